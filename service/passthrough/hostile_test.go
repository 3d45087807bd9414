// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// The guest's root is hostile: it says to the host's server whatever it wants. Each test ends with a session that serves on,
// and with nothing changed or read outside of the export.

const secret = "not for guests"

// outside is a directory beside the export with a file "secret"; the test fails if anything in it has changed at the end.
func outside(g *guest) string {
	g.t.Helper()
	dir := filepath.Join(filepath.Dir(g.dir), "outside")
	if err := os.Mkdir(dir, 0o777); err != nil {
		g.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte(secret), 0o644); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		b, err := os.ReadFile(filepath.Join(dir, "secret"))
		if err != nil || string(b) != secret {
			g.t.Errorf("outside/secret: %q, %v", b, err)
		}
		if l, err := os.ReadDir(dir); err != nil || len(l) != 1 {
			g.t.Errorf("outside has now %v, %v", l, err)
		}
	})
	return dir
}

func TestHostileNames(t *testing.T) {
	g := newGuest(t, nil)
	out := outside(g)
	g.write0("file", "x", 0o644)
	file := g.lookup(1, "file")

	names := []struct {
		name  string
		errno fuse.Errno
	}{
		{"", unix.EINVAL}, {".", unix.EINVAL}, {"..", unix.EINVAL}, {"/", unix.EINVAL}, {"../outside", unix.EINVAL},
		{"../outside/secret", unix.EINVAL}, {out + "/secret", unix.EINVAL}, {"a/b", unix.EINVAL}, {"a/", unix.EINVAL}, {"//", unix.EINVAL},
		{strings.Repeat("n", 256), unix.ENAMETOOLONG}, {strings.Repeat("../", 300), unix.ENAMETOOLONG},
	}
	// The operations that take a name, with a good one in the place of the other, if they take two.
	for op, build := range map[string]func(name []byte) (fuse.Opcode, []byte){
		"LOOKUP": func(n []byte) (fuse.Opcode, []byte) { return fuse.OpLookup, n },
		"MKDIR":  func(n []byte) (fuse.Opcode, []byte) { return fuse.OpMkdir, body(fuse.MkdirIn{Mode: 0o755}, n) },
		"MKNOD": func(n []byte) (fuse.Opcode, []byte) {
			return fuse.OpMknod, body(fuse.MknodIn{Mode: unix.S_IFREG | 0o644}, n)
		},
		"SYMLINK": func(n []byte) (fuse.Opcode, []byte) { return fuse.OpSymlink, body(n, "target") },
		"UNLINK":  func(n []byte) (fuse.Opcode, []byte) { return fuse.OpUnlink, n },
		"RMDIR":   func(n []byte) (fuse.Opcode, []byte) { return fuse.OpRmdir, n },
		"CREATE": func(n []byte) (fuse.Opcode, []byte) {
			return fuse.OpCreate, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: unix.S_IFREG | 0o644}, n)
		},
		"LINK":            func(n []byte) (fuse.Opcode, []byte) { return fuse.OpLink, body(fuse.LinkIn{Oldnodeid: file.NodeID}, n) },
		"RENAME, the old": func(n []byte) (fuse.Opcode, []byte) { return fuse.OpRename, body(fuse.RenameIn{Newdir: 1}, n, "new") },
		"RENAME, the new": func(n []byte) (fuse.Opcode, []byte) { return fuse.OpRename, body(fuse.RenameIn{Newdir: 1}, "file", n) },
		"RENAME2, the old": func(n []byte) (fuse.Opcode, []byte) {
			return fuse.OpRename2, body(fuse.Rename2In{Newdir: 1, Flags: unix.RENAME_EXCHANGE}, n, "file")
		},
		"RENAME2, the new": func(n []byte) (fuse.Opcode, []byte) {
			return fuse.OpRename2, body(fuse.Rename2In{Newdir: 1, Flags: unix.RENAME_EXCHANGE}, "file", n)
		},
	} {
		t.Run(op, func(t *testing.T) {
			for _, n := range names {
				code, b := build(body(n.name))
				if a := g.call(code, 1, b); a.errno != n.errno {
					t.Errorf("%.30q: %v, want %v", n.name, a.errno, n.errno)
				}
			}
			// A name that is not ended, and none at all.
			for _, n := range [][]byte{[]byte("file"), nil} {
				code, b := build(n)
				if strings.HasSuffix(op, "the old") || op == "SYMLINK" {
					continue // what follows ends it
				}
				if a := g.call(code, 1, b); a.errno != unix.EINVAL {
					t.Errorf("%q without NUL: %v", n, a.errno)
				}
			}
			// What follows a NUL is no part of the name, and reaches nothing.
			code, b := build([]byte("none\x00../outside/secret\x00"))
			g.call(code, 1, b)
			g.serving()
		})
	}
	// In a file, and in a node that is not there.
	g.want(unix.ENOTDIR, g.call(fuse.OpLookup, file.NodeID, body("x")))
	g.want(unix.ESTALE, g.call(fuse.OpLookup, 1<<40, body("x")))
	g.serving()
}

// TestHostileSymlinks: a link is text for the guest to read. Nothing goes through it here.
func TestHostileSymlinks(t *testing.T) {
	g := newGuest(t, nil)
	dir := outside(g)
	g.want(0, g.call(fuse.OpSymlink, 1, body("link", dir)))
	g.want(0, g.call(fuse.OpSymlink, 1, body("file", dir+"/secret")))
	for _, name := range []string{"link", "file"} {
		e := g.lookup(1, name)
		if e.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Fatalf("%s has mode %o", name, e.Attr.Mode)
		}
		g.want(unix.ENOTDIR, g.call(fuse.OpLookup, e.NodeID, body("secret")))
		g.want(unix.ENOTDIR, g.call(fuse.OpUnlink, e.NodeID, body("secret")))
		g.want(unix.ENOTDIR, g.call(fuse.OpCreate, e.NodeID, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "planted")))
		g.want(unix.ELOOP, g.call(fuse.OpOpen, e.NodeID, body(fuse.OpenIn{Flags: unix.O_RDWR | unix.O_TRUNC})))
		g.want(unix.ENOTDIR, g.call(fuse.OpOpendir, e.NodeID, body(fuse.OpenIn{})))
		// What changes an inode changes the link's own.
		g.want(unix.EINVAL, g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_SIZE})))
		g.want(unix.EOPNOTSUPP, g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: 0o777})))
		g.want(0, g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_MTIME, Mtime: 1})))
		a := g.call(fuse.OpSetxattr, e.NodeID, body(fuse.SetxattrIn{Size: 1}, "user.x", []byte("1")))
		if a.errno == 0 {
			t.Error("user.x of a symbolic link was set: of what?")
		}
		g.want(0, g.call(fuse.OpLink, 1, body(fuse.LinkIn{Oldnodeid: e.NodeID}, "hard-"+name)))
		if g.stat("hard-"+name).Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Error("LINK followed the link")
		}
	}
	// CREATE of the link's name opens what the link leads to in the guest, not here.
	g.want(unix.ELOOP, g.call(fuse.OpCreate, 1, body(fuse.CreateIn{Flags: unix.O_RDWR | unix.O_TRUNC, Mode: 0o644}, "file")))
	for _, f := range []string{"secret"} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, f), &st); err != nil || st.Mtim.Sec == 1 || st.Nlink != 1 {
			t.Errorf("%s was touched: %+v, %v", f, st, err)
		}
	}
	g.serving()
}

