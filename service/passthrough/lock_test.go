// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func TestSetRange(t *testing.T) {
	const r, w, u = unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK
	for _, c := range []struct {
		name string
		add  []lockRange
		want []lockRange
	}{
		{"one", []lockRange{{0, 9, w, 1}}, []lockRange{{0, 9, w, 1}}},
		{"hole", []lockRange{{0, 9, w, 1}, {3, 5, u, 1}}, []lockRange{{0, 2, w, 1}, {6, 9, w, 1}}},
		{"neighbours merge", []lockRange{{0, 9, w, 1}, {10, 19, w, 1}}, []lockRange{{0, 19, w, 1}}},
		{"kinds do not", []lockRange{{0, 9, w, 1}, {10, 19, r, 1}}, []lockRange{{0, 9, w, 1}, {10, 19, r, 1}}},
		{"fill", []lockRange{{0, 9, w, 1}, {20, 29, w, 1}, {10, 19, w, 1}}, []lockRange{{0, 29, w, 1}}},
		{"downgrade inside", []lockRange{{0, 9, w, 1}, {3, 5, r, 1}}, []lockRange{{0, 2, w, 1}, {3, 5, r, 1}, {6, 9, w, 1}}},
		{"to the end", []lockRange{{5, math.MaxInt64, w, 1}, {0, math.MaxInt64, u, 1}}, []lockRange{}},
		{"cover", []lockRange{{1, 2, r, 1}, {4, 5, w, 1}, {0, 9, w, 2}}, []lockRange{{0, 9, w, 2}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var rs []lockRange
			for _, a := range c.add {
				rs = setRange(rs, a)
			}
			if d := cmp.Diff(c.want, rs, cmp.AllowUnexported(lockRange{})); d != "" {
				t.Error("-want +got\n", d)
			}
		})
	}
}

// TestSetRangeModel compares setRange with a map of bytes.
func TestSetRangeModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	const size = 24
	for range 300 {
		var rs []lockRange
		var model [size]uint32
		for i := range model {
			model[i] = unix.F_UNLCK
		}
		for range 30 {
			a, b := uint64(rnd.IntN(size)), uint64(rnd.IntN(size))
			add := lockRange{min(a, b), max(a, b), uint32(rnd.IntN(3)), 1}
			rs = setRange(rs, add)
			for i := add.start; i <= add.end; i++ {
				model[i] = add.typ
			}
			var got [size]uint32
			for i := range got {
				got[i] = unix.F_UNLCK
			}
			for i, r := range rs {
				if i > 0 && (rs[i-1].end >= r.start || rs[i-1].end+1 == r.start && rs[i-1].typ == r.typ) {
					t.Fatalf("not sorted, disjoint and merged: %v", rs)
				}
				for j := r.start; j <= r.end; j++ {
					got[j] = r.typ
				}
			}
			if d := cmp.Diff(model, got); d != "" {
				t.Fatal("-want +got\n", d)
			}
		}
	}
}

func lockFile(t *testing.T) (string, func() (int, fuse.Errno)) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, func() (int, fuse.Errno) {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		return fd, errnoOf(err)
	}
}

