// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

const (
	rd = unix.F_RDLCK
	wr = unix.F_WRLCK
	un = unix.F_UNLCK
)

func (g *guest) lk(op fuse.Opcode, node, fh, owner uint64, typ uint32, start, end uint64) answer {
	g.t.Helper()
	return g.call(op, node, lkBody(fh, owner, typ, 0, start, end))
}

func lkBody(fh, owner uint64, typ, flags uint32, start, end uint64) []byte {
	return body(fuse.LkIn{Fh: fh, Owner: owner, LkFlags: flags, Lk: fuse.FileLock{Start: start, End: end, Type: typ, PID: uint32(1000 + owner)}})
}

// hostLock tries a lock as a process of the host: POSIX locks of this process would conflict with OFD locks
// like those of any other.
func hostLock(t testing.TB, fd int, typ int16, start, n int64) error {
	t.Helper()
	return unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: typ, Start: start, Len: n})
}

func TestLocks(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID
	fh1, fh2 := g.open(a, unix.O_RDWR), g.open(a, unix.O_RDONLY)
	host, err := unix.Open(g.host("a"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(host)

	g.want(0, g.lk(fuse.OpSetlk, a, fh1, 1, wr, 0, 9))
	g.want(unix.EAGAIN, g.lk(fuse.OpSetlk, a, fh2, 2, rd, 5, 5))
	g.want(0, g.lk(fuse.OpSetlk, a, fh2, 2, rd, 10, math.MaxInt64))
	if err := hostLock(t, host, unix.F_RDLCK, 0, 1); err != unix.EAGAIN {
		t.Errorf("the host's read lock beside the guest's write lock: %v", err)
	}
	if err := hostLock(t, host, unix.F_RDLCK, 20, 1); err != nil {
		t.Errorf("the host's read lock beside the guest's: %v", err)
	}
	g.want(unix.EAGAIN, g.lk(fuse.OpSetlk, a, fh1, 1, wr, 20, 20))
	if err := hostLock(t, host, unix.F_UNLCK, 0, 0); err != nil {
		t.Fatal(err)
	}

	l, _ := out[fuse.LkOut](g, g.lk(fuse.OpGetlk, a, fh2, 3, rd, 0, math.MaxInt64))
	if want := (fuse.FileLock{Start: 0, End: 9, Type: wr, PID: 1001}); l.Lk != want {
		t.Errorf("GETLK: %+v, want %+v", l.Lk, want)
	}
	// A FLUSH of another owner drops nothing, that of the owner all, through whatever handle.
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh1, LockOwner: 3})))
	g.want(unix.EAGAIN, g.lk(fuse.OpSetlk, a, fh2, 3, rd, 0, 0))
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh2, LockOwner: 1})))
	g.want(0, g.lk(fuse.OpSetlk, a, fh2, 3, rd, 0, 0))
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh2, LockOwner: 3})))
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh2, LockOwner: 2})))

	// OFD locks of the guest are dropped with their open file.
	g.want(0, g.lk(fuse.OpSetlk, a, fh1, 7, wr, 0, math.MaxInt64))
	g.release(a, fh1)
	if err := hostLock(t, host, unix.F_WRLCK, 0, 0); err != nil {
		t.Errorf("after RELEASE: %v", err)
	}
	if err := hostLock(t, host, unix.F_UNLCK, 0, 0); err != nil {
		t.Fatal(err)
	}
	g.release(a, fh2)
}

