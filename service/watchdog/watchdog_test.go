// SPDX-License-Identifier: Apache-2.0

package watchdog

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"
)

// What a loop may do for how long.
func TestLook(t *testing.T) {
	var w Watchdog
	var l Loop
	remove := w.Add("pump", &l)
	start := time.Now()
	at := func(d time.Duration, slept bool) []string { return w.look(start.Add(d), slept, 30*time.Second) }
	for _, tt := range []struct {
		state State
		stuck bool
	}{{Running, true}, {WaitKernel, false}, {WaitPeer, false}, {WaitLock, true}} {
		l.Enter(tt.state)
		if bad := at(0, false); bad != nil {
			t.Errorf("%v: %v at once", tt.state, bad)
		}
		if bad := at(29*time.Second, false); bad != nil {
			t.Errorf("%v: %v after 29 s", tt.state, bad)
		}
		bad := at(31*time.Second, false)
		if (bad != nil) != tt.stuck {
			t.Errorf("%v after 31 s: %v", tt.state, bad)
		}
		if tt.stuck && !strings.Contains(bad[0], "pump: "+tt.state.String()) {
			t.Errorf("%q does not name the loop and its state", bad[0])
		}
	}
	// Round and round is no fault.
	l.Enter(Running)
	at(0, false)
	l.Enter(Running)
	if bad := at(time.Hour, false); bad != nil {
		t.Errorf("it went on: %v", bad)
	}
	// Nor is what happened while this process slept.
	if bad := at(2*time.Hour, true); bad != nil {
		t.Errorf("slept: %v", bad)
	}
	if bad := at(2*time.Hour+31*time.Second, false); bad == nil {
		t.Error("after that its time counts again")
	}
	remove()
	if bad := at(3*time.Hour, false); bad != nil {
		t.Errorf("removed: %v", bad)
	}
}

// A lock that is not given back is found.
func TestProbe(t *testing.T) {
	var w Watchdog
	var mu sync.Mutex
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.Probe(ctx, "sessions", time.Millisecond, &mu) })
	told := make(chan string)
	mu.Lock()
	wg.Go(func() {
		w.Run(ctx, 400*time.Millisecond, func() {}, func(s string) {
			select {
			case told <- s:
			case <-ctx.Done():
			}
		})
	})
	if text := <-told; !strings.Contains(text, "sessions: waiting for a lock") {
		t.Error(text)
	}
	mu.Unlock()
	cancel()
	wg.Wait()
}

// A stuck loop is told of once, and starves the watchdog until it goes on.
func TestRun(t *testing.T) {
	var w Watchdog
	var l Loop
	l.Enter(WaitPeer)
	defer w.Add("control", &l)()
	ctx, cancel := context.WithCancel(t.Context())
	fed, told := make(chan struct{}), make(chan string)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.Run(ctx, 400*time.Millisecond, func() {
			select {
			case fed <- struct{}{}:
			case <-ctx.Done():
			}
		}, func(s string) { told <- s })
	}()
	for range 10 {
		<-fed
	}
	l.Enter(Running)
	for text := ""; text == ""; {
		select {
		case <-fed: // until it is found stuck
		case text = <-told:
		}
	}
	select {
	case <-fed:
		t.Error("fed while a loop is stuck")
	case text := <-told:
		t.Errorf("told again: %s", text)
	case <-time.After(500 * time.Millisecond): // nothing happens: there is no event to wait for
	}
	l.Enter(WaitKernel)
	<-fed
	cancel()
	<-ended
}
