// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/wire"
)

// A mount has as many streams as its guest wants, both ends can, and the host allows.
func TestNumberOfStreams(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code"), exportDir(t, "few", "max-streams=2")}})
	g := newGuest(t, h.addr, 1)
	for _, tt := range []struct {
		most   uint16 // that the guest can
		tag    string
		option string
		want   uint16
		errno  unix.Errno
	}{
		{1, "code", "", 1, 0},
		{4, "code", "", 1, 0},
		{4, "code", "streams=1", 1, 0},
		{4, "code", "streams=3", 3, 0},
		{4, "code", "streams=4", 4, 0},
		{0xffff, "code", "streams=65535", 4, 0},
		{2, "code", "streams=4", 2, 0},
		{1, "code", "streams=4", 1, 0},
		{4, "few", "streams=4", 2, 0},
		{4, "code", "streams=0", 0, unix.EINVAL},
		{4, "code", "streams=65536", 0, unix.EINVAL},
		{4, "code", "streams=", 0, unix.EINVAL},
	} {
		g.most = tt.most
		g.connect()
		if g.init.MaxStreams != maxStreams {
			t.Errorf("the host can %d streams", g.init.MaxStreams)
		}
		var options []string
		if tt.option != "" {
			options = []string{tt.option}
		}
		if r := g.request(tt.tag, options...); r.Streams != tt.want || r.Errno != tt.errno {
			t.Errorf("%s with %q of a guest that can %d: %+v", tt.tag, tt.option, tt.most, r)
		}
	}
}

// streams makes a mount and opens n streams of it.
func (g *guest) streams(n int) (id uint32, fs []*fuseConn) {
	g.t.Helper()
	g.most = uint16(n)
	g.connect()
	r := g.request("code", fmt.Sprint("streams=", n))
	if r.Errno != 0 || int(r.Streams) != n {
		g.t.Fatalf("%+v", r)
	}
	return r.MountID, g.reopen(r.MountID, n)
}

func (g *guest) reopen(id uint32, n int) (fs []*fuseConn) {
	g.t.Helper()
	for i := range n {
		f := g.openIndex(id, uint16(i))
		f.unique = uint64(i+1) << 32
		fs = append(fs, f)
	}
	return fs
}

func (g *guest) refusedIndex(id uint32, index uint16, want unix.Errno) {
	g.t.Helper()
	c := dial(g.t, g.addr)
	send(g.t, c, &wire.StreamOpen{SessionID: g.id, Token: g.token, MountID: id, Index: index})
	if r, ok := recv(g.t, c).(*wire.OpenReply); !ok || r.Errno != want {
		g.t.Errorf("stream %d: %+v, want %v", index, r, want)
	}
	gone(g.t, c)
}

// awaitStreams waits until the host shows so many streams of its only mount.
func (h *testHost) awaitStreams(want int) {
	h.t.Helper()
	var got int
	for until := time.Now().Add(15 * time.Second); time.Now().Before(until); time.Sleep(time.Millisecond) {
		if ss := h.s.Sessions(); len(ss) == 1 && len(ss[0].Mounts) == 1 {
			if got = ss[0].Mounts[0].Streams; got == want {
				return
			}
		}
	}
	h.t.Fatalf("the host shows %d streams, want %d", got, want)
}

