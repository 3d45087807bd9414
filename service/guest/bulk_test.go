// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// memFS is tinyFS with a file whose data it keeps.
type memFS struct {
	tinyFS
	data []byte
}

func newMemFS() *memFS {
	m := &memFS{}
	m.handle = func(h fuse.InHeader, body []byte) []byte {
		switch h.Opcode {
		case fuse.OpWrite:
			var in fuse.WriteIn
			data, _ := fuse.Decode(&in, body)
			if need := int(in.Offset) + len(data); need > len(m.data) {
				m.data = append(m.data, make([]byte, need-len(m.data))...)
			}
			copy(m.data[in.Offset:], data)
		case fuse.OpRead:
			var in fuse.ReadIn
			fuse.Decode(&in, body)
			off := min(int(in.Offset), len(m.data))
			return message(h.Unique, 0, m.data[off:min(off+int(in.Size), len(m.data))])
		}
		return nil
	}
	return m
}

// readAll reads the file in blocks of n bytes, around the page cache, as readFile keeps to system calls.
func readAll(t *testing.T, name string, n int) []byte {
	t.Helper()
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var all []byte
	buf := make([]byte, n)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return all
		}
		all = append(all, buf[:n]...)
	}
}

func writeAll(t *testing.T, name string, data []byte, sizes ...int) {
	t.Helper()
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for i := 0; len(data) > 0; i++ {
		n := min(sizes[i%len(sizes)], len(data))
		if _, err := unix.Write(fd, data[:n]); err != nil {
			t.Fatal(err)
		}
		data = data[n:]
	}
}

