// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

const (
	maxTransfer = 1 << 20            // of a READ or WRITE, in bytes: max_write
	maxRequest  = maxTransfer + 4096 // of a whole request
	readAhead   = 32 << 10           // of small requests, read together
	keepReplies = 4 << 10            // of small replies, written together
	maxIdle     = 4                  // goroutines that wait for the turn to read; more end
	watchTick   = time.Millisecond
)

// stream is one connection. Its goroutines take turns in reading: who has the turn reads a request and serves it. If that
// is quick he reads the next one himself, which costs no switch of goroutines; else another takes the turn meanwhile:
// before he begins, if the operation is known to be slow, or moves data and more requests are there already; by the watch,
// if it turns out to be. Waking another for small requests costs more than it wins, even with a CPU to spare.
type stream struct {
	fs *FS
	c  io.ReadWriteCloser
	wg sync.WaitGroup

	turn     chan struct{} // holds the right to read when nobody has it
	idle     atomic.Int32  // goroutines that wait for it
	workers  atomic.Int32
	seq      atomic.Uint64 // odd while who has the turn serves; the watch takes it by making seq even
	watching atomic.Bool
	wake     chan struct{} // begins the watch
	done     chan struct{} // closed when ended

	outMu sync.Mutex // serializes writing; it is held for the Write
	out   []byte     // small replies that go with the next one

	// For who has the turn.
	bulk  bulk
	buf   []byte // bytes r to w were read and not used
	r, w  int
	ended bool
	err   error
}

// Serve serves the requests of one stream until it ends: nil at its end, after DESTROY, or when c is closed, else what is wrong with it. It
// writes replies whole, several in one Write where they are ready together, from several goroutines, and closes c. The streams of one mount may be served at once,
// or one after the other: what the guest knows and has open is the mount's. Of a stream that breaks off the requests under way are done, and their replies lost.
func (fs *FS) Serve(c io.ReadWriteCloser) error {
	s := &stream{fs: fs, c: c, turn: make(chan struct{}, 1), wake: make(chan struct{}, 1), done: make(chan struct{}), buf: make([]byte, readAhead), out: make([]byte, 0, keepReplies)}
	s.beginBulk()
	s.wg.Go(s.watch)
	s.pass()
	s.wg.Wait()
	s.endBulk()
	c.Close() // an error can't be of a reply: those were written
	return s.err
}

// pass gives the turn away.
func (s *stream) pass() {
	s.turn <- struct{}{}
	if s.idle.Load() == 0 && s.fs.limits.takeServer(int64(s.workers.Load())) {
		s.workers.Add(1)
		s.wg.Go(s.work)
	}
}

func (s *stream) work() {
	defer s.fs.limits.serving.Add(-1)
	defer s.workers.Add(-1)
	r := &request{fs: s.fs, s: s}
	for {
		if s.idle.Add(1) > maxIdle {
			s.idle.Add(-1)
			return
		}
		<-s.turn
		s.idle.Add(-1)
		for mine := true; mine; mine = s.serve(r) {
			if s.ended || !s.next(r) {
				if !s.ended {
					s.end()
				}
				s.turn <- struct{}{} // for the others to see it
				return
			}
		}
	}
}

// watch gives the turn to another goroutine when who has it serves for longer than a tick. It sleeps while nothing is served.
func (s *stream) watch() {
	for {
		select {
		case <-s.wake:
		case <-s.done:
			return
		}
		var last uint64
		for quiet := 0; quiet < 20; quiet++ {
			time.Sleep(watchTick)
			select {
			case <-s.done:
				return
			default:
			}
			switch seq := s.seq.Load(); {
			case seq != last:
				last, quiet = seq, 0
			case seq%2 == 1 && s.seq.CompareAndSwap(seq, seq+1):
				s.flush()
				s.pass()
			}
		}
		s.closeFreePipes()
		s.watching.Store(false)
		if s.seq.Load() != last { // began before it could see that we don't watch
			s.beWatched()
		}
	}
}