// Each stream is answered on itself, whatever comes over it, at once and in any order.
func TestSeveralStreams(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1)
	_, fs := g.streams(4)
	h.awaitStreams(4)
	// Before INIT, and INIT where it need not be expected.
	if _, errno, err := fs[3].lookup("hello"); errno != unix.EPROTO || err != nil {
		t.Errorf("LOOKUP before INIT: %v, %v", errno, err)
	}
	fs[1].start()
	in := fuse.InitIn{Major: 7, Minor: fuse.Minor}
	if _, errno, err := fs[0].call(fuse.OpInit, 0, fuse.Append(nil, &in)); errno != unix.EPROTO || err != nil {
		t.Errorf("a second INIT: %v, %v", errno, err)
	}
	node, fh := fs[0].openFile("hello")
	for round := range 3 {
		for i, f := range fs {
			if b, errno, err := f.call(fuse.OpRead, node, fuse.Append(nil, &fuse.ReadIn{Fh: fh, Size: 1 << 20})); string(b) != "hello from code" || errno != 0 || err != nil {
				t.Fatalf("round %d, stream %d: %q, %v, %v", round, i, b, errno, err)
			}
		}
	}
	// One that is not read, and would have much to say, holds up no other.
	big := make([]byte, 1<<20)
	if _, errno, err := fs[0].call(fuse.OpWrite, node, append(fuse.Append(nil, &fuse.WriteIn{Fh: fh, Size: uint32(len(big))}), big...)); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	read := fuse.Append(nil, &fuse.ReadIn{Fh: fh, Size: uint32(len(big))})
	for i := range 32 {
		hdr := fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(read)), Opcode: fuse.OpRead, Unique: uint64(2 * (i + 1)), NodeID: node}
		if _, err := fs[1].Write(append(fuse.Append(nil, &hdr), read...)); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		if err := fs[0].serves(); err != nil {
			t.Fatal(err)
		}
	}
	for range 32 {
		if _, err := io.CopyN(io.Discard, fs[1], int64(fuse.OutHeaderSize+len(big))); err != nil {
			t.Fatal(err)
		}
	}
}

// An INTERRUPT ends the wait for a lock whichever streams the two came over.
func TestInterruptOverAnotherStream(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1)
	_, fs := g.streams(2)
	fs[0].start()
	node, fh := fs[0].openFile("hello")
	if errno := fs[0].lock(node, fh, 1); errno != 0 {
		t.Fatal(errno)
	}
	setlkw := fuse.Append(nil, &fuse.LkIn{Fh: fh, Owner: 2, Lk: fuse.FileLock{End: 1<<63 - 1, Type: unix.F_WRLCK}})
	interrupt := func(f *fuseConn, unique uint64) {
		t.Helper()
		b := fuse.Append(nil, &fuse.InterruptIn{Unique: unique})
		hdr := fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(b)), Opcode: fuse.OpInterrupt, Unique: unique | 1}
		if _, err := f.Write(append(fuse.Append(nil, &hdr), b...)); err != nil {
			t.Fatal(err)
		}
	}
	for i, order := range [][2]int{{0, 1}, {1, 0}, {0, 0}} {
		lock, other := fs[order[0]], fs[order[1]]
		interrupt(other, lock.unique+2) // first, of all; the next request over that stream shows that it was read
		if err := other.serves(); err != nil {
			t.Fatal(err)
		}
		if lock == other {
			interrupt(other, lock.unique+2)
		}
		if _, errno, err := lock.call(fuse.OpSetlkw, node, setlkw); errno != unix.EINTR || err != nil {
			t.Errorf("%d: SETLKW: %v, %v", i, errno, err)
		}
		// Of a request that is done, or is not known, it does nothing.
		interrupt(other, lock.unique)
		interrupt(other, 1<<40)
		if err := lock.serves(); err != nil {
			t.Error(err)
		}
	}
}

