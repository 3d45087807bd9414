// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
	"transfused.org/transfused/service/wire"
)

// Server is the parent process: it listens, finds out who connects, and keeps
// the sessions. It reads no FUSE message. Its methods may be called from any goroutine.
type Server struct {
	conf     Config // as it began; what of it can change is in rules
	rules    atomic.Pointer[policy]
	log      *slog.Logger
	software string
	times    times
	refused  *refusals
	gate     *gate
	// strangers are behind a gate of their own: a guest's ordinary processes must not keep its root out.
	strangers *gate
	limits    confinement // of each worker; paths and capabilities come with the session

	meter meter
	hub   *hub

	started   atomic.Bool // it accepts, and Ready is about to be called or has been
	reloading sync.Mutex  // serializes Reconfigure; taken before mu

	wg sync.WaitGroup // all goroutines but the workers' readers, which the sessions wait for

	watchMu  sync.Mutex // guards watchers, and their being open
	watchers map[chan struct{}]bool

	mu       sync.Mutex // guards the rest; taken before a session's own
	began    uint64     // sessions
	sessions map[*session]bool
	quotas   map[identity]quota
}

// quota bounds what a peer causes, over all of its sessions: log lines, ours
// about it and its own; mounts and workers, since each begins and ends under
// locks that all of this machine shares (mounts, network namespaces).
type quota struct{ own, guest, mounts, workers *limiter }

// quotaOf returns the quota of a peer. Precondition: s.mu is held.
func (s *Server) quotaOf(id identity) quota {
	q, ok := s.quotas[id]
	if !ok {
		q = quota{own: newLimiter(200, 20), guest: newLimiter(100, 10), mounts: newLimiter(maxMounts, 10), workers: newLimiter(4*maxSessions, 1)}
		s.quotas[id] = q
	}
	return q
}

// times are the server's patience.
type times struct {
	first              time.Duration // for a connection's first message
	write              time.Duration // for a message that we send
	answer             time.Duration // for an answer on a channel
	stream             time.Duration // for the stream of a mount
	kept               time.Duration // for a session that has nothing but mounts that are kept
	ping               time.Duration // between pings
	act                time.Duration // for an event of version 1; less than eventTime, so that it is not the worker that gives up
	silent, dead       time.Duration // without a sign of life: log it; end the session
	retryMin, retryMax time.Duration // between attempts of a mount that the host asks for
	goodbye            time.Duration // for unmounting when the host ends
	grace              time.Duration // for unmounting what a guest may have no longer
}

var defaultTimes = times{
	first: 5 * time.Second, write: 10 * time.Second, answer: 10 * time.Second, stream: 30 * time.Second, kept: 5 * time.Minute,
	ping: 10 * time.Second, act: 8 * time.Second, silent: 30 * time.Second, dead: 5 * time.Minute,
	retryMin: 500 * time.Millisecond, retryMax: 30 * time.Second, goodbye: 2 * time.Second, grace: 10 * time.Second,
}

// Bounds of what peers can have.
const (
	maxUnknown       = 256       // connections that have not said who they are, in all
	maxUnknownEach   = 32        // of one peer
	maxStrangers     = 32        // connections that will be refused, until they are told so
	maxStrangersEach = 4         // of one peer
	maxSessions      = 8         // of one peer; each is a process
	maxMounts        = 256       // of one session
	maxRequests      = maxMounts // of one session, being worked on: a guest may ask for all it can have at once
)

// Limits of a worker. Its memory is for the bytes of requests in flight and
// the nodes that the guest's kernel knows: 1,000,000 of them take about 420 MB. The
// soft limit is below 1 GiB, and above what most nodes take (passthrough.Limits), or the
// collector would never rest.
const (
	workerSoftMemory = 896 << 20
	workerHardMemory = 2 << 30
	workerFiles      = 1 << 20
)

