// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/transport"
)

// fakeDevice is a device whose kernel is the test: one packet a message, as /dev/fuse has it.
func fakeDevice(t *testing.T) (dev *os.File, kernel int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	return os.NewFile(uintptr(fds[0]), "device"), fds[1]
}

func TestDevice(t *testing.T) {
	f, kernel := fakeDevice(t)
	d, err := newDevice(f)
	if err != nil {
		t.Fatal(err)
	}
	w, err := newWaker()
	if err != nil {
		t.Fatal(err)
	}
	wait := func(asks bool, timeout int) (ready, woken bool) {
		var fds [2]unix.PollFd
		woken, err := d.waitWith(w, &transport.Spinner{}, asks, fds[:], timeout)
		if err != nil {
			t.Error(err)
		}
		return fds[0].Revents != 0, woken
	}
	if ready, woken := wait(true, 1); ready || woken {
		t.Errorf("wait with nothing there: %v, %v", ready, woken)
	}
	unix.Write(kernel, []byte("request"))
	if ready, woken := wait(true, -1); !ready || woken {
		t.Errorf("wait with a request there: %v, %v", ready, woken)
	}
	if ready, woken := wait(false, 1); ready || woken {
		t.Errorf("wait for other things with a request there: %v, %v", ready, woken)
	}
	unix.Read(d.fd, make([]byte, 16))
	done, gone := make(chan bool), make(chan bool)
	go func() { _, woken := wait(true, -1); done <- woken }()
	go func() { gone <- d.waitGone(w) }()
	w.wake()
	if !<-done {
		t.Error("wait ended, and was not woken")
	}
	if <-gone {
		t.Error("gone, when it was only woken")
	}
	w.close()
	w.wake() // harmless
	if w, err = newWaker(); err != nil {
		t.Fatal(err)
	}
	defer w.close()
	go func() { gone <- d.waitGone(w) }()
	unix.Shutdown(kernel, unix.SHUT_RDWR)
	if !<-gone {
		t.Error("not gone, when it was")
	}
	g, err := d.dup()
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	d.close()
	if _, err := d.dup(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("dup after close: %v, want os.ErrClosed", err)
	}
}

// What nobody waits for goes with the next request, in one write and before it, or by itself after a moment.
func TestHeldRequestsTravelTogether(t *testing.T) {
	for _, op := range []fuse.Opcode{fuse.OpForget, fuse.OpRelease} {
		t.Run(op.String(), func(t *testing.T) { testHeldRequestsTravelTogether(t, op) })
	}
}

func testHeldRequestsTravelTogether(t *testing.T, held fuse.Opcode) {
	dev, kernel := fakeDevice(t)
	a, b := streamPair(t)
	p, err := NewPump(dev, a, PumpOptions{NoFlush: true})
	if err != nil {
		t.Fatal(err)
	}
	ran := make(chan error)
	go func() { ran <- p.Run() }()
	const size = 24 // of RELEASE's body
	request := func(op fuse.Opcode, unique uint64) []byte {
		body := make([]byte, size)
		m := fuse.Append(nil, &fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(body)), Opcode: op, Unique: unique})
		return append(m, body...)
	}
	uniques := func(n int) (got []uint64) {
		buf := make([]byte, n*(fuse.InHeaderSize+size))
		b.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadFull(b, buf); err != nil {
			t.Fatal(err)
		}
		for ; len(buf) > 0; buf = buf[fuse.InHeaderSize+size:] {
			got = append(got, binary.LittleEndian.Uint64(buf[8:]))
		}
		return got
	}
	// Both are there before the pump can have looked twice, or the moment has passed: the order is the same.
	unix.Write(kernel, request(held, 1))
	unix.Write(kernel, request(fuse.OpGetattr, 2))
	if got := uniques(2); got[0] != 1 || got[1] != 2 {
		t.Errorf("order %v, want 1, 2", got)
	}
	start := time.Now()
	unix.Write(kernel, request(held, 3))
	if got := uniques(1); got[0] != 3 {
		t.Errorf("got %v, want 3", got)
	}
	if waited := time.Since(start); waited < holdDelay*time.Millisecond/2 {
		t.Errorf("a %v by itself went out after %v: it did not wait for company", held, waited)
	}
	p.Close()
	if err := <-ran; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Run: %v", err)
	}
}

// A RELEASE is held back only where nobody can wait for what it does.
func TestHeldReleases(t *testing.T) {
	holds := func(noFlush bool, flags uint32, locked uint64) (n int) {
		p := Pump{shortcuts: shortcuts{noFlush: noFlush, locked: map[uint64]struct{}{locked: {}}}}
		for range 2 * maxReleases {
			if p.holds(&fuse.InHeader{Opcode: fuse.OpRelease, NodeID: 5}, fuse.Append(nil, &fuse.ReleaseIn{Fh: 1, Flags: flags})) {
				n++
			}
		}
		return n
	}
	for _, c := range []struct {
		name    string
		noFlush bool
		flags   uint32
		locked  uint64
		want    int
	}{
		{"open for reading", true, unix.O_RDONLY | unix.O_CLOEXEC, 6, maxReleases},
		{"open for writing", true, unix.O_WRONLY, 6, 0},
		{"open for both", true, unix.O_RDWR, 6, 0},
		{"locked", true, unix.O_RDONLY, 5, 0},
		{"nobody knows what is locked", false, unix.O_RDONLY, 6, 0},
	} {
		if got := holds(c.noFlush, c.flags, c.locked); got != c.want {
			t.Errorf("%s: %d are held back, want %d", c.name, got, c.want)
		}
	}
}