// TestHostileExchange: somebody exchanges a directory and a symbolic link that leads out, all the time, while we resolve.
func TestHostileExchange(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*FS)
		limits *Limits
	}{
		{"with descriptors", nil, nil},
		{"by file handle", nil, &Limits{Descriptors: 40}},
		{"by name", func(fs *FS) { fs.byHandle = false }, &Limits{Descriptors: 40}},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t, func(cfg *Config) { cfg.Limits = c.limits })
			if c.change != nil {
				c.change(g.fs)
			}
			out := outside(g)
			if err := errors.Join(os.Mkdir(g.host("dir"), 0o755), os.WriteFile(g.host("dir/secret"), []byte("ours"), 0o644),
				os.Symlink(out, g.host("link"))); err != nil {
				t.Fatal(err)
			}
			for i := range 60 { // to make room for each other
				g.write0(fmt.Sprint("f", i), "", 0o644)
			}
			stop := make(chan struct{})
			var wg sync.WaitGroup
			defer wg.Wait()
			defer close(stop)
			wg.Go(func() {
				dir, link := g.host("dir"), g.host("link")
				for {
					select {
					case <-stop:
						return
					default:
						if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
							t.Error(err)
							return
						}
						runtime.Gosched()
					}
				}
			})
			read := 0
			for i := range 1000 {
				a := g.call(fuse.OpLookup, 1, body("dir"))
				if a.errno != 0 {
					if a.errno != unix.ESTALE && a.errno != unix.ENOENT {
						t.Fatalf("LOOKUP dir: %v", a.errno)
					}
					continue
				}
				var e fuse.EntryOut
				fuse.Decode(&e, a.body)
				g.call(fuse.OpLookup, 1, body(fmt.Sprint("f", i%60)))
				g.call(fuse.OpMkdir, e.NodeID, body(fuse.MkdirIn{Mode: 0o755}, "planted"))
				g.call(fuse.OpRmdir, e.NodeID, body("planted"))
				if a := g.call(fuse.OpLookup, e.NodeID, body("secret")); a.errno == 0 {
					var s fuse.EntryOut
					fuse.Decode(&s, a.body)
					if a := g.call(fuse.OpOpen, s.NodeID, body(fuse.OpenIn{})); a.errno == 0 {
						var o fuse.OpenOut
						fuse.Decode(&o, a.body)
						b := g.want(0, g.call(fuse.OpRead, s.NodeID, body(fuse.ReadIn{Fh: o.Fh, Size: 100}))).body
						if string(b) != "ours" {
							t.Fatalf("read %q", b)
						}
						read++
						g.release(s.NodeID, o.Fh)
					}
				}
			}
			if read == 0 {
				t.Error("never read the file: the attack was not tried")
			}
			g.serving()
		})
	}
}

// TestHostileNumbers: node ids and handles that were never given, or belong to another, on every opcode.
func TestHostileNumbers(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "aaaa", 0o644)
	g.write0("b", "bbbb", 0o644)
	a, b := g.lookup(1, "a"), g.lookup(1, "b")
	fhA := g.open(a.NodeID, unix.O_RDWR)
	zeros := make([]byte, 256)
	for op := fuse.Opcode(1); op < fuse.OpMax+10; op++ {
		if op == fuse.OpInit || op == fuse.OpDestroy || op.NoReply() {
			continue
		}
		for _, node := range []uint64{0, 12345, math.MaxUint64, 1 << 63} {
			// As zeros, and with what takes a name naming something.
			for _, b := range [][]byte{zeros, append(zeros[:16:16], "a\x00b\x00"...), body("a")} {
				if r := g.call(op, node, b); r.errno == 0 {
					t.Errorf("%v of node %d with %d bytes succeeded", op, node, len(b))
				}
			}
		}
	}
	// A handle of a, used with the node b; and one that is not there.
	lk := fuse.FileLock{End: math.MaxInt64, Type: unix.F_WRLCK}
	for _, fh := range []uint64{fhA, 0, 999, math.MaxUint64} {
		for op, req := range map[fuse.Opcode][]byte{
			fuse.OpRead: body(fuse.ReadIn{Fh: fh, Size: 4}), fuse.OpWrite: body(fuse.WriteIn{Fh: fh, Size: 1}, []byte("x")),
			fuse.OpFlush: body(fuse.FlushIn{Fh: fh}), fuse.OpRelease: body(fuse.ReleaseIn{Fh: fh}), fuse.OpFsync: body(fuse.FsyncIn{Fh: fh}),
			fuse.OpSetattr: body(fuse.SetattrIn{Valid: fuse.FATTR_SIZE | fuse.FATTR_FH, Fh: fh}),
			fuse.OpGetlk:   body(fuse.LkIn{Fh: fh, Lk: lk}), fuse.OpSetlk: body(fuse.LkIn{Fh: fh, Lk: lk}), fuse.OpSetlkw: body(fuse.LkIn{Fh: fh, Lk: lk}),
			fuse.OpFallocate: body(fuse.FallocateIn{Fh: fh, Length: 1}), fuse.OpLseek: body(fuse.LseekIn{Fh: fh, Whence: unix.SEEK_DATA}),
			fuse.OpReaddir: body(fuse.ReadIn{Fh: fh, Size: 4096}), fuse.OpReaddirplus: body(fuse.ReadIn{Fh: fh, Size: 4096}),
			fuse.OpReleasedir: body(fuse.ReleaseIn{Fh: fh}), fuse.OpFsyncdir: body(fuse.FsyncIn{Fh: fh}),
			fuse.OpIoctl:           body(fuse.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_GETFLAGS, OutSize: 4}),
			fuse.OpCopyFileRange:   body(fuse.CopyFileRangeIn{FhIn: fh, NodeidOut: b.NodeID, FhOut: fh, Len: 1}),
			fuse.OpCopyFileRange64: body(fuse.CopyFileRangeIn{FhIn: fh, NodeidOut: a.NodeID, FhOut: fhA, Len: 1}),
		} {
			if r := g.call(op, b.NodeID, req); r.errno != unix.EBADF {
				t.Errorf("%v of b with handle %d: %v", op, fh, r.errno)
			}
		}
	}
	g.want(unix.EBADF, g.call(fuse.OpCopyFileRange, a.NodeID, body(fuse.CopyFileRangeIn{FhIn: fhA, NodeidOut: b.NodeID, FhOut: fhA, Len: 1})))
	// File operations on a directory's handle, and the other way round.
	d, _ := out[fuse.OpenOut](g, g.call(fuse.OpOpendir, 1, body(fuse.OpenIn{})))
	for op, req := range map[fuse.Opcode][]byte{
		fuse.OpRead: body(fuse.ReadIn{Fh: d.Fh, Size: 4}), fuse.OpWrite: body(fuse.WriteIn{Fh: d.Fh, Size: 1}, []byte("x")),
		fuse.OpSetlk: body(fuse.LkIn{Fh: d.Fh, Lk: lk}), fuse.OpLseek: body(fuse.LseekIn{Fh: d.Fh, Whence: unix.SEEK_DATA}),
		fuse.OpFallocate: body(fuse.FallocateIn{Fh: d.Fh, Length: 1}),
	} {
		if r := g.call(op, 1, req); r.errno == 0 {
			t.Errorf("%v of a directory succeeded", op)
		}
	}
	g.want(unix.ENOTDIR, g.call(fuse.OpReaddir, a.NodeID, body(fuse.ReadIn{Fh: fhA, Size: 4096})))
	g.release(a.NodeID, fhA)
	g.want(unix.EBADF, g.call(fuse.OpRelease, a.NodeID, body(fuse.ReleaseIn{Fh: fhA})))
	g.serving()
}

