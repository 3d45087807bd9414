// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// newGuestOf is a guest of a directory that is there already.
func newGuestOf(t *testing.T, dir string) *guest {
	t.Helper()
	fs := newFS(t, dir, Config{})
	g := &guest{t: t, fs: fs, dir: dir, c: serve(t, fs), early: map[uint64]answer{}}
	g.init()
	return g
}

func writeBody(fh uint64, off int64, flags uint32, data []byte) []byte {
	return body(fuse.WriteIn{Fh: fh, Offset: uint64(off), Size: uint32(len(data)), Flags: flags}, data)
}

func (g *guest) wrote(want int, a answer) {
	g.t.Helper()
	if o, _ := out[fuse.WriteOut](g, a); int(o.Size) != want {
		g.t.Fatalf("%d bytes were written, of %d", o.Size, want)
	}
}

// Large WRITEs go through a pipe from the second on, whatever comes between them, and write what was sent.
func TestLargeWrites(t *testing.T) {
	g := newGuest(t, nil)
	e, fh := g.create(1, "f", 0o644)
	var want []byte
	for i, n := range []int{splice.MaxData, splice.MaxData, 100, splice.MinData, splice.MinData, maxTransfer, maxTransfer, splice.MinData + 1, 200_001, 300_000} {
		data := noise(n, byte(i))
		g.wrote(n, g.call(fuse.OpWrite, e.NodeID, writeBody(fh, int64(len(want)), 0, data)))
		want = append(want, data...)
		if i == 4 || i == 5 {
			g.serving() // something else between two
		}
	}
	// Several at once, each where it belongs.
	var sent []uint64
	data := noise(20*splice.MinData, 99)
	for i := range 20 {
		part := data[i*splice.MinData:][:splice.MinData]
		sent = append(sent, g.send(fuse.OpWrite, e.NodeID, writeBody(fh, int64(len(want)+i*splice.MinData), 0, part)))
	}
	for _, u := range sent {
		g.wrote(splice.MinData, g.recv(u))
	}
	want = append(want, data...)
	got, err := os.ReadFile(g.host("f"))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes are in the file, not what was sent: %v", len(got), err)
	}
	g.release(e.NodeID, fh)
}

// What appends goes to the end of the file, wherever the guest takes that to be.
func TestLargeAppend(t *testing.T) {
	g := newGuest(t, nil)
	e, fh := g.create(1, "f", 0o644)
	var want []byte
	for i := range 4 {
		data := noise(splice.MinData, byte(i))
		g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 7, unix.O_APPEND, data)))
		want = append(want, data...)
	}
	if got, err := os.ReadFile(g.host("f")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes are in the file, not what was sent: %v", len(got), err)
	}
	g.release(e.NodeID, fh)
}

// A WRITE that is refused leaves nothing behind in its pipe, and the next request is read where it begins.
func TestLargeWriteRefused(t *testing.T) {
	g := newGuest(t, nil)
	e, fh := g.create(1, "f", 0o644)
	g.write0("r", "", 0o644)
	r := g.lookup(1, "r").NodeID
	rfh := g.open(r, unix.O_RDONLY)
	data := noise(splice.MaxData, 1)
	good := writeBody(fh, 0, 0, data)
	g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, good))
	for _, tt := range []struct {
		name string
		node uint64
		body []byte
		want fuse.Errno
	}{
		{"no such handle", e.NodeID, writeBody(fh+100, 0, 0, data), unix.EBADF},
		{"read only", r, writeBody(rfh, 0, 0, data), unix.EBADF},
		{"too far", e.NodeID, writeBody(fh, 1<<62, 0, data), unix.EFBIG},
		{"negative", e.NodeID, writeBody(fh, -1, 0, data), unix.EINVAL},
		{"says more", e.NodeID, body(fuse.WriteIn{Fh: fh, Size: uint32(len(data)) + 1}, data), unix.EINVAL},
		{"says less", e.NodeID, body(fuse.WriteIn{Fh: fh, Size: uint32(len(data)) - 1}, data), unix.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 3 {
				g.want(tt.want, g.call(fuse.OpWrite, tt.node, tt.body))
			}
			data := noise(splice.MaxData, 2)
			g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data)))
			if got, err := os.ReadFile(g.host("f")); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes are in the file, not what was sent: %v", len(got), err)
			}
		})
	}
	g.release(e.NodeID, fh)
	g.release(r, rfh)
}

