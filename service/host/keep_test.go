// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// keeper is a guest that offers FeatureKeep.
func keeper(t testing.TB, a transport.Addr, id byte) *guest {
	g := newGuest(t, a, id)
	g.keep = true
	return g
}

// openFile opens a file of the root and returns its node and handle.
func (f *fuseConn) openFile(name string) (node, fh uint64) {
	f.t.Helper()
	e, errno, err := f.lookup(name)
	if errno != 0 || err != nil {
		f.t.Fatalf("LOOKUP %s: %v, %v", name, errno, err)
	}
	b, errno, err := f.call(fuse.OpOpen, e.NodeID, fuse.Append(nil, &fuse.OpenIn{Flags: unix.O_RDWR}))
	var o fuse.OpenOut
	if _, ok := fuse.Decode(&o, b); errno != 0 || err != nil || !ok {
		f.t.Fatalf("OPEN %s: %v, %v", name, errno, err)
	}
	return e.NodeID, o.Fh
}

// lock tries a write lock of the whole file.
func (f *fuseConn) lock(node, fh, owner uint64) unix.Errno {
	f.t.Helper()
	in := fuse.LkIn{Fh: fh, Owner: owner, Lk: fuse.FileLock{End: 1<<63 - 1, Type: unix.F_WRLCK}}
	_, errno, err := f.call(fuse.OpSetlk, node, fuse.Append(nil, &in))
	if err != nil {
		f.t.Fatal(err)
	}
	return errno
}

// A guest's daemon that is started again goes on with its mount: nodes, open files and locks are as they were.
func TestMountOutlivesStream(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	node, fh := f.openFile("hello")
	if errno := f.lock(node, fh, 1); errno != 0 {
		t.Fatal(errno)
	}
	if err := os.Remove(filepath.Join(h.s.policy().exports[0].Dir, "hello")); err != nil {
		t.Fatal(err)
	}
	goesOn := func(f *fuseConn) {
		t.Helper()
		b, errno, err := f.call(fuse.OpRead, node, fuse.Append(nil, &fuse.ReadIn{Fh: fh, Size: 4096}))
		if errno != 0 || err != nil || string(b) != "hello from code" {
			t.Fatalf("READ of what was open: %q, %v, %v", b, errno, err)
		}
		if errno := f.lock(node, fh, 2); errno != unix.EAGAIN {
			t.Fatalf("another owner's lock: %v", errno)
		}
	}
	pid := h.workerPids()[0]

	g.c.Close()
	f.Close()
	h.logs.wait("mount waits for the guest to come back", "tag=code")
	g.connect()
	f = g.open(id)
	f.unique = 1000
	goesOn(f)

	// As one that was killed, before the host notices: the old stream gives way.
	old := f
	f = g.open(id)
	f.unique = 2000
	gone(t, old.Conn)
	goesOn(f)
	if now := h.workerPids(); len(now) != 1 || now[0] != pid {
		t.Errorf("the worker was %d, now there are %d", pid, now)
	}

	f.Close()
	h.logs.wait("mount waits for the guest to come back")
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked})
	h.logs.wait("mount ended", "tag=code")
	refusedStream(t, g, id, unix.ENOENT)
	g.c.Close()
	h.logs.wait("session ended", "has no mount")
}

// What DESTROY ends is not kept.
func TestDestroyEndsKeptMount(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	if _, errno, err := f.call(fuse.OpDestroy, 0, nil); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	gone(t, f.Conn)
	h.logs.wait("mount ended", "tag=code")
	refusedStream(t, g, id, unix.ENOENT)
}

// Who did not agree on FeatureKeep has what there was before, whatever he offers later.
func TestMountWithoutKeepEndsWithStream(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	f, id := g.mount("code")
	g.keep = true
	g.connect()
	refusedStream(t, g, id, unix.EBUSY)
	f.Close()
	h.logs.wait("mount ended", "tag=code")
	refusedStream(t, g, id, unix.ENOENT)
}

// A session that has nothing but mounts that it keeps ends after a while; one whose guest is there, or whose mount is served, does not.
func TestGuestDoesNotComeBack(t *testing.T) {
	const kept = 300 * time.Millisecond
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) { s.times.kept = kept })
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	f.Close()
	h.logs.wait("mount waits for the guest to come back")
	time.Sleep(2 * kept) // nothing is to happen
	f = g.open(id)
	g.c.Close()
	h.logs.wait("control channel closed")
	time.Sleep(2 * kept)
	if err := f.serves(); err != nil {
		t.Fatalf("a mount that is served ended: %v", err)
	}
	f.Close()
	h.logs.wait("session ended", "did not come back")
	if pids := h.workerPids(); len(pids) != 0 {
		t.Errorf("workers are left: %d", pids)
	}
	refusedStream(t, g, id, unix.ENOENT)
}

