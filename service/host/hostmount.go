// SPDX-License-Identifier: Apache-2.0

package host

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// guests returns the guests of the configuration that this session may be of.
func (ss *session) guests() []Guest {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.guestsLocked()
}

func (ss *session) guestsLocked() []Guest {
	var gs []Guest
	for _, g := range ss.srv.policy().guests {
		if !g.is(ss.peer) {
			continue
		}
		// Over Unix sockets all guests of a user look alike, until one says
		// where it listens, or is dialled (dialV1).
		if g.Addr.Family == transport.Unix && ss.version >= wire.Version2 && ss.about.Socket != g.Addr.String() {
			continue
		}
		gs = append(gs, g)
	}
	return gs
}

// errOtherGuest says that the configured guest is not this session's.
var errOtherGuest = errors.New("another guest listens there")

// errNotWanted ends the keeping of a mount that the configuration has no longer.
var errNotWanted = errors.New("the host no longer asks for this mount")

// keepMounts has the guest keep the mounts that the configuration has now, and no others. It is called with each control channel, and
// when the configuration has changed.
func (ss *session) keepMounts() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	c := ss.control
	if c == nil || ss.ctx.Err() != nil {
		return
	}
	if c.ctx != ss.keeping {
		ss.keeping, ss.keepers = c.ctx, map[string]context.CancelCauseFunc{} // those of the channel before have ended with it
	}
	wanted := map[string]bool{}
	for _, g := range ss.guestsLocked() {
		for _, m := range g.Mounts {
			wish := fmt.Sprintf("%q %q %q %q", g.Addr, m.Tag, m.Dir, m.Options)
			wanted[wish] = true
			if ss.keepers[wish] == nil {
				ctx, cancel := context.WithCancelCause(c.ctx)
				ss.keepers[wish] = cancel
				ss.work.Go(func() {
					defer cancel(nil)
					ss.keep(ctx, c, g, m, wish)
				})
			}
		}
	}
	for wish, cancel := range ss.keepers {
		if !wanted[wish] {
			delete(ss.keepers, wish)
			cancel(errNotWanted)
		}
	}
}

// keep has the guest keep a mount while its control channel c lasts.
func (ss *session) keep(ctx context.Context, c *control, g Guest, gm GuestMount, wish string) {
	log := ss.log.With("tag", gm.Tag, "dir", gm.Dir)
	wait, last := ss.srv.times.retryMin, ""
	for {
		ss.mu.Lock() // one from before the control channel was lost
		m := ss.mountAtLocked(gm.Dir, func(m *mount) bool { return !m.retired && (m.wish == "" || m.wish == wish) })
		ss.mu.Unlock()
		var err error
		if m == nil {
			m, err = ss.ask(ctx, c, g, gm, wish)
		}
		if err == nil {
			select {
			case <-ctx.Done():
				if context.Cause(ctx) == errNotWanted {
					ss.retire(m, wire.ReasonAsked, errNotWanted)
				}
				return
			case <-m.done:
			}
			stood, wish := ss.ending(ctx, m)
			if ctx.Err() == nil && wish {
				log.Info("unmounted by the guest: not asked for again until it connects anew")
				return
			}
			if stood {
				wait, last = ss.srv.times.retryMin, ""
			}
			err = errors.New("it ended")
		}
		if ctx.Err() != nil || errors.Is(err, errOtherGuest) {
			return
		}
		if text := err.Error(); withoutNumbers(text) != last {
			log.Warn("no mount at the guest: trying again", "reason", quote(text))
			last = withoutNumbers(text)
		}
		if !pause(ctx, wait) {
			return
		}
		wait = min(2*wait, ss.srv.times.retryMax)
	}
}

// ending says whether a mount that ended had stood, and whether the guest
// unmounted it on purpose. In version 1 nothing else ends one that stood while
// the control channel lives.
func (ss *session) ending(ctx context.Context, m *mount) (stood, wish bool) {
	if ss.version >= wire.Version2 {
		// The stream's end and the guest's word come by different ways.
		t := time.NewTimer(ss.srv.times.answer)
		defer t.Stop()
		select {
		case <-m.told:
		case <-ctx.Done():
		case <-t.C:
		}
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.untold, m.id)
	if m.retired {
		return m.stood, false
	}
	if ss.version < wire.Version2 {
		return m.stood, m.stood
	}
	return m.stood, m.reason == wire.ReasonAsked || m.reason == wire.ReasonShutdown
}

// ask has the guest mount, in its version of the protocol.
func (ss *session) ask(ctx context.Context, c *control, g Guest, gm GuestMount, wish string) (*mount, error) {
	if ss.version < wire.Version2 {
		return ss.mountV1(ctx, c, g, gm, wish)
	}
	id, answer := ss.expect()
	defer ss.forget(id)
	if err := c.send(&wire.MountAsk{ID: id, Tag: gm.Tag, Dir: gm.Dir, Options: gm.Options}); err != nil {
		return nil, err
	}
	// Not ctx: what the guest has begun has to be unmounted when it is no longer wanted.
	a, err := await(c.ctx, answer, 6*ss.srv.times.answer)
	if err != nil {
		return nil, err
	}
	r, ok := a.(*wire.MountResult)
	if !ok {
		return nil, fmt.Errorf("the guest answered with %T", a)
	}
	if r.Errno != 0 {
		return nil, fmt.Errorf("the guest refused: %s", cmp.Or(r.Text, r.Errno.Error())) // the text has the errno's
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	m := ss.mounts[r.MountID]
	if m == nil || m.export.Tag != gm.Tag {
		return nil, fmt.Errorf("the guest says that mount %d stands, which there is not", r.MountID)
	}
	m.asked, m.wish = true, wish
	ss.log.Debug("what was asked for is mounted", "tag", gm.Tag, "dir", quote(gm.Dir))
	return m, nil
}

// await waits for the answer to a question.
func await(ctx context.Context, answer <-chan wire.Message, d time.Duration) (wire.Message, error) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case m := <-answer:
		return m, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-t.C:
		return nil, fmt.Errorf("no answer within %v", d)
	}
}

