// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"os"
	"os/signal"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// A request that hangs does not stop the stream that it came by.
func TestHangingRequest(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("leased", "x", 0o644)
	n := g.lookup(1, "leased").NodeID

	// Opening a file that somebody has a lease of waits until he gives it back.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, unix.SIGIO)
	defer signal.Stop(broken)
	f, err := os.OpenFile(g.host("leased"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatalf("lease: %v", err)
	}
	hanging := g.send(fuse.OpOpen, n, body(fuse.OpenIn{Flags: unix.O_RDWR}))
	<-broken // it hangs now
	for range 100 {
		g.serving()
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		t.Fatal(err)
	}
	o, _ := out[fuse.OpenOut](g, g.recv(hanging))
	g.release(n, o.Fh)
}

// Requests that hang take so many goroutines, and with them threads, of a session, and no more; yet each stream has one.
func TestHangingRequests(t *testing.T) {
	const limit = 6
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Serving: limit} })
	g.write0("leased", "x", 0o644)
	n := g.lookup(1, "leased").NodeID
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, unix.SIGIO)
	defer signal.Stop(broken)
	f, err := os.OpenFile(g.host("leased"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatalf("lease: %v", err)
	}
	var hanging []uint64
	for range 4 * limit {
		hanging = append(hanging, g.send(fuse.OpOpen, n, body(fuse.OpenIn{Flags: unix.O_RDWR})))
	}
	<-broken
	for until := time.Now().Add(10 * time.Second); g.fs.limits.serving.Load() < limit; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%d goroutines", g.fs.limits.serving.Load())
		}
	}
	first := g.c
	ended := g.dial()
	for range 100 {
		g.serving()
	}
	if n := g.fs.limits.serving.Load(); n > limit+1 {
		t.Errorf("%d goroutines serve, want no more than %d and one of the second stream", n, limit)
	}
	g.c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	g.c = first
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		t.Fatal(err)
	}
	for _, u := range hanging {
		o, _ := out[fuse.OpenOut](g, g.recv(u))
		g.release(n, o.Fh)
	}
}

// Many requests at once are all answered, and answered once.
func TestPipeline(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Requests: 3} })
	g.write0("f", "content", 0o644)
	n := g.lookup(1, "f").NodeID
	fh := g.open(n, unix.O_RDONLY)
	const rounds = 2000
	var wg sync.WaitGroup
	defer wg.Wait()
	first := g.unique + 2
	var msgs []byte
	for i := range rounds {
		var m []byte
		switch i % 4 {
		case 0:
			m, _ = g.message(fuse.OpGetattr, n, body(fuse.GetattrIn{}))
		case 1:
			m, _ = g.message(fuse.OpRead, n, body(fuse.ReadIn{Fh: fh, Size: 4096}))
		case 2:
			m, _ = g.message(fuse.OpFsync, n, body(fuse.FsyncIn{Fh: fh}))
		case 3:
			m, _ = g.message(fuse.OpForget, n, body(fuse.ForgetIn{Nlookup: 0}))
		}
		msgs = append(msgs, m...)
	}
	wg.Go(func() {
		if _, err := g.c.Write(msgs); err != nil {
			t.Error(err)
		}
	})
	got := map[uint64]bool{}
	for range rounds * 3 / 4 {
		u, a := g.next()
		if a.errno != 0 || got[u] || u < first {
			t.Fatalf("request %d: %v, answered before: %v", u, a.errno, got[u])
		}
		got[u] = true
	}
	g.release(n, fh)
}

// Each stream of a mount serves the same nodes.
func TestTwoStreams(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("f", "x", 0o644)
	n := g.lookup(1, "f").NodeID
	first := g.c
	ended := g.dial()
	g.want(0, g.call(fuse.OpGetattr, n, body(fuse.GetattrIn{})))
	g.want(0, g.call(fuse.OpDestroy, 0, nil))
	if err := <-ended; err != nil {
		t.Error(err)
	}
	g.c.Close()
	g.c = first
	g.serving()
}

func TestInit(t *testing.T) {
	for name, c := range map[string]struct {
		in    fuse.InitIn
		errno fuse.Errno
		minor uint32
	}{
		"too old":  {fuse.InitIn{Major: 7, Minor: 30}, unix.EPROTO, 0},
		"major 6":  {fuse.InitIn{Major: 6, Minor: 45}, unix.EPROTO, 0},
		"oldest":   {fuse.InitIn{Major: 7, Minor: 31}, 0, 31},
		"newest":   {fuse.InitIn{Major: 7, Minor: 45}, 0, 45},
		"the next": {fuse.InitIn{Major: 7, Minor: 99}, 0, 45},
		"major 8":  {fuse.InitIn{Major: 8, Minor: 0}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			fs := newFS(t, t.TempDir(), Config{})
			g := &guest{t: t, fs: fs, c: serve(t, fs), early: map[uint64]answer{}}
			a := g.call(fuse.OpInit, 0, body(c.in))
			g.want(c.errno, a)
			if c.errno != 0 {
				return
			}
			o, _ := out[fuse.InitOut](g, a)
			if o.Major != 7 || o.Minor != c.minor || o.Features() != 0 {
				t.Errorf("%+v", o)
			}
		})
	}
}