func TestLockTable(t *testing.T) {
	path, open := lockFile(t)
	other, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) // another process of the host, in effect
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	descriptors := 0
	l := lockTable{give: func() { descriptors-- }}
	owned := open
	open = func() (int, fuse.Errno) { descriptors++; return owned() }
	lk := func(start, end uint64, typ uint32, pid uint32) *fuse.FileLock {
		return &fuse.FileLock{Start: start, End: end, Type: typ, PID: pid}
	}
	try := func(want fuse.Errno, owner uint64, k *fuse.FileLock) {
		t.Helper()
		if got := l.set(1, owner, 10+owner, k, open); got != want {
			t.Fatalf("set for %d: %v, want %v", owner, got, want)
		}
	}
	host := func(want fuse.Errno, start, end uint64, typ uint32) {
		t.Helper()
		f, _ := flock(lk(start, end, typ, 0))
		if got := ofdLock(other, unix.F_OFD_SETLK, f); got != want {
			t.Fatalf("the host's lock: %v, want %v", got, want)
		}
	}
	const r, w, u = unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK

	try(0, 1, lk(0, 9, w, 71))
	try(unix.EAGAIN, 2, lk(5, 20, r, 72))
	try(0, 2, lk(10, 20, r, 72))
	host(unix.EAGAIN, 0, 0, r)
	host(0, 15, 15, r)
	host(unix.EAGAIN, 15, 15, w)

	got := lk(0, math.MaxInt64, w, 0)
	if errno := l.get(1, 2, got, other); errno != 0 {
		t.Fatal(errno)
	}
	if d := cmp.Diff(lk(0, 9, w, 71), got); d != "" {
		t.Error("GETLK: -want +got\n", d)
	}
	got = lk(100, 200, w, 0)
	if errno := l.get(1, 2, got, other); errno != 0 || got.Type != u {
		t.Errorf("GETLK of a free range: %v, %+v", errno, got)
	}

	for _, bad := range []*fuse.FileLock{lk(5, 4, w, 0), lk(0, math.MaxUint64, w, 0), lk(0, 1, 3, 0)} {
		try(unix.EINVAL, 1, bad)
		if errno := l.get(1, 1, bad, other); errno != unix.EINVAL {
			t.Errorf("GETLK: %v", errno)
		}
	}

	if l.flush(1, 3) || l.release(1, 99) || !l.release(1, 11) || !l.flush(1, 2) {
		t.Error("flush or release of the wrong owners")
	}
	host(0, 0, math.MaxInt64, w)
	try(unix.EAGAIN, 1, lk(0, 0, w, 0))
	host(0, 0, math.MaxInt64, u)

	// The bound counts ranges, not calls; unlocking works when it is reached.
	for i := range uint64(maxLocks) - 1 {
		try(0, 5, lk(2*i, 2*i, w, 0))
	}
	try(unix.ENOLCK, 5, lk(1<<40, 1<<40, w, 0))
	try(0, 5, lk(0, math.MaxInt64, u, 0))
	if l.n.Load() != 0 || l.ranges != 0 || len(l.nodes) != 0 {
		t.Errorf("left: %d owners, %d ranges", l.n.Load(), l.ranges)
	}
	try(0, 5, lk(1, 1, w, 0))
	l.close()
	host(0, 0, math.MaxInt64, w)
	if descriptors != 0 {
		t.Errorf("%d descriptors opened and not given back", descriptors)
	}
}

func TestLockWaits(t *testing.T) {
	const most = 50
	limits := &Limits{Waits: most}
	limits.init()
	l := newLockWaits(limits)
	held := make(chan struct{}) // closed: free
	type answer struct {
		unique uint64
		errno  fuse.Errno
	}
	answers := make(chan answer, 10)
	wait := func(unique uint64, stream any) fuse.Errno {
		return l.add(&lockWait{unique: unique, stream: stream,
			try: func() fuse.Errno {
				select {
				case <-held:
					return 0
				default:
					return unix.EAGAIN
				}
			},
			reply: func(e fuse.Errno) { answers <- answer{unique, e} }})
	}
	want := func(w answer) {
		t.Helper()
		select {
		case got := <-answers:
			if got != w {
				t.Fatalf("got %v, want %v", got, w)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("no answer, want %v", w)
		}
	}
	l.interrupt(2) // before its request
	if errno := wait(2, "a"); errno != unix.EINTR {
		t.Fatalf("a wait that was interrupted before: %v", errno)
	}
	for _, u := range []uint64{4, 6, 8} {
		stream := map[bool]string{true: "b", false: "a"}[u == 8]
		if errno := wait(u, stream); errno != 0 {
			t.Fatal(errno)
		}
	}
	l.interrupt(6)
	want(answer{6, unix.EINTR})
	l.drop("b")
	want(answer{8, unix.EINTR})
	close(held) // without a call: as another process of the host does
	want(answer{4, 0})
	l.wait()

	held = make(chan struct{})
	for u := uint64(100); u < 100+most; u++ {
		if errno := wait(u, "c"); errno != 0 {
			t.Fatal(errno)
		}
	}
	if errno := wait(99, "c"); errno != unix.ENOLCK {
		t.Errorf("one waiter too many: %v", errno)
	}
	answers = make(chan answer, most)
	l.drop("c")
	if len(answers) != most {
		t.Errorf("%d answers at the end of the stream", len(answers))
	}
	l.wait()
}
