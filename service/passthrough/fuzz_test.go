// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// script is a stream whose guest says what it has to say, and ends. It checks what it is told.
type script struct {
	t    testing.TB
	r    *bytes.Reader
	step int // bytes a Read
	mu   sync.Mutex
}

func (s *script) Read(b []byte) (int, error) { return s.r.Read(b[:min(len(b), s.step)]) }

func (s *script) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for rest := b; len(rest) > 0; {
		var h fuse.OutHeader
		_, ok := fuse.Decode(&h, rest)
		if !ok || int(h.Len) > len(rest) || h.Len < uint32(fuse.OutHeaderSize) || h.Len > maxRequest || h.Error > 0 || h.Error < -fuse.MaxErrno || h.Error != 0 && h.Len != uint32(fuse.OutHeaderSize) {
			s.t.Errorf("a reply that the kernel would refuse: %d bytes, %+v", len(rest), h)
			break
		}
		rest = rest[h.Len:]
	}
	return len(b), nil
}

func (s *script) Close() error { return nil }

// FuzzServe has Serve read whole sessions, after INIT. Whatever they say, Serve returns, every reply is one that the kernel would
// take, nothing is left of the session when it is closed, and a file beside the export is as it was.
func FuzzServe(f *testing.F) {
	top := smallFS(f)
	export, beside := filepath.Join(top, "export"), filepath.Join(top, "beside")
	if err := os.WriteFile(beside, []byte(secret), 0o644); err != nil {
		f.Fatal(err)
	}
	seedSessions(f)
	f.Fuzz(func(t *testing.T, session []byte, mode byte) {
		if err := os.RemoveAll(export); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{export, export + "/d"} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(export+"/a", []byte("aaaa"), 0o644); err != nil {
			t.Fatal(err)
		}
		root, err := os.Open(export)
		if err != nil {
			t.Fatal(err)
		}
		limits := &Limits{Files: 20, Descriptors: 40, Nodes: 50, Waits: 4, Bytes: 1}
		fs, err := New(Config{Root: root, Name: "fuzz", Limits: limits, ACL: mode&1 != 0, Suid: mode&2 != 0, Xattr: XattrMode(mode >> 2 & 1), ReadOnly: mode&8 != 0})
		if err != nil {
			t.Fatal(err)
		}
		if mode&16 != 0 {
			fs.byHandle = false
		}
		msg, _ := (&guest{}).message(fuse.OpInit, 0, initBody())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = fs.Serve(&script{t: t, r: bytes.NewReader(append(msg, session...)), step: 1 + int(mode)*37})
		}()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			panic("Serve does not return") // with all stacks
		}
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
		for name, n := range map[string]int64{
			"nodes": limits.nodes.Load(), "files": limits.files.Load(), "descriptors": limits.descriptors.Load(),
			"waits": limits.waits.Load(), "bytes": limits.bytes.used,
		} {
			if n != 0 {
				t.Errorf("%d %s are still counted", n, name)
			}
		}
		if b, err := os.ReadFile(beside); err != nil || string(b) != secret {
			t.Fatalf("beside the export: %q, %v", b, err)
		}
		if l, err := os.ReadDir(top); err != nil || len(l) != 2 {
			t.Fatalf("beside the export: %v, %v", l, err)
		}
	})
}

