// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// needRoot fails a test that mounts where it can't.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
}

// streamPair is two connected streams in the poller.
func streamPair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// writeFile and readFile keep to system calls: an *os.File joins the poller, whose lock the kernel then holds while
// it sends POLL to this very process (the deadlock that a pump's process must never risk).
func writeFile(name string, size int) error {
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, make([]byte, size))
	return err
}

func readFile(name string) (size int, err error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 8<<20)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 {
			return size, err
		}
		size += n
	}
}

// tinyFS answers FUSE on a stream: a root with one regular file "hello" that takes writes, and whatever else a test
// puts into handle. It is the host of these tests.
type tinyFS struct {
	size    uint64
	initOut fuse.InitOut
	// handle may answer a request itself: the whole message to send, nil for "as usual".
	handle func(h fuse.InHeader, body []byte) []byte
	pieces int  // bytes that are sent at once; 0: a whole reply
	end    bool // after the next reply
}

const helloNode = 2

func (s *tinyFS) attr(node uint64) fuse.Attr {
	a := fuse.Attr{Ino: node, Mode: unix.S_IFDIR | 0o755, Nlink: 2, Blksize: 4096}
	if node == helloNode {
		a.Mode, a.Nlink, a.Size = unix.S_IFREG|0o644, 1, s.size
	}
	return a
}

func message(unique uint64, errno fuse.Errno, body []byte) []byte {
	b := fuse.Append(nil, &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize + len(body)), Error: -int32(errno), Unique: unique})
	return append(b, body...)
}

// serve answers until the stream ends.
func (s *tinyFS) serve(c io.ReadWriter) error {
	buf := make([]byte, 2<<20)
	if s.pieces > 0 {
		c = pieces{c, s.pieces}
	}
	for !s.end {
		if _, err := io.ReadFull(c, buf[:4]); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint32(buf)
		if _, err := io.ReadFull(c, buf[4:n]); err != nil {
			return err
		}
		var h fuse.InHeader
		body, _ := fuse.Decode(&h, buf[:n])
		var reply []byte
		if s.handle != nil {
			reply = s.handle(h, body)
		}
		if reply == nil {
			reply = s.answer(h, body)
		}
		if len(reply) > 0 {
			if _, err := c.Write(reply); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *tinyFS) answer(h fuse.InHeader, body []byte) []byte {
	switch h.Opcode {
	case fuse.OpInit:
		o := s.initOut
		if o.Major == 0 {
			o = fuse.InitOut{Major: fuse.Major, Minor: fuse.Minor, MaxReadahead: 1 << 17, MaxWrite: MaxData, MaxBackground: 64,
				Flags: uint32(fuse.MAX_PAGES | fuse.BIG_WRITES), MaxPages: 256, TimeGran: 1}
		}
		return message(h.Unique, 0, fuse.Append(nil, &o))
	case fuse.OpLookup:
		if string(body) != "hello\x00" {
			return message(h.Unique, unix.ENOENT, nil)
		}
		return message(h.Unique, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: helloNode, Attr: s.attr(helloNode)}))
	case fuse.OpGetattr:
		return message(h.Unique, 0, fuse.Append(nil, &fuse.AttrOut{Attr: s.attr(h.NodeID)}))
	case fuse.OpOpen, fuse.OpOpendir:
		return message(h.Unique, 0, fuse.Append(nil, &fuse.OpenOut{Fh: 1}))
	case fuse.OpRead:
		var in fuse.ReadIn
		fuse.Decode(&in, body)
		n := min(uint64(in.Size), s.size-min(s.size, in.Offset))
		return message(h.Unique, 0, make([]byte, n))
	case fuse.OpWrite:
		var in fuse.WriteIn
		fuse.Decode(&in, body)
		s.size = max(s.size, in.Offset+uint64(in.Size))
		return message(h.Unique, 0, fuse.Append(nil, &fuse.WriteOut{Size: in.Size}))
	case fuse.OpReaddir:
		var in fuse.ReadIn
		fuse.Decode(&in, body)
		if in.Offset > 0 {
			return message(h.Unique, 0, nil)
		}
		return message(h.Unique, 0, fuse.AppendDirent(nil, helloNode, 1, unix.DT_REG, []byte("hello")))
	case fuse.OpRelease, fuse.OpReleasedir, fuse.OpFlush, fuse.OpAccess, fuse.OpDestroy, fuse.OpFsync, fuse.OpSyncfs:
		return message(h.Unique, 0, nil)
	case fuse.OpForget, fuse.OpBatchForget, fuse.OpInterrupt:
		return []byte{}
	}
	return message(h.Unique, unix.ENOSYS, nil)
}

// pumpTo mounts s over a directory through a Pump; the returned function unmounts and gives Run's error.
func pumpTo(t testing.TB, s *tinyFS) (dir string, p *Pump, stop func() error) {
	t.Helper()
	return pumpOver(t, func(c *os.File) { s.serve(c) })
}

