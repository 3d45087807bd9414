// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// again ends the guest's stream and begins another of the same mount. What Serve returned for the old one is checked.
func (g *guest) again(ended <-chan error) <-chan error {
	g.t.Helper()
	g.c.Close()
	select {
	case err := <-ended:
		if err != nil {
			g.t.Fatalf("Serve: %v", err)
		}
	case <-time.After(20 * time.Second):
		g.t.Fatal("the stream does not end")
	}
	return g.dial()
}

// A mount goes on with another stream: nodes, open files and locks are the mount's, and INIT is not sent again.
func TestStreamAfterStream(t *testing.T) {
	g, ended := newGuestStream(t, nil)
	a, fh := g.create(1, "a", 0o644)
	g.want(0, g.call(fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Size: 5}, []byte("bytes"))))
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 1, wr, 0, 9))
	g.want(0, g.call(fuse.OpUnlink, 1, body("a"))) // open, and without a name

	*ended = g.again(*ended)
	g.want(unix.EPROTO, g.call(fuse.OpInit, 0, initBody()))
	if r := g.want(0, g.call(fuse.OpRead, a.NodeID, body(fuse.ReadIn{Fh: fh, Size: 100}))); string(r.body) != "bytes" {
		t.Errorf("read %q from the open file", r.body)
	}
	g.want(unix.EAGAIN, g.lk(fuse.OpSetlk, a.NodeID, fh, 2, rd, 5, 5))
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 1, un, 0, math.MaxInt64))
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 2, rd, 5, 5))
	g.release(a.NodeID, fh)
	if g.fs.Destroyed() {
		t.Error("a stream's end is no DESTROY")
	}
	g.want(0, g.call(fuse.OpDestroy, 0, nil))
	if !g.fs.Destroyed() {
		t.Error("DESTROY is not told")
	}
}

// A lock that was waited for on a stream that has ended is not got later on; the kernel sends the request again.
func TestLockWaitEndsWithStream(t *testing.T) {
	g, ended := newGuestStream(t, nil)
	a, fh := g.create(1, "a", 0o644)
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 1, wr, 0, 9))
	w := g.send(fuse.OpSetlkw, a.NodeID, lkBody(fh, 2, wr, 0, 0, 9))
	g.serving()

	*ended = g.again(*ended)
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 1, un, 0, 9))
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 3, wr, 0, 9)) // owner 2 has not got it

	// Sent again: the bit stays in the reply, and an INTERRUPT finds its request with or without it.
	for _, bit := range []uint64{0, uniqueResend} {
		g.resend(fuse.OpSetlkw, a.NodeID, w, lkBody(fh, 2, wr, 0, 0, 9))
		g.serving()
		b := body(fuse.InterruptIn{Unique: w | bit})
		g.write(body(fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(b)), Opcode: fuse.OpInterrupt, Unique: w | bit | 1}, b))
		g.want(unix.EINTR, g.recv(w|uniqueResend))
	}
	g.resend(fuse.OpSetlkw, a.NodeID, w, lkBody(fh, 2, wr, 0, 0, 9))
	g.serving()
	g.want(0, g.lk(fuse.OpSetlk, a.NodeID, fh, 3, un, 0, 9))
	g.want(0, g.recv(w|uniqueResend))
	g.resend(fuse.OpGetattr, 1, w+2, body(fuse.GetattrIn{}))
	g.want(0, g.recv((w+2)|uniqueResend))
}

// resend sends a request as the kernel does after FUSE_NOTIFY_RESEND.
func (g *guest) resend(op fuse.Opcode, node, unique uint64, b []byte) {
	g.t.Helper()
	g.write(body(fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(b)), Opcode: op, Unique: unique | uniqueResend, NodeID: node, PID: 4711}, b))
	g.unique = max(g.unique, unique)
}

// A wait that would begin after its stream has ended does not: the request may still have been under way.
func TestNoLockWaitOnEndedStream(t *testing.T) {
	limits := &Limits{}
	limits.init()
	l := newLockWaits(limits)
	ended := make(chan struct{})
	close(ended)
	w := &lockWait{unique: 2, ended: ended, try: func() fuse.Errno { t.Error("tried"); return 0 }, reply: func(fuse.Errno) { t.Error("answered") }}
	if e := l.add(w); e != unix.EINTR {
		t.Errorf("add: %v", e)
	}
	l.wait()
}
