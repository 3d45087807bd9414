// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// eventsV1 has a guest of version 1 act, over a channel that the host dials. To the worker it is the guest's end of an event channel of
// version 2.
//
// The guest answers no event. But it answers a ping, on the control channel, when its thread has done all that came before. All answers look
// the same, so they are counted, those to signs of life too: the n-th pong is for the n-th ping, as long as there is one channel at a time, and
// nothing is acted over the next one before all pings were answered. A call that was believed to be done too early would be made for real.
//
// The channel is not closed while the control channel lasts, unless another one of the guest has ended: a guest may end itself with it.
type eventsV1 struct {
	ss      *session
	pings   atomic.Uint64 // that were sent, in the session
	pongs   atomic.Uint64 // that came
	ponged  chan struct{} // holds one when a pong has come
	wanted  chan struct{} // holds one when there was no channel to ping over
	running sync.Mutex    // serializes the channels

	mu   sync.Mutex      // serializes what is sent
	conn *transport.Conn // nil: none
}

func newEventsV1(ss *session) *eventsV1 {
	return &eventsV1{ss: ss, ponged: make(chan struct{}, 1), wanted: make(chan struct{}, 1)}
}

// wake has one in c.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// pong counts an answer.
func (e *eventsV1) pong() {
	e.pongs.Add(1)
	wake(e.ponged)
}

// ping asks for a sign of life, and waits for nothing.
func (e *eventsV1) ping() error {
	_, err := e.send(nil)
	if errors.Is(err, unix.ENOTCONN) {
		wake(e.wanted)
	}
	return err
}

