// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// keepNotify keeps the notify channel of m, of version 2, until m ends.
func (d *Daemon) keepNotify(m *mount) {
	keepChannel(m.ctx, d.log.With("dir", m.dir), "notify channel", func() error {
		conn, err := d.open(m.ctx, &wire.NotifyOpen2{SessionID: d.session, Token: d.c.Token, MountID: m.wireID})
		if err != nil {
			return err
		}
		return d.passNotify(m.ctx, m, conn)
	})
}

// keepEvents keeps the session's event channel, of version 2, until ctx ends.
func (d *Daemon) keepEvents(ctx context.Context) {
	keepChannel(ctx, d.log, "event channel", func() error {
		// The helper answers at once; an answer that nobody takes would leave it the thread.
		a, err := d.helper.call(context.WithoutCancel(ctx), call{Op: opThread})
		if err != nil {
			return err
		}
		q := call{Op: opEvents2, Thread: a.Thread}
		conn, err := d.open(ctx, &wire.EventOpen{SessionID: d.session, Token: d.c.Token, ThreadID: uint32(a.Thread)})
		if err != nil {
			_, _ = d.helper.call(ctx, q) // ends the thread; an error means that the helper did
			return err
		}
		return d.pass(ctx, q, conn)
	})
}

// channelStands is how long a channel must have been there for its end to be the first of its kind again.
const channelStands = 10 * time.Second

// keepChannel has serve open and serve a channel again and again, until ctx ends or the host has no such channel. Without one a
// mount goes on, and misses what the host would tell.
func keepChannel(ctx context.Context, log *slog.Logger, what string, serve func() error) {
	var b backoff
	var last said
	for {
		began := time.Now()
		err := serve()
		if errors.Is(err, unix.ENOSYS) {
			log.Debug("the host has no "+what, "reason", err)
			return
		}
		if errors.Is(err, errHelperEnded) {
			return
		}
		if time.Since(began) > channelStands {
			b.reset()
			last.reset()
		}
		// The end of all channels is that of the mount or the host: the wait tells it from this one's.
		if !b.wait(ctx) {
			return
		}
		reason := "it ended"
		if err != nil {
			reason = err.Error()
		}
		if !last.again(reason) {
			log.Warn("the "+what+" is lost: dialling again", "reason", reason)
		}
	}
}

// passNotify has the helper serve a notify channel of m until it ends.
func (d *Daemon) passNotify(ctx context.Context, m *mount, conn *transport.Conn) error {
	dev, err := m.dev.dup()
	if err != nil {
		conn.Close()
		return err
	}
	return d.pass(ctx, call{Op: opNotify, Key: m.key, Dir: m.dir}, conn, dev)
}

// pass gives conn, and files after it, to the helper, and waits for its answer. It owns them all.
func (d *Daemon) pass(ctx context.Context, q call, conn *transport.Conn, files ...*os.File) error {
	f, err := conn.File()
	conn.Close()
	if err == nil {
		files = append([]*os.File{f}, files...)
	}
	var id uint64
	var waiting chan answer
	if err == nil {
		id, waiting, err = d.helper.start(q, files...)
	}
	// Before the wait: while this process has it too, nobody sees the end of what the helper closes.
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		return err
	}
	_, err = d.helper.wait(ctx, q.Op, id, waiting)
	return err
}
