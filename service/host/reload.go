// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// Reconfigure makes the server serve c from now on: its exports, guests, token and
// AllowUnprivileged. Mounts of an export that is gone, is another directory, has other options or is
// no longer for their guest end; the others are not touched. A c with a mistake, or with other
// addresses, is a *ConfigError and changes nothing. What else is in c is of no effect.
func (s *Server) Reconfigure(c Config) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	c.Inherited = s.conf.Inherited
	err := c.Check()
	if err == nil {
		err = sameAddresses(s.conf.Listen, c.Listen)
	}
	if err != nil {
		s.refuseConfig(err)
		return &ConfigError{err}
	}
	for _, w := range c.warnings() {
		s.log.Warn(w)
	}
	old, p := s.policy(), newPolicy(&c)
	s.rules.Store(p)
	if c.Taken != nil {
		c.Taken()
	}
	for _, e := range p.exports {
		if o := old.byTag(e.Tag); o == nil {
			s.log.Info("export added", "tag", e.Tag, "dir", e.Dir)
		} else if !o.same(e) {
			s.log.Info("export changed", "tag", e.Tag, "dir", e.Dir)
		}
	}
	for _, e := range old.exports {
		if p.byTag(e.Tag) == nil {
			s.log.Info("export removed", "tag", e.Tag, "dir", e.Dir)
		}
	}
	s.mu.Lock()
	sessions := make([]*session, 0, len(s.sessions))
	for ss := range s.sessions {
		sessions = append(sessions, ss)
	}
	s.tellStatus()
	s.mu.Unlock()
	for _, ss := range sessions {
		ss.reconfigured()
	}
	s.log.Info("configuration read again", "exports", len(p.exports), "guests", len(p.guests), sd.Reloaded.Attr())
	return nil
}

// refuseConfig logs why a configuration is not taken.
func (s *Server) refuseConfig(err error) {
	s.log.Error("configuration refused: the one before stays in force", "reason", err, sd.ConfigRefused.Attr())
}

// sameAddresses refuses another list of addresses to listen on.
func sameAddresses(old, now []transport.Addr) error {
	for _, a := range now {
		if !slices.Contains(old, a) {
			return fmt.Errorf("listen %s: a running server can't begin to listen there: restart it, or leave this out", a)
		}
	}
	for _, a := range old {
		if !slices.Contains(now, a) {
			return fmt.Errorf("listen %s: a running server can't cease to listen there: restart it, or leave this in", a)
		}
	}
	return nil
}

// reconfigured applies the policy as it is now to what the session has.
func (ss *session) reconfigured() {
	ss.mu.Lock()
	var gone []*mount
	for _, m := range ss.mounts {
		if !ss.may(m) {
			gone = append(gone, m)
		}
	}
	ss.mu.Unlock()
	for _, m := range gone {
		ss.spawn(func() { ss.retire(m, wire.ReasonExportGone, errExportGone) })
	}
	ss.keepMounts()
}

// retire has the guest unmount m. With ReasonAsked a guest that has it in use may keep it; with any other the mount
// ends, in grace or without.
func (ss *session) retire(m *mount, reason wire.Reason, why error) {
	ss.mu.Lock()
	c, again := ss.control, m.retired
	m.retired = true
	ss.mu.Unlock()
	if again && reason == wire.ReasonAsked {
		return
	}
	if c == nil || ss.version < wire.Version2 {
		ss.drop(m, why.Error()) // the end of its stream unmounts one of version 1
		return
	}
	err := ss.askUnmount(c, m, reason, why)
	if err != nil && reason == wire.ReasonAsked {
		ss.log.Warn("mount that is no longer asked for stays", "tag", m.export.Tag, "dir", quote(m.dir), "reason", quote(err.Error()))
		ss.mu.Lock()
		m.retired = false
		ss.mu.Unlock()
		return
	}
	ss.drop(m, why.Error())
}

// askUnmount has the guest unmount, and returns when it has, or why it has not.
func (ss *session) askUnmount(c *control, m *mount, reason wire.Reason, why error) error {
	id, answer := ss.expect()
	defer ss.forget(id)
	if err := c.send(&wire.UnmountAsk{ID: id, MountID: m.id, Reason: reason, Text: why.Error()}); err != nil {
		return err
	}
	t := time.NewTimer(ss.srv.times.grace)
	defer t.Stop()
	select {
	case a := <-answer:
		if r, ok := a.(*wire.UnmountReply); ok && r.Errno != 0 {
			return fmt.Errorf("%s (%w)", r.Text, r.Errno)
		}
		return nil
	case <-m.done:
		return nil
	case <-c.ctx.Done():
		return errors.New("its control channel is lost")
	case <-t.C:
		return fmt.Errorf("no answer within %v: %w", ss.srv.times.grace, unix.ETIMEDOUT)
	}
}