// A guest that sends its data in many small pieces gets them written as well.
func TestLargeWriteInPieces(t *testing.T) {
	g := newGuest(t, nil)
	e, fh := g.create(1, "f", 0o644)
	for i := range 4 {
		data := noise(splice.MaxData, byte(i))
		msg, unique := g.message(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data))
		if i == 0 {
			g.write(msg) // the next one is expected to be large too
		} else {
			for len(msg) > 0 {
				n := min(len(msg), 80) // its head, then 6500 pieces
				g.write(msg[:n])
				msg = msg[n:]
			}
		}
		g.wrote(len(data), g.recv(unique))
		if got, err := os.ReadFile(g.host("f")); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes are in the file, not what was sent: %v", len(got), err)
		}
	}
	g.release(e.NodeID, fh)
}

// A stream that ends within the data of a WRITE writes none of it.
func TestLargeWriteCut(t *testing.T) {
	g, ended := newGuestStream(t, nil)
	e, fh := g.create(1, "f", 0o644)
	data := noise(splice.MaxData, 1)
	g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data)))
	msg, _ := g.message(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, noise(splice.MaxData, 2)))
	g.write(msg[:len(msg)-1])
	g.c.Close()
	if err := <-*ended; err == nil {
		t.Error("Serve found nothing wrong with half a request")
	}
	if got, err := os.ReadFile(g.host("f")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the file has changed: %v", err)
	}
	*ended = g.dial()
	g.release(e.NodeID, fh)
}

// Large READs go through a pipe, with as much as there is.
func TestLargeReads(t *testing.T) {
	g := newGuestOf(t, tmpfs(t))
	data := noise(3*splice.MaxData+1000, 1)
	must(t, os.WriteFile(g.host("f"), data, 0o644))
	n := g.lookup(1, "f").NodeID
	fh := g.open(n, unix.O_RDONLY)
	for i, r := range []struct{ off, size int }{
		{0, splice.MaxData}, {splice.MaxData, splice.MaxData}, {1, splice.MaxData}, {4095, splice.MinData}, {0, maxTransfer}, {3, maxTransfer},
		{len(data) - 10, splice.MinData}, {len(data) - splice.MinData, splice.MaxData}, {len(data), splice.MaxData}, {len(data) + 1<<40, splice.MaxData},
	} {
		a := g.want(0, g.call(fuse.OpRead, n, body(fuse.ReadIn{Fh: fh, Offset: uint64(r.off), Size: uint32(r.size)})))
		want := data[min(r.off, len(data)):min(r.off+r.size, len(data))]
		if !bytes.Equal(a.body, want) {
			t.Errorf("read %d: %d bytes at %d gave %d, not what is there", i, r.size, r.off, len(a.body))
		}
	}
	// More at once than there are pipes, with small ones between them.
	var sent []uint64
	for i := range 40 {
		size := splice.MaxData
		if i%3 == 1 {
			size = 100
		}
		sent = append(sent, g.send(fuse.OpRead, n, body(fuse.ReadIn{Fh: fh, Offset: uint64(i * 1000), Size: uint32(size)})))
	}
	for i, u := range sent {
		size := splice.MaxData
		if i%3 == 1 {
			size = 100
		}
		if a := g.want(0, g.recv(u)); !bytes.Equal(a.body, data[i*1000:][:size]) {
			t.Errorf("read %d of many: not what is there", i)
		}
	}
	g.release(n, fh)
}

