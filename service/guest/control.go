// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
	"transfused.org/transfused/service/wire"
)

const (
	handshakeTime = 3 * time.Second  // for the host's first answer (protocol-v1: a longer Init may silence a host)
	replyTime     = 30 * time.Second // for the answer to a request
	queueLen      = 256              // messages to the host that wait for its reading
)

// control is one control channel that is up. Its version is fixed.
type control struct {
	conn    *transport.Conn
	reader  *wire.Reader
	version uint16
	peer    wire.Init // of version 2
	queue   chan queued
	done    chan struct{} // closed by end
	once    sync.Once

	mu      sync.Mutex // guards the rest
	lastID  uint32
	waiting map[uint32]chan wire.Message
	listed  map[uint32][]wire.ExportInfo // of replies of which more is to come
}

// keeps says whether the host keeps a mount that has lost its stream.
func (c *control) keeps() bool {
	return c.version >= wire.Version2 && c.peer.Features&wire.FeatureKeep != 0
}

// queued is a message to the host, or a channel to be closed when all before it were written.
type queued struct {
	m       wire.Message
	written chan struct{}
}

func newControl(conn *transport.Conn, r *wire.Reader, version uint16, peer wire.Init) *control {
	return &control{conn: conn, reader: r, version: version, peer: peer, queue: make(chan queued, queueLen),
		done: make(chan struct{}), waiting: make(map[uint32]chan wire.Message)}
}

// end lets go who waits for the channel. Its writer ends it as well as its reader, who may wait for the writer.
func (c *control) end() { c.once.Do(func() { close(c.done) }) }

// offer queues m, or drops it where the host does not read: for log lines.
func (c *control) offer(m wire.Message) {
	select {
	case c.queue <- queued{m: m}:
	default:
	}
}

// send queues m, and waits for room; false: the channel has ended.
func (c *control) send(m wire.Message) bool {
	select {
	case c.queue <- queued{m: m}:
		return true
	case <-c.done:
		return false
	}
}

// flush waits until what was queued is written, in bounded time.
func (c *control) flush() {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	written := make(chan struct{})
	queue := c.queue
	for {
		select {
		case queue <- queued{written: written}:
			queue = nil // once
		case <-written:
			return
		case <-c.done:
			return
		case <-t.C:
			return
		}
	}
}

// write sends what is queued until the channel ends.
func (c *control) write() {
	for {
		select {
		case q := <-c.queue:
			if q.written != nil {
				close(q.written)
			} else if wire.Write(c.conn, q.m) != nil {
				c.conn.Shutdown() // the reader tells why
				c.end()
				return
			}
		case <-c.done:
			return
		}
	}
}

