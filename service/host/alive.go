// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"fmt"
	"time"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// watch asks the guest for signs of life while ctx lasts. One that gives none
// for long is given up: the connections of a machine that vanished would stay
// for ever. A guest that is only paused is given the time of times.dead.
func (ss *session) watch(ctx context.Context, c *control) {
	ask := func(id uint32) error { return c.send(&wire.Ping{ID: id}) }
	if ss.version < wire.Version2 {
		gs := ss.guests()
		if len(gs) == 0 {
			return // nobody told us where to ask
		}
		p := &pingerV1{ss: ss, guest: gs[0]}
		defer p.close()
		ask = func(uint32) error { return p.ping(ctx) }
	}
	warned := false
	due := time.Since(ss.start) + ss.srv.times.ping
	for id := uint32(1); pause(ctx, ss.srv.times.ping); id++ {
		ss.forgive(due)
		quiet := ss.quiet()
		switch {
		case quiet > ss.srv.times.dead:
			ss.cancel(fmt.Errorf("no sign of life for %v", quiet.Round(time.Second)))
			return
		case quiet > ss.srv.times.silent && !warned:
			ss.log.Warn("guest gives no sign of life", "for", quiet.Round(time.Second))
			warned = true
		case quiet < ss.srv.times.silent:
			warned = false
		}
		due = time.Since(ss.start) + ss.srv.times.ping
		if err := ask(id); err != nil {
			ss.log.Debug("ping failed", "error", err)
			due = time.Since(ss.start) + ss.srv.times.ping // that took long by the guest's fault
		}
	}
}

// pingerV1 pings over an event channel, which version 1 answers on the control
// channel.
type pingerV1 struct {
	ss    *session
	guest Guest
	conn  *transport.Conn
}

func (p *pingerV1) ping(ctx context.Context) error {
	if p.conn == nil {
		c, err := p.ss.dialV1(ctx, p.guest, wire.SubEvents)
		if err != nil {
			return err
		}
		// The thread that would act, in decimal and without an end.
		c.SetReadDeadline(time.Now().Add(p.ss.srv.times.answer))
		var b [32]byte
		if _, err := c.Read(b[:]); err != nil {
			c.Close()
			return fmt.Errorf("event channel: %w", err)
		}
		p.conn = c
	}
	b, err := wire.AppendEventV1(nil, wire.EventV1{Action: wire.ActionPing})
	if err != nil {
		return err
	}
	p.conn.SetWriteDeadline(time.Now().Add(p.ss.srv.times.write))
	if _, err := p.conn.Write(b); err != nil {
		p.close()
		return fmt.Errorf("event channel: %w", err)
	}
	return nil
}

func (p *pingerV1) close() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}