func newServer(c Config) *Server {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if c.Watchdog == nil {
		c.Watchdog = &watchdog.Watchdog{}
	}
	s := &Server{
		conf: c, log: log, times: defaultTimes, refused: newRefusals(toldAgain, 20, 1), gate: newGate(maxUnknown, maxUnknownEach), strangers: newGate(maxStrangers, maxStrangersEach),
		limits: confinement{Files: workerFiles, SoftMemory: workerSoftMemory, HardMemory: workerHardMemory},
		meter:  meter{byTag: map[string]passthrough.Counts{}}, watchers: map[chan struct{}]bool{}, sessions: map[*session]bool{}, quotas: map[identity]quota{},
	}
	s.hub = newHub(log)
	s.rules.Store(newPolicy(&c))
	return s
}

// New makes a server of c, which does nothing before Run. A mistake in c is a
// *ConfigError.
func New(c Config) (*Server, error) {
	if err := c.Check(); err != nil {
		return nil, &ConfigError{err}
	}
	return newServer(c), nil
}

// Run serves until ctx ends, and returns nil when everything that it
// started is gone: processes, sockets, connections. Its errors are of the system. It is
// called once.
func (s *Server) Run(ctx context.Context) error {
	ls := slices.Clone(s.conf.Inherited)
	if err := s.tryWorker(); err != nil {
		for _, l := range ls {
			l.Close()
		}
		return err
	}
	for _, a := range s.conf.Listen {
		if slices.ContainsFunc(s.conf.Inherited, func(l *transport.Listener) bool { return l.Addr() == a }) {
			continue // the service manager listens there for us
		}
		l, err := transport.Listen(a)
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return err
		}
		ls = append(ls, l)
	}
	for _, w := range s.conf.warnings() {
		s.log.Warn(w)
	}
	s.serve(ctx, ls)
	return nil
}

// tellStatus tells how the server does, and that something changed. Precondition: s.mu is held.
func (s *Server) tellStatus() {
	s.changed()
	if s.conf.Status != nil {
		s.conf.Status(s.textLocked())
	}
}

// textLocked tells in words how the server does. Precondition: s.mu is held.
func (s *Server) textLocked() string {
	return fmt.Sprintf("exports: %d, sessions of guests: %d", len(s.policy().exports), len(s.sessions))
}

// policy is who may do what, as it is now. Who decides by it about something that stays looks again afterwards (addMount).
func (s *Server) policy() *policy { return s.rules.Load() }

// tryWorker finds out at the start, and not at the first mount, whether
// workers can be confined here.
func (s *Server) tryWorker() error {
	c := s.limits
	c.Caps = serverCaps(false, false)
	w, err := startWorker(c, s.hub, s.log, workerEvents{died: func(error) {}})
	if err != nil {
		return fmt.Errorf("workers cannot be started here: %w", err)
	}
	w.close()
	return nil
}

// ConfigError is a mistake in a Config.
type ConfigError struct{ err error }

func (e *ConfigError) Error() string { return e.err.Error() }
func (e *ConfigError) Unwrap() error { return e.err }

// serve accepts connections until ctx ends, then closes ls and waits for
// everything.
func (s *Server) serve(ctx context.Context, ls []*transport.Listener) {
	if !canNamespace() {
		s.log.Info("not root, or without CAP_SYS_ADMIN: workers are confined by Landlock", "uid", s.policy().uid)
	}
	for _, l := range ls {
		s.log.Info("listening", "address", l.Addr().String())
	}
	for _, g := range s.policy().guests {
		s.log.Info("waiting for the guest at " + g.Addr.String())
	}
	for _, l := range ls {
		s.wg.Go(func() { s.accept(ctx, l) })
	}
	s.wg.Go(func() { s.conf.Watchdog.Probe(ctx, "the server's lock", time.Second, &s.mu) })
	s.started.Store(true)
	if s.conf.Ready != nil {
		s.conf.Ready()
	}
	s.mu.Lock()
	s.tellStatus()
	s.mu.Unlock()
	<-ctx.Done()
	for _, l := range ls {
		l.Close()
	}
	s.wg.Wait()
	s.hub.close()
}

