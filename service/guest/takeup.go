// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/wire"
)

// store puts m into the store, with what there is to know of it. It is called before m runs.
func (d *Daemon) store(m *mount) error {
	m.record = record{ID: m.key, Spec: m.e.spec, Configured: m.e.configured, Kept: m.e.kept, Nowhere: m.e.nowhere,
		Session: fmt.Sprintf("%x", d.session), WireID: m.wireID, Options: m.options, Streams: m.streams, NoFlush: m.noFlush, HostReadOnly: m.hostReadOnly}
	f, err := newRecordFile(&m.record)
	if err != nil {
		return err
	}
	dev, err := m.dev.dup()
	if err != nil {
		f.Close()
		return err
	}
	defer dev.Close()
	if err := d.c.Store.Put(m.record.name(), dev, f); err != nil {
		f.Close()
		d.log.Error("the mount can't be kept over a restart, and so is not made", "dir", m.dir, "error", err, sd.StoreRefused.Attr())
		return err
	}
	d.mu.Lock()
	m.recordFile = f
	d.mu.Unlock()
	return nil
}

// unstore takes m, which has ended, out of the store.
func (d *Daemon) unstore(m *mount) {
	m.recordMu.Lock()
	defer m.recordMu.Unlock()
	if err := d.c.Store.Remove(m.record.name()); err != nil {
		d.log.Error("take out of the store", "dir", m.dir, "error", err)
	}
	m.recordFile.Close()
	d.mu.Lock()
	m.recordFile = nil
	d.mu.Unlock()
}

// change changes what the next process is told of m.
func (d *Daemon) change(m *mount, f func(*record)) {
	m.recordMu.Lock()
	defer m.recordMu.Unlock()
	f(&m.record)
	if m.recordFile == nil {
		return
	}
	if err := m.record.append(m.recordFile); err != nil {
		d.log.Error("note the state of a mount", "dir", m.dir, "error", err)
	}
}

// takeUp goes on with the mounts that an earlier process has left. They wait for the host, and so do those who use them.
func (d *Daemon) takeUp() {
	for _, s := range d.c.Stored {
		if err := d.takeUpOne(s); err != nil {
			d.log.Error("a mount can't be taken up", "name", s.Name, "error", err, sd.MountLost.Attr())
			if err := d.c.Store.Remove(s.Name); err != nil {
				d.log.Error("take out of the store", "name", s.Name, "error", err)
			}
		}
	}
}

func (d *Daemon) takeUpOne(s sd.Stored) error {
	r, dev, file, err := readRecord(s)
	if err != nil {
		return err
	}
	id, err := r.session()
	if err == nil && r.Agreed != (agreed{}) {
		err = r.Agreed.check()
	}
	if err == nil && d.lastID > 0 && id != d.session {
		err = fmt.Errorf("it is of another session than the others")
	}
	m := &mount{key: r.ID, dir: r.Spec.Dir, tag: r.Spec.Tag, wireID: r.WireID, version: 2, streams: r.streams(), noFlush: r.NoFlush, keeps: true, hostReadOnly: r.HostReadOnly,
		options: r.Options, traffic: &traffic{}, ended: make(chan struct{}), adopted: make(chan struct{}), attached: r.Mount, record: *r, recordFile: file}
	if err != nil {
		dev.Close()
		file.Close()
		return err
	}
	if m.dev, err = newDevice(dev); err != nil {
		file.Close()
		return err
	}
	// What was opened without it stays without it.
	if err = unix.SetNonblock(m.dev.fd, true); err == nil {
		fds := []unix.PollFd{{Fd: int32(m.dev.fd)}}
		if _, perr := unix.Poll(fds, 0); perr == nil && fds[0].Revents&unix.POLLERR != 0 {
			err = fmt.Errorf("%s was unmounted meanwhile: %w", m.dir, unix.ENODEV)
			d.tellUnmounted(&wire.Unmounted{MountID: m.wireID, Reason: reasonAsked})
		}
	}
	if err == nil {
		d.mu.Lock()
		m.e, err = d.listLocked(r.ID, r.Spec, r.Options, r.Configured)
		d.lastID = max(d.lastID, r.ID)
		d.mu.Unlock()
	}
	if err != nil {
		m.dev.close()
		file.Close()
		return err
	}
	d.session = id
	d.mu.Lock()
	m.e.nowhere, m.e.kept = r.Nowhere, r.Kept
	d.mu.Unlock()
	m.ctx, m.cancel = context.WithCancelCause(context.WithoutCancel(d.ctx))
	d.set(m.e, api.Reconnecting, "the daemon was started again")
	d.log.Info("taken up", "dir", m.dir, "tag", m.tag, sd.MountTakenUp.Attr())
	d.begin(m)
	// Its users wait for the host, not for the helper to start; and the path may lead through another mount that waits for the host.
	d.wg.Go(func() {
		d.adopt(m, r)
		d.keepNotify(m)
	})
	if r.Kept {
		d.keepers.Go(func() { _ = d.keep(m.e) }) // what it can't do was logged
	} else {
		d.unlistAfter(m.e, m)
	}
	return nil
}

// adopt has the helper look for m, which was taken up.
func (d *Daemon) adopt(m *mount, r *record) {
	defer close(m.adopted)
	q := call{Op: opAdopt, Key: m.key, Dir: m.dir, Mount: r.Mount, Options: r.Options, WireID: m.wireID, Keep: true}
	if r.Nowhere {
		q.Dir = ""
	}
	if _, err := d.helper.call(m.ctx, q); err != nil && m.ctx.Err() == nil {
		d.log.Warn("a mount that was taken up can't be reached: it goes on, but not for events, and unmounting it is up to you", "dir", m.dir, "error", err)
	}
}

// callAbout asks the helper about m, which it may not know yet.
func (d *Daemon) callAbout(ctx context.Context, m *mount, q call) (answer, error) {
	if m.adopted != nil {
		select {
		case <-m.adopted:
		case <-ctx.Done():
			return answer{}, fmt.Errorf("%s: %w", q.Op, context.Cause(ctx))
		}
	}
	return d.helper.call(ctx, q)
}
