// SPDX-License-Identifier: Apache-2.0

package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

const (
	// maxWrite is the most data of one READ or WRITE, in bytes; the seed's bound.
	maxWrite = 1 << 20
	// maxStreams is how many streams a mount may have.
	maxStreams = 4
)

// control is a control channel. It may be written to by any goroutine.
type control struct {
	*transport.Conn
	patience time.Duration
	ctx      context.Context // ends with it
}

// send writes m. A guest that does not read it loses the channel.
func (c *control) send(m wire.Message) error {
	// Concurrent senders move each other's deadline a little: harmless.
	c.SetWriteDeadline(time.Now().Add(c.patience))
	err := wire.Write(c.Conn, m)
	if err != nil {
		c.Close()
	}
	return err
}

// serveControl answers an Init and serves the channel to its end.
func (ss *session) serveControl(conn *transport.Conn, init *wire.Init) {
	ctx, cancel := context.WithCancel(ss.ctx)
	defer cancel()
	c := &control{Conn: conn, patience: ss.srv.times.write, ctx: ctx}
	defer c.Close()
	err := c.send(ss.answer(init))
	attached, began := false, false
	if err == nil {
		attached, began = ss.attach(c, init)
	}
	if attached {
		about := []any{"version", ss.version}
		if ss.version >= wire.Version2 {
			about = append(about, "software", quote(init.Software), "kernel", quote(init.Kernel))
		}
		if began {
			about = append(about, sd.SessionBegan.Attr())
		}
		ss.log.Info("guest connected", about...)
		ss.alive()
		ss.spawn(func() { ss.watch(ctx, c) })
		if ss.v1 != nil {
			ss.spawn(func() { ss.v1.run(ctx) })
		}
		ss.srv.changed()
		ss.keepMounts()
		err = ss.read(c)
	} else if err == nil && ss.ctx.Err() != nil {
		ss.refuse(conn) // run has not seen it
	}
	cancel()
	ss.detach(c)
	ss.srv.changed()
	switch {
	case errors.Is(err, wire.ErrProtocol):
		ss.log.Warn("control channel closed: the guest broke the protocol", "error", err)
	case err == nil || errors.Is(err, io.EOF) || ss.ctx.Err() != nil:
		ss.log.Debug("control channel closed")
	default:
		ss.log.Warn("control channel lost", "error", err)
	}
}

// answer is the host's Init.
func (ss *session) answer(guests *wire.Init) *wire.Init {
	if ss.version < wire.Version2 {
		return &wire.Init{Version: wire.Version1}
	}
	m := &wire.Init{
		Version: wire.Version2, MinVersion: wire.Version1, Features: guests.Features & wire.FeatureKeep, MaxMessage: wire.MaxControl, MaxWrite: maxWrite,
		FuseMinor: fuse.Minor, MaxStreams: maxStreams, BootID: bootID(), SessionID: ss.id, Software: ss.srv.conf.Software,
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return m
}

// bootID is zero where the system does not tell it.
func bootID() (id [16]byte) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	var b []byte
	if _, err := fmt.Sscanf(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""), "%x", &b); err == nil {
		copy(id[:], b)
	}
	return id
}

// attach makes c, which began with init, the session's channel, in place of one that it had. Began
// says that it had none before.
func (ss *session) attach(c *control, init *wire.Init) (ok, began bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.ctx.Err() != nil {
		return false, false
	}
	if ss.control != nil {
		ss.control.Close()
	}
	ss.control, ss.lostAt = c, time.Time{}
	ss.heard(init)
	ss.settleLocked()
	clear(ss.untold) // who waited did so with the channel before
	began, ss.known = !ss.known, true
	return true, began
}

// detach notes the end of c. Mounts that are in use go on without it.
func (ss *session) detach(c *control) {
	ss.mu.Lock()
	var unused []*mount
	if ss.control == c || ss.control == nil {
		ss.control, ss.lostAt = nil, time.Now()
		for _, m := range ss.mounts {
			if m.sets == 0 {
				unused = append(unused, m)
			}
		}
		ss.settleLocked()
	}
	ss.mu.Unlock()
	for _, m := range unused {
		ss.drop(m, "the control channel was lost before its stream came")
	}
}

// read takes the guest's messages until the channel ends, and returns why it did.
func (ss *session) read(c *control) error {
	r := wire.NewReader(c, wire.MaxControl)
	for {
		t, body, err := r.Next()
		var m wire.Message
		if err == nil {
			m, err = wire.ToHost(t, body)
		}
		if err == nil {
			ss.alive()
			err = ss.message(c, m)
		}
		if err == nil {
			continue
		}
		if errors.Is(err, wire.ErrProtocol) && ss.version >= wire.Version2 {
			_ = c.send(&wire.Refused{Errno: unix.EPROTO, Text: err.Error()}) // it may be gone
		}
		return err
	}
}