func TestFlock(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID
	fh1, fh2 := g.open(a, unix.O_RDONLY), g.open(a, unix.O_RDONLY)
	host, err := unix.Open(g.host("a"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(host)
	flock := func(op fuse.Opcode, fh uint64, typ uint32) answer {
		return g.call(op, a, lkBody(fh, 1, typ, fuse.LK_FLOCK, 0, math.MaxInt64))
	}
	g.want(0, flock(fuse.OpSetlk, fh1, rd))
	g.want(0, flock(fuse.OpSetlk, fh2, rd))
	g.want(unix.EAGAIN, flock(fuse.OpSetlk, fh2, wr))
	if err := unix.Flock(host, unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the host's flock: %v", err)
	}
	g.want(0, flock(fuse.OpSetlk, fh1, un))
	g.want(0, flock(fuse.OpSetlkw, fh2, wr))
	waiting := g.send(fuse.OpSetlkw, a, lkBody(fh1, 1, rd, fuse.LK_FLOCK, 0, math.MaxInt64))
	g.serving()
	g.want(0, g.call(fuse.OpRelease, a, body(fuse.ReleaseIn{Fh: fh2, ReleaseFlags: fuse.RELEASE_FLOCK_UNLOCK})))
	g.want(0, g.recv(waiting))
	g.want(0, g.call(fuse.OpRelease, a, body(fuse.ReleaseIn{Fh: fh1, ReleaseFlags: fuse.RELEASE_FLOCK_UNLOCK})))
	if err := unix.Flock(host, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the host's flock afterwards: %v", err)
	}
}

func TestLockWaitsAndInterrupts(t *testing.T) {
	g := newGuest(t, func(c *Config) { c.Limits = &Limits{Waits: 100} })
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID
	fh := g.open(a, unix.O_RDWR)
	wait := func(owner uint64) uint64 {
		return g.send(fuse.OpSetlkw, a, lkBody(fh, owner, wr, 0, 0, math.MaxInt64))
	}
	interrupt := func(unique uint64) {
		b := body(fuse.InterruptIn{Unique: unique})
		g.write(body(fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(b)), Opcode: fuse.OpInterrupt, Unique: unique | 1}, b))
	}
	g.want(0, g.lk(fuse.OpSetlkw, a, fh, 1, wr, 0, math.MaxInt64))

	// Interrupted; the session serves meanwhile, and the lock is not taken later on.
	w := wait(2)
	g.serving()
	interrupt(w)
	g.want(unix.EINTR, g.recv(w))
	// An INTERRUPT that overtakes its request, and those of requests that are done or never were.
	interrupt(g.unique + 2)
	g.want(unix.EINTR, g.recv(wait(2)))
	interrupt(2)
	interrupt(0)
	interrupt(math.MaxUint64)
	g.serving()

	// Unlocking wakes one after the other.
	w2, w3 := wait(2), wait(3)
	g.want(0, g.lk(fuse.OpSetlk, a, fh, 1, un, 0, math.MaxInt64))
	first, second := uint64(2), uint64(3)
	u, r := g.next()
	g.want(0, r)
	if u == w3 {
		first, second, w2, w3 = second, first, w3, w2
	}
	g.want(unix.EAGAIN, g.lk(fuse.OpSetlk, a, fh, second, wr, 0, 0))
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh, LockOwner: first})))
	g.want(0, g.recv(w3))
	g.want(0, g.call(fuse.OpFlush, a, body(fuse.FlushIn{Fh: fh, LockOwner: second})))

	// The host's processes do not tell when they unlock; the guest gets it all the same.
	host, err := unix.Open(g.host("a"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := hostLock(t, host, unix.F_WRLCK, 0, 0); err != nil {
		t.Fatal(err)
	}
	w = wait(4)
	g.serving()
	begin := time.Now()
	if err := hostLock(t, host, unix.F_UNLCK, 0, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(host)
	g.want(0, g.recv(w))
	if d := time.Since(begin); d > time.Second {
		t.Errorf("got the host's lock after %v", d)
	}

	// More waiters than there may be; then the stream ends with all of them.
	refused := 0
	var last uint64
	for owner := range uint64(150) {
		last = wait(10 + owner)
	}
	for range 50 {
		if _, r := g.next(); r.errno == unix.ENOLCK {
			refused++
		}
	}
	if refused != 50 {
		t.Errorf("%d waiters were refused", refused)
	}
	interrupt(last) // was refused: for nobody
	g.serving()
}