// mountV1 asks a guest of version 1 whether the mount point suits, dials it,
// and has the worker serve the connection.
func (ss *session) mountV1(ctx context.Context, c *control, g Guest, gm GuestMount, wish string) (*mount, error) {
	e := ss.srv.policy().byTag(gm.Tag)
	if e == nil {
		return nil, errExportGone
	}
	id, answer := ss.expect()
	defer ss.forget(id)
	// As for an export, which an empty directory suits too: there is one after the first mount.
	if err := c.send(&wire.SuitabilityRequest{Export: true, ID: uint16(id), Paths: []string{gm.Dir}}); err != nil {
		return nil, err
	}
	a, err := await(ctx, answer, ss.srv.times.answer)
	if err != nil {
		return nil, fmt.Errorf("asking whether %s suits: %w", gm.Dir, err)
	}
	switch a := a.(type) {
	case *wire.SuitabilityReply:
		if !slices.Contains(a.Paths, gm.Dir) {
			return nil, fmt.Errorf("%s does not suit: it is there in the guest and not an empty directory; empty it, or choose another", gm.Dir)
		}
	case *wire.ErrorReply:
		return nil, fmt.Errorf("the guest refused: %s", a.Text)
	default:
		return nil, fmt.Errorf("the guest answered with %T", a)
	}
	options := []string{"default_permissions", "allow_other", "fsname=" + gm.Tag}
	var own, theirs []string // a guest of version 1 passes nothing on
	for _, o := range gm.Options {
		if key, _, _ := strings.Cut(o, "="); key == "cache" || key == "writeback" || key == "streams" {
			own = append(own, o)
		} else {
			theirs = append(theirs, o)
		}
	}
	as, err := e.with(own)
	if err != nil {
		return nil, err
	}
	if e.ReadOnly {
		options = append(options, "ro")
	}
	args, err := wire.AppendMountArgs(nil, wire.MountArgs(append(options, theirs...), gm.Dir))
	if err != nil {
		return nil, err
	}
	conn, err := ss.dialV1(ctx, g, wire.SubMount)
	if err != nil {
		return nil, err
	}
	defer conn.Close() // the worker has its own
	m, err := ss.addMount(e, as, gm.Dir)
	if err != nil {
		return nil, err
	}
	conn.SetWriteDeadline(time.Now().Add(ss.srv.times.write))
	if _, err := conn.Write(args); err != nil {
		ss.drop(m, "the guest hung up")
		return nil, err
	}
	if err := ss.passStream(m, 0, conn, false); err != nil {
		return nil, err
	}
	ss.mu.Lock()
	m.asked, m.wish = true, wish
	ss.mu.Unlock()
	return m, nil
}

// byTag returns an export, or nil.
func (c *policy) byTag(tag string) *Export {
	for _, e := range c.exports {
		if e.Tag == tag {
			return e
		}
	}
	return nil
}

// dialV1 connects to the guest's own socket for a subprotocol. Where the
// transport does not prove who listens there, the guest has to.
func (ss *session) dialV1(ctx context.Context, g Guest, sub byte) (*transport.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, ss.srv.times.answer)
	defer cancel()
	c, err := transport.Dial(ctx, g.Addr)
	if err != nil {
		return nil, err
	}
	if identify(c.Peer()) != ss.who || !ss.sameProcess(c.Peer()) {
		c.Close()
		return nil, errOtherGuest
	}
	c.SetDeadline(time.Now().Add(ss.srv.times.answer))
	if token := ss.srv.policy().token; g.Addr.Family == transport.Hybrid && len(token) > 0 {
		if err := prove(c, token); err != nil {
			c.Close()
			return nil, err
		}
	}
	if _, err := c.Write([]byte{sub}); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// prove has the listener that c reached show that it has the token.
func prove(c io.ReadWriter, token []byte) error {
	hello := make([]byte, 1+wire.NonceLen)
	hello[0] = wire.SubProof
	rand.Read(hello[1:]) // never fails
	if _, err := c.Write(hello); err != nil {
		return err
	}
	var proof [32]byte
	if _, err := io.ReadFull(c, proof[:]); err != nil {
		return fmt.Errorf("the guest's listener did not prove that it has the token (%w): give transfused there the --token-file of the host", err)
	}
	want := wire.Proof(token, hello[1:])
	if !hmac.Equal(proof[:], want[:]) {
		return fmt.Errorf("%w: the guest's listener has another token, or is not transfused: give both ends the same --token-file", unix.EPERM)
	}
	return nil
}