func TestHostileForget(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "aaaa", 0o644)
	a := g.lookup(1, "a")
	fh := g.open(a.NodeID, unix.O_RDONLY)

	g.send(fuse.OpForget, 1, body(fuse.ForgetIn{Nlookup: math.MaxUint64}))
	g.send(fuse.OpForget, 1, body(fuse.ForgetIn{Nlookup: 1}))
	g.send(fuse.OpForget, 999, body(fuse.ForgetIn{Nlookup: 1}))
	g.send(fuse.OpForget, a.NodeID, body(fuse.ForgetIn{Nlookup: math.MaxUint64}))
	g.send(fuse.OpForget, a.NodeID, body(fuse.ForgetIn{Nlookup: 5}))
	g.send(fuse.OpForget, a.NodeID, nil)
	// The count says more than is there, and less.
	one := fuse.ForgetOne{NodeID: a.NodeID, Nlookup: 1}
	g.send(fuse.OpBatchForget, 0, body(fuse.BatchForgetIn{Count: math.MaxUint32}, one))
	g.send(fuse.OpBatchForget, 0, body(fuse.BatchForgetIn{Count: math.MaxUint32}))
	g.send(fuse.OpBatchForget, 0, body(fuse.BatchForgetIn{Count: 0}, one, one))
	g.send(fuse.OpBatchForget, 0, body(fuse.BatchForgetIn{Count: 2}, fuse.ForgetOne{NodeID: 1, Nlookup: 1 << 60}, fuse.ForgetOne{NodeID: 7777, Nlookup: 1}))
	g.send(fuse.OpBatchForget, 0, []byte{1, 2, 3})
	g.serving()
	// What is open stays open.
	if b := g.want(0, g.call(fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: 10}))).body; string(b) != "aaaa" {
		t.Errorf("read %q", b)
	}
	g.release(a.NodeID, fh)
	g.want(unix.ESTALE, g.call(fuse.OpGetattr, a.NodeID, body(fuse.GetattrIn{})))
	if again := g.lookup(1, "a"); again.NodeID == a.NodeID {
		t.Errorf("node id %d was given again with the same generation", a.NodeID)
	}
	if s := g.fs.Stats(); s.Nodes != 2 {
		t.Errorf("%d nodes, want the root and a", s.Nodes)
	}
	g.serving()
}

