// SPDX-License-Identifier: Apache-2.0

package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// session is one guest daemon: its control channel, its mounts, and the worker
// that serves them. It lasts while it has a control channel or a mount in use, and
// for times.kept with nothing but mounts that it keeps.
//
// Its context ends it; the cause is the reason.
type session struct {
	srv     *Server
	number  uint64 // of all sessions of the server
	who     identity
	peer    transport.Peer // of the control connection that made it
	version uint16         // that is spoken
	id      [16]byte       // version 2
	boot    [16]byte       // version 2: of the guest's kernel; zero where it has none
	write   uint32         // the most data of a READ or WRITE, in bytes
	log     *slog.Logger
	quota   quota
	ctx     context.Context
	cancel  context.CancelCauseFunc
	start   time.Time
	seen    atomic.Int64 // when the guest last gave a sign of life, in ns after start; a suspended host's clock stands
	work    sync.WaitGroup
	busy    chan struct{} // one for each request being worked on

	v1       *eventsV1     // of version 1, else nil
	channels atomic.Uint64 // notify and event channels that came
	working  chan struct{} // closed when there is a worker, for the first time
	counting atomic.Bool   // the worker has been asked for its counts, and not answered

	starting sync.Mutex  // serializes starting the worker, and what it must be there for; taken before mu
	confined confinement // of the worker; guarded by starting

	mu      sync.Mutex // guards the rest
	worker  *workerProc
	limited string                             // not all directories of this session's mounts can be watched by inotify, and why
	keeping context.Context                    // of the control channel that keepers are of
	keepers map[string]context.CancelCauseFunc // one for each mount that the host asks for
	known   bool                               // it has had a control channel
	control *control                           // nil while it is lost
	lostAt  time.Time                          // when it was lost; zero while it is there, or has not been yet
	about   wire.Init                          // what the guest said at last
	kept    *time.Timer                        // runs while the session has nothing but mounts that it keeps
	mounts  map[uint32]*mount
	untold  map[uint32]*mount // that the host asked for and that ended, until the guest says why
	// next begins at random: a guest that comes back to a host which has forgotten its session must not find another mount
	// under the number that it knows.
	next    uint32                       // MountID, or ID of a question to the guest, used last
	waiting map[uint32]chan wire.Message // for answers of the guest, by ID
}

// mount is one mount of an export by one guest.
type mount struct {
	id     uint32
	export *Export // as the guest has it: perhaps read-only where the host's is not
	of     *Export // as it was offered
	dir    string  // in the guest
	done   chan struct{}
	told   chan struct{} // closed when the guest has said why it ended

	keep    bool // wire.FeatureKeep
	streams int  // that it has at once
	noFlush bool // passthrough.NoFlush; set before anybody else has the mount

	// Guarded by the session's mu.
	asked   bool        // by the host
	wish    string      // the configured mount that was asked for
	retired bool        // the host has it unmounted
	sets    uint64      // of streams, that came; a set begins with its stream 0
	open    uint16      // streams of the last set that came, bit by index; 0: the set has ended
	watched string      // how changes on the host are seen
	stood   bool        // its notify channel came: the guest had mounted it
	reason  wire.Reason // why it ended, if the guest said so
	why     string      // why drop ends it
	counts  passthrough.Counts
	timeout *time.Timer // until all of its first streams came
}

var (
	errGuestGone = errors.New("the guest closed its control channel and has no mount")
	errNotBack   = errors.New("the guest did not come back for its mounts")
	errRebooted  = errors.New("the guest has booted anew")
	errGaveWay   = errors.New("the guest has begun too many sessions since it lost this one")
)

// newSession makes a session, which its run ends. Precondition: s.mu is held.
func newSession(ctx context.Context, s *Server, p transport.Peer, m *wire.Init) *session {
	ss := &session{
		srv: s, number: s.began, who: identify(p), peer: p, version: min(m.Version, wire.Version2), id: m.SessionID, boot: m.BootID, write: maxWrite,
		next: rand.Uint32(), start: time.Now(), busy: make(chan struct{}, maxRequests), working: make(chan struct{}),
		mounts: map[uint32]*mount{}, untold: map[uint32]*mount{}, waiting: map[uint32]chan wire.Message{},
	}
	if ss.version < wire.Version2 {
		ss.v1 = newEventsV1(ss)
	}
	ss.heard(m)
	ss.quota = s.quotaOf(ss.who)
	ss.log = slog.New(limitedHandler{s.log.Handler(), ss.quota.own}).With("peer", p.String())
	if m.MaxWrite > 0 {
		ss.write = min(ss.write, m.MaxWrite)
	}
	ss.ctx, ss.cancel = context.WithCancelCause(ctx)
	return ss
}

