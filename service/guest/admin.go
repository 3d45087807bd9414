// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/wire"
)

// The methods of api.Guest. Watch is in watch.go.

// Status is api.Guest's.
func (d *Daemon) Status() api.GuestStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := api.GuestStatus{Version: strings.TrimPrefix(d.c.Software, "transfused "), Server: d.c.Server.String(), Features: []string{}, Mounts: len(d.mounts), Text: d.textLocked()}
	if c := d.control.Load(); c != nil {
		s.Connected, s.Protocol, s.Host = true, int(c.version), c.peer.Software
		if c.keeps() {
			s.Features = append(s.Features, "keep")
		}
	}
	return s
}

// Mounts is api.Guest's.
func (d *Daemon) Mounts() []api.Mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mountsLocked()
}

// specOf checks what an administrator asks for.
func (d *Daemon) specOf(spec api.MountSpec) (MountSpec, error) {
	s := MountSpec{Tag: spec.Tag, Dir: spec.Directory, Options: spec.Options}
	if err := s.Check(); err != nil {
		return s, api.Errorf(api.Invalid, "%w", err)
	}
	return s, nil
}

// Mount is api.Guest's. What is mounted there already, from the same export, is what was asked for.
func (d *Daemon) Mount(ctx context.Context, spec api.MountSpec) (api.Mount, error) {
	s, err := d.specOf(spec)
	if err != nil {
		return api.Mount{}, err
	}
	e, err := d.want(s, false, true)
	mine := err == nil
	switch {
	case mine:
		if spec.At != nil {
			fd, err := unix.FcntlInt(spec.At.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				d.unlist(e)
				return api.Mount{}, api.Errorf(api.Internal, "mount %s: %w", s.Tag, err)
			}
			e.at = os.NewFile(uintptr(fd), s.Dir)
		}
		d.keepers.Go(func() { _ = d.keep(e) }) // who asked is told below
	case errors.Is(err, unix.EBUSY) && e.spec.Tag == s.Tag:
	case errors.Is(err, unix.EBUSY):
		return api.Mount{}, api.Errorf(api.Exists, "mount %s: %w: unmount %s from there first", s.Tag, err, e.spec.Tag)
	default:
		return api.Mount{}, api.Errorf(api.Invalid, "mount %s: %w", s.Tag, err)
	}
	for {
		d.mu.Lock()
		info, changed := d.infoLocked(e), e.changed
		d.mu.Unlock()
		switch info.State {
		case api.Active, api.Reconnecting:
			return info, nil
		case api.Failed:
			kind := api.Refused
			if d.control.Load() == nil {
				kind = api.Unreachable
			}
			return info, api.Errorf(kind, "%s", info.Error)
		}
		select {
		case <-changed:
		case <-e.done:
			d.mu.Lock()
			info = d.infoLocked(e)
			d.mu.Unlock()
			if info.State == api.Failed {
				return info, api.Errorf(api.Refused, "%s", info.Error)
			}
			return info, api.Errorf(api.Internal, "mount %s: it was given up: %w", s.Tag, context.Cause(e.ctx))
		case <-ctx.Done():
			if mine {
				d.remove(e)
			}
			why := info.Error
			if why == "" {
				why = "the host has not answered"
			}
			if d.control.Load() == nil {
				return info, api.Errorf(api.Unreachable, "mount %s: the host at %s is not there: start transfuse-host, or correct the server's address (%s)", s.Tag, d.c.Server, why)
			}
			return info, api.Errorf(api.Unreachable, "mount %s: %s", s.Tag, why)
		}
	}
}

// Detached is api.Guest's.
func (d *Daemon) Detached(ctx context.Context, spec api.MountSpec) (*os.File, api.Mount, error) {
	s, err := d.specOf(spec)
	if err != nil {
		return nil, api.Mount{}, err
	}
	c := d.waitControl(ctx)
	if c == nil {
		return nil, api.Mount{}, api.Errorf(api.Unreachable, "mount %s: the host at %s is not there: start transfuse-host, or correct the server's address", s.Tag, d.c.Server)
	}
	if c.version < wire.Version2 {
		return nil, api.Mount{}, api.Errorf(api.Unsupported, "mount %s: the host speaks protocol version 1 and mounts by itself", s.Tag)
	}
	o, err := ParseMountOptions(s.Options)
	if err != nil {
		return nil, api.Mount{}, api.Errorf(api.Invalid, "%w", err)
	}
	d.mu.Lock()
	d.lastID++
	e, err := d.listLocked(d.lastID, s, o, false)
	if err == nil {
		e.nowhere = true
	}
	d.mu.Unlock()
	if err != nil {
		return nil, api.Mount{}, api.Errorf(api.Internal, "%w", err)
	}
	m, at, err := d.request2(ctx, c, e)
	if err != nil {
		d.unlist(e)
		return nil, api.Mount{}, api.Errorf(api.Refused, "%w", err)
	}
	d.unlistAfter(e, m)
	d.mu.Lock()
	defer d.mu.Unlock()
	return at, d.infoLocked(e), nil
}

