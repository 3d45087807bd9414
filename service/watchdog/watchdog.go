// SPDX-License-Identifier: Apache-2.0

// Package watchdog tells a service manager that the loops of a program go on, and stops telling when one is stuck.
//
// Decisions:
//   - Who says that a loop goes on is the loop itself: it publishes what it does (Loop.Enter), at the cost of one store. A timer that
//     fed the watchdog by itself would only show that timers work.
//   - To wait for the kernel or for a peer is no fault, however long: a host may be stopped, a VM may be paused. Only what runs,
//     or waits for a lock of this program, and does nothing else for half of the watchdog's time is stuck.
//   - Time that this process itself was not running in (a stopped or suspended machine) counts for nobody.
package watchdog

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// State is what a loop does.
type State uint8

// The states of a loop.
const (
	Running State = iota
	WaitKernel
	WaitPeer
	WaitLock
)

func (s State) String() string {
	return [...]string{"running", "waiting for the kernel", "waiting for its peer", "waiting for a lock"}[s&3]
}

// mayStick says whether to stay in s is a fault.
func (s State) mayStick() bool { return s == Running || s == WaitLock }

// Loop is what one goroutine publishes of itself. The zero value runs.
type Loop struct {
	n uint64 // of the goroutine alone
	v atomic.Uint64
}

// Enter says that the loop is in s now. Only the loop's own goroutine calls it, each time round.
func (l *Loop) Enter(s State) {
	l.n++
	l.v.Store(l.n<<2 | uint64(s))
}

// Watchdog looks at loops. The zero value has none. Any goroutine may call its methods.
type Watchdog struct {
	mu    sync.Mutex // guards loops
	loops map[*Loop]*seen
}

// seen is what was seen of a loop when it last changed.
type seen struct {
	name  string
	v     uint64
	since time.Time
}

// Add has l looked at, until remove is called. The name is for the log.
func (w *Watchdog) Add(name string, l *Loop) (remove func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.loops == nil {
		w.loops = map[*Loop]*seen{}
	}
	w.loops[l] = &seen{name: name, v: l.v.Load(), since: time.Now()}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.loops, l)
	}
}

// Probe takes l now and then, until ctx ends: a lock that nobody gets any more stops whoever needs it, and no loop may be among those.
func (w *Watchdog) Probe(ctx context.Context, name string, period time.Duration, l sync.Locker) {
	var loop Loop
	loop.Enter(WaitPeer)
	defer w.Add(name, &loop)()
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		loop.Enter(WaitLock)
		l.Lock()
		loop.Enter(Running)
		l.Unlock()
		loop.Enter(WaitPeer)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// Run calls feed while no loop is stuck, several times in timeout, until ctx ends. It calls stuck with the words for a
// loop each time that one is found stuck.
func (w *Watchdog) Run(ctx context.Context, timeout time.Duration, feed func(), stuck func(string)) {
	period := timeout / 8
	t := time.NewTicker(period)
	defer t.Stop()
	last := time.Now()
	var told []string
	for {
		now := time.Now()
		bad := w.look(now, now.Sub(last) > 2*period, timeout/2)
		last = now
		if len(bad) == 0 {
			feed()
		} else if !slices.Equal(bad, told) {
			for _, text := range bad {
				stuck(text)
			}
		}
		told = bad
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// look returns the loops that have done nothing for longer than limit. With slept this process did not run lately.
func (w *Watchdog) look(now time.Time, slept bool, limit time.Duration) (bad []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for l, s := range w.loops {
		v := l.v.Load()
		if v != s.v || slept {
			s.v, s.since = v, now
			continue
		}
		if state := State(v & 3); state.mayStick() && now.Sub(s.since) > limit {
			bad = append(bad, fmt.Sprintf("%s: %v for over %v", s.name, state, limit))
		}
	}
	slices.Sort(bad)
	return bad
}
