// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/watchdog"
	"transfused.org/transfused/service/wire"
)

// attachTime is how long it may take to show a mount: nothing of it waits for the host.
const attachTime = 10 * time.Second

// unmountTime is how long a mount may take to write back before its requests are failed.
const unmountTime = 5 * time.Second

// mount is one that stands. It has a pump while it has its streams.
type mount struct {
	e            *entry
	key          uint64 // the entry's id
	dir          string
	tag          string // of version 2
	wireID       uint32
	version      uint16
	streams      int
	noFlush      bool
	keeps        bool // the host keeps it when its streams are lost
	hostReadOnly bool
	dev          *device
	traffic      *traffic
	loop         watchdog.Loop
	ctx          context.Context // ends with the mount
	cancel       context.CancelCauseFunc
	ended        chan struct{} // closed when nothing is left of it
	adopted      chan struct{} // closed when the helper has looked for it; nil: it has made it
	err          error         // why it ended; nil: it was unmounted; errLeft: another process goes on with it. Before ended is closed

	recordMu   sync.Mutex // guards record
	record     record
	recordFile *os.File // nil: it is not in the store

	// Guarded by Daemon.mu.
	options  MountOptions
	attached mountID
	pump     *Pump       // nil: it waits for its streams
	why      wire.Reason // why it was unmounted, if we did it
}

// mountAsk is what mount needs: streams that are ready for FUSE, as descriptors that do not block.
type mountAsk struct {
	socks    []int
	options  MountOptions
	wireID   uint32
	version  uint16
	noFlush  bool
	keeps    bool
	readOnly bool // at the host
}

// errLeft ends a mount that another process will go on with.
var errLeft = errors.New("left to the next process")

// mount mounts e and starts the pump. It owns the streams, also when it fails. If e is for nowhere it returns the mount's descriptor.
func (d *Daemon) mount(ctx context.Context, e *entry, q mountAsk) (m *mount, at *os.File, err error) {
	m = &mount{e: e, key: e.id, dir: e.spec.Dir, tag: e.spec.Tag, wireID: q.wireID, version: q.version, streams: len(q.socks), noFlush: q.noFlush,
		keeps: q.keeps, hostReadOnly: q.readOnly, options: q.options, traffic: &traffic{}, ended: make(chan struct{})}
	store := q.keeps && d.c.Store != nil
	c := call{Op: opMount, Key: m.key, Dir: e.spec.Dir, Options: q.options, WireID: q.wireID, Keep: store}
	if e.nowhere {
		c.Dir = ""
	}
	var files []*os.File
	if e.at != nil {
		files = []*os.File{e.at}
	}
	a, err := d.helper.call(ctx, c, files...)
	if e.at != nil {
		e.at.Close()
		e.at = nil
	}
	if err == nil && a.file == nil {
		err = errors.New("mount: the helper sent no device")
	}
	if err != nil {
		closeAll(q.socks)
		return nil, nil, err
	}
	at = a.more
	begun := m
	defer func() {
		if err == nil {
			return
		}
		if a.more != nil {
			a.more.Close()
		}
		m, at = nil, nil
		d.detach(begun)
		if begun.recordFile != nil {
			d.unstore(begun)
		}
		if begun.dev != nil {
			begun.dev.close()
		}
	}()
	if m.dev, err = newDevice(a.file); err != nil {
		closeAll(q.socks)
		return nil, at, err
	}
	if store {
		// Before its first request is read, and before it is seen.
		if err = d.store(m); err != nil {
			closeAll(q.socks)
			return nil, at, fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	p, err := d.newPump(m, q.socks)
	if err != nil {
		return nil, at, err
	}
	m.pump = p
	// Not of the daemon's: how a mount ends then is decided when the daemon ends.
	m.ctx, m.cancel = context.WithCancelCause(context.WithoutCancel(d.ctx))
	missed := d.begin(m)
	// Whatever becomes of who asked: an attaching that is given up could come after the mount's end.
	actx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), attachTime, errors.New("the mount point does not answer"))
	seen, err := d.helper.call(actx, call{Op: opAttach, Key: m.key})
	cancel()
	if err != nil {
		d.closeMount(m) // run takes the rest apart
		<-m.ended
		m.recordFile, m.dev = nil, nil
		return nil, at, err
	}
	if store {
		d.mu.Lock()
		m.attached = seen.Mount
		d.mu.Unlock()
		d.change(m, func(r *record) { r.Mount = seen.Mount })
		d.list()
	}
	d.set(e, api.Active, "")
	d.log.Info("mounted", "dir", m.dir, "tag", m.tag, sd.Mounted.Attr())
	switch err = context.Cause(e.ctx); {
	case missed:
		err = errEnding
	case !errors.Is(err, errNotWanted):
		err = nil // if the daemon is ending, it has seen m, and unmounts or leaves it
	}
	if err != nil {
		d.unmount(m, wire.ReasonShutdown)
		m.recordFile, m.dev = nil, nil
		return nil, at, err
	}
	return m, at, nil
}