func (s *Server) accept(ctx context.Context, l *transport.Listener) {
	var loop watchdog.Loop
	loop.Enter(watchdog.WaitPeer)
	defer s.conf.Watchdog.Add("listening on "+l.Addr().String(), &loop)()
	for {
		loop.Enter(watchdog.WaitPeer)
		c, err := l.Accept()
		loop.Enter(watchdog.Running)
		switch {
		case err == nil:
			s.wg.Go(func() { s.handle(ctx, c) })
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return
		default:
			// Our own trouble (EMFILE), or a peer that was gone before it
			// was accepted; the next one may do better.
			s.refuse(transport.Peer{Local: l.Addr()}, err)
			if !pause(ctx, 100*time.Millisecond) {
				return
			}
		}
	}
}

// pause waits, and says whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// refuse logs why a connection is not served.
func (s *Server) refuse(p transport.Peer, err error) {
	s.meter.refused.Add(1)
	if ok, dropped := s.refused.allow(identify(p), err, time.Now()); ok {
		s.log.Warn("connection refused", append([]any{"peer", p.String(), "address", p.Local.String(), "reason", err, sd.ConnectionRefused.Attr()}, droppedAttr(dropped)...)...)
	}
}

// handle serves one connection to its end.
func (s *Server) handle(ctx context.Context, c *transport.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	who, gate := identify(c.Peer()), s.gate
	if s.policy().stranger(c.Peer()) {
		gate = s.strangers
	}
	if !gate.enter(who) {
		s.refuse(c.Peer(), errors.New("too many connections that have not said who they are"))
		return
	}
	first, err := s.first(c)
	if err == nil {
		err = s.policy().admit(c.Peer(), tokenOf(first))
	}
	gate.leave(who)
	if err == nil {
		err = s.dispatch(ctx, stop, c, first)
	}
	if err != nil && ctx.Err() == nil {
		s.refuse(c.Peer(), err)
		s.tell(c, first, err)
	}
}

// first reads the message that says what a connection is for.
func (s *Server) first(c *transport.Conn) (wire.Message, error) {
	c.SetReadDeadline(time.Now().Add(s.times.first))
	defer c.SetReadDeadline(time.Time{})
	t, body, err := wire.NewReader(c, wire.MaxFirst).Next()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("no first message within %v", s.times.first)
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET):
		return nil, errors.New("closed before its first message was complete")
	case err != nil:
		return nil, err
	}
	return wire.ToHost(t, body)
}

func tokenOf(m wire.Message) []byte {
	switch m := m.(type) {
	case *wire.Init:
		return m.Token
	case *wire.StreamOpen:
		return m.Token
	case *wire.NotifyOpen2:
		return m.Token
	case *wire.EventOpen:
		return m.Token
	}
	return nil
}

// dispatch serves a connection by its first message. Its error is for the
// peer, who has had no answer yet. Stop keeps ctx from closing c.
func (s *Server) dispatch(ctx context.Context, stop func() bool, c *transport.Conn, first wire.Message) error {
	switch m := first.(type) {
	case *wire.Init:
		ss, err := s.session(ctx, c.Peer(), m)
		if err != nil {
			return err
		}
		// The session closes its channel itself: when the host ends it still
		// has something to say there.
		stop()
		ss.serveControl(c, m)
		return nil
	case *wire.StreamOpen:
		ss, err := s.find(c.Peer(), m.SessionID)
		if err != nil {
			return err
		}
		return ss.openStream(c, m)
	case *wire.NotifyOpen2:
		ss, err := s.find(c.Peer(), m.SessionID)
		if err != nil {
			return err
		}
		return ss.openNotify(c, m)
	case *wire.EventOpen:
		ss, err := s.find(c.Peer(), m.SessionID)
		if err != nil {
			return err
		}
		return ss.openEvents(c, m)
	case *wire.NotifyOpen:
		return s.openNotifyV1(c, m)
	}
	return fmt.Errorf("%w: a connection does not begin with %T", wire.ErrProtocol, first)
}