// heard keeps what an Init says, but for the token. Precondition: ss.mu is held, or nobody else has ss yet.
func (ss *session) heard(m *wire.Init) {
	ss.about = *m
	ss.about.Token = nil
}

// alive notes a sign of life.
func (ss *session) alive() { ss.seen.Store(int64(time.Since(ss.start))) }

// forgive takes back the silence of a time in which this process itself stood still (SIGSTOP, a debugger, a machine without a CPU to spare):
// nobody was asked then. It is called when it was due, in time after start, or as much later as the process stood.
func (ss *session) forgive(due time.Duration) {
	late := time.Since(ss.start) - due
	if seen := ss.seen.Load(); seen <= int64(due) { // else the guest was heard from just now
		ss.seen.CompareAndSwap(seen, seen+int64(late))
	}
}

// quiet is how long there was none.
func (ss *session) quiet() time.Duration {
	return time.Since(ss.start) - time.Duration(ss.seen.Load())
}

// resumes says whether an Init is of this session, whose control channel was
// lost or is about to be found lost. Peers have no session in common: VMs
// cloned from one snapshot come with one id.
func (ss *session) resumes(p transport.Peer, m *wire.Init) bool {
	if ss.who != identify(p) {
		return false
	}
	if m.Version >= wire.Version2 {
		return ss.version >= wire.Version2 && ss.id == m.SessionID
	}
	// Version 1 has no session: it is known by the peer.
	return ss.version == wire.Version1 && ss.sameProcess(p) && ss.lost()
}

// sameProcess tells guests over one Unix socket apart.
func (ss *session) sameProcess(p transport.Peer) bool {
	return p.Family != transport.Unix || p.PID == ss.peer.PID
}

// spawn runs f in a goroutine that the session's end waits for; false: that has begun.
func (ss *session) spawn(f func()) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	// run takes mu after ctx has ended and before it waits: work is not added to while it is waited for.
	if ss.ctx.Err() != nil {
		return false
	}
	ss.work.Go(f)
	return true
}

func (ss *session) lost() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.control == nil
}

// lostSince is when the session lost its control channel; zero if it has one, or has had none yet.
func (ss *session) lostSince() time.Time {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.lostAt
}

// rebooted says whether an Init of the same peer is of another boot than this session: one VM has one at a time.
func (ss *session) rebooted(m *wire.Init) bool {
	var none [16]byte
	return ss.who.family != transport.Unix && m.Version >= wire.Version2 && m.BootID != none && ss.boot != none && m.BootID != ss.boot
}

// settleLocked ends the session if it has nothing left, and bounds it if it has nothing but mounts that it keeps. Precondition: ss.mu is held.
func (ss *session) settleLocked() {
	alone := ss.control == nil
	for _, m := range ss.mounts {
		alone = alone && m.open == 0
	}
	switch {
	case !alone || ss.ctx.Err() != nil:
		if ss.kept != nil {
			ss.kept.Stop()
			ss.kept = nil
		}
	case len(ss.mounts) == 0:
		ss.cancel(errGuestGone)
	case ss.kept == nil:
		var t *time.Timer
		t = time.AfterFunc(ss.srv.times.kept, func() {
			ss.mu.Lock()
			defer ss.mu.Unlock()
			if ss.kept == t { // else somebody was there first
				ss.cancel(errNotBack)
			}
		})
		ss.kept = t
	}
}