// end is for who has the turn, once. Requests under way go on, but for locks that are waited for.
func (s *stream) end() {
	s.ended = true
	close(s.done)
	s.fs.second.streamEnded(s)
}

func (s *stream) beWatched() {
	if !s.watching.Load() {
		s.watching.Store(true)
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// next reads a request. The caller has the turn. False: the stream has ended, s.err says why.
func (s *stream) next(r *request) bool {
	err := s.read(r)
	if err == nil {
		return true
	}
	r.release()
	if err != io.EOF {
		s.err = err
		s.c.Close() // wakes who writes
	}
	return false
}

// read fills r.hdr and r.body. io.EOF is the end between two requests.
func (s *stream) read(r *request) error {
	for s.w-s.r < fuse.InHeaderSize {
		if s.r > 0 {
			s.w = copy(s.buf, s.buf[s.r:s.w])
			s.r = 0
		}
		room := s.buf[s.w:]
		if s.bulk.writes {
			room = room[:fuse.WriteHead-s.w]
		}
		n, err := s.c.Read(room)
		s.w += n
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && s.w > 0 {
				return fmt.Errorf("the stream ended within a request: %w", io.ErrUnexpectedEOF)
			}
			if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, os.ErrClosed) {
				return io.EOF
			}
			return fmt.Errorf("reading a request: %w", err)
		}
	}
	fuse.Decode(&r.hdr, s.buf[s.r:s.w])
	if r.hdr.Len < uint32(fuse.InHeaderSize) || r.hdr.Len > maxRequest {
		// Where the next request begins can't be known.
		return fmt.Errorf("a request of %d bytes (opcode %v, unique %d): the peer does not speak FUSE, or is hostile", r.hdr.Len, r.hdr.Opcode, r.hdr.Unique)
	}
	s.r += fuse.InHeaderSize
	n := int(r.hdr.Len) - fuse.InHeaderSize
	if s.goesPiped(r, n) {
		if err := s.readPiped(r, n); err != nil {
			return fmt.Errorf("reading the rest of a request: %w", err)
		}
		return nil
	}
	if n <= len(r.inSmall) {
		r.body = r.inSmall[:n]
	} else {
		r.inBuf = s.fs.limits.getBuffer(n, false)
		r.body = r.inBuf.b[:n]
	}
	have := copy(r.body, s.buf[s.r:s.w])
	s.r += have
	if have < n {
		if _, err := io.ReadFull(s.c, r.body[have:]); err != nil {
			return fmt.Errorf("reading the rest of a request: %w", err)
		}
	}
	return nil
}

// serve serves one request, and tells whether the caller still has the turn.
func (s *stream) serve(r *request) (mine bool) {
	var op *op
	if r.hdr.Opcode < fuse.OpMax {
		op = &ops[r.hdr.Opcode]
	}
	if r.hdr.Opcode == fuse.OpDestroy {
		s.fs.destroyed.Store(true) // before the guest can know that it was told
		s.answer(r, op, false)
		s.end()
		return true
	}
	more := s.more()
	if op != nil && (op.slow || more && op.moves) {
		s.flush()
		s.pass()
		s.answer(r, op, false)
		return false
	}
	seq := s.seq.Add(1)
	s.beWatched()
	s.answer(r, op, more)
	if s.seq.CompareAndSwap(seq, seq+1) {
		return true
	}
	s.flush() // what answer may have kept, when the turn was no longer ours
	return false
}

// more tells whether a whole request is there already. The caller has the turn.
func (s *stream) more() bool {
	there := s.buf[s.r:s.w]
	return len(there) >= fuse.InHeaderSize && uint64(binary.LittleEndian.Uint32(there)) <= uint64(len(there))
}