// TestHostileLengths: bodies that are shorter or longer than they say.
func TestHostileLengths(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "aaaa", 0o644)
	a := g.lookup(1, "a")
	fh := g.open(a.NodeID, unix.O_RDWR)
	d, _ := out[fuse.OpenOut](g, g.call(fuse.OpOpendir, 1, body(fuse.OpenIn{})))

	// Every opcode with every length that is too short for what it begins with.
	for op := fuse.Opcode(1); op < fuse.OpMax; op++ {
		if op == fuse.OpInit || op == fuse.OpDestroy || op.NoReply() {
			continue
		}
		for n := range 8 {
			r := g.call(op, a.NodeID, make([]byte, n))
			switch op {
			case fuse.OpStatfs, fuse.OpReadlink, fuse.OpSyncfs: // which need no body
			default:
				if r.errno == 0 {
					t.Errorf("%v with %d bytes succeeded", op, n)
				}
			}
		}
	}
	for _, c := range []struct {
		name string
		op   fuse.Opcode
		node uint64
		body []byte
		want fuse.Errno
	}{
		{"WRITE says more", fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Size: 1 << 20}, []byte("x")), unix.EINVAL},
		{"WRITE says 4 GiB", fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Size: math.MaxUint32}, []byte("x")), unix.EINVAL},
		{"WRITE says less", fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Size: 1}, []byte("xx")), unix.EINVAL},
		{"WRITE beyond all files", fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Offset: math.MaxUint64, Size: 1}, []byte("x")), unix.EINVAL},
		{"WRITE at the end of all files", fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Offset: math.MaxInt64, Size: 1}, []byte("x")), unix.EINVAL},
		{"SETXATTR says more", fuse.OpSetxattr, a.NodeID, body(fuse.SetxattrIn{Size: 9}, "user.x", []byte("x")), unix.EINVAL},
		{"SETXATTR says 4 GiB", fuse.OpSetxattr, a.NodeID, body(fuse.SetxattrIn{Size: math.MaxUint32}, "user.x", []byte("x")), unix.EINVAL},
		{"SETXATTR says less", fuse.OpSetxattr, a.NodeID, body(fuse.SetxattrIn{Size: 0}, "user.x", []byte("x")), unix.EINVAL},
		{"SETXATTR of too much", fuse.OpSetxattr, a.NodeID, body(fuse.SetxattrIn{Size: 1<<16 + 1}, "user.x", make([]byte, 1<<16+1)), unix.E2BIG},
		{"SETXATTR without a name", fuse.OpSetxattr, a.NodeID, body(fuse.SetxattrIn{Size: 1}, []byte("x")), unix.EINVAL},
		{"GETXATTR of an empty name", fuse.OpGetxattr, a.NodeID, body(fuse.GetxattrIn{Size: 100}, ""), unix.ERANGE},
		{"GETXATTR of a long name", fuse.OpGetxattr, a.NodeID, body(fuse.GetxattrIn{Size: 100}, "user."+strings.Repeat("x", 1000)), unix.ERANGE},
		{"GETXATTR of 4 GiB", fuse.OpGetxattr, a.NodeID, body(fuse.GetxattrIn{Size: math.MaxUint32}, "user.none"), unix.ENODATA},
		{"LISTXATTR of 4 GiB", fuse.OpListxattr, a.NodeID, body(fuse.GetxattrIn{Size: math.MaxUint32}), 0},
		{"READ of 4 GiB", fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: math.MaxUint32}), unix.EINVAL},
		{"READ beyond all files", fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Offset: math.MaxUint64, Size: 1}), unix.EINVAL},
		{"READDIR of 4 GiB", fuse.OpReaddir, 1, body(fuse.ReadIn{Fh: d.Fh, Size: math.MaxUint32}), unix.EINVAL},
		{"READDIRPLUS of 4 GiB", fuse.OpReaddirplus, 1, body(fuse.ReadIn{Fh: d.Fh, Size: math.MaxUint32}), unix.EINVAL},
		{"READ and more", fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: 1}, []byte("x")), unix.EINVAL},
		{"READ and much more", fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: 1}, make([]byte, maxTransfer)), unix.EINVAL},
		{"READDIR and more", fuse.OpReaddir, 1, body(fuse.ReadIn{Fh: d.Fh, Size: 4096}, []byte("x")), unix.EINVAL},
		{"READDIRPLUS and more", fuse.OpReaddirplus, 1, body(fuse.ReadIn{Fh: d.Fh, Size: 4096}, []byte("x")), unix.EINVAL},
		{"READDIR of 0", fuse.OpReaddir, 1, body(fuse.ReadIn{Fh: d.Fh}), unix.EINVAL},
		{"IOCTL says more", fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_SETFLAGS, InSize: 4}), unix.EINVAL},
		{"IOCTL wants 4 GiB", fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_GETFLAGS, OutSize: math.MaxUint32}), unix.EINVAL},
		{"IOCTL wants nothing", fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_GETFLAGS}), unix.EINVAL},
		{"FALLOCATE of everything", fuse.OpFallocate, a.NodeID, body(fuse.FallocateIn{Fh: fh, Offset: math.MaxUint64, Length: 1}), unix.EINVAL},
		{"FALLOCATE round the end", fuse.OpFallocate, a.NodeID, body(fuse.FallocateIn{Fh: fh, Offset: math.MaxInt64, Length: math.MaxInt64}), unix.EFBIG},
		{"LSEEK far", fuse.OpLseek, a.NodeID, body(fuse.LseekIn{Fh: fh, Offset: math.MaxUint64, Whence: unix.SEEK_DATA}), unix.ENXIO},
		{"LSEEK otherwise", fuse.OpLseek, a.NodeID, body(fuse.LseekIn{Fh: fh, Offset: 1, Whence: unix.SEEK_SET}), unix.EINVAL},
		{"SETATTR of a size below 0", fuse.OpSetattr, a.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_SIZE, Size: math.MaxUint64}), unix.EFBIG},
		{"SETATTR of what is not known", fuse.OpSetattr, a.NodeID, body(fuse.SetattrIn{Valid: 1 << 31}), unix.EINVAL},
		{"SETATTR of a time that is none", fuse.OpSetattr, a.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_MTIME, Mtimensec: math.MaxUint32}), unix.EINVAL},
		{"SETATTR of an owner that is none", fuse.OpSetattr, a.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_UID, UID: noID}), 0},
		{"COPY_FILE_RANGE with flags", fuse.OpCopyFileRange, a.NodeID, body(fuse.CopyFileRangeIn{FhIn: fh, NodeidOut: a.NodeID, FhOut: fh, Len: 1, Flags: 1}), unix.EINVAL},
		{"COPY_FILE_RANGE onto itself", fuse.OpCopyFileRange64, a.NodeID, body(fuse.CopyFileRangeIn{FhIn: fh, NodeidOut: a.NodeID, FhOut: fh, Len: math.MaxUint64}), unix.EINVAL},
		{"SETLK from after to before", fuse.OpSetlk, a.NodeID, body(fuse.LkIn{Fh: fh, Lk: fuse.FileLock{Start: 2, End: 1, Type: unix.F_WRLCK}}), unix.EINVAL},
		{"SETLK of a type that is none", fuse.OpSetlkw, a.NodeID, body(fuse.LkIn{Fh: fh, Lk: fuse.FileLock{End: 1, Type: 77}}), unix.EINVAL},
		{"flock of a type that is none", fuse.OpSetlkw, a.NodeID, body(fuse.LkIn{Fh: fh, LkFlags: fuse.LK_FLOCK, Lk: fuse.FileLock{Type: 77}}), unix.EINVAL},
		{"ACCESS for more than there is", fuse.OpAccess, a.NodeID, body(fuse.AccessIn{Mask: math.MaxUint32}), unix.EINVAL},
		{"RENAME2 with flags", fuse.OpRename2, 1, body(fuse.Rename2In{Newdir: 1, Flags: math.MaxUint32}, "a", "b"), unix.EINVAL},
		{"INIT again", fuse.OpInit, 0, initBody(), unix.EPROTO},
		{"an ioctl that is not for files", fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: unix.TIOCINQ, OutSize: 4}), unix.ENOTTY},
		{"an ioctl that clones", fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: unix.FICLONE, InSize: 4}, []byte{1, 0, 0, 0}), unix.ENOTTY},
		{"an opcode that is none", 4096, 1, nil, unix.ENOSYS},
		{"the greatest opcode", math.MaxUint32, 1, nil, unix.ENOSYS},
	} {
		t.Run(c.name, func(t *testing.T) {
			g.t = t
			g.want(c.want, g.call(c.op, c.node, c.body))
		})
	}
	g.t = t
	const extension = 1 << 18
	msg, unique := g.message(fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: 1}, fuse.ExtHeader{Size: extension, Type: 99}, make([]byte, extension-8)))
	var h fuse.InHeader
	fuse.Decode(&h, msg)
	h.TotalExtlen = extension / 8
	fuse.Put(msg, &h)
	g.write(msg)
	g.want(unix.EINVAL, g.recv(unique)) // READ and a large extension
	if b, err := os.ReadFile(g.host("a")); err != nil || string(b) != "aaaa" {
		t.Errorf("a is now %d bytes, %v", len(b), err)
	}
	if st := g.stat("a"); st.Uid != 0 && os.Getuid() == 0 {
		t.Errorf("a belongs to %d", st.Uid)
	}
	g.serving()
}