// run waits for the session's end and takes it apart.
func (ss *session) run() {
	<-ss.ctx.Done()
	if ss.reason() == errShutdown {
		ss.goodbye()
	}
	ss.srv.mu.Lock()
	delete(ss.srv.sessions, ss)
	ss.srv.tellStatus()
	ss.srv.mu.Unlock()

	ss.count(endTime) // for the last time
	ss.mu.Lock()
	c := ss.control
	for _, m := range ss.mounts {
		ss.endLocked(m)
	}
	ss.settleLocked()
	ss.mu.Unlock()
	if c != nil {
		ss.refuse(c.Conn)
		c.Close()
	}
	ss.starting.Lock() // nobody starts a worker after this: see startWorker
	w := ss.worker
	ss.starting.Unlock()
	if w != nil {
		w.close()
	}
	ss.work.Wait()
	ss.log.Info("session ended", "reason", ss.reason(), sd.SessionEnded.Attr())
}

// refuse tells a guest of version 2 that the session has ended.
func (ss *session) refuse(c *transport.Conn) {
	if ss.version >= wire.Version2 {
		// It may be gone, or not listen.
		c.SetWriteDeadline(time.Now().Add(ss.srv.times.goodbye))
		_ = wire.Write(c, &wire.Refused{Errno: unix.ESHUTDOWN, Text: ss.reason().Error()})
	}
}