// tell sends a peer of version 2 why it is refused. One of version 1 has no
// ear for that.
func (s *Server) tell(c *transport.Conn, first wire.Message, err error) {
	errno := errnoOf(err)
	if errno == unix.EIO {
		errno = unix.EPERM
	}
	var answer wire.Message
	switch m := first.(type) {
	case *wire.Init:
		if m.Version < wire.Version2 {
			return
		}
		answer = &wire.Refused{Errno: errno, Text: err.Error()}
	case *wire.StreamOpen, *wire.NotifyOpen2, *wire.EventOpen:
		answer = &wire.OpenReply{Errno: errno, Text: err.Error()}
	default:
		return
	}
	c.SetWriteDeadline(time.Now().Add(s.times.write))
	// Whether it arrives is the peer's loss.
	_ = wire.Write(c, answer)
}

// session returns the session of an Init: a new one, or the one that lost its
// control channel.
func (s *Server) session(ctx context.Context, p transport.Peer, m *wire.Init) (*session, error) {
	if m.MinVersion > wire.Version2 {
		return nil, fmt.Errorf("%w: the guest speaks version %d of the protocol and above, this host up to %d: upgrade the host", unix.EPROTONOSUPPORT, m.MinVersion, wire.Version2)
	}
	if m.Version >= wire.Version2 && m.SessionID == [16]byte{} {
		return nil, fmt.Errorf("%w: a session id of zero", unix.EPROTO)
	}
	who := identify(p)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	var lost *session // longest
	var since time.Time
	for ss := range s.sessions {
		if ss.ctx.Err() != nil || ss.who != who {
			continue
		}
		if ss.resumes(p, m) {
			return ss, nil
		}
		if ss.rebooted(m) {
			ss.cancel(errRebooted)
			continue
		}
		n++
		if t := ss.lostSince(); !t.IsZero() && (lost == nil || t.Before(since)) {
			lost, since = ss, t
		}
	}
	if n >= maxSessions {
		if lost == nil {
			return nil, fmt.Errorf("%w: %d sessions of this guest already: end one of its daemons", unix.EAGAIN, n)
		}
		lost.cancel(errGaveWay)
	}
	s.began++
	ss := newSession(ctx, s, p, m)
	s.sessions[ss] = true
	s.tellStatus()
	s.wg.Go(ss.run)
	return ss, nil
}

// find returns the session that a further connection of p belongs to.
func (s *Server) find(p transport.Peer, id [16]byte) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ss := range s.sessions {
		// Another's session is as good as none, also in what p is told.
		if ss.version >= wire.Version2 && ss.id == id && ss.who == identify(p) && ss.ctx.Err() == nil {
			return ss, nil
		}
	}
	return nil, fmt.Errorf("%w: no session of this peer has that id: open a control channel first", unix.ENOENT)
}

// openNotifyV1 finds the mount that a notify channel of version 1 is for: it
// tells no more than the mount point.
func (s *Server) openNotifyV1(c *transport.Conn, m *wire.NotifyOpen) error {
	p := c.Peer()
	s.mu.Lock()
	var found *mount
	var owner *session
	for ss := range s.sessions {
		if ss.version == wire.Version1 && ss.who == identify(p) && ss.sameProcess(p) {
			if mt := ss.mountAt(m.Dir); mt != nil {
				owner, found = ss, mt
			}
		}
	}
	s.mu.Unlock()
	if found == nil {
		return fmt.Errorf("%w: notify channel for %q, where this host has mounted nothing", unix.ENOENT, m.Dir)
	}
	owner.passNotify(c, found, owner.channels.Add(1))
	return nil
}
