// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// unmountTime is how long a mount may take to write back before its requests are failed.
const unmountTime = 5 * time.Second

// mount is one that stands. Its pump owns the device.
type mount struct {
	key     uint64
	dir     string
	tag     string // of version 2
	wireID  uint32
	version uint16
	pump    *Pump
	ctx     context.Context // ends with the pump
	cancel  context.CancelFunc
	why     wire.Reason   // guarded by daemon.mu: why it was unmounted, if we did it
	ended   chan struct{} // closed when nothing is left of it
	err     error         // what its pump returned; before ended is closed
}

// mountAsk is what mount needs: a stream that is ready for FUSE, and where to mount.
type mountAsk struct {
	dir     string
	tag     string
	options MountOptions
	conn    *transport.Conn
	wireID  uint32
	version uint16
	noFlush bool
}

// mount mounts and starts the pump. It owns the stream, also when it fails.
func (d *daemon) mount(ctx context.Context, q mountAsk) (*mount, error) {
	d.mu.Lock()
	d.lastKey++
	m := &mount{key: d.lastKey, dir: filepath.Clean(q.dir), tag: q.tag, wireID: q.wireID, version: q.version, ended: make(chan struct{})}
	var err error
	switch {
	case d.ending:
		err = errEnding
	case d.standing == maxMounts:
		err = fmt.Errorf("mount %s: %w: there are %d mounts already", m.dir, unix.EMFILE, maxMounts)
	default:
		d.standing++
		d.wg.Add(1) // while mounts is not yet final, so that the end waits for this one
	}
	d.mu.Unlock()
	if err != nil {
		q.conn.Close()
		return nil, err
	}
	a, err := d.helper.call(ctx, call{Op: opMount, Key: m.key, Dir: q.dir, Options: q.options, WireID: q.wireID})
	if err == nil && a.file == nil {
		err = errors.New("mount: the helper sent no device")
	}
	if err != nil {
		q.conn.Close()
		d.gone()
		return nil, err
	}
	log := d.log.With("dir", m.dir)
	if m.pump, err = NewPump(a.file, q.conn, PumpOptions{Ahead: q.version >= wire.Version2, NoFlush: q.noFlush, Log: log}); err != nil {
		d.detach(m)
		d.gone()
		return nil, err
	}
	m.ctx, m.cancel = context.WithCancel(d.ctx)
	d.mu.Lock()
	d.mounts[m.key] = m
	ending := d.ending
	d.mu.Unlock()
	go func() {
		defer d.gone()
		d.run(m)
	}()
	if m.tag != "" {
		log = log.With("tag", m.tag)
	}
	log.Info("mounted")
	d.tell()
	if ending {
		d.unmount(m, wire.ReasonShutdown)
		return nil, errEnding
	}
	return m, nil
}

// gone is for a mount that was begun and has ended.
func (d *daemon) gone() {
	d.mu.Lock()
	d.standing--
	d.mu.Unlock()
	d.wg.Done()
}

// detach takes away a mount that has no pump, so that nobody meets ENOTCONN or waits in it.
func (d *daemon) detach(m *mount) {
	ctx, cancel := context.WithTimeout(context.Background(), unmountTime)
	defer cancel()
	if _, err := d.helper.call(ctx, call{Op: opUnmount, Key: m.key, Force: true}); err != nil {
		if errors.Is(err, errHelperEnded) {
			d.mu.Lock()
			d.stale = append(d.stale, m.dir) // for another helper
			d.mu.Unlock()
			return
		}
		d.log.Error("detach", "dir", m.dir, "error", err)
	}
	// Forgetting can't fail but with the helper.
	_, _ = d.helper.call(ctx, call{Op: opForget, Key: m.key})
}

var errEnding = errors.New("the daemon is ending")

// run pumps until the mount ends, and cleans up after it.
func (d *daemon) run(m *mount) {
	err := m.pump.Run()
	m.cancel()
	if errors.Is(err, os.ErrClosed) {
		err = nil // by unmount, below
	}
	d.detach(m)
	d.mu.Lock()
	delete(d.mounts, m.key)
	reason := m.why
	d.mu.Unlock()
	d.tell()
	if reason == 0 {
		reason = wire.ReasonAsked
	}
	text := ""
	if err != nil {
		reason, text = wire.ReasonStreamLost, err.Error()
		level := slog.LevelWarn // a host that ends does that too
		if errors.Is(err, ErrProtocol) {
			reason, level = wire.ReasonProtocol, slog.LevelError
		}
		d.log.Log(context.Background(), level, fmt.Sprintf("%s: the mount ended: %s", m.dir, err))
	} else {
		d.log.Info("unmounted", "dir", m.dir)
	}
	m.err = err
	if c := d.control.Load(); c != nil && m.version >= wire.Version2 {
		c.offer(&wire.Unmounted{MountID: m.wireID, Reason: reason, Text: text})
	}
	close(m.ended)
}

// unmount unmounts in order, or, where that takes too long, by force, and waits for the end of the mount.
func (d *daemon) unmount(m *mount, reason wire.Reason) error {
	d.mu.Lock()
	m.why = reason
	d.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(context.Background(), unmountTime, errors.New("the host does not answer"))
	defer cancel()
	_, err := d.helper.call(ctx, call{Op: opUnmount, Key: m.key})
	if err != nil && !errors.Is(err, errHelperEnded) {
		d.log.Warn(fmt.Sprintf("unmount %s: %s: by force now", m.dir, err))
	}
	// Who still uses a detached mount gets an error.
	grace := time.NewTimer(100 * time.Millisecond)
	defer grace.Stop()
	select {
	case <-m.ended:
		return nil
	case <-grace.C:
	}
	m.pump.Close()
	<-m.ended
	return nil
}

