// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// eventTime is what a guest has to make the call of one event. With a longer one the channel ends: what the guest can't act it
// is told by notifications alone.
const eventTime = 10 * time.Second

// eventChannel is the session's channel of events, whose thread in the guest makes one call at a time.
type eventChannel struct {
	conn   *transport.Conn
	number uint64 // of the channel
	thread uint32
	plain  bool          // the guest speaks version 1: the thread is known for as long as all of its channels last
	ended  chan struct{} // closed when the guest's end is gone, or breaks the protocol
	done   chan *wire.EventDone

	mu   sync.Mutex // one event at a time
	last uint64     // number of the event
}

// mountActor is the passthrough.Actor of one mount.
type mountActor struct {
	*eventChannel
	id uint32
}

func (c *eventChannel) actor(id uint32) passthrough.Actor { return &mountActor{c, id} }

func (a *mountActor) Thread() uint32 { return a.thread }
func (a *mountActor) Plain() bool    { return a.plain }

// actions are the calls as the wire has them.
var actions = map[passthrough.ActOp]wire.Action{
	passthrough.ActRmdir: wire.ActionRmdir, passthrough.ActUnlink: wire.ActionUnlink, passthrough.ActMkdir: wire.ActionMkdir,
	passthrough.ActSymlink: wire.ActionSymlink, passthrough.ActTruncate: wire.ActionTruncate, passthrough.ActChmod: wire.ActionChmod,
	passthrough.ActMknod: wire.ActionMknod, passthrough.ActRename: wire.ActionRename, passthrough.ActCloseWrite: wire.ActionCloseWrite,
	passthrough.ActWatched: wire.ActionWatched,
}

// Act has the guest make a call, and waits until it is done.
func (a *mountActor) Act(act passthrough.Act) fuse.Errno {
	if max(len(act.Path), len(act.NewPath)) > wire.MaxPath {
		return unix.ENAMETOOLONG
	}
	c := a.eventChannel
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.ended:
		return unix.ENOTCONN // nothing was sent
	default:
	}
	c.last++
	c.conn.SetWriteDeadline(time.Now().Add(eventTime))
	if wire.Write(c.conn, &wire.Event{Number: c.last, MountID: a.id, Action: actions[act.Op], Mode: act.Mode, Path: act.Path, NewPath: act.NewPath}) != nil {
		c.conn.Close()
		return unix.EPIPE
	}
	t := time.NewTimer(eventTime)
	defer t.Stop()
	select {
	case d := <-c.done:
		if d.Number == c.last {
			return d.Errno
		}
	case <-t.C:
	case <-c.ended:
	}
	c.conn.Close()
	return unix.EPIPE
}

// read takes the guest's answers, until it has nothing more to say.
func (c *eventChannel) read() error {
	defer close(c.ended)
	defer c.conn.Close()
	r := wire.NewReader(c.conn, wire.MaxControl)
	for {
		t, body, err := r.Next()
		if err != nil {
			return nil
		}
		m, err := wire.ToHost(t, body)
		if err != nil {
			return err
		}
		d, ok := m.(*wire.EventDone)
		if !ok {
			return fmt.Errorf("%w: %T", wire.ErrProtocol, m)
		}
		select {
		case c.done <- d:
		default:
			return fmt.Errorf("%w: the end of event %d, which nobody waits for", wire.ErrProtocol, d.Number)
		}
	}
}

// serveEvents takes the session's event channel. A second one takes the place of the first.
func (w *worker) serveEvents(o *eventsOrder, f *os.File) {
	conn := transport.NewConn(f, o.Peer)
	c := &eventChannel{conn: conn, number: o.Number, thread: o.Thread, plain: o.Plain, ended: make(chan struct{}), done: make(chan *wire.EventDone, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.events != nil {
		if w.events.number > o.Number {
			conn.Close()
			return
		}
		w.events.conn.Close()
	}
	w.events = c
	if c.plain {
		w.plain.Store(c)
	}
	for id, m := range w.mounts {
		m.fs.Act(c.actor(id))
	}
	go func() {
		if err := c.read(); err != nil {
			w.log.Warn("event channel closed: the guest broke the protocol", "error", err)
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.events == c {
			w.events = nil
			for _, m := range w.mounts {
				m.fs.Act(nil)
			}
		}
	}()
}

// channelEnded ends what a guest of version 1 acts, with whichever of its channels ended: its daemon may be gone, and the thread's id
// be another's.
func (w *worker) channelEnded() {
	if c := w.plain.Load(); c != nil {
		c.conn.Close()
	}
}

// notifyChannel is a notify channel, whose end is not unseen. It may be closed under locks of passthrough.
type notifyChannel struct {
	*transport.Conn
	w *worker
}

func (c notifyChannel) Close() error {
	defer c.w.channelEnded()
	return c.Conn.Close()
}

// notify takes the notify channel of a mount.
func (w *worker) notify(o *notifyOrder, f *os.File) error {
	conn := transport.NewConn(f, o.Peer)
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.mounts[o.MountID]
	if m == nil {
		conn.Close()
		return fmt.Errorf("mount %d: %w", o.MountID, unix.ENOENT)
	}
	if m.notify > o.Number {
		conn.Close()
		return nil
	}
	m.notify = o.Number
	m.fs.Notify(notifyChannel{conn, w})
	return nil
}