func TestHostileStreams(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprint("keep=", keep), func(t *testing.T) {
			fstest.Leaks(t)
			h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
			g := newGuest(t, h.addr, 1)
			g.keep, g.most = keep, 4
			g.connect()
			id := g.request("code", "streams=3").MountID
			g.refusedIndex(id, 1, unix.EAGAIN)
			fs := []*fuseConn{g.open(id)}
			g.refusedIndex(id, 3, unix.ENOENT)
			g.refusedIndex(id, 0xffff, unix.ENOENT)
			g.refusedIndex(id, 4, unix.ENOENT)
			fs = append(fs, g.openIndex(id, 2))
			g.refusedIndex(id, 2, unix.EBUSY)
			if !keep {
				g.refusedIndex(id, 0, unix.EBUSY)
			}
			fs = append(fs, g.openIndex(id, 1))
			g.refusedIndex(id, 1, unix.EBUSY)
			h.awaitStreams(3)
			fs[0].start()
			for i := range fs {
				fs[i].unique = uint64(i+1) << 32
				if err := fs[i].serves(); err != nil {
					t.Errorf("stream %d: %v", i, err)
				}
			}
			// What is no FUSE on one stream ends them all.
			fs[1].Write(make([]byte, 4096))
			for _, f := range fs {
				gone(t, f.Conn)
			}
			if !keep {
				h.logs.wait("mount ended", "does not speak FUSE")
				g.refusedIndex(id, 0, unix.ENOENT)
				return
			}
			h.logs.wait("mount waits for the guest to come back", "does not speak FUSE")
			h.awaitStreams(0)
			g.refusedIndex(id, 1, unix.EAGAIN)
			fs = g.reopen(id, 2) // fewer than there were
			h.awaitStreams(2)
			for i, f := range fs {
				if err := f.serves(); err != nil {
					t.Errorf("stream %d of the next ones: %v", i, err)
				}
			}
			// DESTROY ends the mount, wherever it comes.
			if _, errno, err := fs[1].call(fuse.OpDestroy, 0, nil); errno != 0 || err != nil {
				t.Error(errno, err)
			}
			for _, f := range fs {
				gone(t, f.Conn)
			}
			h.logs.wait("mount ended", "tag=code")
			g.refusedIndex(id, 0, unix.ENOENT)
		})
	}
}

// A mount whose other streams never come is not kept for them.
func TestStreamNeverComes(t *testing.T) {
	for _, keep := range []bool{false, true} {
		h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) { s.times.stream = 300 * time.Millisecond })
		g := newGuest(t, h.addr, 1)
		g.keep, g.most = keep, 4
		g.connect()
		id := g.request("code", "streams=3").MountID
		fs := g.reopen(id, 2)
		fs[0].start()
		h.logs.wait("mount ended", "not all of its streams came")
		for _, f := range fs {
			gone(t, f.Conn)
		}
		g.refusedIndex(id, 0, unix.ENOENT)
		// One that has all of them stays.
		id = g.request("code", "streams=2").MountID
		fs = g.reopen(id, 2)
		fs[0].start()
		if err := fs[1].serves(); err != nil {
			t.Error(err)
		}
		ss := h.session()
		ss.mu.Lock()
		if ss.mounts[id].timeout.Stop() {
			t.Error("it still waits for a stream")
		}
		ss.mu.Unlock()
	}
}

// With any of its streams a mount loses all, and a kept one goes on with the next ones: index 0 begins them, and the older ones give way.
func TestKeptStreams(t *testing.T) {
	const n = 3
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := keeper(t, h.addr, 1)
	id, fs := g.streams(n)
	fs[0].start()
	node, fh := fs[0].openFile("hello")
	for i := range n {
		fs[i].Close()
		for _, f := range fs {
			if f != fs[i] {
				gone(t, f.Conn)
			}
		}
		h.awaitStreams(0)
		fs = g.reopen(id, n)
		for j, f := range fs {
			if b, errno, err := f.call(fuse.OpRead, node, fuse.Append(nil, &fuse.ReadIn{Fh: fh, Size: 4096})); errno != 0 || err != nil || len(b) == 0 {
				t.Fatalf("READ over stream %d: %q, %v, %v", j, b, errno, err)
			}
		}
	}
	before := fs
	fs = g.reopen(id, n) // before the host knows that the guest was away
	for _, f := range before {
		gone(t, f.Conn)
	}
	h.awaitStreams(n)
	for _, f := range fs {
		if err := f.serves(); err != nil {
			t.Error(err)
		}
	}
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked})
	for _, f := range fs {
		gone(t, f.Conn)
	}
	h.logs.wait("mount ended", "tag=code")
}
