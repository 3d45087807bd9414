// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"
)

func blockedPair(t *testing.T) (a, b *Conn) {
	t.Helper()
	checkLeaks(t)
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	if err := a.Block(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestBlockLeavesThePoller(t *testing.T) {
	a, b := blockedPair(t)
	if err := a.SetDeadline(time.Now()); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("SetDeadline after Block: %v, want os.ErrNoDeadline", err)
	}
	go b.Write([]byte("there"))
	buf := make([]byte, 16)
	if n, err := a.Read(buf); err != nil || string(buf[:n]) != "there" {
		t.Errorf("Read: %q, %v", buf[:n], err)
	}
}

// Close wakes whoever waits in read(2) or write(2), and tells the peer.
func TestBlockedConnCloseWakes(t *testing.T) {
	a, b := blockedPair(t)
	var wg sync.WaitGroup
	started := make(chan struct{}, 2)
	wg.Go(func() {
		started <- struct{}{}
		if n, err := a.Read(make([]byte, 1)); err == nil {
			t.Errorf("Read returned %d bytes", n)
		}
	})
	wg.Go(func() {
		started <- struct{}{}
		if _, err := a.Write(make([]byte, 64<<20)); err == nil { // more than any buffer holds
			t.Error("Write of what nobody reads: no error")
		}
	})
	<-started
	<-started
	// Whether they wait in their system calls already or begin now, they return.
	a.Close()
	wg.Wait()
	if _, err := io.Copy(io.Discard, b); err != nil {
		t.Errorf("peer: %v, want the end of file", err)
	}
}

func TestBlockedConnWritesWhole(t *testing.T) {
	a, b := blockedPair(t)
	const size = 1 << 20
	var wg sync.WaitGroup
	for c := range 4 {
		wg.Go(func() {
			if _, err := a.Write(bytes.Repeat([]byte{byte(c)}, size)); err != nil {
				t.Error(err)
			}
		})
	}
	buf := make([]byte, size)
	for range 4 {
		if _, err := io.ReadFull(b, buf); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf, bytes.Repeat(buf[:1], size)) {
			t.Fatal("two Writes are mixed")
		}
	}
	wg.Wait()
}

func TestBlockedConnAllocatesNothing(t *testing.T) {
	a, b := blockedPair(t)
	if err := b.Block(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 80)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := a.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(b, buf); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a message", n)
	}
}

// A goroutine that reads and reads goes through the scheduler about every yieldTime, and not at each message.
func TestReadYields(t *testing.T) {
	a, b := blockedPair(t)
	var y Yielder
	y.Yield()
	first := y.last.Load()
	if y.Yield(); y.last.Load() != first {
		t.Error("yields again at once")
	}
	buf := []byte{0}
	for begin := time.Now(); time.Since(begin) < 2*yieldTime; {
		if _, err := b.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	if a.yielder.last.Load() <= first+int64(yieldTime) {
		t.Error("Read of a blocking Conn did not yield")
	}
	if b.yielder.last.Load() != 0 {
		t.Error("Read of a Conn in the poller yields by itself, and need not")
	}
}
