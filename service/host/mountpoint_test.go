// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// A guest does not take away, nor move, what the host has mounted in an export, be it from before the guest's mount or
// from after it.
func TestMountPointsStay(t *testing.T) {
	if !canNamespace() {
		t.Fatal("run the tests as root: sudo -E go test ./...")
	}
	tmpfs := func(dir string) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	base := t.TempDir()
	tmpfs(base)
	// As systemd has all mounts.
	if err := unix.Mount("", base, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	tmpfs(filepath.Join(base, "before"))
	for _, dir := range []string{"after", "free", "gone"} {
		if err := os.Mkdir(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tmpfs(filepath.Join(base, "gone"))
	e, err := ParseExport("code=" + base)
	if err != nil {
		t.Fatal(err)
	}
	h := startHost(t, Config{Exports: []Export{e}})
	f, _ := newGuest(t, h.addr, 1).connect().mount("code")
	tmpfs(filepath.Join(base, "after"))
	// Nor does a worker keep a mount from being taken away by the host.
	if err := unix.Unmount(filepath.Join(base, "gone"), 0); err != nil {
		t.Errorf("umount by the host: %v", err)
	}

	name := func(s string) []byte { return append([]byte(s), 0) }
	for _, c := range []struct {
		what string
		op   fuse.Opcode
		body []byte
		want unix.Errno
	}{
		{"rmdir before", fuse.OpRmdir, name("before"), unix.EBUSY},
		{"rmdir after", fuse.OpRmdir, name("after"), unix.EBUSY},
		{"rename before", fuse.OpRename, bytes.Join([][]byte{fuse.Append(nil, &fuse.RenameIn{Newdir: 1}), name("before"), name("x")}, nil), unix.EBUSY},
		{"rename onto after", fuse.OpRename, bytes.Join([][]byte{fuse.Append(nil, &fuse.RenameIn{Newdir: 1}), name("free"), name("after")}, nil), unix.EBUSY},
		{"rmdir of none", fuse.OpRmdir, name("gone"), 0},
	} {
		if _, errno, err := f.call(c.op, 1, c.body); errno != c.want || err != nil {
			t.Errorf("%s: %v, %v; want %v", c.what, errno, err, c.want)
		}
	}
	var root unix.Stat_t
	if err := unix.Stat(base, &root); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"before", "after"} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(base, dir), &st); err != nil || st.Dev == root.Dev {
			t.Errorf("%s is no longer mounted: %v", dir, err)
		}
	}
}