// reason is why the session ends.
func (ss *session) reason() error {
	if err := context.Cause(ss.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return errShutdown
}

var errShutdown = errors.New("the host ends")

// reaches says whether a worker that is so confined can serve e: the walls don't move.
func (c *confinement) reaches(e *Export) bool {
	if e.Suid && !slices.Contains(c.Caps, unix.CAP_SETFCAP) || e.Dev && !slices.Contains(c.Caps, unix.CAP_MKNOD) {
		return false
	}
	return canNamespace() || slices.Contains(c.ReadWrite, e.Dir) || e.ReadOnly && slices.Contains(c.ReadOnly, e.Dir)
}

// workerFor returns the session's worker, which can serve e; started if need be. Precondition: ss.starting is held.
func (ss *session) workerFor(e *Export) (*workerProc, error) {
	if err := ss.ctx.Err(); err != nil {
		return nil, fmt.Errorf("the session has ended: %w", unix.ESHUTDOWN)
	}
	if ss.worker != nil && !ss.confined.reaches(e) {
		ss.mu.Lock()
		used := len(ss.mounts) > 0
		old := ss.worker
		if !used {
			ss.worker = nil
		}
		ss.mu.Unlock()
		if used {
			return nil, fmt.Errorf("%w: the worker of this guest was shut in before export %s was as it is now: unmount what the guest has of this host, or start its transfused again", unix.EAGAIN, e.Tag)
		}
		old.close()
	}
	if ss.worker != nil {
		return ss.worker, nil
	}
	if ok, _ := ss.quota.workers.allow(time.Now()); !ok {
		return nil, fmt.Errorf("%w: this guest has begun too many sessions lately", unix.EAGAIN)
	}
	c := ss.srv.limits
	var suid, dev bool
	for _, e := range ss.srv.policy().visible(ss.peer) {
		suid, dev = suid || e.Suid, dev || e.Dev
		if e.ReadOnly {
			c.ReadOnly = append(c.ReadOnly, e.Dir)
		} else {
			c.ReadWrite = append(c.ReadWrite, e.Dir)
		}
	}
	c.Caps = serverCaps(suid, dev)
	w, err := startWorker(c, ss.srv.hub, ss.log, workerEvents{ended: ss.mountEnded, lost: ss.streamLost, counted: ss.counted, limited: ss.watchLimited, died: func(err error) {
		if err != nil {
			ss.srv.meter.deaths.Add(1)
			ss.log.Error("worker died: its session ends, no other", "error", err, sd.WorkerDied.Attr())
			ss.cancel(fmt.Errorf("its worker died: %w", err))
		}
	}})
	if err != nil {
		return nil, &hostError{err}
	}
	ss.confined = c
	ss.mu.Lock()
	ss.worker = w
	ss.mu.Unlock()
	select {
	case <-ss.working:
	default:
		close(ss.working)
	}
	return w, nil
}

// addMount gives the worker an export to serve, as e, under a new MountID.
func (ss *session) addMount(of *Export, e Export, dir string) (*mount, error) {
	m := &mount{export: &e, of: of, dir: dir, done: make(chan struct{}), told: make(chan struct{})}
	w, err := ss.noteMount(m)
	if err != nil {
		return nil, err
	}
	noFlush, watched, err := w.mount(mountOrder{MountID: m.id, Ahead: ss.version >= wire.Version2, Reread: ss.version < wire.Version2, Keep: m.keep, Spin: ss.srv.conf.Spin}, &e)
	m.noFlush = noFlush
	ss.mu.Lock()
	m.watched = watched
	ss.mu.Unlock()
	// The policy may have changed before the mount was noted, and so nobody have ended it.
	if err == nil && !ss.may(m) {
		ss.drop(m, errExportGone.Error())
		return nil, fmt.Errorf("%w: %w", errExportGone, unix.ENOENT)
	}
	if err != nil {
		ss.mu.Lock()
		if ss.mounts[m.id] == m {
			ss.endLocked(m)
		}
		ss.mu.Unlock()
		return nil, &hostError{err}
	}
	return m, nil
}

var errExportGone = errors.New("the host has changed what it exports to this guest")

// may says whether the guest may have m as it is.
func (ss *session) may(m *mount) bool {
	now := ss.srv.policy().export(ss.peer, m.of.Tag)
	return now != nil && now.same(m.of)
}

// noteMount gives m its number, and returns the worker that is to serve it.
func (ss *session) noteMount(m *mount) (*workerProc, error) {
	ss.starting.Lock() // until it is noted, and so the worker is in use
	defer ss.starting.Unlock()
	w, err := ss.workerFor(m.export)
	if err != nil {
		return nil, err
	}
	if ok, _ := ss.quota.mounts.allow(time.Now()); !ok {
		return nil, fmt.Errorf("%w: too many mounts at once: wait a little", unix.EAGAIN)
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if len(ss.mounts) >= maxMounts {
		return nil, fmt.Errorf("%w: this guest has %d mounts already", unix.EMFILE, maxMounts)
	}
	for ss.next++; ss.next == 0 || ss.mounts[ss.next] != nil; {
		ss.next++
	}
	m.id, m.keep = ss.next, ss.about.Features&wire.FeatureKeep != 0
	m.streams = max(1, min(m.export.Streams, int(ss.about.MaxStreams))) // version 1 has no such fields
	m.timeout = time.AfterFunc(ss.srv.times.stream, func() { ss.drop(m, "not all of its streams came") })
	ss.mounts[m.id] = m
	return w, nil
}

// hostError is one whose text is not for guests: it may name the host's paths.
type hostError struct{ error }

func (e *hostError) Unwrap() error { return e.error }

// passStream gives c, a stream of m, to the worker, as workerProc.stream does. Its error is a
// *hostError where the worker may have c already.
func (ss *session) passStream(m *mount, index uint16, c *transport.Conn, reply bool) error {
	bit := uint16(1) << index
	ss.mu.Lock()
	w := ss.worker
	switch {
	case ss.mounts[m.id] != m:
		ss.mu.Unlock()
		return fmt.Errorf("%w: mount %d has ended", unix.ENOENT, m.id)
	case index == 0 && m.sets > 0 && !m.keep, index > 0 && m.open&bit != 0:
		ss.mu.Unlock()
		return fmt.Errorf("%w: mount %d has its stream %d", unix.EBUSY, m.id, index)
	case index > 0 && m.open == 0:
		ss.mu.Unlock()
		return fmt.Errorf("%w: stream %d of mount %d comes before its stream 0", unix.EAGAIN, index, m.id)
	}
	if index == 0 {
		m.sets++
		m.open = 0
	}
	m.open |= bit
	n := m.sets
	if bits.OnesCount16(m.open) == m.streams {
		m.timeout.Stop()
	}
	ss.settleLocked()
	ss.mu.Unlock()
	ss.srv.changed()
	if index == 0 && n > 1 {
		ss.log.Info("mount goes on with another stream", "tag", m.export.Tag, "dir", quote(m.dir))
	}
	err := w.stream(m.id, n, index, c, reply)
	switch {
	case err == nil:
		return nil
	case index > 0: // what has become of the others is another report
		ss.mu.Lock()
		if m.sets == n {
			m.open &^= bit
		}
		ss.mu.Unlock()
		ss.srv.changed()
	case n > 1: // the mount is there, and the guest may try again
		ss.streamLost(m.id, n, err.Error())
	default:
		ss.drop(m, "its stream could not be served")
	}
	return &hostError{err}
}

// drop ends a mount that is of no use.
func (ss *session) drop(m *mount, why string) {
	ss.mu.Lock()
	w, there := ss.worker, ss.mounts[m.id] == m
	m.why = cmp.Or(m.why, why) // the worker may be the first to say that it ended
	ss.mu.Unlock()
	if !there {
		return
	}
	// The worker may be dead, and then the session ends.
	_ = w.unmount(m.id)
	ss.mountEnded(m.id, "")
}

// watchLimited notes that the worker can't watch all directories.
func (ss *session) watchLimited(text string) {
	ss.mu.Lock()
	ss.limited = text
	ss.mu.Unlock()
	ss.srv.changed()
}

// streamLost notes that a mount is kept without its streams, the number-th of them.
func (ss *session) streamLost(id uint32, number uint64, text string) {
	ss.mu.Lock()
	m := ss.mounts[id]
	if m == nil || !m.keep || m.sets != number { // another has come meanwhile
		ss.mu.Unlock()
		return
	}
	m.open = 0
	ss.settleLocked()
	ss.mu.Unlock()
	ss.srv.changed()
	ss.log.Info("mount waits for the guest to come back", "tag", m.export.Tag, "dir", quote(m.dir), "reason", quote(cmp.Or(text, "its stream ended")))
}

// mountEnded forgets a mount, whose streams are closed. An empty text says
// that it ended in order, or as drop has noted.
func (ss *session) mountEnded(id uint32, text string) {
	ss.mu.Lock()
	m, w := ss.mounts[id], ss.worker
	if m != nil {
		text = cmp.Or(m.why, text)
		ss.endLocked(m)
		ss.settleLocked()
	}
	ss.mu.Unlock()
	if m == nil {
		return
	}
	if w != nil {
		w.member.unmounted(id)
	}
	ss.srv.changed()
	about := []any{"tag", m.export.Tag, "dir", quote(m.dir)}
	if text != "" {
		about = append(about, "reason", quote(text))
	}
	if text == "" || m.retired || m.reason == wire.ReasonAsked || m.reason == wire.ReasonShutdown {
		ss.log.Info("mount ended", append(about, sd.Unmounted.Attr())...)
	} else {
		ss.log.Warn("mount ended", append(about, sd.MountLost.Attr())...)
	}
}

// endLocked takes m out of the table. Precondition: ss.mu is held.
func (ss *session) endLocked(m *mount) {
	delete(ss.mounts, m.id)
	m.timeout.Stop()
	if m.asked && m.reason == 0 && ss.control != nil {
		ss.untold[m.id] = m
	}
	close(m.done)
}

// mountAt returns the mount at dir, or nil.
func (ss *session) mountAt(dir string) *mount {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.mountAtLocked(dir, func(*mount) bool { return true })
}

func (ss *session) mountAtLocked(dir string, match func(*mount) bool) *mount {
	for _, m := range ss.mounts {
		if m.dir == dir && match(m) {
			return m
		}
	}
	return nil
}

// openStream serves the connection of a stream of a mount.
func (ss *session) openStream(c *transport.Conn, o *wire.StreamOpen) error {
	ss.mu.Lock()
	m := ss.mounts[o.MountID]
	ss.mu.Unlock()
	if m == nil || int(o.Index) >= m.streams {
		return fmt.Errorf("%w: no stream %d of a mount %d is expected", unix.ENOENT, o.Index, o.MountID)
	}
	if o.Received != 0 || o.Sent != 0 {
		return fmt.Errorf("%w: a stream cannot be resumed", unix.EOPNOTSUPP)
	}
	err := ss.passStream(m, o.Index, c, true)
	if he := (*hostError)(nil); errors.As(err, &he) {
		ss.log.Warn("stream lost before it began", "tag", m.export.Tag, "error", err)
		return nil // no answer, but its end: a write could wait for ever
	}
	return err
}

// openNotify serves a notify channel of version 2.
func (ss *session) openNotify(c *transport.Conn, o *wire.NotifyOpen2) error {
	ss.mu.Lock()
	m := ss.mounts[o.MountID]
	ss.mu.Unlock()
	if m == nil {
		return fmt.Errorf("%w: notify channel for mount %d, which there is not", unix.ENOENT, o.MountID)
	}
	n := ss.channels.Add(1)
	c.SetWriteDeadline(time.Now().Add(ss.srv.times.write))
	if err := wire.Write(c, &wire.OpenReply{}); err != nil {
		return nil // it is gone, and needs no answer
	}
	ss.passNotify(c, m, n)
	return nil
}

// passNotify gives c, the notify channel of m, the n-th of the session, to the worker.
func (ss *session) passNotify(c *transport.Conn, m *mount, n uint64) {
	ss.mu.Lock()
	if ss.mounts[m.id] != m {
		ss.mu.Unlock()
		return
	}
	first, w := !m.stood, ss.worker
	m.stood = true
	ss.mu.Unlock()
	if first {
		ss.log.Info("mounted", "tag", m.export.Tag, "dir", quote(m.dir), "read_only", m.export.ReadOnly, sd.Mounted.Attr())
	}
	if err := w.notify(m.id, n, c); err != nil {
		ss.log.Warn("notify channel lost", "tag", m.export.Tag, "error", err)
	}
}

var past = time.Unix(1, 0)

// openEvents gives the session's event channel to the worker, now or when it has one.
func (ss *session) openEvents(c *transport.Conn, o *wire.EventOpen) error {
	ss.mu.Lock()
	if ss.ctx.Err() != nil {
		ss.mu.Unlock()
		return fmt.Errorf("%w: the session has ended", unix.ESHUTDOWN)
	}
	ss.mu.Unlock()
	n := ss.channels.Add(1)
	c.SetWriteDeadline(time.Now().Add(ss.srv.times.write))
	if err := wire.Write(c, &wire.OpenReply{}); err != nil {
		return nil // it is gone, and needs no answer
	}
	c.SetDeadline(time.Time{})
	go func() {
		select {
		case <-ss.working:
		case <-ss.ctx.Done():
		}
		c.SetReadDeadline(past)
	}()
	if err := c.Readable(); !errors.Is(err, os.ErrDeadlineExceeded) || ss.ctx.Err() != nil {
		return nil // the guest has nothing to say here that it was not asked for, or is gone
	}
	c.SetReadDeadline(time.Time{})
	ss.mu.Lock()
	w := ss.worker
	ss.mu.Unlock()
	if w == nil {
		return nil // between two; the guest dials again
	}
	if err := w.eventChannel(o.ThreadID, n, false, c); err != nil {
		ss.log.Warn("event channel lost", "error", err)
	}
	return nil
}

// unmounted notes that the guest has unmounted.
func (ss *session) unmounted(u *wire.Unmounted) {
	ss.mu.Lock()
	m := cmp.Or(ss.mounts[u.MountID], ss.untold[u.MountID])
	if m != nil && m.reason == 0 {
		m.reason = cmp.Or(u.Reason, wire.ReasonAsked)
		close(m.told)
	}
	ss.mu.Unlock()
	if m != nil {
		ss.drop(m, u.Text)
	}
}

// exports returns what the guest may mount.
func (ss *session) exports() []wire.ExportInfo {
	var es []wire.ExportInfo
	for _, e := range ss.srv.policy().visible(ss.peer) {
		es = append(es, wire.ExportInfo{Tag: e.Tag, ReadOnly: e.ReadOnly})
	}
	slices.SortFunc(es, func(a, b wire.ExportInfo) int { return cmp.Compare(a.Tag, b.Tag) })
	return es
}

// goodbye has the guest unmount what the host asked for, since nobody else
// would: the guest's own mounts wait for the host to come back.
func (ss *session) goodbye() {
	ss.mu.Lock()
	c := ss.control
	var asked []*mount
	for _, m := range ss.mounts {
		if m.asked {
			asked = append(asked, m)
		}
	}
	ss.mu.Unlock()
	if c == nil || ss.version < wire.Version2 {
		return // the end of its stream unmounts one of version 1
	}
	timeout := time.After(ss.srv.times.goodbye)
	var answers []chan wire.Message
	for _, m := range asked {
		id, answer := ss.expect()
		answers = append(answers, answer)
		if c.send(&wire.UnmountAsk{ID: id, MountID: m.id, Reason: wire.ReasonShutdown, Text: errShutdown.Error()}) != nil {
			return
		}
	}
	for _, answer := range answers {
		select {
		case <-answer:
		case <-timeout:
			return
		}
	}
}