// Large data pass as they are, through the pipes where the stream before them was large, beside small ones, and in any pieces that the
// host sends.
func TestLargeData(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pieces int // what the host writes at once; 0: a whole reply
	}{
		{"whole replies", 0},
		{"replies in large pieces", 40_000},
		{"replies in small pieces", 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			m := newMemFS()
			m.pieces = tt.pieces
			dir, p, stop := pumpTo(t, &m.tinyFS)
			name := filepath.Join(dir, "hello")
			data := make([]byte, 5*splice.MaxData+1234)
			rand.NewChaCha8([32]byte{7}).Read(data)
			for _, sizes := range [][]int{{1 << 20}, {splice.MinData}, {1 << 20, 10, 100_000}} {
				m.data, m.size = nil, 0
				writeAll(t, name, data, sizes...)
				if !bytes.Equal(m.data, data) {
					t.Fatalf("the host has %d bytes, not those that were written by %d", len(m.data), sizes)
				}
			}
			for _, size := range []int{1 << 20, splice.MinData, 12_288} {
				if got := readAll(t, name, size); !bytes.Equal(got, data) {
					t.Fatalf("%d bytes were read by %d, not those of the host", len(got), size)
				}
			}
			if st := p.Stats(); st.RequestBytes < 3*uint64(len(data)) || st.RxBytes < 3*uint64(len(data)) {
				t.Errorf("not all was counted: %+v", st)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A pump that goes on with what another one has agreed may get requests that don't fit a pipe.
func TestLargeDataAgreedBefore(t *testing.T) {
	for _, tt := range []struct {
		write uint32
		pages int
		want  bool
	}{
		{0, 32, false}, // before INIT
		{splice.MaxData, splice.MaxData / pageSize, true},
		{splice.MaxData, splice.Size/pageSize - 2, true},
		{splice.MaxData, splice.Size/pageSize - 1, false},
		{MaxData, MaxData / pageSize, false},
	} {
		p := &Pump{maxReply: max(minReply, tt.pages*pageSize+fuse.OutHeaderSize+headRoom), lanes: make([]lane, 1), saves: true}
		out := &p.lanes[0].bulk.out
		p.maxWrite.Store(tt.write)
		if p.may(out) != tt.want || (*out != nil) != tt.want {
			t.Errorf("requests of up to %d bytes and %d pages go through a pipe: %v", tt.write, tt.pages, !tt.want)
		}
		p.closePipes(true)
	}
}

// Where INIT's reply, another one and the beginning of a large one come together, the large one may have to leave the pipe again for a
// buffer that has not grown yet.
func TestLargeReplyRightAfterInit(t *testing.T) {
	fstest.Leaks(t)
	dev, kernel := fakeDevice(t)
	a, b := streamPair(t)
	p, err := NewPump(dev, a, PumpOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.initUnique = 2
	const size, piece = 200_000, 700 // 256 pieces are more than the buffer had before INIT, and less than all
	init := message(2, 0, fuse.Append(nil, &fuse.InitOut{Major: fuse.Major, Minor: fuse.Minor, MaxWrite: MaxData, Flags: uint32(fuse.MAX_PAGES), MaxPages: 256}))
	other, large := message(4, 0, make([]byte, splice.MinData)), message(6, 0, make([]byte, size))
	rand.NewChaCha8([32]byte{3}).Read(large[fuse.OutHeaderSize:])
	if err := unix.SetNonblock(kernel, false); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Write(slices.Concat(init, other, large[:fuse.OutHeaderSize])); err != nil {
		t.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- p.Run() }()
	buf := make([]byte, 1<<20)
	next := func() []byte {
		n, err := unix.Read(kernel, buf)
		if err != nil {
			t.Fatal(err)
		}
		return buf[:n]
	}
	if a, b := len(next()), len(next()); a != len(init) || b != len(other) {
		t.Fatalf("replies of %d and %d bytes", a, b)
	}
	for rest := large[fuse.OutHeaderSize:]; len(rest) > 0; {
		n, err := b.Write(rest[:min(piece, len(rest))])
		if err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if !bytes.Equal(next(), large) {
		t.Error("the reply is not what was sent")
	}
	p.Close()
	if err := <-ran; !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	unix.Shutdown(kernel, unix.SHUT_RDWR)
}

// Pipes are not kept by who does not need them.
func TestPipesOfAQuietPump(t *testing.T) {
	fstest.Leaks(t)
	m := newMemFS()
	dir, p, stop := pumpTo(t, &m.tinyFS)
	name := filepath.Join(dir, "hello")
	pipes := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasPrefix(to, "pipe:") {
				n++
			}
		}
		return n
	}
	before, most := pipes(), 0
	for range 10 {
		writeAll(t, name, make([]byte, 2*splice.MaxData), 2*splice.MaxData)
		most = max(most, pipes())
	}
	if most != before+2 {
		t.Errorf("%d descriptors of pipes while it writes, %d before", most, before)
	}
	for range 10 {
		readAll(t, name, splice.MaxData)
		most = max(most, pipes())
	}
	if most != before+4 {
		t.Errorf("%d descriptors of pipes while it reads, %d before", most, before)
	}
	for until := time.Now().Add(20 * time.Second); pipes() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%d descriptors of pipes, %d before", pipes(), before)
		}
	}
	writeAll(t, name, make([]byte, 3*splice.MaxData), 3*splice.MaxData) // and again
	if err := stop(); err != nil {
		t.Error(err)
	}
	if p.hasPipes() {
		t.Error("a pipe is left")
	}
}

// A host that ends within a large reply, or sends one that nobody waits for, or one that is no reply to a READ.
func TestLargeReplyOfAHostileHost(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply func(h fuse.InHeader, size int) []byte
		want  error
	}{
		{"half", func(h fuse.InHeader, size int) []byte { return message(h.Unique, 0, make([]byte, size))[:size/2] }, ErrStream},
		{"too long", func(h fuse.InHeader, size int) []byte { return message(h.Unique, 0, make([]byte, size+4096)) }, ErrProtocol},
		{"to nobody", func(h fuse.InHeader, size int) []byte {
			return append(message(h.Unique+1000, 0, make([]byte, size)), message(h.Unique, 0, make([]byte, size))...)
		}, nil},
		{"a large notification", func(h fuse.InHeader, size int) []byte { return message(0, 0, make([]byte, size)) }, ErrProtocol},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			m := newMemFS()
			m.size = 4 * splice.MaxData
			usual, reads := m.handle, 0
			m.data = make([]byte, m.size)
			m.handle = func(h fuse.InHeader, body []byte) []byte {
				if h.Opcode == fuse.OpRead {
					if reads++; reads == 3 {
						var in fuse.ReadIn
						fuse.Decode(&in, body)
						m.end = tt.name == "half"
						return tt.reply(h, int(in.Size))
					}
				}
				return usual(h, body)
			}
			dir, p, stop := pumpTo(t, &m.tinyFS)
			fd, err := unix.Open(filepath.Join(dir, "hello"), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, splice.MaxData)
			var rerr error
			for range 4 {
				if _, rerr = unix.Read(fd, buf); rerr != nil {
					break
				}
			}
			unix.Close(fd)
			if tt.want != nil {
				<-p.Done()
			} else if rerr != nil {
				t.Errorf("read: %v", rerr)
			}
			if err := stop(); !errors.Is(err, tt.want) {
				t.Errorf("Run: %v, want %v", err, tt.want)
			}
		})
	}
}

// pieces writes so many bytes at once.
type pieces struct {
	io.ReadWriter
	n int
}

func (p pieces) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		n, err := p.ReadWriter.Write(b[done:min(done+p.n, len(b))])
		if done += n; err != nil {
			return done, err
		}
	}
	return len(b), nil
}
