// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// entry is a mount that somebody wants: it is listed from when it is asked for until nothing is left of it. One that is kept is made
// again when it was lost.
type entry struct {
	id      uint64
	spec    MountSpec // Dir is clean
	options MountOptions
	at      *os.File // Dir, as who asked for it has it, for the first time that it is mounted; nil: it is looked for
	nowhere bool     // it is for another mount namespace, and Dir is a name only
	ctx     context.Context
	cancel  context.CancelCauseFunc // ends keeping it
	done    chan struct{}           // closed when it is no longer listed

	// Guarded by Daemon.mu.
	configured bool
	kept       bool   // it is made again when it is lost
	m          *mount // that stands; nil: none
	state      api.State
	text       string // why it is not active
	since      time.Time
	changed    chan struct{} // closed, and replaced, when what is above changes
}

// why an entry's context ended.
var (
	errNotWanted = errors.New("it is not wanted any more")
	errEnding    = errors.New("the daemon is ending")
)

// want lists a mount. Where something is wanted at that directory already the error is EBUSY, and the entry is that one. Who wants it calls
// unlist in the end, or has keep do it.
func (d *Daemon) want(spec MountSpec, configured, kept bool) (*entry, error) {
	o, err := ParseMountOptions(spec.Options)
	if err != nil {
		return nil, err
	}
	if err := checkPoint(spec.Dir, d.roots); err != nil {
		return nil, err
	}
	spec.Dir = filepath.Clean(spec.Dir)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.entries {
		if e.spec.Dir == spec.Dir && !e.nowhere {
			return e, fmt.Errorf("mount %s: %s is mounted already: %w", spec.Tag, spec.Dir, unix.EBUSY)
		}
	}
	d.lastID++
	e, err := d.listLocked(d.lastID, spec, o, configured)
	if err == nil {
		e.kept = kept
	}
	return e, err
}

// listLocked makes an entry. Precondition: d.mu is held.
func (d *Daemon) listLocked(id uint64, spec MountSpec, o MountOptions, configured bool) (*entry, error) {
	switch {
	case d.ending:
		return nil, errEnding
	case len(d.entries) >= maxMounts:
		return nil, fmt.Errorf("mount %s: %w: there are %d mounts already", spec.Dir, unix.EMFILE, maxMounts)
	}
	e := &entry{id: id, spec: spec, options: o, configured: configured, done: make(chan struct{}),
		state: api.Mounting, since: time.Now(), changed: make(chan struct{})}
	e.ctx, e.cancel = context.WithCancelCause(d.ctx)
	d.entries[id] = e
	d.wg.Add(1) // while entries is not yet final, so that the end waits for this one
	d.publishLocked(api.Added, e)
	return e, nil
}

// unlist is for an entry of which nothing is left.
func (d *Daemon) unlist(e *entry) {
	d.mu.Lock()
	delete(d.entries, e.id)
	d.publishLocked(api.Removed, e)
	d.mu.Unlock()
	e.cancel(nil)
	if e.at != nil {
		e.at.Close()
	}
	close(e.done)
	d.wg.Done()
}

// set sets how e does.
func (d *Daemon) set(e *entry, s api.State, text string) {
	d.mu.Lock()
	d.setLocked(e, s, text)
	d.mu.Unlock()
	d.tell()
}

func (d *Daemon) setLocked(e *entry, s api.State, text string) {
	if e.state == s && e.text == text {
		return
	}
	if e.state != s {
		e.since = time.Now()
	}
	e.state, e.text = s, text
	close(e.changed)
	e.changed = make(chan struct{})
	d.publishLocked(api.Changed, e)
}

// infoLocked is e in an administrator's words. Precondition: d.mu is held.
func (d *Daemon) infoLocked(e *entry) api.Mount {
	i := api.Mount{ID: strconv.FormatUint(e.id, 10), Tag: e.spec.Tag, Directory: e.spec.Dir, Source: d.c.Server.String(),
		Options: append([]string{}, e.spec.Options...), ReadOnly: e.options.ReadOnly, Configured: e.configured,
		State: e.state, Error: e.text, Since: e.since}
	if e.m != nil {
		i.ReadOnly = e.m.options.ReadOnly
		if e.state == api.Active || e.state == api.Draining {
			i.Streams = e.m.streams
		}
	}
	return i
}

// keep has e mounted whenever the host is there, until somebody unmounts it (nil), it can't be (the error), or it is not wanted any
// more. It unlists e, but one that is configured and can't be stays listed until it is not wanted.
func (d *Daemon) keep(e *entry) error {
	defer d.unlist(e)
	err := d.keepMounted(e)
	d.mu.Lock()
	stays := err != nil && e.configured && d.c.Stay
	d.mu.Unlock()
	if stays {
		d.set(e, api.Failed, err.Error())
		<-e.ctx.Done()
	} else if err != nil {
		d.set(e, api.Failed, err.Error()) // for who waits for it
	}
	return err
}

// apply makes the configured mounts those of specs: what is new is mounted, what is not in specs, or not the same there, is unmounted, and
// the others are left alone. It doesn't wait for mounts to be made.
func (d *Daemon) apply(specs []MountSpec, failed func(error)) {
	var gone, found []*entry
	d.mu.Lock()
	for _, e := range d.entries {
		if e.nowhere || !e.kept {
			continue // a container's, or the host's
		}
		i := slices.IndexFunc(specs, func(s MountSpec) bool { return filepath.Clean(s.Dir) == e.spec.Dir })
		switch {
		case i >= 0 && specs[i].Tag == e.spec.Tag && slices.Equal(specs[i].Options, e.spec.Options) && e.state != api.Failed:
			if !e.configured {
				e.configured = true
				d.publishLocked(api.Changed, e)
				found = append(found, e)
			}
		case e.configured:
			gone = append(gone, e)
		}
	}
	d.mu.Unlock()
	for _, e := range found {
		if m := d.mountOf(e); m != nil {
			d.change(m, func(r *record) { r.Configured = true })
		}
	}
	for _, e := range gone {
		d.remove(e)
	}
	for _, spec := range specs {
		if o, err := ParseMountOptions(spec.Options); err == nil && o.NoAuto {
			continue // somebody else asks for it in time
		}
		e, err := d.want(spec, true, true)
		if err != nil {
			if e == nil || e.spec.Tag != spec.Tag {
				d.warn(err)
			}
			continue
		}
		d.keepers.Go(func() {
			if err := d.keep(e); err != nil {
				failed(err)
			}
		})
	}
}

// remove ends an entry, and unmounts what stands of it, also where it is in use.
func (d *Daemon) remove(e *entry) {
	e.cancel(errNotWanted)
	if m := d.mountOf(e); m != nil {
		d.unmount(m, reasonAsked)
	}
	<-e.done
}

// mountOf returns what stands of e, or nil.
func (d *Daemon) mountOf(e *entry) *mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return e.m
}