// pumpOver is pumpTo over as many streams as there are functions, each of which serves one.
func pumpOver(t testing.TB, serve ...func(c *os.File)) (dir string, p *Pump, stop func() error) {
	t.Helper()
	needRoot(t)
	dir = t.TempDir()
	dev, err := Mount(dir, MountOptions{Source: "tiny"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDevice(dev)
	if err != nil {
		t.Fatal(err)
	}
	var socks []int
	var served sync.WaitGroup
	for _, f := range serve {
		a, b := streamPair(t)
		sock, err := dupNonblocking(a)
		if err != nil {
			t.Fatal(err)
		}
		a.Close()
		socks = append(socks, sock)
		served.Go(func() { f(b); b.Close() })
	}
	if p, err = newPump(d, socks, PumpOptions{}); err != nil {
		t.Fatal(err)
	}
	p.ownsDev = true
	ran := make(chan error, 1)
	go func() { ran <- p.Run() }()
	return dir, p, func() error {
		unix.Unmount(dir, unix.MNT_DETACH)
		err := <-ran
		served.Wait()
		return err
	}
}

func TestPumpCarriesAFileSystem(t *testing.T) {
	fstest.Leaks(t)
	dir, p, stop := pumpTo(t, &tinyFS{})
	name := filepath.Join(dir, "hello")
	// Three times the largest WRITE, and so all sizes up to it.
	if err := writeFile(name, 3*MaxData+1); err != nil {
		t.Error(err)
	}
	if n, err := readFile(name); err != nil || n != 3*MaxData+1 {
		t.Errorf("read %d bytes: %v", n, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "absent")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("stat absent: %v", err)
	}
	st := p.Stats()
	if st.MaxWrite != splice.MaxData || st.Minor != fuse.Minor || st.Requests == 0 || st.Replies == 0 {
		t.Errorf("stats: %+v", st)
	}
	if err := stop(); err != nil {
		t.Errorf("Run after unmount: %v", err)
	}
}

// The least that a server may allow, and more than the pump carries.
func TestPumpNegotiates(t *testing.T) {
	for _, tt := range []struct {
		name  string
		out   fuse.InitOut
		write uint32
	}{
		{"old and small", fuse.InitOut{Major: 7, Minor: 31, MaxWrite: 4096, TimeGran: 1}, 4096},
		{"zero", fuse.InitOut{Major: 7, Minor: 31, TimeGran: 1}, 4096},
		{"too much", fuse.InitOut{Major: 7, Minor: 45, MaxWrite: 1 << 31, Flags: uint32(fuse.MAX_PAGES), MaxPages: 65535, TimeGran: 1}, splice.MaxData},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			dir, p, stop := pumpTo(t, &tinyFS{initOut: tt.out})
			if err := writeFile(filepath.Join(dir, "hello"), MaxData); err != nil {
				t.Error(err)
			}
			if got := p.Stats().MaxWrite; got != tt.write {
				t.Errorf("max_write %d, want %d", got, tt.write)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPumpHidesWhatNeedsTheDevicesOwner(t *testing.T) {
	fstest.Leaks(t)
	var asked fuse.InitIn
	s := &tinyFS{}
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		if h.Opcode == fuse.OpInit {
			asked, _ = fuse.DecodeInitIn(body)
		}
		return nil
	}
	dir, _, stop := pumpTo(t, s)
	os.Stat(dir)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if asked.Major != fuse.Major || asked.Features()&ownerBits != 0 {
		t.Errorf("INIT %+v shows %#x to the server", asked, asked.Features()&ownerBits)
	}
}

// A host that breaks the protocol ends its mount; a reply to nobody does not.
func TestPumpAgainstAHostileHost(t *testing.T) {
	header := func(n uint32, code int32, unique uint64) []byte {
		return fuse.Append(nil, &fuse.OutHeader{Len: n, Error: code, Unique: unique})
	}
	for _, tt := range []struct {
		name  string
		bytes func(h fuse.InHeader) []byte
		want  error
	}{
		{"length 0", func(h fuse.InHeader) []byte { return header(0, 0, h.Unique) }, ErrProtocol},
		{"length 15", func(h fuse.InHeader) []byte { return header(15, 0, h.Unique) }, ErrProtocol},
		{"length 4 GiB", func(h fuse.InHeader) []byte { return header(0xffffffff, 0, h.Unique) }, ErrProtocol},
		{"too short a body", func(h fuse.InHeader) []byte { return header(16, 0, h.Unique) }, ErrProtocol},
		{"error out of range", func(h fuse.InHeader) []byte { return header(16, -4096, h.Unique) }, ErrProtocol},
		{"positive error", func(h fuse.InHeader) []byte { return header(16, 5, h.Unique) }, ErrProtocol},
		{"notification", func(h fuse.InHeader) []byte { return header(16, int32(fuse.NOTIFY_INVAL_INODE), 0) }, ErrProtocol},
		{"unknown unique", func(h fuse.InHeader) []byte {
			return append(header(16, 0, h.Unique+1000), header(16, -int32(unix.EIO), h.Unique)...)
		}, nil},
		{"garbage", func(h fuse.InHeader) []byte { return []byte(strings.Repeat("garbage!", 1000)) }, ErrProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			s := &tinyFS{}
			s.handle = func(h fuse.InHeader, body []byte) []byte {
				if h.Opcode == fuse.OpLookup {
					return tt.bytes(h)
				}
				return nil
			}
			dir, p, stop := pumpTo(t, s)
			if _, err := os.Stat(filepath.Join(dir, "hello")); err == nil {
				t.Error("stat succeeded")
			}
			if tt.want != nil {
				<-p.Done()
			}
			if err := stop(); !errors.Is(err, tt.want) {
				t.Errorf("Run: %v, want %v", err, tt.want)
			}
		})
	}
}

// Whoever waits for an answer gets an error when the pump is closed, and the mount stays for its owner to detach.
func TestPumpClosed(t *testing.T) {
	fstest.Leaks(t)
	s := &tinyFS{}
	asked := make(chan struct{})
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		if h.Opcode == fuse.OpLookup {
			close(asked)
			return []byte{}
		}
		return nil
	}
	dir, p, stop := pumpTo(t, s)
	waiting := make(chan error, 1)
	go func() {
		_, err := os.Stat(filepath.Join(dir, "hello"))
		waiting <- err
	}()
	<-asked
	p.Close()
	if err := <-waiting; !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("stat: %v", err)
	}
	if err := stop(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Run: %v", err)
	}
}