func TestWorkersDeathEndsKeptMount(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	f.Close()
	h.logs.wait("mount waits for the guest to come back")
	if err := unix.Kill(h.workerPids()[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.logs.wait("session ended", "worker died")
	gone(t, g.c)
	refusedStream(t, g, id, unix.ENOENT)
}

// hybridHost is a host that VMs reach by a VMM's socket, all as they like.
func hybridHost(t *testing.T, change ...func(*Server)) (*testHost, transport.Addr) {
	a := transport.Addr{Family: transport.Hybrid, Path: filepath.Join(t.TempDir(), "v.sock"), Port: 1524}
	return startHost(t, Config{Listen: []transport.Addr{a}, AllowUnprivileged: true, Exports: []Export{exportDir(t, "code", "guests=any")}}, change...), a
}

// A VM that has booted anew ends what it had before; guests over a Unix socket are many machines, or none.
func TestRebootEndsSessions(t *testing.T) {
	h, vm := hybridHost(t)
	boots := func(a transport.Addr, id, boot byte) *guest {
		g := keeper(t, a, id)
		g.boot = boot
		return g.connect()
	}
	before := boots(vm, 1, 1)
	before.mount("code")
	sister := boots(vm, 2, 1) // another daemon of that boot
	local, other := boots(h.addr, 3, 1), boots(h.addr, 4, 2)
	after := boots(vm, 5, 2)
	for _, g := range []*guest{before, sister} {
		if r := want[*wire.Refused](t, g.c); r.Errno != unix.ESHUTDOWN {
			t.Error(r)
		}
		gone(t, g.c)
	}
	h.logs.wait("session ended", errRebooted.Error())
	nameless := boots(vm, 6, 0) // it doesn't tell its boot
	for _, g := range []*guest{local, other, after, nameless} {
		if r := g.request("code"); r.Errno != 0 {
			t.Errorf("a session of another machine, or of this boot: %+v", r)
		}
	}
}

// A guest that has lost many sessions may begin one more: the longest lost gives way.
func TestLostSessionGivesWay(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	var gs []*guest
	for i := range maxSessions {
		g := keeper(t, h.addr, byte(i+1)).connect()
		f, id := g.mount("code")
		t.Cleanup(func() { f.Close() })
		if id == 0 {
			t.Fatal("no mount")
		}
		gs = append(gs, g)
	}
	awaitLost := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(15 * time.Second); h.lostSessions() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not %d control channels are lost", n)
			}
		}
	}
	for n, i := range []int{3, 5} {
		gs[i].c.Close()
		awaitLost(n + 1)
	}
	keeper(t, h.addr, 100).connect()
	h.logs.wait("session ended", errGaveWay.Error())
	refusedStream(t, gs[3], 1, unix.ENOENT)
	gs[5].connect() // it is there still
	awaitLost(0)
	c := dial(t, h.addr)
	send(t, c, keeper(t, h.addr, 101).hello())
	if r := want[*wire.Refused](t, c); r.Errno != unix.EAGAIN {
		t.Errorf("all sessions have their guest: %+v", r)
	}
}

// lostSessions counts those without control channel.
func (h *testHost) lostSessions() (n int) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for ss := range h.s.sessions {
		if !ss.lostSince().IsZero() {
			n++
		}
	}
	return n
}

// What was under way on the stream before is done before the next one is served, or answered.
func TestNextStreamWaits(t *testing.T) {
	fstest.Leaks(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	parent := os.NewFile(uintptr(fds[1]), "parent")
	defer parent.Close()
	conn, err := ipc.New(os.NewFile(uintptr(fds[0]), "worker"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	w := newWorker(conn)
	began, goOn := make(chan struct{}, 2), make(chan struct{})
	w.serve = func(_ *passthrough.FS, c io.ReadWriteCloser) error {
		began <- struct{}{}
		io.Copy(io.Discard, c) // the stream ends
		<-goOn                 // and what was under way goes on
		return nil
	}
	root, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if w.procFD, err = os.Open("/proc/self/fd"); err != nil {
		t.Fatal(err)
	}
	defer w.procFD.Close()
	if _, err := w.mount(&mountOrder{MountID: 1, Tag: "code", Keep: true}, root); err != nil {
		t.Fatal(err)
	}
	stream := func(number uint64) *transport.Conn {
		ours, theirs, err := transport.Pair()
		if err != nil {
			t.Fatal(err)
		}
		f, err := theirs.File()
		theirs.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.stream(&streamOrder{MountID: 1, Number: number, Reply: true}, f); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ours.Close() })
		return ours
	}
	first := stream(1)
	want[*wire.OpenReply](t, first)
	<-began
	second := stream(2)
	gone(t, first) // it gave way
	second.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := second.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answered before: %d, %v", n, err)
	}
	close(goOn)
	second.SetReadDeadline(time.Now().Add(15 * time.Second))
	want[*wire.OpenReply](t, second)
	<-began
	w.end()
	if len(w.mounts) != 0 {
		t.Error("a mount is left at the worker's end")
	}
}

// A session of the same id that begins anew has other numbers for its mounts: who comes back for one that was forgotten does not get another.
func TestForgottenMountIsNoOther(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code"), exportDir(t, "docs")}})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	f.Close()
	h.session().cancel(errNotBack)
	gone(t, g.c)
	h.logs.wait("session ended")
	g.connect()
	if _, other := g.mount("docs"); other == id {
		t.Errorf("both are mount %d", id)
	}
	refusedStream(t, g, id, unix.ENOENT)
}
