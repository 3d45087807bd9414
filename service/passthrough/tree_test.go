// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func bind(t testing.TB, from, to string) {
	t.Helper()
	must(t, unix.Mount(from, to, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(to, 0)) })
}

// list is the tree below dir, as paths with the contents of files.
func list(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name := strings.TrimPrefix(p, dir+"/")
		if !d.Type().IsRegular() {
			all[name] = d.Type().String()
			return nil
		}
		b, err := os.ReadFile(p)
		all[name] = string(b)
		return err
	}))
	return all
}

func TestSubmounts(t *testing.T) {
	for name, c := range map[string]struct {
		policy SubmountPolicy
		want   map[string]string
	}{
		"hidden":   {SubmountsHide, map[string]string{"f": "root"}},
		"followed": {SubmountsFollow, map[string]string{"f": "root", "sub": "d---------", "sub/f": "sub"}},
	} {
		t.Run(name, func(t *testing.T) {
			fstest.Leaks(t)
			dir, sub := tmpfs(t), tmpfs(t)
			must(t, os.WriteFile(dir+"/f", []byte("root"), 0o644))
			must(t, os.WriteFile(sub+"/f", []byte("sub"), 0o644))
			must(t, os.Mkdir(dir+"/sub", 0o755))
			bind(t, sub, dir+"/sub")
			mnt := mount(t, dir, Config{Submounts: c.policy})
			got := list(t, mnt)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if c.policy == SubmountsHide {
				if err := os.Mkdir(mnt+"/sub/x", 0o755); !errors.Is(err, unix.ENOENT) {
					t.Errorf("mkdir below the hidden mount: %v", err)
				}
				return
			}
			// Both file systems count their inodes from the same number.
			seen := map[uint64]string{}
			for _, p := range []string{"", "/f", "/sub", "/sub/f"} {
				var st unix.Stat_t
				must(t, unix.Stat(mnt+p, &st))
				if o, ok := seen[st.Ino]; ok {
					t.Errorf("%q and %q both are inode %d", o, p, st.Ino)
				}
				seen[st.Ino] = p
			}
			if err := os.Rename(mnt+"/f", mnt+"/sub/g"); !errors.Is(err, unix.EXDEV) {
				t.Errorf("rename to another mount: %v", err)
			}
		})
	}
}

// The host changes what the guest knows.
func TestStale(t *testing.T) {
	g := newGuest(t, nil)
	getattr := body(fuse.GetattrIn{})
	open := body(fuse.OpenIn{})

	g.write0("known", "x", 0o644)
	known := g.lookup(1, "known").NodeID
	must(t, os.Remove(g.host("known")))
	g.want(unix.ESTALE, g.call(fuse.OpGetattr, known, getattr))
	g.want(unix.ESTALE, g.call(fuse.OpOpen, known, open))

	// Its place is taken.
	g.write0("known", "another", 0o644)
	g.want(unix.ESTALE, g.call(fuse.OpOpen, known, open))
	if n := g.lookup(1, "known").NodeID; n == known {
		t.Error("another inode has the same node id")
	}

	// With a descriptor of ours: it was opened before.
	g.write0("used", "x", 0o644)
	used := g.lookup(1, "used").NodeID
	g.release(used, g.open(used, unix.O_RDONLY))
	must(t, os.Remove(g.host("used")))
	g.want(unix.ESTALE, g.call(fuse.OpOpen, used, open))

	// What the guest holds open it keeps, and may open again.
	g.write0("open", "content", 0o644)
	n := g.lookup(1, "open").NodeID
	fh := g.open(n, unix.O_RDONLY)
	must(t, os.Remove(g.host("open")))
	a := g.call(fuse.OpRead, n, body(fuse.ReadIn{Fh: fh, Size: 100}))
	if g.want(0, a); string(a.body) != "content" {
		t.Errorf("read %q", a.body)
	}
	g.release(n, g.open(n, unix.O_RDONLY))
	g.release(n, fh)

	// A directory that has moved is found by its new name only.
	must(t, os.MkdirAll(g.host("a/d"), 0o755))
	d := g.lookup(g.lookup(1, "a").NodeID, "d").NodeID
	must(t, os.Rename(g.host("a/d"), g.host("e")))
	g.want(unix.ESTALE, g.call(fuse.OpLookup, d, body("x")))
	if g.lookup(1, "e").NodeID != d {
		t.Error("a directory that moved has another node id")
	}
	g.want(unix.ENOENT, g.call(fuse.OpLookup, d, body("x")))
}