// Unmount is api.Guest's.
func (d *Daemon) Unmount(ctx context.Context, id string, how api.Unmounting) error {
	e := d.entryOf(id)
	if e == nil {
		return noMount(id)
	}
	m := d.mountOf(e)
	if m == nil {
		e.cancel(errNotWanted)
		select {
		case <-e.done:
			return nil
		case <-ctx.Done():
			return api.Errorf(api.Internal, "unmount %s: it does not end: %w", e.spec.Dir, ctx.Err())
		}
	}
	if e.nowhere && !how.Force {
		return api.Errorf(api.Unsupported, "unmount %s: it is in another mount namespace: umount it there, or end it by force", e.spec.Dir)
	}
	d.mu.Lock()
	before, text := e.state, e.text
	d.setLocked(e, api.Draining, "")
	d.mu.Unlock()
	restore := func() {
		d.mu.Lock()
		if e.state == api.Draining { // else it has changed meanwhile
			d.setLocked(e, before, text)
		}
		d.mu.Unlock()
	}
	q := call{Op: opUnmount, Key: m.key, How: howBusy}
	switch {
	case how.Force:
		q.How = howForce
	case how.Lazy:
		q.How = howDetach
	}
	_, err := d.callAbout(ctx, m, q)
	switch {
	case errors.Is(err, unix.EBUSY):
		restore()
		return api.Errorf(api.Busy, "unmount %s: %w: something is open there (fuser -vm %[1]s); --lazy detaches it all the same", e.spec.Dir, unix.EBUSY)
	case err != nil:
		restore()
		return api.Errorf(api.Internal, "unmount %s: %w", e.spec.Dir, err)
	case how.Force:
		d.closeMount(m)
	case how.Lazy:
		// It ends when nobody uses it any more.
		return nil
	}
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return api.Errorf(api.Internal, "unmount %s: it does not end: %w", e.spec.Dir, ctx.Err())
	}
}

func noMount(id string) error {
	return api.Errorf(api.NotFound, "no mount has the ID %q: transfusectl mounts lists them", id)
}

// Remount is api.Guest's.
func (d *Daemon) Remount(ctx context.Context, id string, readOnly bool) error {
	e := d.entryOf(id)
	if e == nil {
		return noMount(id)
	}
	m := d.mountOf(e)
	if m == nil {
		return api.Errorf(api.NotFound, "remount %s: it does not stand", e.spec.Dir)
	}
	d.mu.Lock()
	o := m.options
	d.mu.Unlock()
	if !readOnly && m.hostReadOnly {
		return api.Errorf(api.Refused, "remount %s: %w: the host exports %s read-only", e.spec.Dir, unix.EROFS, e.spec.Tag)
	}
	o.ReadOnly = readOnly
	if _, err := d.callAbout(ctx, m, call{Op: opRemount, Key: m.key, Options: o}); err != nil {
		return api.Errorf(api.Internal, "%w", err)
	}
	d.mu.Lock()
	m.options = o
	d.publishLocked(api.Changed, e)
	d.mu.Unlock()
	d.change(m, func(r *record) { r.Options = o })
	return nil
}

// Exports is api.Guest's.
func (d *Daemon) Exports(ctx context.Context) ([]api.Export, error) {
	c := d.control.Load()
	if c == nil {
		return nil, api.Errorf(api.Unreachable, "the host at %s is not there", d.c.Server)
	}
	if c.version < wire.Version2 {
		return nil, api.Errorf(api.Unsupported, "the host speaks protocol version 1, which has no list of exports")
	}
	m, err := c.request(ctx, func(id uint32) wire.Message { return &wire.ExportsRequest{ID: id} })
	if err != nil {
		return nil, api.Errorf(api.Unreachable, "list the exports: %w", err)
	}
	r, ok := m.(*wire.ExportsReply)
	if !ok {
		return nil, api.Errorf(api.Internal, "list the exports: %w: %T instead of ExportsReply", wire.ErrProtocol, m)
	}
	all := []api.Export{}
	for _, e := range r.Exports {
		all = append(all, api.Export{Tag: e.Tag, ReadOnly: e.ReadOnly, Text: e.Text})
	}
	return all, nil
}

