// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"transfused.org/transfused/service/api"
)

// promptTime is how long somebody may look for the password.
const promptTime = 2 * time.Minute

// allowInteraction is CheckAuthorizationFlags of polkit(8).
const allowInteraction = 1

// authorize returns nil if the caller may do what is, of our name's actions, action. Details are for polkit's rules and
// for the text of the question. It asks for each call, so that what was allowed once ends when polkit says so.
func (c *call) authorize(action string, details map[string]string) error {
	action = c.conn.served.name + "." + action
	wait := c.conn.c.callTime
	if c.interactive {
		wait = c.conn.c.promptTime
	}
	ctx, cancel := context.WithTimeout(c.ctx, wait)
	defer cancel()
	var uid uint32
	if err := c.conn.bus.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionUnixUser", 0, c.sender).Store(&uid); err != nil {
		return c.deny(action, uid, "the bus does not say who asks: "+err.Error())
	}
	if uid == 0 {
		return nil
	}
	var flags uint32
	if c.interactive {
		flags = allowInteraction
	}
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(c.sender)}}
	var answer struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	cancellation := c.sender + " " + action
	polkit := c.conn.bus.Object("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority")
	err := polkit.CallWithContext(ctx, "org.freedesktop.PolicyKit1.Authority.CheckAuthorization", 0, subject, action, details, flags, cancellation).Store(&answer)
	switch {
	case err == nil && answer.Authorized:
		return nil
	case ctx.Err() != nil:
		// The question would stay on the screen. If this is lost, so be it.
		polkit.Go("org.freedesktop.PolicyKit1.Authority.CancelCheckAuthorization", dbus.FlagNoReplyExpected, nil, cancellation)
		return c.deny(action, uid, "nobody answered in time: without polkit's answer only root may")
	case err != nil:
		return c.deny(action, uid, "polkit does not answer ("+strings.TrimSpace(err.Error())+"): without it only root may")
	case answer.Challenge && !c.interactive:
		return c.deny(action, uid, "a password is wanted, and the caller does not let anybody be asked for it: allow interactive authorization, or ask as root")
	case answer.Details["polkit.dismissed"] != "":
		return c.deny(action, uid, "the question for a password was dismissed")
	}
	return c.deny(action, uid, "polkit does not authorize it: ask as root, or have a rule of polkit allow it")
}

// deny is the error, which is logged as well.
func (c *call) deny(action string, uid uint32, why string) error {
	err := api.Errorf(api.Denied, "%s is denied: %s", action, why)
	if ok, left := c.conn.denied.allow(time.Now()); ok {
		c.conn.log.Warn("D-Bus call", "uid", uid, "caller", c.sender, "error", err, "left_out_before", left)
	}
	return err
}

// limiter bounds what callers can cause in the log: burst lines a period.
type limiter struct {
	mu    sync.Mutex // guards the rest
	began time.Time
	n     int
}

// Bounds of a limiter.
const (
	burst  = 10
	period = time.Minute
)

// allow says whether to log, and how many were left out in the period before.
func (l *limiter) allow(now time.Time) (ok bool, left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.began) > period {
		left = max(0, l.n-burst)
		l.began, l.n = now, 0
	}
	l.n++
	return l.n <= burst, left
}