// message acts on one message of the guest.
func (ss *session) message(c *control, m wire.Message) error {
	switch m := m.(type) {
	case *wire.LogError:
		ss.relayLog(m.Text, true)
	case *wire.LogNotice:
		ss.relayLog(m.Text, false)
	case *wire.Pong:
		if ss.v1 != nil {
			ss.v1.pong()
		}
	case *wire.PerfstatReply, *wire.Ack:
		// Signs of life; nobody waits for what they tell.
	case *wire.SuitabilityReply:
		ss.answered(uint32(m.ID), m)
	case *wire.ErrorReply:
		ss.answered(uint32(m.ID), m)
	default:
		if ss.version < wire.Version2 {
			return fmt.Errorf("%w: %T is no message of version 1", wire.ErrProtocol, m)
		}
		return ss.message2(c, m)
	}
	return nil
}

// message2 acts on one message of version 2.
func (ss *session) message2(c *control, m wire.Message) error {
	switch m := m.(type) {
	case *wire.Ping:
		return c.send(&wire.Alive{ID: m.ID})
	case *wire.Alive:
	case *wire.ExportsRequest:
		return ss.listExports(c, m)
	case *wire.MountRequest:
		select {
		case ss.busy <- struct{}{}:
			ss.spawn(func() {
				defer func() { <-ss.busy }()
				ss.requestMount(c, m)
			})
		default:
			return c.send(&wire.MountReply{ID: m.ID, Errno: unix.EAGAIN, Text: "too many requests at once: wait for the answers"})
		}
	case *wire.MountResult:
		ss.answered(m.ID, m)
	case *wire.UnmountReply:
		if m.Errno != 0 {
			ss.log.Warn("guest did not unmount", "error", m.Errno, "reason", quote(m.Text))
		}
		ss.answered(m.ID, m)
	case *wire.Unmounted:
		ss.unmounted(m)
	default:
		return fmt.Errorf("%w: %T has no place on a control channel", wire.ErrProtocol, m)
	}
	return nil
}

// requestMount is a mount asked for by the guest.
func (ss *session) requestMount(c *control, r *wire.MountRequest) {
	m, err := ss.tryMount(r)
	reply := &wire.MountReply{ID: r.ID}
	if err != nil {
		ss.log.Warn("mount refused", "tag", quote(r.Tag), "dir", quote(r.Dir), "reason", err)
		reply.Errno, reply.Text = errnoOf(err), err.Error()
		if he := (*hostError)(nil); errors.As(err, &he) {
			reply.Text = "the host cannot serve this export: its log tells why"
		}
	} else {
		reply.MountID, reply.ReadOnly, reply.MaxWrite, reply.Streams, reply.Source = m.id, m.export.ReadOnly, ss.write, uint16(m.streams), m.export.Tag
		reply.NoFlush = m.noFlush
	}
	if c.send(reply) != nil && m != nil {
		ss.drop(m, "the control channel was lost")
	}
}

func (ss *session) tryMount(r *wire.MountRequest) (*mount, error) {
	p := ss.srv.policy()
	e := p.export(ss.peer, r.Tag)
	if e == nil {
		var tags []string
		for _, x := range p.visible(ss.peer) {
			tags = append(tags, x.Tag)
		}
		return nil, fmt.Errorf("no export %s for this guest (%w): there are %s", quote(r.Tag), unix.ENOENT, cmp.Or(strings.Join(tags, ", "), "none"))
	}
	as, err := e.with(r.Options)
	if err != nil {
		return nil, err
	}
	return ss.addMount(e, as, r.Dir)
}

// listExports answers with as many messages as it takes.
func (ss *session) listExports(c *control, r *wire.ExportsRequest) error {
	es := ss.exports()
	// An entry has at most MaxTag bytes and 7 of lengths and flags.
	const each = wire.MaxControl/2/(wire.MaxTag+16) - 1
	for len(es) > each {
		if err := c.send(&wire.ExportsReply{ID: r.ID, More: true, Exports: es[:each]}); err != nil {
			return err
		}
		es = es[each:]
	}
	return c.send(&wire.ExportsReply{ID: r.ID, Exports: es})
}

// relayLog puts a text of the guest into the host's log.
func (ss *session) relayLog(text string, isError bool) {
	if ss.v1 != nil && strings.Contains(text, passthrough.ProbeName) {
		return // that it can't be removed is as it should be
	}
	ok, dropped := ss.quota.guest.allow(time.Now())
	if !ok {
		return
	}
	attrs := append([]any{"text", quote(strings.TrimRight(text, "\n")), sd.GuestSays.Attr()}, droppedAttr(dropped)...)
	if isError {
		ss.log.Warn("from the guest", attrs...) // an error is the host's own
	} else {
		ss.log.Info("from the guest", attrs...)
	}
}

// expect returns an ID for a question to the guest, and where its answer will
// come; forget gives the ID back.
func (ss *session) expect() (id uint32, answer chan wire.Message) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	answer = make(chan wire.Message, 1)
	for {
		ss.next++
		id = ss.next
		if ss.version < wire.Version2 {
			id &= 0xffff // as wide as it is there
		}
		if id != 0 && ss.waiting[id] == nil {
			ss.waiting[id] = answer
			return id, answer
		}
	}
}

func (ss *session) forget(id uint32) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.waiting, id)
}

// answered passes an answer to who waits for it.
func (ss *session) answered(id uint32, m wire.Message) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ch := ss.waiting[id]; ch != nil {
		delete(ss.waiting, id)
		ch <- m
	}
}