// answer serves the request and replies. With keep a small reply may wait for the next one.
func (s *stream) answer(r *request, op *op, keep bool) {
	r.out, r.end = r.outSmall[:fuse.OutHeaderSize], false
	r.seq, r.watches = s.fs.caching.seq.Load(), s.fs.dirs.count.Load()
	e := s.run(r, op)
	s.fs.requests.Add(1)
	s.fs.received.Add(uint64(r.hdr.Len))
	if e == later || r.hdr.Opcode.NoReply() {
		r.release()
		if !keep {
			s.flush()
		}
		return
	}
	if e != 0 {
		r.out = r.out[:fuse.OutHeaderSize]
	} else if op.names {
		s.fs.settle(r.hdr.NodeID)
	}
	var first []byte
	switch {
	case e != 0 || !s.fs.c.Ahead:
	case op.names:
		first = r.tellAhead()
	case r.end:
		first = r.tellEnd()
	}
	if e == 0 && r.sends {
		s.replyPiped(r)
	} else {
		s.reply(first, r.out, r.hdr.Unique, e, keep)
	}
	r.release()
}

// replyPiped writes what was kept, and the reply whose data are in the request's pipe.
func (s *stream) replyPiped(r *request) {
	size := len(r.out) + r.piped
	fuse.Put(r.out, &fuse.OutHeader{Len: uint32(size), Unique: r.hdr.Unique})
	s.fs.sent.Add(uint64(size))
	s.outMu.Lock()
	defer s.outMu.Unlock()
	s.flushLocked()
	if _, err := s.c.Write(r.out); err == nil && r.sendPiped() != nil {
		s.c.Close() // the rest of the reply can't come: who reads sees the end
	}
}

// reply writes b, which begins with room for the header, and before it first and what was kept; or keeps all that.
func (s *stream) reply(first, b []byte, unique uint64, e fuse.Errno, keep bool) {
	if e > fuse.MaxErrno {
		e = unix.EIO
	}
	fuse.Put(b, &fuse.OutHeader{Len: uint32(len(b)), Error: -int32(e), Unique: unique})
	s.fs.sent.Add(uint64(len(first) + len(b)))
	s.outMu.Lock()
	defer s.outMu.Unlock()
	fits := len(s.out)+len(first)+len(b) <= cap(s.out)
	if fits && (keep || len(s.out)+len(first) > 0) {
		s.out = append(append(s.out, first...), b...)
		b = nil
	}
	if !fits {
		s.flushLocked()
		s.out = append(s.out, first...)
	}
	if !keep || !fits {
		s.flushLocked()
	}
	if len(b) > 0 {
		// An error ends the stream: who reads sees it too.
		_, _ = s.c.Write(b)
	}
}

// flush writes the replies that were kept. They are kept only by who has the turn, while he can go on without waiting.
func (s *stream) flush() {
	s.outMu.Lock()
	s.flushLocked()
	s.outMu.Unlock()
}

func (s *stream) flushLocked() {
	if len(s.out) > 0 {
		_, _ = s.c.Write(s.out) // as in reply
		s.out = s.out[:0]
	}
}

// replier is for an operation that returns later: it is to be called once, from anywhere, with the errno.
func (r *request) replier() func(fuse.Errno) {
	s, unique := r.s, r.hdr.Unique
	return func(e fuse.Errno) { s.reply(nil, make([]byte, fuse.OutHeaderSize), unique, e, false) }
}

func (s *stream) run(r *request, op *op) fuse.Errno {
	switch {
	case op == nil || op.serve == nil:
		return unix.ENOSYS
	case r.fs.session.Load() == nil && r.hdr.Opcode != fuse.OpInit:
		return unix.EPROTO
	}
	var ok bool
	if r.body, r.group, r.hasGroup, ok = r.hdr.Groups(r.body); !ok {
		return unix.EINVAL
	}
	if x := r.fs.acting.Load(); x != nil && r.hdr.PID == x.thread {
		if e, ok := x.serve(r); ok {
			return e
		}
	}
	switch {
	case op.writes && r.fs.c.ReadOnly:
		return unix.EROFS
	case r.fs.overdue.has(r):
		return unix.EIO
	}
	return op.serve(r)
}
