// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

const (
	// A waiter tries again at once when the guest itself unlocks something, and else after a delay that doubles
	// from the first to the last of these: nothing tells us that another process of the host has unlocked. (F_OFD_SETLKW
	// would wait in the kernel, but on an OS thread for each waiter, and nothing but a signal ends it.)
	lockDelayMin = time.Millisecond
	lockDelayMax = 32 * time.Millisecond

	// maxEarly is how many INTERRUPTs are remembered that did not find their request.
	maxEarly = 256
)

// lockWaits has the SETLKW requests that wait. They hold no goroutine and no buffer of the stream that they came by, so
// that a guest with many of them can still send the unlock.
//
// One goroutine serves them all, only as long as there are any.
type lockWaits struct {
	wake   chan struct{} // of capacity 1: something was unlocked
	limits *Limits

	mu      sync.Mutex
	waits   []*lockWait // in the order of arrival
	early   [maxEarly]uint64
	earlyAt int
	running bool

	wg sync.WaitGroup // the goroutine
}

// lockWait is a SETLKW request that waits.
type lockWait struct {
	unique uint64            // without the resend bit
	stream any               // where it came from
	ended  <-chan struct{}   // closed when that has ended
	try    func() fuse.Errno // EAGAIN: not yet
	reply  func(fuse.Errno)  // called once
	delay  time.Duration
	next   time.Time
}

func newLockWaits(limits *Limits) *lockWaits {
	return &lockWaits{wake: make(chan struct{}, 1), limits: limits}
}

// add makes w wait: w.reply will be called. If it returns an errno, w.reply will not be.
func (l *lockWaits) add(w *lockWait) fuse.Errno {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-w.ended: // drop was here already
		return unix.EINTR
	default:
	}
	if i := slices.Index(l.early[:], w.unique); i >= 0 && w.unique != 0 {
		l.early[i] = 0
		return unix.EINTR
	}
	if !take(&l.limits.waits, l.limits.Waits) {
		return unix.ENOLCK
	}
	w.delay = lockDelayMin
	w.next = time.Now().Add(w.delay)
	l.waits = append(l.waits, w)
	if !l.running {
		l.running = true
		l.wg.Go(l.run)
	} else {
		l.unlocked() // the goroutine may sleep for longer than this one's delay
	}
	return 0
}

// unlocked makes all waiters try again.
func (l *lockWaits) unlocked() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// interrupt answers EINTR to the waiter unique. If it does not wait (yet: an INTERRUPT may come by
// another way than its request and be first), it is remembered. A unique comes twice only where the kernel sends one
// request again, so one that was not for a SETLKW does no harm.
func (l *lockWaits) interrupt(unique uint64) {
	l.mu.Lock()
	i := slices.IndexFunc(l.waits, func(w *lockWait) bool { return w.unique == unique })
	if i < 0 {
		l.early[l.earlyAt] = unique
		l.earlyAt = (l.earlyAt + 1) % maxEarly
		l.mu.Unlock()
		return
	}
	w := l.waits[i]
	l.waits = slices.Delete(l.waits, i, i+1)
	l.mu.Unlock()
	l.answer(w, unix.EINTR)
}

func (l *lockWaits) answer(w *lockWait, errno fuse.Errno) {
	l.limits.waits.Add(-1)
	w.reply(errno)
}

// drop answers EINTR to the waiters of a stream that has ended: nobody hears it, but a lock that was got later would be
// nobody's.
func (l *lockWaits) drop(stream any) {
	var gone []*lockWait
	l.mu.Lock()
	l.waits = slices.DeleteFunc(l.waits, func(w *lockWait) bool {
		if w.stream != stream {
			return false
		}
		gone = append(gone, w)
		return true
	})
	l.mu.Unlock()
	for _, w := range gone {
		l.answer(w, unix.EINTR)
	}
	l.unlocked()
}

// wait returns when nobody waits and the goroutine has ended. Precondition: nobody adds any more.
func (l *lockWaits) wait() { l.wg.Wait() }

// run is the goroutine. It ends when nobody waits.
func (l *lockWaits) run() {
	timer := time.NewTimer(lockDelayMin)
	defer timer.Stop()
	for {
		woken := false
		select {
		case <-l.wake:
			woken = true
		case <-timer.C:
		}
		now := time.Now()
		l.mu.Lock()
		var due []*lockWait
		for _, w := range l.waits {
			if woken || !now.Before(w.next) {
				due = append(due, w)
			}
		}
		l.mu.Unlock()
		for _, w := range due {
			l.attempt(w)
		}
		l.mu.Lock()
		if len(l.waits) == 0 {
			l.running = false
			l.mu.Unlock()
			return
		}
		next := l.waits[0].next
		for _, w := range l.waits {
			if w.next.Before(next) {
				next = w.next
			}
		}
		l.mu.Unlock()
		timer.Reset(time.Until(next))
	}
}

// attempt tries w's lock and answers if that is decided. The lock is taken under mu: else an INTERRUPT between
// the try and the removal would answer EINTR to a lock that was got.
func (l *lockWaits) attempt(w *lockWait) {
	l.mu.Lock()
	i := slices.Index(l.waits, w)
	if i < 0 {
		l.mu.Unlock()
		return
	}
	errno := w.try()
	if errno == unix.EAGAIN {
		w.delay = min(2*w.delay, lockDelayMax)
		w.next = time.Now().Add(w.delay)
		l.mu.Unlock()
		return
	}
	l.waits = slices.Delete(l.waits, i, i+1)
	l.mu.Unlock()
	l.answer(w, errno)
}