// request sends what make builds for a new id, and waits for the reply of that id.
func (c *control) request(ctx context.Context, build func(id uint32) wire.Message) (wire.Message, error) {
	ch := make(chan wire.Message, 1)
	c.mu.Lock()
	c.lastID++
	id := c.lastID
	c.waiting[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		delete(c.listed, id)
		c.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, replyTime, errors.New("the host does not answer"))
	defer cancel()
	c.send(build(id))
	select {
	case m := <-ch:
		return m, nil
	case <-c.done:
		return nil, errControlLost
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

var errControlLost = errors.New("the control channel ended")

// deliver hands a reply to who waits for it; one that nobody asked for is ignored: its asker may have given up.
func (c *control) deliver(id uint32, m wire.Message) {
	c.mu.Lock()
	ch := c.waiting[id]
	delete(c.waiting, id)
	c.mu.Unlock()
	if ch != nil {
		ch <- m
	}
}

// maxListed is how many exports one list may have.
const maxListed = 64 << 10

// exports puts the parts of a list together.
func (c *control) exports(m *wire.ExportsReply) {
	c.mu.Lock()
	wanted := c.waiting[m.ID] != nil
	if wanted && len(c.listed[m.ID]) < maxListed {
		if c.listed == nil {
			c.listed = map[uint32][]wire.ExportInfo{}
		}
		c.listed[m.ID] = append(c.listed[m.ID], m.Exports...)
	}
	all := c.listed[m.ID]
	if !m.More || !wanted {
		delete(c.listed, m.ID)
	}
	c.mu.Unlock()
	if wanted && !m.More {
		c.deliver(m.ID, &wire.ExportsReply{ID: m.ID, Exports: all})
	}
}

// connect dials the host and agrees on a version.
func (d *Daemon) connect(ctx context.Context) (*control, error) {
	if d.host1.known() {
		return d.connect1(ctx)
	}
	c, err := d.connect2(ctx)
	if !errors.Is(err, errMaybeV1) || ctx.Err() != nil {
		return c, err
	}
	c1, err1 := d.connect1(ctx)
	if err1 != nil {
		return nil, fmt.Errorf("%w; and to version 1: %w", err, err1)
	}
	if !errors.Is(err, errV1) {
		// One of version 2 that was starting or ending was silent or hung up too: connections wait in its socket meanwhile. By now it answers.
		c, err := d.connect2(ctx)
		if !errors.Is(err, errMaybeV1) || ctx.Err() != nil {
			c1.conn.Close()
			return c, err
		}
	}
	d.log.Info("the host speaks protocol version 1", "server", d.c.Server)
	d.host1.remember(d.log)
	return c1, nil
}

var (
	// errMaybeV1 says that the host took a long Init as one of version 1 would.
	errMaybeV1 = errors.New("no answer to Init of version 2")
	// errV1 says that it is one.
	errV1 = fmt.Errorf("%w: it answered six bytes", errMaybeV1)
)

func (d *Daemon) connect2(ctx context.Context) (*control, error) {
	conn, err := transport.Dial(ctx, d.c.Server)
	if err != nil {
		return nil, err
	}
	init := &wire.Init{Version: wire.Version2, MinVersion: wire.Version1, MaxMessage: wire.MaxControl, MaxWrite: MaxData,
		FuseMinor: fuse.Minor, MaxStreams: maxStreams, BootID: d.boot, SessionID: d.session, Token: d.c.Token,
		Kernel: kernelRelease(), Software: d.c.Software}
	if d.c.Store != nil {
		// Without a store nobody would come back for what the host keeps.
		init.Features = wire.FeatureKeep
	}
	if d.listening.Family != 0 {
		init.Socket = d.listening.String()
	}
	r := wire.NewReader(conn, wire.MaxControl)
	m, err := firstAnswer(ctx, conn, r, init)
	switch m := m.(type) {
	case *wire.Init:
		if m.Version == wire.Version2 {
			if m.Features&^init.Features != 0 {
				err = fmt.Errorf("%w: the host chose features %#x, which were not offered", wire.ErrProtocol, m.Features)
				break
			}
			return newControl(conn, r, wire.Version2, *m), nil
		}
		if m.Version == wire.Version1 {
			err = errV1
		} else {
			err = fmt.Errorf("%w: the host chose version %d, which was not offered", wire.ErrProtocol, m.Version)
		}
	case *wire.Refused:
		err = fmt.Errorf("refused: %w", &refusal{m.Errno, m.Text})
	case nil:
		if !errors.Is(err, wire.ErrProtocol) {
			err = fmt.Errorf("%w: %w", errMaybeV1, err)
		}
	default:
		err = fmt.Errorf("%w: %T instead of Init", wire.ErrProtocol, m)
	}
	conn.Close()
	return nil, err
}

func (d *Daemon) connect1(ctx context.Context) (*control, error) {
	conn, err := transport.Dial(ctx, d.c.Server)
	if err != nil {
		return nil, err
	}
	r := wire.NewReader(conn, wire.MaxControl)
	m, err := firstAnswer(ctx, conn, r, &wire.Init{Version: wire.Version1})
	if i, ok := m.(*wire.Init); ok && i.Version == wire.Version1 {
		return newControl(conn, r, wire.Version1, *i), nil
	}
	conn.Close()
	switch m := m.(type) {
	case nil:
		return nil, err
	case *wire.Refused:
		return nil, fmt.Errorf("refused: %w", &refusal{m.Errno, m.Text})
	default:
		return nil, fmt.Errorf("%w: %T instead of Init", wire.ErrProtocol, m)
	}
}

// firstAnswer sends the first message of a connection and reads the answer, in bounded time. A nil message comes with
// an error.
func firstAnswer(ctx context.Context, conn *transport.Conn, r *wire.Reader, m wire.Message) (wire.Message, error) {
	defer context.AfterFunc(ctx, func() { conn.Shutdown() })()
	// Deadlines of a connection in the poller can be set.
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	if err := wire.Write(conn, m); err != nil {
		return nil, err
	}
	t, body, err := r.Next()
	switch {
	case errors.Is(err, io.EOF):
		return nil, errors.New("the host closed the connection")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("the host is silent for %v", handshakeTime)
	case err != nil:
		return nil, err
	}
	_ = conn.SetDeadline(time.Time{})
	return wire.ToGuest(t, body)
}

// open dials the host for a channel of version 2 and introduces it. The caller owns the connection.
func (d *Daemon) open(ctx context.Context, m wire.Message) (*transport.Conn, error) {
	conn, err := transport.Dial(ctx, d.c.Server)
	if err != nil {
		return nil, err
	}
	reply, err := firstAnswer(ctx, conn, wire.NewReader(conn, wire.MaxFirst), m)
	switch r := reply.(type) {
	case *wire.OpenReply:
		if r.Errno == 0 {
			return conn, nil
		}
		err = &refusal{r.Errno, r.Text}
	case *wire.Refused:
		err = fmt.Errorf("refused: %w", &refusal{r.Errno, r.Text})
	case nil:
	default:
		err = fmt.Errorf("%w: %T instead of OpenReply", wire.ErrProtocol, reply)
	}
	conn.Close()
	return nil, err
}

// refusal is an answer of the host, in its own words. The host has logged it.
type refusal struct {
	errno unix.Errno
	text  string
}

func (r *refusal) Error() string { return cmp.Or(r.text, r.errno.Error()) }
func (r *refusal) Unwrap() error { return r.errno }

// backoff is the time before the next try: 0.1 s to 5 s, with jitter, so that many guests of one host do not come at
// once.
type backoff struct{ next time.Duration }

func (b *backoff) reset() { b.next = 0 }

// wait waits, and reports whether ctx goes on.
func (b *backoff) wait(ctx context.Context) bool {
	b.next = min(max(2*b.next, 100*time.Millisecond), 5*time.Second)
	t := time.NewTimer(b.next/2 + rand.N(b.next/2))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// controlLoop keeps the control channel up until ctx ends.
func (d *Daemon) controlLoop(ctx context.Context) {
	var b backoff
	var last said
	defer d.c.Watchdog.Add("control channel", &d.loop)()
	for ctx.Err() == nil {
		d.loop.Enter(watchdog.WaitPeer) // dialling and waiting for the next time are no more
		c, err := d.connect(ctx)
		if err != nil {
			if ctx.Err() == nil && !last.again(err.Error()) {
				d.log.Warn(fmt.Sprintf("waiting for the host at %s: %s", d.c.Server, err))
			}
			if !b.wait(ctx) {
				return
			}
			continue
		}
		last.reset()
		b.reset()
		err = d.session1(ctx, c)
		if ctx.Err() == nil {
			d.log.Warn(fmt.Sprintf("the control channel to the host at %s ended: %s", d.c.Server, err), sd.HostLost.Attr())
			d.loop.Enter(watchdog.WaitPeer)
			if !b.wait(ctx) {
				return
			}
		}
	}
}

// session1 serves one control channel until it ends.
func (d *Daemon) session1(ctx context.Context, c *control) error {
	stop := context.AfterFunc(ctx, func() { c.conn.Shutdown() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(c.write)
	d.up(c)
	d.tellUntold(c)
	sctx, cancel := context.WithCancel(ctx)
	if c.version >= wire.Version2 {
		wg.Go(func() { d.keepEvents(sctx) })
	}
	err := d.readControl(sctx, c, &wg)
	d.down(c)
	cancel()
	c.end()
	c.conn.Close()
	wg.Wait()
	return err
}

func (d *Daemon) readControl(ctx context.Context, c *control, wg *sync.WaitGroup) error {
	for {
		d.loop.Enter(watchdog.WaitPeer)
		t, body, err := c.reader.Next()
		d.loop.Enter(watchdog.Running)
		if errors.Is(err, io.EOF) {
			return errors.New("the host closed it")
		}
		if err != nil {
			return err
		}
		m, err := wire.ToGuest(t, body)
		if err != nil {
			return err
		}
		if c.version < wire.Version2 && t >= wire.TypeRefused {
			return fmt.Errorf("%w: %T from a host of version 1", wire.ErrProtocol, m)
		}
		d.loop.Enter(watchdog.WaitPeer) // an answer may wait for a host that does not read
		switch m := m.(type) {
		case *wire.SuitabilityRequest:
			err = d.limited(ctx, wg, func() { d.suitability(ctx, c, m) })
		case *wire.PerfstatRequest:
			c.send(d.perfstat(m))
		case *wire.Ping:
			c.send(&wire.Alive{ID: m.ID})
		case *wire.MountReply:
			c.deliver(m.ID, m)
		case *wire.ExportsReply:
			c.exports(m)
		case *wire.MountAsk:
			err = d.limited(ctx, wg, func() { d.mountAsked(ctx, c, m) })
		case *wire.UnmountAsk:
			err = d.limited(ctx, wg, func() { d.unmountAsked(ctx, c, m) })
		case *wire.Refused:
			return fmt.Errorf("the host says: %w", &refusal{m.Errno, m.Text})
		case *wire.Alive:
			// An answer to what is not asked: harmless.
		default:
			return fmt.Errorf("%w: %T on the control channel", wire.ErrProtocol, m)
		}
		if err != nil {
			return err
		}
	}
}

// limited runs f as soon as fewer than maxAsks are running. The channel is read meanwhile, or what f waits for would not come; but a
// host may not have more than maxMounts wait.
func (d *Daemon) limited(ctx context.Context, wg *sync.WaitGroup, f func()) error {
	if d.asked.Add(1) > maxMounts {
		d.asked.Add(-1)
		return fmt.Errorf("%w: more than %d requests of the host at once", wire.ErrProtocol, maxMounts)
	}
	wg.Go(func() {
		defer d.asked.Add(-1)
		select {
		case d.asks <- struct{}{}:
			defer func() { <-d.asks }()
			f()
		case <-ctx.Done():
		}
	})
	return nil
}

func (d *Daemon) suitability(ctx context.Context, c *control, m *wire.SuitabilityRequest) {
	a, err := d.helper.call(ctx, call{Op: opSuit, Paths: m.Paths, Export: m.Export})
	if err != nil {
		c.send(&wire.ErrorReply{ID: m.ID, Text: "suitability: " + err.Error()})
		return
	}
	c.send(&wire.SuitabilityReply{ID: m.ID, Paths: a.Paths})
}

func (d *Daemon) perfstat(m *wire.PerfstatRequest) wire.Message {
	p := d.pumpAt(m.Dir)
	if p == nil {
		return &wire.ErrorReply{ID: m.ID, Text: fmt.Sprintf("perfstat: nothing of this host is mounted at %q", m.Dir)}
	}
	r := &wire.PerfstatReply{ID: m.ID, Now: monotonic()}
	if m.Stop {
		r.Entries = p.stopPerf()
	} else {
		p.startPerf()
	}
	return r
}