// TestHostileExtensions: what follows the body of a create.
func TestHostileExtensions(t *testing.T) {
	g := newGuest(t, nil)
	for i, c := range []struct {
		name string
		ext  []byte
		n    uint16
		want fuse.Errno
	}{
		{"good", body(fuse.ExtHeader{Size: 16, Type: fuse.EXT_GROUPS}, fuse.SuppGroups{NrGroups: 1}, uint32(5)), 2, 0},
		{"more than the body", nil, 1000, unix.EINVAL},
		{"all of the body", nil, 2, unix.EINVAL},
		{"size below the header", body(fuse.ExtHeader{Size: 0, Type: fuse.EXT_GROUPS}, uint64(0)), 2, unix.EINVAL},
		{"size beyond the end", body(fuse.ExtHeader{Size: 1 << 30, Type: fuse.EXT_GROUPS}, uint64(0)), 2, unix.EINVAL},
		{"more groups than bytes", body(fuse.ExtHeader{Size: 16, Type: fuse.EXT_GROUPS}, fuse.SuppGroups{NrGroups: math.MaxUint32}, uint32(5)), 2, unix.EINVAL},
		{"a group that is none", body(fuse.ExtHeader{Size: 16, Type: fuse.EXT_GROUPS}, fuse.SuppGroups{NrGroups: 1}, noID), 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g.t = t
			b := body(fuse.MkdirIn{Mode: 0o755}, fmt.Sprint("d", i), make([]byte, 5), c.ext)
			msg, unique := g.message(fuse.OpMkdir, 1, b)
			var h fuse.InHeader
			fuse.Decode(&h, msg)
			h.TotalExtlen = c.n
			fuse.Put(msg, &h)
			g.write(msg)
			g.want(c.want, g.recv(unique))
		})
	}
	g.t = t
	g.serving()
}

// TestHostileStreams: what cannot be understood ends its stream, with an error, and no other.
func TestHostileStreams(t *testing.T) {
	g := newGuest(t, nil)
	good := g.c
	header := func(length uint32) []byte {
		return body(fuse.InHeader{Len: length, Opcode: fuse.OpGetattr, NodeID: 1, Unique: 2})
	}
	for _, c := range []struct {
		name string
		send []byte
		ok   bool
	}{
		{"nothing", nil, true},
		{"a length of 0", header(0), false},
		{"a length below the header", header(39), false},
		{"4 GiB", header(math.MaxUint32), false},
		{"a byte above the limit", header(maxRequest + 1), false},
		{"an end within a header", header(56)[:20], false},
		{"an end within a body", header(1000), false},
		{"text", []byte("GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: none\r\n\r\n"), false},
		{"requests, then garbage", append(body(fuse.InHeader{Len: 56, Opcode: fuse.OpGetattr, NodeID: 1, Unique: 2}, fuse.GetattrIn{}), header(3)...), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ended := g.dial()
			g.c.SetDeadline(time.Now().Add(20 * time.Second))
			if len(c.send) > 0 {
				if _, err := g.c.Write(c.send); err != nil {
					t.Fatal(err)
				}
			}
			raw, err := g.c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_WR) })
			if _, err := io.Copy(io.Discard, g.c); err != nil {
				t.Errorf("the server left the stream open: %v", err)
			}
			if err := <-ended; (err == nil) != c.ok {
				t.Errorf("Serve: %v", err)
			}
			g.c.Close()
			g.c = good
			g.serving()
		})
	}
}

// TestHostileBeforeInit: nothing is served before INIT.
func TestHostileBeforeInit(t *testing.T) {
	g := newGuest(t, nil)
	g.fs.session.Store(nil)
	for op := fuse.Opcode(1); op < fuse.OpMax; op++ {
		if op == fuse.OpInit || op == fuse.OpDestroy || op.NoReply() {
			continue
		}
		if a := g.call(op, 1, body("a", make([]byte, 200))); a.errno == 0 {
			t.Errorf("%v before INIT succeeded", op)
		}
	}
	for _, in := range []fuse.InitIn{{Major: 6, Minor: 45}, {Major: 7, Minor: 30}} {
		g.want(unix.EPROTO, g.call(fuse.OpInit, 0, body(in)))
	}
	g.want(unix.EINVAL, g.call(fuse.OpInit, 0, []byte{1, 2, 3}))
	g.init()
	g.serving()
}

// TestHostileDevices: device nodes are made only where the export says so, and opened never.
func TestHostileDevices(t *testing.T) {
	needRoot(t)
	for _, dev := range []bool{false, true} {
		t.Run(fmt.Sprint("dev=", dev), func(t *testing.T) {
			g := newGuest(t, func(c *Config) { c.Dev = dev })
			null := fuse.MknodIn{Mode: unix.S_IFCHR | 0o666, Rdev: 1<<8 | 3}
			want := fuse.Errno(unix.EPERM)
			if dev {
				want = 0
			}
			g.want(want, g.call(fuse.OpMknod, 1, body(null, "null")))
			g.want(want, g.call(fuse.OpMknod, 1, body(fuse.MknodIn{Mode: unix.S_IFBLK | 0o666, Rdev: 8 << 8}, "disk")))
			// The whiteout of overlayfs is a device that opens nothing.
			g.want(0, g.call(fuse.OpMknod, 1, body(fuse.MknodIn{Mode: unix.S_IFCHR}, "whiteout")))
			for _, typ := range []uint32{unix.S_IFDIR, unix.S_IFLNK, 0, 0o130000, unix.S_IFMT} {
				g.want(unix.EINVAL, g.call(fuse.OpMknod, 1, body(fuse.MknodIn{Mode: typ | 0o666}, "odd")))
			}
			if err := errors.Join(unix.Mknod(g.host("zero"), unix.S_IFCHR|0o666, 1<<8|5), unix.Mkfifo(g.host("fifo"), 0o666)); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"zero", "fifo", "whiteout"} {
				e := g.lookup(1, name)
				for _, flags := range []uint32{unix.O_RDONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC} {
					g.want(unix.ENXIO, g.call(fuse.OpOpen, e.NodeID, body(fuse.OpenIn{Flags: flags})))
					g.want(unix.ENXIO, g.call(fuse.OpCreate, 1, body(fuse.CreateIn{Flags: flags, Mode: 0o644}, name)))
				}
				g.want(unix.ENOTDIR, g.call(fuse.OpOpendir, e.NodeID, body(fuse.OpenIn{})))
				g.want(unix.EINVAL, g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_SIZE})))
			}
			g.serving()
		})
	}
}

