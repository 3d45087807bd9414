// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
)

// guest speaks FUSE to Serve by hand, over a socketpair: what a hostile guest's kernel could say.
type guest struct {
	t      testing.TB
	fs     *FS
	dir    string // the export
	c      *os.File
	unique uint64
	uid    uint32 // of the caller
	gid    uint32
	early  map[uint64]answer // replies that were read while another was waited for
}

type answer struct {
	errno fuse.Errno
	body  []byte
}

// newGuest exports a new directory and begins a session with it, that ends with the test, with nothing left behind. One for each test: leaks are counted.
func newGuest(t testing.TB, change func(*Config)) *guest {
	t.Helper()
	g, _ := newGuestStream(t, change)
	return g
}

// newGuestStream is newGuest, and tells where what Serve returns will come. Who begins another stream puts its own there.
func newGuestStream(t testing.TB, change func(*Config)) (*guest, *<-chan error) {
	t.Helper()
	fstest.Leaks(t)
	g := &guest{t: t, dir: filepath.Join(t.TempDir(), "export"), early: map[uint64]answer{}}
	if err := os.Mkdir(g.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	root, err := os.Open(g.dir)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Root: root, Name: "test"}
	if change != nil {
		change(&cfg)
	}
	if g.fs, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ended := g.dial()
	t.Cleanup(func() {
		g.c.Close()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := g.fs.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if n := g.fs.limits.files.Load() + g.fs.limits.waits.Load() + g.fs.limits.serving.Load(); n != 0 {
			t.Errorf("%d files, waits and goroutines are still counted", n)
		}
	})
	g.init()
	return g, &ended
}

// dial begins a stream; what Serve returned is sent when it has ended.
func (g *guest) dial() <-chan error {
	g.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	g.c = os.NewFile(uintptr(fds[0]), "guest")
	ended := make(chan error, 1)
	go func() { ended <- g.fs.Serve(os.NewFile(uintptr(fds[1]), "host")) }()
	return ended
}

// offered are those that a kernel of 7.45 offers.
const offered = fuse.ASYNC_READ | fuse.POSIX_LOCKS | fuse.ATOMIC_O_TRUNC | fuse.BIG_WRITES | fuse.DONT_MASK | fuse.FLOCK_LOCKS |
	fuse.HAS_IOCTL_DIR | fuse.AUTO_INVAL_DATA | fuse.DO_READDIRPLUS | fuse.READDIRPLUS_AUTO | fuse.ASYNC_DIO | fuse.PARALLEL_DIROPS |
	fuse.HANDLE_KILLPRIV | fuse.POSIX_ACL | fuse.ABORT_ERROR | fuse.MAX_PAGES | fuse.CACHE_SYMLINKS |
	fuse.HANDLE_KILLPRIV_V2 | fuse.SETXATTR_EXT | fuse.INIT_EXT | fuse.CREATE_SUPP_GROUP | fuse.HAS_EXPIRE_ONLY | fuse.HAS_RESEND

func initBody() []byte {
	f := uint64(offered)
	return body(fuse.InitIn{Major: 7, Minor: 45, MaxReadahead: 1 << 20, Flags: uint32(f), Flags2: uint32(f >> 32)})
}

func (g *guest) init() {
	g.t.Helper()
	if a := g.call(fuse.OpInit, 0, initBody()); a.errno != 0 {
		g.t.Fatalf("INIT: %v", a.errno)
	}
}

// body joins structures, strings (with a NUL) and bytes.
func body(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = append(append(b, p...), 0)
		case []byte:
			b = append(b, p...)
		default:
			var err error
			if b, err = binary.Append(b, binary.NativeEndian, p); err != nil {
				panic(err)
			}
		}
	}
	return b
}

// message is a whole request.
func (g *guest) message(op fuse.Opcode, node uint64, b []byte) (msg []byte, unique uint64) {
	g.unique += 2
	return body(fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(b)), Opcode: op, Unique: g.unique, NodeID: node,
		UID: g.uid, GID: g.gid, PID: 4711}, b), g.unique
}

func (g *guest) write(b []byte) {
	g.t.Helper()
	if _, err := g.c.Write(b); err != nil {
		g.t.Fatalf("write to the server: %v", err)
	}
}

func (g *guest) send(op fuse.Opcode, node uint64, b []byte) (unique uint64) {
	g.t.Helper()
	msg, unique := g.message(op, node, b)
	g.write(msg)
	return unique
}

