// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"

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
			if p.bulk.out == nil || p.bulk.in == nil {
				t.Errorf("nothing went through pipes: %+v", &p.bulk)
			}
		})
	}
}

// A pump that goes on with what another one has agreed may get requests that don't fit a pipe.
func TestLargeDataAgreedBefore(t *testing.T) {
	for _, write := range []uint32{0, splice.MaxData + 4096, MaxData} {
		b := bulk{saves: true}
		if b.may(&b.out, write) || b.out != nil {
			t.Errorf("requests of up to %d bytes would go through a pipe", write)
		}
	}
	b := bulk{saves: true}
	if !b.may(&b.out, splice.MaxData) {
		t.Error("requests that fit don't go through a pipe")
	}
	b.close()
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