// TestHostileSetID: a guest cannot leave a program on the host that runs as another user.
func TestHostileSetID(t *testing.T) {
	needRoot(t)
	const both = unix.S_ISUID | unix.S_ISGID
	for _, suid := range []bool{false, true} {
		t.Run(fmt.Sprint("suid=", suid), func(t *testing.T) {
			g := newGuest(t, func(c *Config) { c.Suid = suid })
			mode := func(name string, want uint32) {
				t.Helper()
				if !suid {
					want &^= both
				}
				if got := g.stat(name).Mode & 0o7777; got != want {
					t.Errorf("%s has mode %o, want %o", name, got, want)
				}
			}
			_, fh := g.create(1, "created", both|0o755)
			_ = fh
			mode("created", both|0o755)
			g.want(0, g.call(fuse.OpMknod, 1, body(fuse.MknodIn{Mode: unix.S_IFREG | both | 0o755}, "made")))
			mode("made", both|0o755)
			g.write0("changed", "", 0o644)
			e := g.lookup(1, "changed")
			g.want(0, g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: unix.S_IFREG | both | 0o755})))
			mode("changed", both|0o755)
			tmp, rest := out[fuse.EntryOut](g, g.call(fuse.OpTmpfile, 1, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: unix.S_IFREG | both | 0o755}, "/")))
			_ = rest
			g.want(0, g.call(fuse.OpLink, 1, body(fuse.LinkIn{Oldnodeid: tmp.NodeID}, "linked")))
			mode("linked", both|0o755)

			// On a directory, set-group-id only gives files their group.
			g.want(0, g.call(fuse.OpMkdir, 1, body(fuse.MkdirIn{Mode: 0o755}, "dir")))
			d := g.lookup(1, "dir")
			g.want(0, g.call(fuse.OpSetattr, d.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: unix.S_IFDIR | both | 0o755})))
			if got := g.stat("dir").Mode & 0o7777; got != unix.S_ISGID|0o755 {
				t.Errorf("dir has mode %o", got)
			}

			caps := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} // VFS_CAP_REVISION_2, permitted CAP_NET_RAW
			want := fuse.Errno(unix.EPERM)
			if suid {
				want = 0
			}
			g.want(want, g.call(fuse.OpSetxattr, e.NodeID, body(fuse.SetxattrIn{Size: uint32(len(caps))}, capability, caps)))
			if _, err := unix.Getxattr(g.host("changed"), capability, nil); (err == nil) != suid {
				t.Errorf("the file's capabilities: %v", err)
			}
			g.serving()
		})
	}
}

// TestHostileWriteDropsSetID: who changes a set-id program of the host must not keep it one.
func TestHostileWriteDropsSetID(t *testing.T) {
	needRoot(t)
	caps := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	for name, change := range map[string]func(g *guest, node uint64){
		"WRITE": func(g *guest, node uint64) {
			fh := g.open(node, unix.O_RDWR)
			g.want(0, g.call(fuse.OpWrite, node, body(fuse.WriteIn{Fh: fh, Size: 1}, []byte("x"))))
		},
		"truncate": func(g *guest, node uint64) {
			g.want(0, g.call(fuse.OpSetattr, node, body(fuse.SetattrIn{Valid: fuse.FATTR_SIZE, Size: 1})))
		},
		"OPEN with O_TRUNC": func(g *guest, node uint64) { g.open(node, unix.O_WRONLY|unix.O_TRUNC) },
		"chown": func(g *guest, node uint64) {
			g.want(0, g.call(fuse.OpSetattr, node, body(fuse.SetattrIn{Valid: fuse.FATTR_UID, UID: 1234})))
		},
		"FALLOCATE": func(g *guest, node uint64) {
			fh := g.open(node, unix.O_RDWR)
			g.want(0, g.call(fuse.OpFallocate, node, body(fuse.FallocateIn{Fh: fh, Length: 100})))
		},
		"COPY_FILE_RANGE": func(g *guest, node uint64) {
			g.write0("source", "source", 0o644)
			src := g.lookup(1, "source")
			from, to := g.open(src.NodeID, unix.O_RDONLY), g.open(node, unix.O_RDWR)
			g.want(0, g.call(fuse.OpCopyFileRange, src.NodeID, body(fuse.CopyFileRangeIn{FhIn: from, NodeidOut: node, FhOut: to, Len: 6})))
		},
	} {
		for _, suid := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ",suid=", suid), func(t *testing.T) {
				g := newGuest(t, func(c *Config) { c.Suid = suid })
				g.write0("program", "program", 0o6755)
				if err := unix.Setxattr(g.host("program"), capability, caps, 0); err != nil {
					t.Fatal(err)
				}
				change(g, g.lookup(1, "program").NodeID)
				if m := g.stat("program").Mode & 0o7777; m != 0o755 {
					t.Errorf("mode %o", m)
				}
				if _, err := unix.Getxattr(g.host("program"), capability, nil); err != unix.ENODATA {
					t.Errorf("the capabilities are there: %v", err)
				}
			})
		}
	}
}

