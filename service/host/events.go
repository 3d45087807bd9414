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
	thread uint32

	mu     sync.Mutex // one event at a time
	reader *wire.Reader
	number uint64
	err    error
}

// mountActor is the passthrough.Actor of one mount.
type mountActor struct {
	*eventChannel
	id uint32
}

func (c *eventChannel) actor(id uint32) passthrough.Actor { return &mountActor{c, id} }

func (a *mountActor) Thread() uint32 { return a.thread }

// Close does nothing: other mounts have the channel too.
func (a *mountActor) Close() {}

// actions are the calls as the wire has them.
var actions = map[passthrough.ActOp]wire.Action{
	passthrough.ActRmdir: wire.ActionRmdir, passthrough.ActUnlink: wire.ActionUnlink, passthrough.ActMkdir: wire.ActionMkdir,
	passthrough.ActSymlink: wire.ActionSymlink, passthrough.ActTruncate: wire.ActionTruncate, passthrough.ActChmod: wire.ActionChmod,
	passthrough.ActMknod: wire.ActionMknod, passthrough.ActRename: wire.ActionRename, passthrough.ActCloseWrite: wire.ActionCloseWrite,
}

// Act has the guest make a call, and waits until it is done.
func (a *mountActor) Act(act passthrough.Act) fuse.Errno {
	c := a.eventChannel
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return unix.EPIPE
	}
	e, err := c.act(a, act)
	if err != nil {
		c.err = err
		c.conn.Close()
	}
	return e
}

func (c *eventChannel) act(a *mountActor, act passthrough.Act) (fuse.Errno, error) {
	c.conn.SetDeadline(time.Now().Add(eventTime))
	c.number++
	if err := wire.Write(c.conn, &wire.Event{Number: c.number, MountID: a.id, Action: actions[act.Op], Mode: act.Mode, Path: act.Path, NewPath: act.NewPath}); err != nil {
		return unix.EPIPE, err
	}
	t, body, err := c.reader.Next()
	if err != nil {
		return unix.EPIPE, err
	}
	m, err := wire.ToHost(t, body)
	if err != nil {
		return unix.EPIPE, err
	}
	d, ok := m.(*wire.EventDone)
	if !ok || d.Number != c.number {
		return unix.EPIPE, fmt.Errorf("%w: %T on the event channel, where the end of event %d was expected", wire.ErrProtocol, m, c.number)
	}
	return d.Errno, nil
}

// serveEvents takes the session's event channel. A second one takes the place of the first.
func (w *worker) serveEvents(o *eventsOrder, f *os.File) {
	conn := transport.NewConn(f, o.Peer)
	c := &eventChannel{conn: conn, thread: o.Thread, reader: wire.NewReader(conn, wire.MaxControl)}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.events != nil {
		w.events.conn.Close()
	}
	w.events = c
	for id, m := range w.mounts {
		m.fs.Act(c.actor(id))
	}
}

// notify takes the notify channel of a mount.
func (w *worker) notify(o *notifyOrder, f *os.File) error {
	conn := transport.NewConn(f, o.Peer)
	w.mu.Lock()
	m := w.mounts[o.MountID]
	w.mu.Unlock()
	if m == nil {
		conn.Close()
		return fmt.Errorf("mount %d: %w", o.MountID, unix.ENOENT)
	}
	m.fs.Notify(conn)
	return nil
}
