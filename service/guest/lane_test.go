// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// apart is a memFS behind several streams, which looks at what comes over which.
type apart struct {
	t     *testing.T
	stall func() // called before a request for large data is served, and of a WRITE before its data are read; nil: not

	mu     sync.Mutex // guards the rest
	m      *memFS
	large  [maxStreams]int // requests for large data, by their stream
	writes int             // of them
}

func newApart(t *testing.T) *apart { return &apart{t: t, m: newMemFS()} }

// all returns what serves n streams.
func (a *apart) all(n int) (serve []func(*os.File)) {
	for i := range n {
		serve = append(serve, func(c *os.File) { a.serve(c, i, n) })
	}
	return serve
}

// serve serves stream i of n.
func (a *apart) serve(c *os.File, i, n int) {
	s := &tinyFS{}
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		if h.Opcode == fuse.OpOpen { // several may write at once
			return message(h.Unique, 0, fuse.Append(nil, &fuse.OpenOut{Fh: 1, OpenFlags: fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES}))
		}
		large := isLarge(&h, body)
		if n > 1 && large != (i > 0) {
			a.t.Errorf("%v of %d bytes comes over stream %d", h.Opcode, h.Len, i)
		}
		if large && h.Opcode == fuse.OpRead && a.stall != nil {
			a.stall()
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if large {
			a.large[i]++
			if h.Opcode == fuse.OpWrite {
				a.writes++
			}
		}
		reply := a.m.handle(h, body)
		if reply == nil {
			reply = a.m.answer(h, body)
		}
		return reply
	}
	s.serve(&heads{ReadWriter: c, data: func(n int) {
		if n > largeData && a.stall != nil {
			a.stall()
		}
	}})
}

// heads calls data between the length of each message and the rest of it, of so many bytes.
type heads struct {
	io.ReadWriter
	data func(n int)
	rest bool // the length was read
}

func (r *heads) Read(b []byte) (int, error) {
	if r.rest {
		r.data(len(b))
	}
	r.rest = len(b) <= 4
	return r.ReadWriter.Read(b)
}

// direct opens a file for reading and writing around the page cache. Who waits for the end of its mount closes it before.
func direct(t *testing.T, name string) int {
	t.Helper()
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func getattr(path string) error {
	var st unix.Statx_t
	return unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st)
}