// Reload is api.Guest's.
func (d *Daemon) Reload(ctx context.Context) error {
	if d.c.Reload == nil {
		return api.Errorf(api.Unsupported, "this daemon has no configuration to read again")
	}
	d.reloading.Lock()
	defer d.reloading.Unlock()
	refuse := func(err error) error {
		d.log.Error("the configuration is not taken, the one before stays in force", "error", err, sd.ConfigRefused.Attr())
		return api.Errorf(api.Invalid, "%w", err)
	}
	c, err := d.c.Reload()
	if err == nil {
		err = c.Check()
	}
	if err != nil {
		return refuse(err)
	}
	var fixed []string
	for _, f := range []struct {
		name string
		same bool
	}{
		{"server", c.Server == d.c.Server},
		{"socket", c.Socket == d.c.Socket},
		{"token-file", string(c.Token) == string(d.c.Token)},
		{"mount-root", strings.Join(c.MountRoots, "\x00") == strings.Join(d.c.MountRoots, "\x00")},
		{"allow-suid", c.AllowSuid == d.c.AllowSuid},
		{"allow-dev", c.AllowDev == d.c.AllowDev},
		{"fusermount", c.Fusermount == d.c.Fusermount},
	} {
		if !f.same {
			fixed = append(fixed, f.name)
		}
	}
	if len(fixed) > 0 {
		return refuse(fmt.Errorf("%s can't change while the daemon runs: systemctl restart transfused, which keeps the mounts", strings.Join(fixed, ", ")))
	}
	d.apply(c.Mounts, d.warn)
	d.log.Info("the configuration was read again", "mounts", len(c.Mounts), sd.Reloaded.Attr())
	return nil
}

// Wait is api.Guest's.
func (d *Daemon) Wait(ctx context.Context) error {
	if d.waitControl(ctx) == nil {
		return api.Errorf(api.Unreachable, "the host at %s is not there: %w", d.c.Server, context.Cause(ctx))
	}
	return nil
}

// trafficOf returns the counts of a mount that stands.
func (d *Daemon) trafficOf(id string) (*traffic, error) {
	e := d.entryOf(id)
	if e == nil {
		return nil, noMount(id)
	}
	m := d.mountOf(e)
	if m == nil {
		return nil, api.Errorf(api.NotFound, "%s is not mounted now", e.spec.Dir)
	}
	return m.traffic, nil
}

// Statistics is api.Guest's.
func (d *Daemon) Statistics(id string) (api.Statistics, error) {
	t, err := d.trafficOf(id)
	if err != nil {
		return api.Statistics{}, err
	}
	return t.statistics(), nil
}

// traceLen is how many requests wait for who traces; of more some are left out.
const traceLen = 4096

// Trace is api.Guest's. Mounts that are made meanwhile are traced too.
func (d *Daemon) Trace(ctx context.Context, filter api.TraceFilter, f func(api.Request)) error {
	if filter.Mount != "" {
		if _, err := d.trafficOf(filter.Mount); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := make(chan api.Request, traceLen)
	op := strings.ToUpper(filter.Operation)
	tracing := map[*traffic]func(){}
	defer func() {
		for _, remove := range tracing {
			remove()
		}
	}()
	_, changes := d.Watch(ctx)
	look := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		now := map[*traffic]bool{}
		for _, m := range d.mounts {
			id := d.infoLocked(m.e).ID
			if filter.Mount != "" && filter.Mount != id {
				continue
			}
			now[m.traffic] = true
			if tracing[m.traffic] == nil {
				tracing[m.traffic] = m.traffic.trace(&tracer{mount: id, op: op, out: out})
			}
		}
		for t, remove := range tracing {
			if !now[t] {
				remove()
				delete(tracing, t)
			}
		}
	}
	look()
	for {
		select {
		case r := <-out:
			f(r)
		case _, ok := <-changes:
			if !ok {
				return ctx.Err()
			}
			look()
		case <-ctx.Done():
			return ctx.Err()
		case <-d.ctx.Done():
			return api.Errorf(api.Internal, "the daemon is ending")
		}
	}
}