// TestHostileOwners: what a caller makes is his, as far as the export lets him be.
func TestHostileOwners(t *testing.T) {
	needRoot(t)
	squash := &Cred{2000, 2001}
	for _, c := range []struct {
		name     string
		change   func(*Config)
		uid, gid uint32 // of the caller
		want     Cred
		errno    fuse.Errno
	}{
		{"root is the owner of the export", nil, 0, 0, Cred{1500, 1501}, 0},
		{"a user is himself", nil, 1000, 1001, Cred{1000, 1001}, 0},
		{"root is trusted", func(c *Config) { c.RootAs = RootTrust }, 0, 0, Cred{0, 0}, 0},
		{"mapped", func(c *Config) { c.UIDs, c.GIDs = IDMap{{1000, 9000, 10}}, IDMap{{1000, 8000, 10}} }, 1005, 1006, Cred{9005, 8006}, 0},
		{"unmapped", func(c *Config) { c.UIDs, c.GIDs = IDMap{{1000, 9000, 10}}, IDMap{{1000, 8000, 10}} }, 77, 77, Cred{}, unix.EOVERFLOW},
		{"squashed", func(c *Config) { c.Squash = squash }, 1000, 1001, *squash, 0},
		{"squashed root", func(c *Config) { c.Squash, c.RootAs = squash, RootTrust }, 0, 0, *squash, 0},
		{"nobody at all", nil, noID, 0, Cred{}, unix.EOVERFLOW},
		{"no group at all", nil, 0, noID, Cred{}, unix.EOVERFLOW},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t, func(cfg *Config) {
				if err := cfg.Root.Chown(1500, 1501); err != nil {
					t.Fatal(err)
				}
				if c.change != nil {
					c.change(cfg)
				}
			})
			g.uid, g.gid = c.uid, c.gid
			for name, req := range map[string]struct {
				op fuse.Opcode
				b  []byte
			}{
				"mkdir":   {fuse.OpMkdir, body(fuse.MkdirIn{Mode: 0o755}, "mkdir")},
				"mknod":   {fuse.OpMknod, body(fuse.MknodIn{Mode: unix.S_IFREG | 0o644}, "mknod")},
				"symlink": {fuse.OpSymlink, body("symlink", "target")},
				"create":  {fuse.OpCreate, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "create")},
			} {
				g.want(c.errno, g.call(req.op, 1, req.b))
				if c.errno == 0 {
					if st := g.stat(name); (Cred{st.Uid, st.Gid}) != c.want {
						t.Errorf("%s belongs to %d:%d, want %v", name, st.Uid, st.Gid, c.want)
					}
				} else if _, err := os.Lstat(g.host(name)); err == nil {
					t.Errorf("%s was made", name)
				}
			}
			// chown to the caller's own ids goes the same way.
			g.write0("given", "", 0o644)
			e := g.lookup(1, "given")
			a := g.call(fuse.OpSetattr, e.NodeID, body(fuse.SetattrIn{Valid: fuse.FATTR_UID | fuse.FATTR_GID, UID: c.uid, GID: c.gid}))
			if st := g.stat("given"); c.errno == 0 && (a.errno != 0 || (Cred{st.Uid, st.Gid}) != c.want) {
				t.Errorf("given to %d:%d, %v", st.Uid, st.Gid, a.errno)
			}
			g.uid, g.gid = 0, 0
			g.serving()
		})
	}
}

// TestHostileGroups: the guest's kernel has checked permissions with all groups of the caller; the host knows one, and
// does not refuse for it.
func TestHostileGroups(t *testing.T) {
	needRoot(t)
	g := newGuest(t, func(c *Config) { c.Suid = true })
	if err := errors.Join(os.Mkdir(g.host("shared"), 0o770), unix.Chmod(g.host("shared"), 0o2770), unix.Chown(g.host("shared"), 0, 777)); err != nil {
		t.Fatal(err)
	}
	d := g.lookup(1, "shared")
	g.uid, g.gid = 1000, 1000
	in := fuse.CreateIn{Flags: unix.O_RDWR, Mode: unix.S_IFREG | unix.S_ISGID | 0o755}
	g.want(0, g.call(fuse.OpCreate, d.NodeID, body(in, "outsider")))
	if st := g.stat("shared/outsider"); st.Uid != 1000 || st.Gid != 777 || st.Mode&unix.S_ISGID != 0 {
		t.Errorf("outsider: %d:%d, %o", st.Uid, st.Gid, st.Mode)
	}
	msg, unique := g.message(fuse.OpCreate, d.NodeID, body(in, "member0",
		fuse.ExtHeader{Size: 16, Type: fuse.EXT_GROUPS}, fuse.SuppGroups{NrGroups: 1}, uint32(777)))
	var h fuse.InHeader
	fuse.Decode(&h, msg)
	h.TotalExtlen = 2
	fuse.Put(msg, &h)
	g.write(msg)
	g.want(0, g.recv(unique))
	if st := g.stat("shared/member0"); st.Uid != 1000 || st.Gid != 777 || st.Mode&unix.S_ISGID == 0 {
		t.Errorf("member: %d:%d, %o", st.Uid, st.Gid, st.Mode)
	}
	// The next one has not inherited the group.
	g.want(0, g.call(fuse.OpCreate, d.NodeID, body(in, "later")))
	if st := g.stat("shared/later"); st.Mode&unix.S_ISGID != 0 {
		t.Errorf("later: %o", st.Mode)
	}
	g.serving()
}