// A session without descriptors to spare copies.
func TestLargeWithoutDescriptors(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Descriptors: 3, Files: 2} })
	e, fh := g.create(1, "f", 0o644)
	for i := range 3 {
		data := noise(splice.MaxData, byte(i))
		g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data)))
		a := g.want(0, g.call(fuse.OpRead, e.NodeID, body(fuse.ReadIn{Fh: fh, Size: splice.MaxData})))
		if !bytes.Equal(a.body, data) {
			t.Error("read something else than was written")
		}
	}
	g.release(e.NodeID, fh)
}

// A file that takes no data from a pipe (those of proc, and those of drivers) gets them by write(2).
func TestLargeWriteToWhatTakesNone(t *testing.T) {
	score := filepath.Join(fmt.Sprintf("/proc/%d", os.Getpid()), "oom_score_adj")
	now, err := os.ReadFile(score)
	must(t, err)
	g := newGuestOf(t, filepath.Dir(score))
	n := g.lookup(1, "oom_score_adj").NodeID
	fh := g.open(n, unix.O_WRONLY)
	data := append(bytes.TrimSpace(now), bytes.Repeat([]byte(" "), splice.MinData)...)
	first := g.call(fuse.OpWrite, n, writeBody(fh, 0, 0, data))
	second := g.call(fuse.OpWrite, n, writeBody(fh, 0, 0, data))
	if o, _ := out[fuse.WriteOut](g, first); o.Size == 0 {
		t.Error("nothing was written")
	}
	if first.errno != second.errno || !bytes.Equal(first.body, second.body) {
		t.Errorf("copied: %+v, through the pipe: %+v", first, second)
	}
	g.release(n, fh)
}

// A stream has a pipe while large data pass, and none when it is quiet.
func TestPipesOfAQuietStream(t *testing.T) {
	g := newGuestOf(t, tmpfs(t)) // whose reads go through a pipe too
	e, fh := g.create(1, "f", 0o644)
	data := noise(splice.MaxData, 1)
	for _, do := range []func(){
		func() { g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data))) },
		func() { g.want(0, g.call(fuse.OpRead, e.NodeID, body(fuse.ReadIn{Fh: fh, Size: splice.MaxData}))) },
	} {
		until := time.Now().Add(20 * time.Second)
		for g.fs.limits.pipes.Load() != 1 {
			if do(); time.Now().After(until) {
				t.Fatalf("%d pipes", g.fs.limits.pipes.Load())
			}
		}
		for g.fs.limits.pipes.Load() != 0 {
			if time.Sleep(time.Millisecond); time.Now().After(until) {
				t.Fatalf("%d pipes of a quiet stream", g.fs.limits.pipes.Load())
			}
		}
	}
	g.release(e.NodeID, fh)
}

// A file system that is full takes a part of a WRITE: the guest is told how much, and the rest is nobody's.
func TestLargeWriteWithoutSpace(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=704k"))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	g := newGuestOf(t, dir)
	e, fh := g.create(1, "f", 0o644)
	data := noise(splice.MaxData, 1)
	g.wrote(len(data), g.call(fuse.OpWrite, e.NodeID, writeBody(fh, 0, 0, data)))
	o, _ := out[fuse.WriteOut](g, g.call(fuse.OpWrite, e.NodeID, writeBody(fh, int64(len(data)), 0, data)))
	if o.Size == 0 || int(o.Size) >= len(data) {
		t.Errorf("%d bytes of %d were written, want some", o.Size, len(data))
	}
	g.want(unix.ENOSPC, g.call(fuse.OpWrite, e.NodeID, writeBody(fh, int64(len(data))+int64(o.Size), 0, data)))
	g.serving()
	got, err := os.ReadFile(filepath.Join(dir, "f"))
	if err != nil || !bytes.Equal(got, append(data, data[:o.Size]...)) {
		t.Errorf("%d bytes are in the file, not what was sent: %v", len(got), err)
	}
	g.release(e.NodeID, fh)
}