// send sends an event, and a ping after it, whose number it returns.
func (e *eventsV1) send(event []byte) (n uint64, err error) {
	b, err := wire.AppendEventV1(event, wire.EventV1{Action: wire.ActionPing})
	if err != nil {
		return 0, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn == nil {
		return 0, fmt.Errorf("no event channel: %w", unix.ENOTCONN)
	}
	n = e.pings.Add(1)
	e.conn.SetWriteDeadline(time.Now().Add(e.ss.srv.times.write))
	if _, err := e.conn.Write(b); err != nil {
		e.conn.Close()
		return n, fmt.Errorf("event channel: %w", err)
	}
	return n, nil
}

var (
	errUnanswered = errors.New("the guest has not answered a ping")
	errUnasked    = errors.New("the guest answers pings that it was not sent")
	errChannel    = errors.New("the event channel has ended")
)

// answered waits until the n-th ping is answered, for d at most; with 0 for as long as it takes.
func (e *eventsV1) answered(ctx context.Context, n uint64, d time.Duration) error {
	var timeout <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timeout = t.C
	}
	for {
		switch pongs := e.pongs.Load(); {
		case pongs > e.pings.Load():
			return errUnasked
		case pongs >= n:
			return nil
		}
		select {
		case <-e.ponged:
		case <-timeout:
			return errUnanswered
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// run keeps a channel while ctx, a control channel's, lasts, once there is something to act or a ping is due.
func (e *eventsV1) run(ctx context.Context) {
	e.running.Lock()
	defer e.running.Unlock()
	select {
	case <-e.ss.working:
	case <-e.wanted:
	case <-ctx.Done():
		return
	}
	wait, last := e.ss.srv.times.retryMin, ""
	for {
		stood, err := e.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		if stood {
			wait, last = e.ss.srv.times.retryMin, ""
		}
		if text := withoutNumbers(err.Error()); text != last {
			e.ss.log.Debug("no event channel at the guest: trying again", "reason", err)
			last = text
		}
		if !pause(ctx, wait) {
			return
		}
		wait = min(2*wait, e.ss.srv.times.retryMax)
	}
}

// serve dials a channel and has events acted over it, until it ends. stood: it was a good one.
func (e *eventsV1) serve(ctx context.Context) (stood bool, err error) {
	before := e.answered(ctx, e.pings.Load(), e.ss.srv.times.act)
	conn, err := e.dial(ctx)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	t := &threadID{conn: conn, cancel: cancel}
	defer func() {
		e.mu.Lock()
		e.conn = nil
		e.mu.Unlock()
		cancel(errChannel)
		stop()
		conn.Close()
		t.reading.Wait()
	}()
	e.mu.Lock()
	e.conn = conn
	e.mu.Unlock()
	t.read()
	if err = before; err == nil {
		err = e.serveThread(ctx, t)
	}
	if errors.Is(err, errUnanswered) || errors.Is(err, errUnasked) {
		e.ss.log.Warn("the guest's inotify does not show what changes on the host: it can't be told what the guest has done", "reason", err)
		<-ctx.Done() // it is good for signs of life
	}
	return !errors.Is(err, wire.ErrProtocol), err
}

// serveThread has events acted by the thread that the guest tells.
func (e *eventsV1) serveThread(ctx context.Context, t *threadID) error {
	// Its id may come in pieces, and has no end. All of it is there before anything is answered.
	n, err := e.send(nil)
	if err == nil {
		err = e.answered(ctx, n, 0)
	}
	if err != nil {
		return err
	}
	thread, err := t.take()
	if err != nil {
		return err
	}
	for {
		again, err := e.bridge(ctx, thread)
		if !again {
			return err
		}
		// No other call before the last one is done.
		if err := e.answered(ctx, e.pings.Load(), 0); err != nil {
			return err
		}
	}
}

// dial dials the guest that this session is of.
func (e *eventsV1) dial(ctx context.Context) (*transport.Conn, error) {
	err := errors.New("nobody told where the guest listens")
	for _, g := range e.ss.guests() {
		var c *transport.Conn
		if c, err = e.ss.dialV1(ctx, g, wire.SubEvents); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// threadID is the decimal id of the thread that acts, which is all that the guest says on the channel.
type threadID struct {
	conn    *transport.Conn
	cancel  context.CancelCauseFunc // of what needs the channel
	reading sync.WaitGroup
	digits  []byte // of reading, until it has ended
}

const maxThreadID = 10 // digits

// read takes what the guest says, in its own goroutine, until the channel's end or past its deadline.
func (t *threadID) read() {
	t.reading.Go(func() {
		for len(t.digits) <= maxThreadID {
			var b [maxThreadID + 1]byte
			n, err := t.conn.Read(b[:])
			t.digits = append(t.digits, b[:n]...)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			if err != nil {
				t.cancel(fmt.Errorf("%w: %w", errChannel, err))
				return
			}
		}
		t.cancel(fmt.Errorf("%w: the guest says more on its event channel than a thread's id", wire.ErrProtocol))
	})
}

// take returns the id, all of which has arrived.
func (t *threadID) take() (uint32, error) {
	t.conn.SetReadDeadline(past)
	t.reading.Wait()
	raw, err := t.conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var b [maxThreadID + 1]byte
	n := 0
	t.conn.SetReadDeadline(time.Time{})
	if err := raw.Read(func(fd uintptr) bool {
		n, _ = unix.Read(int(fd), b[:]) // without waiting; its end is seen below
		return true
	}); err != nil {
		return 0, err
	}
	text := string(t.digits) + string(b[:max(n, 0)])
	id, err := strconv.ParseUint(text, 10, 31)
	if err != nil || id == 0 {
		return 0, fmt.Errorf("%w: %q is the id of no thread", wire.ErrProtocol, text)
	}
	t.digits = make([]byte, maxThreadID) // one byte more is too much
	t.read()
	return uint32(id), nil
}

// bridge gives the session's worker an event channel, and has acted what comes over it. again: the channel to the guest may be used
// further, and its thread.
func (e *eventsV1) bridge(ctx context.Context, thread uint32) (again bool, err error) {
	ss := e.ss
	select {
	case <-ss.working:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	ss.mu.Lock()
	w := ss.worker
	ss.mu.Unlock()
	if w == nil { // between two
		return pause(ctx, ss.srv.times.retryMin), context.Cause(ctx)
	}
	ours, theirs, err := transport.Pair()
	if err != nil {
		return false, err
	}
	defer ours.Close()
	stop := context.AfterFunc(ctx, func() { ours.Close() })
	defer stop()
	err = w.eventChannel(thread, ss.channels.Add(1), true, theirs)
	theirs.Close()
	if err == nil {
		err = e.act(ctx, ours)
	}
	ss.mu.Lock()
	another := ss.worker != w
	ss.mu.Unlock()
	if errors.Is(err, errUnanswered) {
		ss.log.Warn("the guest's inotify shows no changes on the host, until the guest is done with what it does now", "after", ss.srv.times.act)
		return true, nil
	}
	return another && ctx.Err() == nil, err
}

// act has the events acted that come from the worker. It returns errUnanswered if the guest did not do one in time.
func (e *eventsV1) act(ctx context.Context, conn *transport.Conn) error {
	r := wire.NewReader(conn, wire.MaxControl)
	for {
		t, body, err := r.Next()
		var m wire.Message
		if err == nil {
			m, err = wire.ToGuest(t, body)
		}
		if err != nil {
			return fmt.Errorf("the worker's end of the event channel: %w", err)
		}
		ev, ok := m.(*wire.Event)
		if !ok {
			return fmt.Errorf("the worker's end of the event channel: %w: %T", wire.ErrProtocol, m)
		}
		done := &wire.EventDone{Number: ev.Number}
		b, err := e.event(ev)
		if err != nil {
			done.Errno = errnoOf(err)
		} else {
			n, err := e.send(b)
			if err == nil {
				err = e.answered(ctx, n, e.ss.srv.times.act)
			}
			if err != nil {
				return err
			}
		}
		if err := wire.Write(conn, done); err != nil {
			return err
		}
	}
}

// event is an event as version 1 has it. The worker is not believed further than the mount's directory goes.
func (e *eventsV1) event(ev *wire.Event) ([]byte, error) {
	e.ss.mu.Lock()
	m := e.ss.mounts[ev.MountID]
	e.ss.mu.Unlock()
	switch {
	case m == nil:
		return nil, fmt.Errorf("mount %d: %w", ev.MountID, unix.ENODEV)
	case ev.Action > wire.ActionMknod:
		return nil, fmt.Errorf("action %d: %w", ev.Action, unix.EOPNOTSUPP)
	case ev.Path == "" && ev.Action == wire.ActionChmod:
	case !filepath.IsLocal(ev.Path) || filepath.Clean(ev.Path) != ev.Path:
		return nil, fmt.Errorf("path %q: %w", ev.Path, unix.EINVAL)
	}
	return wire.AppendEventV1(nil, wire.EventV1{Path: filepath.Join(m.dir, ev.Path), Action: ev.Action})
}