// call sends a request and waits for its reply.
func (g *guest) call(op fuse.Opcode, node uint64, b []byte) answer {
	g.t.Helper()
	return g.recv(g.send(op, node, b))
}

func (g *guest) recv(unique uint64) answer {
	g.t.Helper()
	for {
		if a, ok := g.early[unique]; ok {
			delete(g.early, unique)
			return a
		}
		u, a := g.next()
		g.early[u] = a
	}
}

func (g *guest) next() (unique uint64, a answer) {
	g.t.Helper()
	if err := g.c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		g.t.Fatal(err)
	}
	var head [16]byte
	if _, err := io.ReadFull(g.c, head[:]); err != nil {
		g.t.Fatalf("read a reply: %v", err)
	}
	var h fuse.OutHeader
	fuse.Decode(&h, head[:])
	if h.Len < 16 || h.Len > maxRequest || h.Error > 0 || h.Error < -fuse.MaxErrno || h.Error != 0 && h.Len != 16 {
		g.t.Fatalf("a reply that the kernel would refuse: %+v", h)
	}
	a = answer{fuse.Errno(-h.Error), make([]byte, h.Len-16)}
	if _, err := io.ReadFull(g.c, a.body); err != nil {
		g.t.Fatalf("read a reply: %v", err)
	}
	return h.Unique, a
}

// want fails the test unless the answer has the errno.
func (g *guest) want(errno fuse.Errno, a answer) answer {
	g.t.Helper()
	if a.errno != errno {
		g.t.Fatalf("errno %v (%d), want %v (%d)", a.errno, a.errno, errno, errno)
	}
	return a
}

// out decodes what a reply carries.
func out[T fuse.Struct](g *guest, a answer) (v T, rest []byte) {
	g.t.Helper()
	g.want(0, a)
	rest, ok := fuse.Decode(&v, a.body)
	if !ok {
		g.t.Fatalf("a reply of %d bytes is too short for %T", len(a.body), v)
	}
	return v, rest
}

func (g *guest) lookup(parent uint64, name string) fuse.EntryOut {
	g.t.Helper()
	e, _ := out[fuse.EntryOut](g, g.call(fuse.OpLookup, parent, body(name)))
	return e
}

func (g *guest) open(node uint64, flags int) uint64 {
	g.t.Helper()
	o, _ := out[fuse.OpenOut](g, g.call(fuse.OpOpen, node, body(fuse.OpenIn{Flags: uint32(flags)})))
	return o.Fh
}

// create makes a file and opens it.
func (g *guest) create(parent uint64, name string, mode uint32) (fuse.EntryOut, uint64) {
	g.t.Helper()
	e, rest := out[fuse.EntryOut](g, g.call(fuse.OpCreate, parent,
		body(fuse.CreateIn{Flags: unix.O_CREAT | unix.O_RDWR, Mode: unix.S_IFREG | mode}, name)))
	var o fuse.OpenOut
	if _, ok := fuse.Decode(&o, rest); !ok {
		g.t.Fatal("CREATE's reply is short")
	}
	return e, o.Fh
}

func (g *guest) release(node, fh uint64) {
	g.t.Helper()
	g.want(0, g.call(fuse.OpRelease, node, body(fuse.ReleaseIn{Fh: fh})))
}

// serving checks that the session goes on as if nothing had been.
func (g *guest) serving() {
	g.t.Helper()
	a, _ := out[fuse.AttrOut](g, g.call(fuse.OpGetattr, 1, body(fuse.GetattrIn{})))
	if a.Attr.Mode&unix.S_IFMT != unix.S_IFDIR {
		g.t.Fatalf("the root has mode %o", a.Attr.Mode)
	}
}

// host is the host's path of a name in the export.
func (g *guest) host(name string) string { return filepath.Join(g.dir, name) }

func (g *guest) write0(name, content string, mode os.FileMode) {
	g.t.Helper()
	if err := os.WriteFile(g.host(name), []byte(content), 0o600); err != nil {
		g.t.Fatal(err)
	}
	if err := unix.Chmod(g.host(name), uint32(mode)); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) stat(name string) unix.Stat_t {
	g.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(g.host(name), &st); err != nil {
		g.t.Fatal(fmt.Errorf("%s: %w", name, err))
	}
	return st
}
