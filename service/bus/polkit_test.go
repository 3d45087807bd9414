// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
)

// guarded are the methods that not everybody may call.
var guarded = []struct {
	path    dbus.ObjectPath
	method  string
	args    []any
	action  string
	details map[string]string
	asks    any // of the daemon
}{
	{guestRoot, "Manager.Mount", []any{"src", "/nix/is", []string{"ro", "a=b"}}, "mount", map[string]string{"tag": "src", "directory": "/nix/is", "options": "ro,a=b"},
		askedMount{Tag: "src", Directory: "/nix/is", Options: []string{"ro", "a=b"}}},
	{guestRoot, "Manager.Unmount", []any{mountPath("a1"), uint32(0)}, "unmount", map[string]string{"tag": "src", "directory": "/srv/a1"},
		askedUnmount{"a1", api.Unmounting{}}},
	{mountPath("a2"), "Mount.Unmount", []any{uint32(1)}, "unmount", map[string]string{"tag": "src", "directory": "/srv/a2"},
		askedUnmount{"a2", api.Unmounting{Force: true}}},
	{guestRoot, "Manager.Reload", nil, "reload", map[string]string{}, "reload"},
}

func TestPolkit(t *testing.T) {
	for _, m := range guarded {
		t.Run(m.method, func(t *testing.T) {
			b := runningBus(t)
			g := newGuest(aMount("a1"), aMount("a2"))
			l := serveGuest(t, b, g, Config{})
			c := b.user()
			call := func(flags dbus.Flags) error {
				_, err := try(c, GuestName, m.path, GuestName+"."+m.method, flags, m.args...)
				return err
			}
			action := GuestName + "." + m.action
			const denied = "org.transfused1.Error.Denied"

			wantError(t, call(0), denied, action, "polkit does not answer", "root")
			l.await(t, action+" is denied", 1)

			p := b.polkit()
			question := polkitQuestion{"system-bus-name " + c.Names()[0], action, m.details, 0}
			for _, x := range []struct {
				answer polkitAnswer
				flags  dbus.Flags
				says   string
			}{
				{polkitAnswer{}, 0, "does not authorize"},
				{polkitAnswer{Challenge: true}, 0, "interactive"},
				{polkitAnswer{Challenge: true, Details: map[string]string{"polkit.dismissed": "true"}}, dbus.FlagAllowInteractiveAuthorization, "dismissed"},
				{polkitAnswer{Challenge: true}, dbus.FlagAllowInteractiveAuthorization, "does not authorize"},
			} {
				p.set(x.answer)
				wantError(t, call(x.flags), denied, action, x.says)
				question.Flags = 0
				if x.flags != 0 {
					question.Flags = 1
				}
				if d := cmp.Diff([]polkitQuestion{question}, p.taken()); d != "" {
					t.Error(d)
				}
			}
			if a := g.taken(); len(a) > 0 {
				t.Errorf("the daemon was asked for %v", a)
			}
			p.set(polkitAnswer{Authorized: true})
			if err := call(0); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff([]any{m.asks}, g.taken()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestRootIsNotAsked(t *testing.T) {
	needsRoot(t)
	b := runningBus(t)
	p := b.polkit()
	g := newGuest(aMount("a1"), aMount("a2"))
	serveGuest(t, b, g, Config{})
	c := b.client()
	for _, m := range guarded {
		do(t, c, GuestName, m.path, GuestName+"."+m.method, m.args...)
		if d := cmp.Diff([]any{m.asks}, g.taken()); d != "" {
			t.Error(d)
		}
	}
	if q := p.taken(); len(q) > 0 {
		t.Errorf("polkit was asked %v", q)
	}
}

func TestAllMayRead(t *testing.T) {
	b := runningBus(t)
	p := b.polkit()
	serveGuest(t, b, newGuest(aMount("a1")), Config{})
	c := b.user()
	values(t, c, GuestName, guestRoot, GuestName+".Manager")
	do(t, c, GuestName, guestRoot, managerName+".GetManagedObjects")
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Exports")
	do(t, c, GuestName, mountPath("a1"), GuestName+".Mount.GetStatistics")
	if q := p.taken(); len(q) > 0 {
		t.Errorf("polkit was asked %v", q)
	}
}

// Polkit is not waited for for ever, and what it was asked is taken back.
func TestSlowPolkit(t *testing.T) {
	b := runningBus(t)
	p := b.polkit()
	wait := make(chan struct{})
	defer close(wait)
	p.mu.Lock()
	p.wait = wait
	p.mu.Unlock()
	serveGuest(t, b, newGuest(), Config{callTime: 300 * time.Millisecond, promptTime: 400 * time.Millisecond})
	c := b.user()
	for _, flags := range []dbus.Flags{0, dbus.FlagAllowInteractiveAuthorization} {
		_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Reload", flags)
		wantError(t, err, "org.transfused1.Error.Denied", GuestName+".reload", "in time")
		select {
		case <-p.cancelled:
		case <-time.After(patience):
			t.Error("the question was not taken back")
		}
	}
}

func TestLimiter(t *testing.T) {
	var l limiter
	now := time.Unix(1000, 0)
	logged := 0
	for range 3 * burst {
		if ok, _ := l.allow(now); ok {
			logged++
		}
	}
	if logged != burst {
		t.Errorf("%d lines were logged", logged)
	}
	if ok, left := l.allow(now.Add(2 * period)); !ok || left != 2*burst {
		t.Error(ok, left)
	}
}