// TestHostileReadOnly: a read-only export changes by nothing that a guest says.
func TestHostileReadOnly(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.ReadOnly = true })
	g.write0("a", "aaaa", 0o644)
	a := g.lookup(1, "a")
	fh := g.open(a.NodeID, unix.O_RDONLY)
	before := g.stat("a")
	for op, b := range map[fuse.Opcode][]byte{
		fuse.OpMkdir: body(fuse.MkdirIn{}, "d"), fuse.OpMknod: body(fuse.MknodIn{Mode: unix.S_IFREG}, "f"), fuse.OpSymlink: body("s", "t"),
		fuse.OpLink: body(fuse.LinkIn{Oldnodeid: a.NodeID}, "l"), fuse.OpUnlink: body("a"), fuse.OpRmdir: body("a"),
		fuse.OpCreate: body(fuse.CreateIn{Flags: unix.O_RDWR}, "c"), fuse.OpTmpfile: body(fuse.CreateIn{Flags: unix.O_RDWR}, "/"),
		fuse.OpRename: body(fuse.RenameIn{Newdir: 1}, "a", "b"), fuse.OpRename2: body(fuse.Rename2In{Newdir: 1}, "a", "b"),
	} {
		if r := g.call(op, 1, b); r.errno != unix.EROFS {
			t.Errorf("%v: %v", op, r.errno)
		}
	}
	for op, b := range map[fuse.Opcode][]byte{
		fuse.OpSetattr: body(fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: 0o777}), fuse.OpOpen: body(fuse.OpenIn{Flags: unix.O_RDWR}),
		fuse.OpSetxattr: body(fuse.SetxattrIn{Size: 1}, "user.x", []byte("1")), fuse.OpRemovexattr: body("user.x"),
		fuse.OpWrite: body(fuse.WriteIn{Fh: fh, Size: 1}, []byte("x")), fuse.OpFallocate: body(fuse.FallocateIn{Fh: fh, Length: 99}),
		fuse.OpCopyFileRange: body(fuse.CopyFileRangeIn{FhIn: fh, NodeidOut: a.NodeID, FhOut: fh, OffOut: 4, Len: 4}),
		fuse.OpIoctl:         body(fuse.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_SETFLAGS, InSize: 4}, uint32(0)),
		fuse.OpAccess:        body(fuse.AccessIn{Mask: unix.W_OK}),
	} {
		r := g.call(op, a.NodeID, b)
		if op == fuse.OpIoctl && (r.errno == unix.ENOTTY || r.errno == unix.EOPNOTSUPP) {
			continue // this file system has no flags
		}
		if r.errno != unix.EROFS {
			t.Errorf("%v: %v", op, r.errno)
		}
	}
	g.want(unix.EROFS, g.call(fuse.OpOpen, a.NodeID, body(fuse.OpenIn{Flags: unix.O_RDONLY | unix.O_TRUNC})))
	after := g.stat("a")
	after.Atim = before.Atim
	if after != before {
		t.Errorf("a changed: %+v, %+v", before, after)
	}
	g.serving()
}

// TestHostileOpenFiles: 10,000 opens against a limit of 1,000.
func TestHostileOpenFiles(t *testing.T) {
	const limit, tries = 1000, 10000
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Files: limit} })
	g.write0("a", "aaaa", 0o644)
	a := g.lookup(1, "a")
	var fhs []uint64
	for range tries {
		r := g.call(fuse.OpOpen, a.NodeID, body(fuse.OpenIn{}))
		switch {
		case r.errno == 0 && len(fhs) < limit:
			fhs = append(fhs, binary.NativeEndian.Uint64(r.body))
		case r.errno == 0 || len(fhs) < limit:
			t.Fatalf("open %d: %v", len(fhs)+1, r.errno)
		case r.errno != unix.ENFILE:
			t.Fatalf("over the limit: %v", r.errno)
		}
	}
	// What else takes one is refused too; the rest goes on.
	g.want(unix.ENFILE, g.call(fuse.OpOpendir, 1, body(fuse.OpenIn{})))
	g.want(unix.ENFILE, g.call(fuse.OpCreate, 1, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "new")))
	g.want(unix.ENFILE, g.call(fuse.OpTmpfile, 1, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "/")))
	g.want(unix.ENOLCK, g.call(fuse.OpSetlk, a.NodeID, body(fuse.LkIn{Fh: fhs[0], Owner: 1, Lk: fuse.FileLock{End: 1, Type: unix.F_RDLCK}})))
	g.want(0, g.call(fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fhs[limit-1], Size: 4})))
	g.serving()
	for _, fh := range fhs {
		g.release(a.NodeID, fh)
	}
	g.release(a.NodeID, g.open(a.NodeID, unix.O_RDWR))
	g.want(0, g.call(fuse.OpCreate, 1, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "new")))
}

// TestHostileNodes: more inodes than the session may know.
func TestHostileNodes(t *testing.T) {
	const limit = 100
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Nodes: limit} })
	for i := range 2 * limit {
		g.write0(fmt.Sprint(i), "", 0o644)
	}
	var nodes []uint64
	for i := range 2 * limit {
		r := g.call(fuse.OpLookup, 1, body(fmt.Sprint(i)))
		if r.errno == 0 {
			nodes = append(nodes, binary.NativeEndian.Uint64(r.body))
		} else if r.errno != unix.ENFILE || len(nodes) < limit-1 {
			t.Fatalf("lookup %d: %v", i, r.errno)
		}
	}
	if len(nodes) > limit {
		t.Errorf("%d nodes", len(nodes))
	}
	g.serving()
	for _, n := range nodes {
		g.send(fuse.OpForget, n, body(fuse.ForgetIn{Nlookup: 1}))
	}
	g.lookup(1, fmt.Sprint(2*limit-1))
}

// TestHostileNoReader: a guest that asks and does not read the answers holds up nobody but itself.
func TestHostileNoReader(t *testing.T) {
	g := newGuest(t, nil)
	if err := os.WriteFile(g.host("big"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	big := g.lookup(1, "big")
	fh := g.open(big.NodeID, unix.O_RDONLY)
	good := g.c
	ended := g.dial()
	bad := g.c
	bad.SetDeadline(time.Now().Add(300 * time.Millisecond))
	for i := 0; i < 1000; i++ {
		msg, _ := g.message(fuse.OpRead, big.NodeID, body(fuse.ReadIn{Fh: fh, Size: 1 << 20}))
		if _, err := bad.Write(msg); err != nil {
			break // the server has stopped reading
		}
	}
	g.c = good
	for range 100 {
		g.serving()
	}
	bad.Close()
	<-ended // with or without an error: the replies could not be written
	g.serving()
}

// TestHostileBytes: requests that hold much and want much, more at once than there is for all.
func TestHostileBytes(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Bytes: 1} }) // the least that it does with
	if err := os.WriteFile(g.host("big"), make([]byte, maxTransfer), 0o644); err != nil {
		t.Fatal(err)
	}
	big := g.lookup(1, "big")
	fh := g.open(big.NodeID, unix.O_RDONLY)
	var all []byte
	var uniques []uint64
	for i := range 48 {
		var b []byte
		op := fuse.OpFsync
		switch i % 4 {
		case 0: // slow, so that others are read meanwhile
			b = body(fuse.FsyncIn{Fh: fh}, make([]byte, 900<<10))
		case 1:
			b, op = body(fuse.GetxattrIn{Size: 1 << 16}, make([]byte, 900<<10)), fuse.OpListxattr
		default:
			b, op = body(fuse.ReadIn{Fh: fh, Size: maxTransfer}), fuse.OpRead
		}
		msg, unique := g.message(op, big.NodeID, b)
		all = append(all, msg...)
		uniques = append(uniques, unique)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := g.c.Write(all)
		sent <- err
	}()
	for _, u := range uniques {
		g.recv(u)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	g.serving()
}