// newPump makes a pump of m for its streams, whose descriptors it owns, also when it fails.
func (d *Daemon) newPump(m *mount, socks []int) (*Pump, error) {
	p, err := newPump(m.dev, socks, PumpOptions{Ahead: m.version >= wire.Version2, NoFlush: m.noFlush, Spin: d.c.Spin, Log: d.log.With("dir", m.dir)})
	if err != nil {
		return nil, err
	}
	p.traffic, p.loop = m.traffic, &m.loop
	p.agreed = func(a agreed) { d.change(m, func(r *record) { r.Agreed = a }) }
	return p, nil
}

// begin has m run, until it has ended. missed: the daemon is ending, and does not see to m.
func (d *Daemon) begin(m *mount) (missed bool) {
	d.mu.Lock()
	m.e.m = m
	d.mounts[m.key] = m
	missed = d.ending
	d.wg.Add(1) // its entry keeps the count above 0
	d.mu.Unlock()
	go func() {
		defer d.wg.Done()
		d.run(m)
	}()
	return missed
}

// detach takes away a mount that has no pump, so that nobody meets ENOTCONN or waits in it.
func (d *Daemon) detach(m *mount) {
	ctx, cancel := context.WithTimeout(context.Background(), unmountTime)
	defer cancel()
	if _, err := d.callAbout(ctx, m, call{Op: opUnmount, Key: m.key, How: howForce}); err != nil {
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

// run carries m until it ends, and cleans up after it.
func (d *Daemon) run(m *mount) {
	remove := d.c.Watchdog.Add("mount "+m.dir, &m.loop)
	err := d.carry(m)
	remove()
	m.cancel(err)
	if errors.Is(err, errLeft) {
		d.leaveNothing(m)
		m.err = errLeft
		d.mu.Lock()
		delete(d.mounts, m.key)
		m.e.m = nil
		d.mu.Unlock()
		close(m.ended)
		return
	}
	if errors.Is(err, os.ErrClosed) {
		err = nil // by unmount, below
	}
	d.detach(m)
	stored := m.recordFile != nil
	if stored {
		d.unstore(m)
	}
	m.dev.close()
	d.mu.Lock()
	delete(d.mounts, m.key)
	m.e.m = nil
	reason := m.why
	d.mu.Unlock()
	if stored {
		d.list()
	}
	if reason == 0 {
		reason = reasonAsked
	}
	text := ""
	if err != nil {
		reason, text = wire.ReasonStreamLost, err.Error()
		level := slog.LevelWarn // a host that ends does that too
		if errors.Is(err, ErrProtocol) {
			reason, level = wire.ReasonProtocol, slog.LevelError
		}
		d.log.Log(context.Background(), level, fmt.Sprintf("%s: the mount ended: %s", m.dir, err), sd.MountLost.Attr())
	} else {
		d.log.Info("unmounted", "dir", m.dir, sd.Unmounted.Attr())
	}
	m.err = err
	if m.version >= wire.Version2 {
		d.tellUnmounted(&wire.Unmounted{MountID: m.wireID, Reason: reason, Text: text})
	}
	d.tell()
	close(m.ended)
}

// tellUnmounted tells the host that a mount is gone, now or when it is there again: it may keep the mount's files and locks until then.
func (d *Daemon) tellUnmounted(u *wire.Unmounted) {
	d.mu.Lock()
	d.untold = append(d.untold, u)
	d.mu.Unlock()
	if c := d.control.Load(); c != nil {
		d.tellUntold(c)
	}
}

func (d *Daemon) tellUntold(c *control) {
	if c.version < wire.Version2 {
		return
	}
	d.mu.Lock()
	all := d.untold
	d.untold = nil
	d.mu.Unlock()
	for i, u := range all {
		if !c.send(u) {
			d.mu.Lock()
			d.untold = append(all[i:], d.untold...)
			d.mu.Unlock()
			return
		}
	}
}

// reasonAsked is what a mount ends by that nobody gave a reason for.
const reasonAsked = wire.ReasonAsked

// carry pumps, over the streams and, where the host keeps the mount, over other ones after them, until it ends: nil when it was unmounted.
func (d *Daemon) carry(m *mount) error {
	var b backoff
	var last said
	for {
		d.mu.Lock()
		p := m.pump
		d.mu.Unlock()
		if p != nil {
			began := time.Now()
			err := p.Run()
			d.mu.Lock()
			m.pump = nil
			leaving := d.leaving && m.recordFile != nil
			d.mu.Unlock()
			switch {
			case err == errDrained, leaving && errors.Is(err, ErrStream):
				return errLeft
			case !errors.Is(err, ErrStream) || !m.keeps:
				return err
			}
			if time.Since(began) > channelStands {
				b.reset()
				last.reset()
			}
			if !last.again(err.Error()) {
				d.log.Warn(fmt.Sprintf("%s: the mount waits for the host: %s", m.dir, err), "dir", m.dir)
			}
			d.set(m.e, api.Reconnecting, err.Error())
			if a := d.agreedOf(m); a != (agreed{}) && !a.Resend {
				m.fail(unix.EIO) // the kernel can't send them again, and nobody else would answer
			}
		}
		m.loop.Enter(watchdog.WaitPeer)
		socks, err := d.resume(m, &b)
		if err != nil {
			return err
		}
		if p, err = d.newPump(m, socks); err != nil {
			return err
		}
		p.goOn(d.agreedOf(m))
		d.mu.Lock()
		m.pump = p
		leaving, ended := d.leaving && m.recordFile != nil, m.ctx.Err() != nil
		d.mu.Unlock()
		switch {
		case ended: // who ended it saw no pump
			p.Close()
		case leaving:
			p.drain(drainTime)
		}
		d.set(m.e, api.Active, "")
		d.log.Info("the mount goes on", "dir", m.dir)
	}
}

// agreedOf is what INIT agreed for m; zero: it was not answered.
func (d *Daemon) agreedOf(m *mount) agreed {
	m.recordMu.Lock()
	defer m.recordMu.Unlock()
	return m.record.Agreed
}

// fail answers the requests that have no answer, as far as they are known. Precondition: no pump runs.
func (m *mount) fail(errno unix.Errno) {
	for _, unique := range m.traffic.pending() {
		var msg [fuse.OutHeaderSize]byte
		fuse.Put(msg[:], &fuse.OutHeader{Len: uint32(len(msg)), Error: -int32(errno), Unique: unique})
		_, _ = writeNow(m.dev.fd, msg[:]) // one that has ended meanwhile is ENOENT
		m.traffic.end(unique, len(msg), -int32(errno))
	}
}

// resume opens all streams of m anew, as soon as the host is there, and returns their descriptors. The error is nil's of carry where m was unmounted
// meanwhile, and ErrStream where the host has the mount no longer.
func (d *Daemon) resume(m *mount, b *backoff) (socks []int, err error) {
	ctx, cancel := context.WithCancelCause(m.ctx)
	defer cancel(nil)
	w, err := newWaker()
	if err != nil {
		return nil, err
	}
	var watching sync.WaitGroup
	watching.Go(func() {
		if m.dev.waitGone(w) {
			cancel(errUnmounted)
		}
	})
	defer func() {
		w.wake()
		watching.Wait()
		w.close()
		if errors.Is(err, errUnmounted) {
			err = os.ErrClosed
		}
	}()
	for {
		// A stream that ends at once is not opened again at once.
		if !b.wait(ctx) {
			return nil, context.Cause(ctx)
		}
		c := d.waitControl(ctx)
		if c == nil {
			return nil, context.Cause(ctx)
		}
		if !c.keeps() {
			return nil, fmt.Errorf("%w, and this host can't go on with it", ErrStream)
		}
		if socks, err = d.openStreams(ctx, m.wireID, m.streams); err == nil {
			return socks, nil
		}
		var r *refusal
		if errors.As(err, &r) && r.errno != unix.EAGAIN && r.errno != unix.EBUSY && r.errno != unix.ESHUTDOWN {
			return nil, fmt.Errorf("%w, and the host has the mount no longer: %w", ErrStream, err)
		}
	}
}

// openStreams opens the streams of a mount, of which the host takes index 0 for the first of new ones, and returns their descriptors.
func (d *Daemon) openStreams(ctx context.Context, id uint32, n int) (socks []int, err error) {
	for i := range n {
		conn, err := d.open(ctx, &wire.StreamOpen{SessionID: d.session, Token: d.c.Token, MountID: id, Index: uint16(i)})
		if err == nil {
			var sock int
			if sock, err = dupNonblocking(conn); err == nil {
				socks = append(socks, sock)
			}
			conn.Close()
		}
		if err != nil {
			closeAll(socks)
			return nil, fmt.Errorf("open stream %d: %w", i, err)
		}
	}
	return socks, nil
}

// leave has m end with errLeft. Precondition: d.mu is held, d.leaving is set.
func (m *mount) leave() {
	if m.pump != nil {
		m.pump.drain(drainTime)
	} else {
		m.cancel(errLeft)
	}
}

// drainTime is how long requests at the host may take to be answered before another process goes on. Those that do not end in that time
// are sent again then.
const drainTime = 2 * time.Second

// leaveNothing lets go of m in this process. A kernel that can't send requests again has those that are not answered fail
// now, with EINTR: nobody else would answer them.
func (d *Daemon) leaveNothing(m *mount) {
	if a := d.agreedOf(m); a != (agreed{}) && !a.Resend {
		m.fail(unix.EINTR)
	}
	m.dev.close()
	m.recordFile.Close()
}

// unmount unmounts in order, or, where that takes too long, by force, and waits for the end of the mount. Who still uses it gets errors.
func (d *Daemon) unmount(m *mount, reason wire.Reason) {
	d.mu.Lock()
	m.why = reason
	d.setLocked(m.e, api.Draining, "")
	d.mu.Unlock()
	ctx, cancel := context.WithTimeoutCause(context.Background(), unmountTime, errors.New("the host does not answer"))
	defer cancel()
	_, err := d.callAbout(ctx, m, call{Op: opUnmount, Key: m.key, How: howDetach})
	if err != nil && !errors.Is(err, errHelperEnded) {
		d.log.Warn(fmt.Sprintf("unmount %s: %s: by force now", m.dir, err))
	}
	// Who still uses a detached mount gets an error.
	grace := time.NewTimer(100 * time.Millisecond)
	defer grace.Stop()
	select {
	case <-m.ended:
		return
	case <-grace.C:
	}
	d.closeMount(m)
	<-m.ended
}

// closeMount has m end now.
func (d *Daemon) closeMount(m *mount) {
	m.cancel(os.ErrClosed)
	d.mu.Lock()
	p := m.pump
	d.mu.Unlock()
	if p != nil {
		p.Close()
	}
}

// request2 asks the host for e's export and mounts it, version 2.
func (d *Daemon) request2(ctx context.Context, c *control, e *entry) (*mount, *os.File, error) {
	spec, o := e.spec, e.options
	options, streams := hostOptions(spec.Options), 1
	if c.peer.MaxStreams > 1 {
		streams = cmp.Or(o.Streams, defaultStreams)
		options = append(options, fmt.Sprintf("streams=%d", streams))
	}
	reply, err := c.request(ctx, func(id uint32) wire.Message {
		return &wire.MountRequest{ID: id, Tag: spec.Tag, Dir: spec.Dir, Options: options}
	})
	if err != nil {
		return nil, nil, fmt.Errorf("mount %s: %w", spec.Tag, err)
	}
	r, ok := reply.(*wire.MountReply)
	if !ok {
		return nil, nil, fmt.Errorf("mount %s: %w: %T instead of MountReply", spec.Tag, wire.ErrProtocol, reply)
	}
	if r.Errno != 0 {
		err := fmt.Errorf("mount %s: the host refuses: %w", spec.Tag, &refusal{r.Errno, r.Text})
		if r.Errno == unix.EAGAIN {
			return nil, nil, err // too much at once
		}
		return nil, nil, &permanentError{err}
	}
	failed := func(err error) error {
		c.send(&wire.Unmounted{MountID: r.MountID, Reason: wire.ReasonFailed, Text: err.Error()})
		return err
	}
	socks, err := d.openStreams(ctx, r.MountID, min(max(1, int(r.Streams)), streams))
	if err != nil {
		return nil, nil, failed(fmt.Errorf("mount %s: %w", spec.Tag, err))
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
	m, at, err := d.mount(ctx, e, mountAsk{options: o, socks: socks, wireID: r.MountID, version: wire.Version2, noFlush: r.NoFlush, keeps: c.keeps(), readOnly: r.ReadOnly})
	if err != nil {
		var h *helperError
		if errors.As(err, &h) {
			err = &permanentError{err}
		}
		return nil, nil, failed(err)
	}
	d.wg.Go(func() { d.keepNotify(m) })
	return m, at, nil
}

// permanentError is one that a later try would meet again.
type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// keepMounted mounts e whenever the host is there, until somebody unmounts it (nil), it can't be (the error), it is left to the next
// process, or its context ends.
func (d *Daemon) keepMounted(e *entry) error {
	var b backoff
	var last said
	m := d.mountOf(e) // taken up
	once := m != nil
	for {
		var err error
		if m == nil {
			c := d.waitControl(e.ctx)
			if c == nil {
				return nil
			}
			if c.version < wire.Version2 {
				return fmt.Errorf("mount %s: the host speaks protocol version 1 and mounts by itself; ask for %s there, or upgrade it", e.spec.Tag, e.spec.Dir)
			}
			m, _, err = d.request2(e.ctx, c, e)
		}
		if err == nil {
			last.reset()
			once = true
			b.reset()
			<-m.ended
			if m.err == nil || errors.Is(m.err, errLeft) {
				return nil
			}
			d.set(e, api.Mounting, m.err.Error())
			m = nil
		} else if e.ctx.Err() == nil {
			var p *permanentError
			if errors.As(err, &p) && !once {
				return err
			}
			d.set(e, api.Mounting, err.Error())
			if !last.again(err.Error()) {
				d.warn(fmt.Errorf("%w: trying again", err))
			}
		}
		if !b.wait(e.ctx) {
			return nil
		}
	}
}

// mountAsked serves a MountAsk.
func (d *Daemon) mountAsked(ctx context.Context, c *control, q *wire.MountAsk) {
	spec := MountSpec{Tag: q.Tag, Dir: q.Dir, Options: q.Options}
	o, err := ParseMountOptions(q.Options)
	if err == nil {
		err = d.mayAsk(o)
	}
	var e *entry
	if err == nil {
		e, err = d.want(spec, false, false)
	}
	var m *mount
	if err == nil {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(e.ctx, cancel)()
		if m, _, err = d.request2(ctx, c, e); err != nil {
			d.unlist(e)
		} else {
			d.unlistAfter(e, m)
		}
	}
	if err != nil {
		d.warn(fmt.Errorf("the host asks for a mount of %s at %s: %w", q.Tag, q.Dir, err))
		c.send(&wire.MountResult{ID: q.ID, Errno: errnoFor(err), Text: err.Error()})
		return
	}
	c.send(&wire.MountResult{ID: q.ID, MountID: m.wireID})
}

// unlistAfter unlists e when m has ended: nobody here makes it again.
func (d *Daemon) unlistAfter(e *entry, m *mount) {
	d.keepers.Go(func() {
		<-m.ended
		d.unlist(e)
	})
}

func (d *Daemon) unmountAsked(ctx context.Context, c *control, q *wire.UnmountAsk) {
	m := d.mountByWire(q.MountID)
	if m == nil {
		c.send(&wire.UnmountReply{ID: q.ID, Errno: unix.ENOENT, Text: fmt.Sprintf("no mount %d", q.MountID)})
		return
	}
	d.unmount(m, q.Reason)
	if m.err == nil { // else it is made again
		select {
		case <-m.e.done: // or who asks for another mount there at once would be refused
		case <-ctx.Done():
		}
	}
	c.send(&wire.UnmountReply{ID: q.ID})
}

// pumpAt returns the pump of the mount at dir, or nil.
func (d *Daemon) pumpAt(dir string) *Pump {
	dir = filepath.Clean(dir)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.dir == dir {
			return m.pump
		}
	}
	return nil
}

func (d *Daemon) mountByWire(id uint32) *mount {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		if m.version >= wire.Version2 && m.wireID == id {
			return m
		}
	}
	return nil
}