// Few descriptors, many nodes: they are closed and opened again, by file handle and by name.
func TestFewDescriptors(t *testing.T) {
	for name, byHandle := range map[string]bool{"by handle": true, "by name": false} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, func(c *Config) { c.Limits = &Limits{Descriptors: 48} })
			if byHandle && !g.fs.byHandle {
				fmt.Println("NOT RUN: few descriptors, by handle: needs CAP_DAC_READ_SEARCH and a file system with file handles")
				t.Skip()
			}
			g.fs.byHandle = byHandle
			node := uint64(1)
			path := ""
			nodes := map[string]uint64{}
			for i := range 100 { // deeper than there are descriptors
				path = filepath.Join(path, fmt.Sprint("d", i))
				must(t, os.Mkdir(g.host(path), 0o755))
				g.write0(path+"/f", path, 0o644)
				node = g.lookup(node, fmt.Sprint("d", i)).NodeID
				nodes[path] = g.lookup(node, "f").NodeID
			}
			var held []uint64
			for range 2 {
				for path, n := range nodes {
					fh := g.open(n, unix.O_RDONLY)
					a := g.call(fuse.OpRead, n, body(fuse.ReadIn{Fh: fh, Size: 4096}))
					if g.want(0, a); string(a.body) != path {
						t.Fatalf("%s: read %q", path, a.body)
					}
					g.release(n, fh)
				}
			}
			for len(held) < 20 {
				held = append(held, g.open(nodes["d0"], unix.O_RDONLY))
			}
			if s := g.fs.Stats(); s.Paths+s.Files > 48 {
				t.Errorf("%+v with a limit of 48", s)
			}
			for _, fh := range held {
				g.release(nodes["d0"], fh)
			}
			g.serving()
		})
	}
}

// A tree that goes on the mount as the layers of overlayfs.
func TestOverlay(t *testing.T) {
	fstest.Leaks(t)
	// Not a tmpfs below: overlayfs wants what is upper to have extended attributes in trusted., and files without names.
	mnt := mount(t, t.TempDir(), Config{RootAs: RootTrust, Dev: true, Suid: true})
	for _, d := range []string{"lower/dir", "upper", "work"} {
		must(t, os.MkdirAll(filepath.Join(mnt, d), 0o755))
	}
	for _, f := range []string{"kept", "changed", "removed", "renamed", "dir/removed", "dir/kept"} {
		must(t, os.WriteFile(filepath.Join(mnt, "lower", f), []byte("lower "+f), 0o644))
	}
	merged := t.TempDir()
	must(t, unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", mnt)))
	t.Cleanup(func() { must(t, unix.Unmount(merged, 0)) })
	in := func(p string) string { return filepath.Join(merged, p) }

	f, err := os.OpenFile(in("changed"), os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	_, err = f.WriteString(", changed")
	must(t, err)
	must(t, f.Close())
	must(t, os.Remove(in("removed")))
	must(t, os.Rename(in("renamed"), in("new")))
	must(t, os.RemoveAll(in("dir")))
	must(t, os.Mkdir(in("dir"), 0o755)) // opaque
	must(t, os.WriteFile(in("dir/new"), []byte("n"), 0o644))

	want := map[string]string{
		"kept": "lower kept", "changed": "lower changed, changed", "new": "lower renamed", "dir": "d---------", "dir/new": "n",
	}
	if diff := cmp.Diff(want, list(t, merged)); diff != "" {
		t.Error(diff)
	}
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(mnt, "upper/removed"), &st))
	if st.Mode != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the whiteout is mode %o, device %d", st.Mode, st.Rdev)
	}
}

// A server that is an ordinary user, with few descriptors: no file handles, no owners but himself.
func TestUnprivileged(t *testing.T) {
	fstest.Leaks(t)
	dir := tmpfs(t)
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Chown(dir, 65534, 65534))
	mnt := mountAs(t, dir, Config{Limits: &Limits{Descriptors: 40}}, &syscall.Credential{Uid: 65534, Gid: 65534})
	want := map[string]string{}
	p := ""
	for i := range 60 {
		p = filepath.Join(p, fmt.Sprint("d", i))
		must(t, os.Mkdir(filepath.Join(mnt, p), 0o755))
		must(t, os.WriteFile(filepath.Join(mnt, p, "f"), []byte(p), 0o600))
		want[p], want[p+"/f"] = "d---------", p
	}
	if diff := cmp.Diff(want, list(t, mnt)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want, list(t, dir)); diff != "" {
		t.Error(diff)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dir, p, "f"), &st))
	if st.Uid != 65534 || st.Mode != unix.S_IFREG|0o600 {
		t.Errorf("a new file has owner %d, mode %o", st.Uid, st.Mode)
	}

	f, err := os.OpenFile(mnt+"/d0/f", os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	must(t, os.Rename(mnt+"/d0/d1", mnt+"/moved"))
	must(t, os.WriteFile(mnt+"/moved/d2/f", []byte("new"), 0))
	must(t, os.Remove(mnt+"/d0/f"))
	if _, err := f.WriteString("removed"); err != nil {
		t.Error(err)
	}
	must(t, f.Truncate(3))
	must(t, f.Chmod(0o640))
	fi, err := f.Stat()
	must(t, err)
	if fi.Size() != 3 || fi.Mode() != 0o640 {
		t.Errorf("the removed file: %d bytes, mode %v", fi.Size(), fi.Mode())
	}
	must(t, os.Link(mnt+"/moved/f", mnt+"/link"))
	must(t, os.Remove(mnt+"/moved/f"))
	if b, err := os.ReadFile(mnt + "/link"); string(b) != "d0/d1" {
		t.Errorf("the link: %q, %v", b, err)
	}
}