// Large data arrive as they are over however many streams, and no other way.
func TestLargeDataOverStreams(t *testing.T) {
	for n := 1; n <= maxStreams; n++ {
		fstest.Leaks(t)
		a := newApart(t)
		dir, _, stop := pumpOver(t, a.all(n)...)
		name := filepath.Join(dir, "hello")
		data := make([]byte, 16*splice.MaxData)
		rand.NewChaCha8([32]byte{byte(n)}).Read(data)
		const each = 4 * splice.MaxData
		a.mu.Lock()
		a.m.size, a.m.data = uint64(len(data)), make([]byte, len(data))
		a.mu.Unlock()
		var users sync.WaitGroup
		for at := 0; at < len(data); at += each {
			fd := direct(t, name)
			users.Go(func() {
				defer unix.Close(fd)
				part := data[at : at+each]
				for off := 0; off < each; off += 2 * splice.MaxData {
					if k, err := unix.Pwrite(fd, part[off:off+2*splice.MaxData], int64(at+off)); err != nil || k != 2*splice.MaxData {
						t.Errorf("write: %d, %v", k, err)
					}
				}
				got := make([]byte, each)
				if k, err := unix.Pread(fd, got, int64(at)); err != nil || !bytes.Equal(got, part) {
					t.Errorf("read: %d bytes, %v, or others than were written", k, err)
				}
			})
			users.Go(func() {
				for range 100 {
					if err := getattr(name); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		users.Wait()
		if err := stop(); err != nil {
			t.Error(err)
		}
		for i, k := range a.large[:n] {
			if k == 0 && (n == 1 || i == 1 || i == 2) { // a third is needed where two are busy
				t.Errorf("of %d streams the one of index %d had no large data", n, i)
			}
		}
	}
}

// What is small is answered while large data are not taken, whether there is room for them in the socket or not; over one stream, or where all
// streams for large data are full and more comes, it is not. Then all goes on.
func TestStalledLargeData(t *testing.T) {
	read := func(fd, i int) error {
		_, err := unix.Pread(fd, make([]byte, splice.MaxData), 0)
		return err
	}
	data := make([]byte, 4*splice.MaxData)
	rand.NewChaCha8([32]byte{9}).Read(data)
	write := func(fd, i int) error {
		_, err := unix.Pwrite(fd, data[i*splice.MaxData:(i+1)*splice.MaxData], int64(i)*splice.MaxData)
		return err
	}
	for _, tt := range []struct {
		name    string
		streams int
		before  int                   // requests that are served
		do      func(fd, i int) error // what each user does
		users   int
		waits   bool // what is small does
	}{
		{"reads", 2, 0, read, 3, false},
		{"reads over one stream", 1, 0, read, 3, true},
		{"a write that is copied", 2, 0, write, 1, false},
		{"a write by the pipe", 2, 1, write, 1, false},
		{"two writes by the pipe", 3, 1, write, 2, false},
		{"a write over one stream", 1, 1, write, 1, true},
		{"more writes than streams", 2, 0, write, 3, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			a := newApart(t)
			stalled, goOn := make(chan struct{}, 10), make(chan struct{})
			var left atomic.Int32
			left.Store(int32(tt.before))
			a.stall = func() {
				if left.Add(-1) < 0 {
					stalled <- struct{}{}
					<-goOn
				}
			}
			dir, _, stop := pumpOver(t, a.all(tt.streams)...)
			name := filepath.Join(dir, "hello")
			a.mu.Lock()
			a.m.size, a.m.data = uint64(len(data)), make([]byte, len(data))
			a.mu.Unlock()
			use := func(fd, i int) {
				defer unix.Close(fd)
				if err := tt.do(fd, i); err != nil {
					t.Error(err)
				}
			}
			for i := range tt.before {
				use(direct(t, name), i)
			}
			var users sync.WaitGroup
			fds := make([]int, tt.users)
			for i := range fds {
				fds[i] = direct(t, name) // before the first waits
			}
			for i, fd := range fds {
				users.Go(func() { use(fd, i) })
			}
			for range min(tt.users, max(1, tt.streams-1)) {
				<-stalled
			}
			asked := make(chan error, 1)
			go func() { asked <- getattr(name) }()
			patience := wait
			if tt.waits {
				patience = 100 * time.Millisecond
			}
			var err error
			select {
			case err = <-asked:
				if tt.waits {
					t.Error("answered while the stream before it was not read")
				}
				close(goOn)
			case <-time.After(patience):
				if !tt.waits {
					t.Error("a GETATTR waits for large data that are not taken")
				}
				close(goOn)
				err = <-asked
			}
			if err != nil {
				t.Error(err)
			}
			users.Wait()
			if err := stop(); err != nil {
				t.Error(err)
			}
			if got := a.m.data[:tt.users*splice.MaxData]; a.writes > 0 && !bytes.Equal(got, data[:len(got)]) {
				t.Error("the host has other data than were written")
			}
		})
	}
}

// The end of any stream is that of all.
func TestOneStreamEnds(t *testing.T) {
	for i := range maxStreams {
		fstest.Leaks(t)
		a := newApart(t)
		serve := a.all(maxStreams)
		asked := make(chan struct{})
		serve[i] = func(*os.File) { <-asked }
		dir, p, stop := pumpOver(t, serve...)
		if i > 0 {
			if err := getattr(filepath.Join(dir, "hello")); err != nil {
				t.Error(err)
			}
		}
		close(asked)
		<-p.Done()
		if err := stop(); !errors.Is(err, ErrStream) {
			t.Errorf("stream %d has ended, and Run says %v", i, err)
		}
	}
}

// A host may break the protocol on any stream, or answer where it was not asked.
func TestHostileStreams(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply func(h fuse.InHeader) []byte
		want  error
	}{
		{"length 4 GiB", func(h fuse.InHeader) []byte { return bytes.Repeat([]byte{0xff}, 16) }, ErrProtocol},
		{"notification", func(h fuse.InHeader) []byte {
			return fuse.Append(nil, &fuse.OutHeader{Len: 16, Error: int32(fuse.NOTIFY_INVAL_INODE)})
		}, ErrProtocol},
		{"a reply to nobody", func(h fuse.InHeader) []byte {
			return append(message(h.Unique+1000, 0, nil), message(h.Unique, unix.EIO, nil)...)
		}, nil},
		{"many replies to nobody", func(h fuse.InHeader) []byte {
			return append(bytes.Repeat(message(h.Unique+1000, 0, nil), 1000), message(h.Unique, unix.EIO, nil)...)
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			a := newApart(t)
			a.m.size = splice.MaxData
			serve := a.all(2)
			hostile := &tinyFS{handle: func(h fuse.InHeader, body []byte) []byte { return tt.reply(h) }}
			serve[1] = func(c *os.File) { hostile.serve(c) }
			dir, p, stop := pumpOver(t, serve...)
			fd := direct(t, filepath.Join(dir, "hello"))
			if _, err := unix.Pread(fd, make([]byte, splice.MaxData), 0); err == nil {
				t.Error("read what nobody has sent")
			}
			unix.Close(fd)
			if tt.want != nil {
				<-p.Done()
			}
			if err := stop(); !errors.Is(err, tt.want) {
				t.Errorf("Run: %v, want %v", err, tt.want)
			}
		})
	}
}

// A reply may come over another stream than its request.
func TestReplyOverAnotherStream(t *testing.T) {
	fstest.Leaks(t)
	a := newApart(t)
	a.m.size, a.m.data = splice.MaxData, bytes.Repeat([]byte("x"), splice.MaxData)
	serve := a.all(2)
	first, elsewhere := make(chan *os.File, 1), &tinyFS{}
	elsewhere.handle = func(h fuse.InHeader, body []byte) []byte {
		c := <-first
		first <- c
		a.mu.Lock()
		defer a.mu.Unlock()
		c.Write(a.m.handle(h, body))
		return []byte{}
	}
	small := serve[0]
	serve[0] = func(c *os.File) { first <- c; small(c) }
	serve[1] = func(c *os.File) { elsewhere.serve(c) }
	dir, _, stop := pumpOver(t, serve...)
	got := make([]byte, splice.MaxData)
	fd := direct(t, filepath.Join(dir, "hello"))
	for range 3 {
		if n, err := unix.Pread(fd, got, 0); n != len(got) || err != nil || !bytes.Equal(got, a.m.data) {
			t.Errorf("read %d bytes, %v", n, err)
		}
	}
	unix.Close(fd)
	if err := stop(); err != nil {
		t.Error(err)
	}
}