// request2 asks the host for spec and mounts it, version 2.
func (d *daemon) request2(ctx context.Context, c *control, spec MountSpec, o MountOptions) (*mount, error) {
	// Two mounts of one point would hide each other.
	if d.mountAtDir(spec.Dir) != nil {
		return nil, &permanentError{fmt.Errorf("mount %s: %s is mounted already: %w", spec.Tag, spec.Dir, unix.EBUSY)}
	}
	if err := checkPoint(spec.Dir, d.roots); err != nil {
		return nil, &permanentError{err}
	}
	reply, err := c.request(ctx, func(id uint32) wire.Message {
		return &wire.MountRequest{ID: id, Tag: spec.Tag, Dir: spec.Dir, Options: hostOptions(spec.Options)}
	})
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", spec.Tag, err)
	}
	r, ok := reply.(*wire.MountReply)
	if !ok {
		return nil, fmt.Errorf("mount %s: %w: %T instead of MountReply", spec.Tag, wire.ErrProtocol, reply)
	}
	if r.Errno != 0 {
		err := fmt.Errorf("mount %s: the host refuses: %w", spec.Tag, &refusal{r.Errno, r.Text})
		if r.Errno == unix.EAGAIN {
			return nil, err // too much at once
		}
		return nil, &permanentError{err}
	}
	failed := func(err error) error {
		c.send(&wire.Unmounted{MountID: r.MountID, Reason: wire.ReasonFailed, Text: err.Error()})
		return err
	}
	conn, err := d.open(ctx, &wire.StreamOpen{SessionID: d.session, Token: d.c.Token, MountID: r.MountID})
	if err != nil {
		return nil, failed(fmt.Errorf("mount %s: open its stream: %w", spec.Tag, err))
	}
	o.DefaultPermissions = true
	o.AllowOther = o.AllowOther || os.Geteuid() == 0
	o.ReadOnly = o.ReadOnly || r.ReadOnly
	if o.Source == "" {
		o.Source = spec.Tag
	}
	if r.MaxWrite >= 4096 && r.MaxWrite < MaxData {
		o.MaxRead = r.MaxWrite
	}
	m, err := d.mount(ctx, mountAsk{dir: spec.Dir, tag: spec.Tag, options: o, conn: conn, wireID: r.MountID, version: wire.Version2, noFlush: r.NoFlush})
	if err != nil {
		var h *helperError
		if errors.As(err, &h) {
			err = &permanentError{err}
		}
		return nil, failed(err)
	}
	d.wg.Go(func() { d.keepNotify(m) })
	return m, nil
}

// permanentError is one that a later try would meet again.
type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// keepMounted mounts spec whenever the host is there, until somebody unmounts it (nil), it can't be (the error), or
// ctx ends.
func (d *daemon) keepMounted(ctx context.Context, spec MountSpec) error {
	// Checked before the daemon began.
	o, err := ParseMountOptions(spec.Options)
	if err != nil {
		return err
	}
	var b backoff
	var last said
	once := false
	for {
		c := d.waitControl(ctx)
		if c == nil {
			return nil
		}
		if c.version < wire.Version2 {
			return fmt.Errorf("mount %s: the host speaks protocol version 1 and mounts by itself; ask for %s there, or upgrade it", spec.Tag, spec.Dir)
		}
		m, err := d.request2(ctx, c, spec, o)
		if err == nil {
			last.reset()
			once = true
			b.reset()
			<-m.ended
			if m.err == nil {
				return nil
			}
		} else if ctx.Err() == nil {
			var p *permanentError
			if errors.As(err, &p) && !once {
				return err
			}
			if !last.again(err.Error()) {
				d.warn(fmt.Errorf("%w: trying again", err))
			}
		}
		if !b.wait(ctx) {
			return nil
		}
	}
}

// mountAsked serves a MountAsk.
func (d *daemon) mountAsked(ctx context.Context, c *control, q *wire.MountAsk) {
	spec := MountSpec{Tag: q.Tag, Dir: q.Dir, Options: q.Options}
	o, err := ParseMountOptions(q.Options)
	if err == nil {
		err = d.mayAsk(o)
	}
	var m *mount
	if err == nil {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(d.ctx, cancel)()
		m, err = d.request2(ctx, c, spec, o)
	}
	if err != nil {
		d.warn(fmt.Errorf("the host asks for a mount of %s at %s: %w", q.Tag, q.Dir, err))
		c.send(&wire.MountResult{ID: q.ID, Errno: errnoFor(err), Text: err.Error()})
		return
	}
	c.send(&wire.MountResult{ID: q.ID, MountID: m.wireID})
}

func (d *daemon) unmountAsked(ctx context.Context, c *control, q *wire.UnmountAsk) {
	m := d.mountByWire(q.MountID)
	if m == nil {
		c.send(&wire.UnmountReply{ID: q.ID, Errno: unix.ENOENT, Text: fmt.Sprintf("no mount %d", q.MountID)})
		return
	}
	r := &wire.UnmountReply{ID: q.ID}
	if err := d.unmount(m, q.Reason); err != nil {
		r.Errno, r.Text = errnoFor(err), err.Error()
	}
	c.send(r)
}

func (d *daemon) mountAtDir(dir string) *mount {
	dir = filepath.Clean(dir)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.dir == dir {
			return m
		}
	}
	return nil
}

func (d *daemon) mountByWire(id uint32) *mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.version >= wire.Version2 && m.wireID == id {
			return m
		}
	}
	return nil
}
