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

	"golang.org/x/sys/unix"
)

func pair(t testing.TB) (a, b *Conn) {
	t.Helper()
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestPairPeer(t *testing.T) {
	checkLeaks(t)
	a, b := pair(t)
	want := Peer{Family: Unix, PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	diff(t, "peer of a", want, a.Peer())
	diff(t, "peer of b", want, b.Peer())
}

func TestReadWriteAllocateNothing(t *testing.T) {
	checkLeaks(t)
	a, b := pair(t)
	buf := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := a.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Read(buf); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for a Write and a Read, want none", n)
	}

	// The same where Read has to wait in the poller.
	var wg sync.WaitGroup
	wg.Go(func() {
		echo := make([]byte, 4096)
		for {
			n, err := b.Read(echo)
			if err != nil {
				return
			}
			if _, err := b.Write(echo[:n]); err != nil {
				t.Error(err)
				return
			}
		}
	})
	if n := testing.AllocsPerRun(100, func() {
		if _, err := a.Write(buf[:16]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(a, buf[:16]); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for a round trip, want none", n)
	}
	a.Close()
	wg.Wait()
}

// TestWritesAreWhole has writers fill far more than the buffers hold, with a
// reader that takes odd pieces: each message must arrive in one piece.
func TestWritesAreWhole(t *testing.T) {
	checkLeaks(t)
	a, b := pair(t)
	const writers, messages, size = 4, 4, 3 << 20
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			msg := bytes.Repeat([]byte{byte('a' + i)}, size)
			for range messages {
				if n, err := a.Write(msg); n != size || err != nil {
					t.Errorf("Write = %d, %v", n, err)
				}
			}
		})
	}
	msg := make([]byte, size)
	for range writers * messages {
		if _, err := io.ReadFull(b, msg); err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(msg, msg[:1]); n != size {
			t.Fatalf("only %d of %d bytes of a message are its own", n, size)
		}
	}
	wg.Wait()
}

func TestCloseWakes(t *testing.T) {
	tests := []struct {
		name string
		do   func(a, b *Conn) error
		want error // of a.Read
	}{
		{"Close", func(a, _ *Conn) error { return a.Close() }, os.ErrClosed},
		{"Shutdown", func(a, _ *Conn) error { return a.Shutdown() }, io.EOF},
		{"Shutdown of the peer", func(_, b *Conn) error { return b.Shutdown() }, io.EOF},
		{"Close of the peer", func(_, b *Conn) error { return b.Close() }, io.EOF},
		{"CloseWrite of the peer", func(_, b *Conn) error { return b.CloseWrite() }, io.EOF},
		{"deadline", func(a, _ *Conn) error { return a.SetReadDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			a, b := pair(t)
			got := make(chan error)
			go func() {
				_, err := a.Read(make([]byte, 1))
				got <- err
			}()
			if err := tt.do(a, b); err != nil {
				t.Fatal(err)
			}
			if err := <-got; !errors.Is(err, tt.want) {
				t.Errorf("Read = %v, want %v", err, tt.want)
			}
		})
	}
}

func TestCloseWriteLeavesReading(t *testing.T) {
	checkLeaks(t)
	a, b := pair(t)
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("Write after CloseWrite = %v, want EPIPE", err)
	}
	if _, err := b.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	b.Close()
	got, err := io.ReadAll(a)
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "answer", "answer", string(got))
}

func TestAfterClose(t *testing.T) {
	checkLeaks(t)
	a, _ := pair(t)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Shutdown(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Shutdown = %v, want os.ErrClosed", err)
	}
	if f, err := a.File(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("File = %v, %v, want os.ErrClosed", f, err)
	}
}

// TestFileAndNewConn passes a connection on as SCM_RIGHTS would, and then as
// a file that blocks.
func TestFileAndNewConn(t *testing.T) {
	for _, blocking := range []bool{false, true} {
		checkLeaks(t)
		a, b := pair(t)
		f, err := a.File()
		if err != nil {
			t.Fatal(err)
		}
		peer := a.Peer()
		a.Close()
		if blocking {
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if err := unix.SetNonblock(fd, false); err != nil {
				t.Fatal(err)
			}
			f = os.NewFile(uintptr(fd), "blocking")
		}
		c := NewConn(f, peer)
		diff(t, "peer", peer, c.Peer())
		if err := c.SetReadDeadline(time.Unix(1, 0)); err != nil {
			t.Errorf("not in the poller: %v", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read = %v, want os.ErrDeadlineExceeded", err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		c.Close()
		got, err := io.ReadAll(b)
		if err != nil {
			t.Fatal(err)
		}
		diff(t, "read", "hello", string(got))
	}
}