// smallFS is a path of a file system of its own, so that FALLOCATE can't fill one that others use. It is mounted nowhere: it goes
// when this process does, however that ends.
func smallFS(f *testing.F) string {
	if os.Getuid() != 0 {
		f.Fatal("run the tests as root: sudo make test")
	}
	ctx, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	defer unix.Close(ctx)
	if err := errors.Join(unix.FsconfigSetString(ctx, "size", "8m"), unix.FsconfigSetString(ctx, "nr_inodes", "2000"), unix.FsconfigCreate(ctx)); err != nil {
		f.Fatal(err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { unix.Close(fd) })
	return fmt.Sprint("/proc/self/fd/", fd)
}

// seedSessions are sessions in which each opcode says something sensible. Nodes are numbered from 2 and handles from 1,
// as they come.
func seedSessions(f *testing.F) {
	session := func(mode byte, requests ...any) {
		g := &guest{unique: 100}
		var all []byte
		for i := 0; i < len(requests); i += 3 {
			msg, _ := g.message(requests[i].(fuse.Opcode), uint64(requests[i+1].(int)), requests[i+2].([]byte))
			all = append(all, msg...)
		}
		f.Add(all, mode)
	}
	rw := fuse.OpenIn{Flags: unix.O_RDWR}
	lk := func(typ uint32) []byte { return lkBody(1, 9, typ, 0, 0, math.MaxInt64) }
	session(1,
		fuse.OpLookup, 1, body("a"), fuse.OpOpen, 2, body(rw), fuse.OpRead, 2, body(fuse.ReadIn{Fh: 1, Size: 4096}),
		fuse.OpWrite, 2, body(fuse.WriteIn{Fh: 1, Size: 4}, []byte("bbbb")), fuse.OpGetattr, 2, body(fuse.GetattrIn{}),
		fuse.OpStatx, 2, body(fuse.StatxIn{}), fuse.OpFlush, 2, body(fuse.FlushIn{Fh: 1}), fuse.OpFsync, 2, body(fuse.FsyncIn{Fh: 1}),
		fuse.OpFallocate, 2, body(fuse.FallocateIn{Fh: 1, Length: 10000}), fuse.OpLseek, 2, body(fuse.LseekIn{Fh: 1, Whence: unix.SEEK_HOLE}),
		fuse.OpIoctl, 2, body(fuse.IoctlIn{Fh: 1, Cmd: unix.FS_IOC_GETFLAGS, OutSize: 4}),
		fuse.OpCopyFileRange, 2, body(fuse.CopyFileRangeIn{FhIn: 1, NodeidOut: 2, FhOut: 1, OffOut: 20000, Len: 100}),
		fuse.OpRelease, 2, body(fuse.ReleaseIn{Fh: 1}), fuse.OpForget, 2, body(fuse.ForgetIn{Nlookup: 1}))
	session(0,
		fuse.OpLookup, 1, body("a"), fuse.OpOpen, 2, body(rw), fuse.OpSetlk, 2, lk(wr), fuse.OpSetlkw, 2, lkBody(1, 8, wr, 0, 0, 5),
		fuse.OpInterrupt, 2, body(fuse.InterruptIn{Unique: 108}), fuse.OpGetlk, 2, lkBody(1, 7, rd, 0, 0, 5), fuse.OpSetlkw, 2, lkBody(1, 8, wr, 0, 0, 5),
		fuse.OpSetlk, 2, lk(un), fuse.OpSetlkw, 2, lkBody(1, 1, wr, fuse.LK_FLOCK, 0, 5))
	session(5,
		fuse.OpLookup, 1, body("a"), fuse.OpSetxattr, 2, body(fuse.SetxattrIn{Size: 3}, "user.x", []byte("123")),
		fuse.OpGetxattr, 2, body(fuse.GetxattrIn{Size: 100}, "user.x"), fuse.OpListxattr, 2, body(fuse.GetxattrIn{Size: 100}),
		fuse.OpRemovexattr, 2, body("user.x"), fuse.OpSetxattr, 2, body(fuse.SetxattrIn{Size: 4}, "system.posix_acl_access", uint32(2)),
		fuse.OpSetattr, 2, body(fuse.SetattrIn{Valid: 0x7f &^ fuse.FATTR_FH, Mode: 0o4755, Size: 7, UID: 1, GID: 2}), fuse.OpAccess, 2, body(fuse.AccessIn{Mask: 7}))
	session(16,
		fuse.OpLookup, 1, body("d"), fuse.OpMkdir, 2, body(fuse.MkdirIn{Mode: 0o755}, "e"), fuse.OpMknod, 3, body(fuse.MknodIn{Mode: unix.S_IFREG | 0o644}, "f"),
		fuse.OpSymlink, 2, body("l", "../../beside"), fuse.OpReadlink, 5, []byte{}, fuse.OpLink, 1, body(fuse.LinkIn{Oldnodeid: 4}, "hard"),
		fuse.OpRename, 2, body(fuse.RenameIn{Newdir: 1}, "e", "moved"), fuse.OpRename2, 1, body(fuse.Rename2In{Newdir: 1, Flags: unix.RENAME_EXCHANGE}, "moved", "a"),
		fuse.OpCreate, 3, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "new"), fuse.OpTmpfile, 2, body(fuse.CreateIn{Flags: unix.O_RDWR, Mode: 0o644}, "/"),
		fuse.OpUnlink, 3, body("f"), fuse.OpRmdir, 1, body("moved"), fuse.OpLookup, 3, body("new"),
		fuse.OpBatchForget, 0, body(fuse.BatchForgetIn{Count: 2}, fuse.ForgetOne{NodeID: 3, Nlookup: 1}, fuse.ForgetOne{NodeID: 4, Nlookup: 9}))
	session(8,
		fuse.OpOpendir, 1, body(fuse.OpenIn{}), fuse.OpReaddir, 1, body(fuse.ReadIn{Fh: 1, Size: 4096}),
		fuse.OpReaddirplus, 1, body(fuse.ReadIn{Fh: 1, Size: 4096}), fuse.OpFsyncdir, 1, body(fuse.FsyncIn{Fh: 1}),
		fuse.OpReleasedir, 1, body(fuse.ReleaseIn{Fh: 1}), fuse.OpStatfs, 1, []byte{}, fuse.OpSyncfs, 1, body(fuse.SyncfsIn{}),
		fuse.OpPoll, 1, body(fuse.PollIn{}), fuse.OpBmap, 1, body(uint64(0), uint64(0)), fuse.OpDestroy, 0, []byte{})
}

var _ io.ReadWriteCloser = (*script)(nil)
