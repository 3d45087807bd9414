// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/passthrough"
)

// What a worker gets is a mount of its own, whose flags hold for it whatever
// it does, and which ".." does not leave.
func TestOpenExport(t *testing.T) {
	if !canNamespace() {
		t.Fatal("run the tests as root: sudo -E go test ./...")
	}
	fstest.Leaks(t)
	e := exportDir(t, "code")
	sub := filepath.Join(e.Dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("sub", sub, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(sub, "below"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		o     Options
		flags int64 // statfs's, of nosuid, nodev and ro
		write error
		below error // of opening what is in the submount
	}{
		{"plain", Options{}, unix.ST_NOSUID | unix.ST_NODEV, nil, unix.ENOENT},
		{"ro", Options{ReadOnly: true}, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_RDONLY, unix.EROFS, unix.ENOENT},
		{"dev", Options{Dev: true}, unix.ST_NOSUID, nil, unix.ENOENT},
		{"follow", Options{Submounts: passthrough.SubmountsFollow}, unix.ST_NOSUID | unix.ST_NODEV, nil, nil},
		{"follow, ro", Options{Submounts: passthrough.SubmountsFollow, ReadOnly: true},
			unix.ST_NOSUID | unix.ST_NODEV | unix.ST_RDONLY, unix.EROFS, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := e
			e.Options = c.o
			f, err := openExport(&e)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			open := func(path string, flags int) (int64, error) {
				fd, err := unix.Openat(int(f.Fd()), path, flags|unix.O_CLOEXEC, 0o644)
				if err != nil {
					return 0, err
				}
				defer unix.Close(fd)
				var st unix.Statfs_t
				if err := unix.Fstatfs(fd, &st); err != nil {
					t.Error(err)
				}
				return st.Flags & (unix.ST_NOSUID | unix.ST_NODEV | unix.ST_RDONLY), nil
			}
			if flags, err := open("hello", unix.O_RDONLY); err != nil || flags != c.flags {
				t.Errorf("flags %#x, %v; want %#x", flags, err, c.flags)
			}
			if _, err := open("new", unix.O_WRONLY|unix.O_CREAT); !errors.Is(err, c.write) {
				t.Errorf("create: %v, want %v", err, c.write)
			}
			if flags, err := open("sub/below", unix.O_RDONLY); !errors.Is(err, c.below) || err == nil && flags != c.flags {
				t.Errorf("submount: %#x, %v; want %#x, %v", flags, err, c.flags, c.below)
			}
			if _, err := open("sub", unix.O_PATH); err != nil {
				t.Errorf("the submount, or the directory under it: %v", err)
			}
			if _, err := open("../"+filepath.Base(e.Dir)+"/hello", unix.O_RDONLY); !errors.Is(err, unix.ENOENT) {
				t.Errorf("..: %v, want it to end at the root", err)
			}
		})
	}
	for _, dir := range []string{filepath.Join(e.Dir, "none"), filepath.Join(e.Dir, "hello")} {
		gone := e
		gone.Dir = dir
		if f, err := openExport(&gone); err == nil {
			f.Close()
			t.Errorf("opened %s", dir)
		}
	}
}

// A tree that is followed has the mounts that there were, without those that are gone.
func TestOpenExportLater(t *testing.T) {
	if !canNamespace() {
		t.Fatal("run the tests as root: sudo -E go test ./...")
	}
	fstest.Leaks(t)
	e := exportDir(t, "code", "submounts=follow")
	mount := func(dir string) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("sub", dir, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mount(e.Dir)
	if err := unix.Mount("", e.Dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	before, later := filepath.Join(e.Dir, "before"), filepath.Join(e.Dir, "later")
	mount(before)
	f, err := openExport(&e)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mount(later)
	is := func(name string) bool {
		t.Helper()
		var root, st unix.Statx_t
		for path, st := range map[string]*unix.Statx_t{".": &root, name: &st} {
			if err := unix.Statx(int(f.Fd()), path, 0, unix.STATX_MNT_ID, st); err != nil {
				t.Fatal(err)
			}
		}
		return st.Mnt_id != root.Mnt_id
	}
	if !is("before") {
		t.Error("what was mounted before is missing")
	}
	if is("later") {
		t.Error("what is mounted later appears: correct README.md")
	}
	if err := unix.Unmount(before, 0); err != nil {
		t.Fatal(err)
	}
	if is("before") {
		t.Error("what is unmounted stays")
	}
}
