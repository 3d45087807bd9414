// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watch"
	"transfused.org/transfused/service/wire"
)

// RoleWorker is the role of a process that serves one guest session.
const RoleWorker = "worker"

// order is what the parent has a worker do. Each is answered by a report with
// its ID.
type order struct {
	ID      uint64
	Start   *confinement  `json:",omitempty"` // first of all, once
	Mount   *mountOrder   `json:",omitempty"` // with the export's directory
	Stream  *streamOrder  `json:",omitempty"` // with the connection
	Unmount *unmountOrder `json:",omitempty"`
	Count   bool          `json:",omitempty"`
	Changes bool          `json:",omitempty"` // with the socket of the hub, and its memory, once
	Notify  *notifyOrder  `json:",omitempty"` // with the connection
	Events  *eventsOrder  `json:",omitempty"` // with the connection
}

type mountOrder struct {
	MountID uint32
	Tag     string
	Options Options
	Ahead   bool // passthrough.Config's
	Reread  bool // passthrough.Config's
	Keep    bool // the mount outlives its streams
	Spin    transport.Spin
	Watched bool // changes on the host come; else the worker watches itself, if it can
}

// notifyOrder passes the notify channel of a mount, and eventsOrder the session's event channel, whose thread in the guest acts. Both have been
// answered. Number says which of two came later.
type notifyOrder struct {
	MountID uint32
	Number  uint64
	Peer    transport.Peer
}

type eventsOrder struct {
	Thread uint32
	Number uint64
	Plain  bool // passthrough.Actor's
	Peer   transport.Peer
}

// streamOrder passes a stream, the Index-th of the Number-th that its mount has at once. With Reply the worker begins it with an
// OpenReply: it makes the connection block, for the parent too, and the parent
// must not wait for a guest that does not read.
type streamOrder struct {
	MountID uint32
	Number  uint64
	Index   uint16
	Peer    transport.Peer
	Reply   bool
}

type unmountOrder struct{ MountID uint32 }

// report is what a worker tells its parent: the answer to an order, or
// something that happened.
type report struct {
	ID       uint64        `json:",omitempty"` // of the order
	Errno    syscall.Errno `json:",omitempty"` // of the order
	Text     string        `json:",omitempty"`
	Warnings []string      `json:",omitempty"` // of Start
	Blind    string        `json:",omitempty"` // of Mount, where changes on the host should be seen: why the worker can't
	Ended    *endedReport  `json:",omitempty"`
	Counts   counts        `json:",omitempty"` // of Count; and of the mount, of Unmount and Ended
	Lost     *lostReport   `json:",omitempty"`
	Limited  string        `json:",omitempty"` // not all directories can be watched, and why
	Log      *logReport    `json:",omitempty"`
}

// counts are what mounts have served, by their MountID.
type counts map[uint32]passthrough.Counts

// endedReport says that a mount ended, with its last streams. Text is empty when that was in order.
type endedReport struct {
	MountID uint32
	Text    string
}

// lostReport says that a mount that is kept has lost its streams, the Number-th.
type lostReport struct {
	MountID uint32
	Number  uint64
	Text    string // empty when it just ended
}

// worker serves the streams of one session. Its parent has the guest's other
// channels.
type worker struct {
	conn   *ipc.Conn
	log    *slog.Logger
	procFD *os.File

	// For tests: what to do once confined, and how a stream is served.
	confined func(procFD *os.File)
	serve    func(*passthrough.FS, io.ReadWriteCloser) error

	streams sync.WaitGroup
	mu      sync.Mutex // guards the rest, and what is in mounts
	mounts  map[uint32]*workerMount
	events  *eventChannel                  // nil: none
	plain   atomic.Pointer[eventChannel]   // the last one of version 1
	changes *changes                       // set once, before the first mount
	several atomic.Bool                    // there is more than one mount
	dirs    *passthrough.DirWatches        // of all mounts whose changes the parent does not see; nil: of none yet
	limits  map[string]*passthrough.Limits // by tag and numbers, of exports that have their own; "" of the others
}

type workerMount struct {
	fs     *passthrough.FS
	notify uint64 // number of its notify channel
	keep   bool
	spin   transport.Spin
	ending bool       // it was to be unmounted while it had streams
	last   *streamSet // nil: none, or they have ended
}

// streamSet are the streams that a mount has at once. With one of them all end, and the mount's next ones wait for that.
type streamSet struct {
	number uint64
	before <-chan struct{} // closed when those before have ended; nil: there were none
	done   chan struct{}   // closed when all have ended

	// Guarded by the worker's mu.
	conns  []*transport.Conn
	open   int // that have not ended
	ending bool
	err    error // why the first one ended
}

// end has all streams end; err is why.
func (s *streamSet) end(err error) {
	if s.ending {
		return
	}
	s.ending, s.err = true, err
	for _, c := range s.conns {
		c.Shutdown()
	}
}

// Worker is the main of a worker process, with the connection to its parent.
// It returns when the parent is gone, which is also how it is told to end.
func Worker(c *ipc.Conn) error {
	transport.PrepareBlocking()
	return newWorker(c).run()
}

func newWorker(c *ipc.Conn) *worker {
	w := &worker{conn: c, mounts: map[uint32]*workerMount{}, limits: map[string]*passthrough.Limits{}, serve: (*passthrough.FS).Serve}
	w.log = slog.New(reportHandler{w, nil})
	return w
}

func (w *worker) run() error {
	// A terminal's ^C is for the parent, which then ends its workers.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	for {
		var o order
		files, err := w.conn.Recv(&o)
		var r report
		switch {
		case err == nil:
			r = w.obey(&o, files)
		case errors.Is(err, ipc.ErrNoRoom): // the guest has them all open
			r.Errno, r.Text, err = unix.EMFILE, err.Error(), nil
		}
		if err == nil {
			r.ID = o.ID
			err = w.conn.Send(r)
		}
		if err == io.EOF || errors.Is(err, unix.EPIPE) {
			w.end()
			return nil
		}
		if err != nil {
			return fmt.Errorf("worker: %w", err)
		}
	}
}

// obey does what o says. The files are its own from here on.
func (w *worker) obey(o *order, files []*os.File) (r report) {
	var err error
	used := false
	switch {
	case o.Start != nil && w.procFD == nil:
		w.procFD, r.Warnings, err = confine(*o.Start)
		if err == nil && w.confined != nil {
			w.confined(w.procFD)
		}
	case w.procFD == nil:
		err = errors.New("not started")
	case o.Mount != nil && len(files) == 1:
		used = true
		r.Blind, err = w.mount(o.Mount, files[0])
	case o.Stream != nil && len(files) == 1:
		used = true
		err = w.stream(o.Stream, files[0])
	case o.Changes && len(files) == 2 && w.changes == nil:
		w.changes, err = newChanges(w, files[0], files[1])
	case o.Notify != nil && len(files) == 1:
		used = true
		err = w.notify(o.Notify, files[0])
	case o.Events != nil && len(files) == 1:
		used = true
		w.serveEvents(o.Events, files[0])
	case o.Unmount != nil:
		r.Counts = w.unmount(o.Unmount.MountID)
	case o.Count:
		r.Counts = w.count()
	default:
		err = errors.New("unknown order")
	}
	if !used {
		for _, f := range files {
			f.Close()
		}
	}
	if err != nil {
		r.Errno, r.Text = errnoOf(err), err.Error()
	}
	return r
}

func (w *worker) mount(o *mountOrder, root *os.File) (blind string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mounts[o.MountID] != nil {
		root.Close()
		return "", fmt.Errorf("mount %d: %w", o.MountID, unix.EEXIST)
	}
	var dirs *passthrough.DirWatches
	if o.Options.Cache == passthrough.CacheCoherent && !o.Watched {
		if dirs, err = w.dirsOf(root); err != nil {
			blind = err.Error()
		}
	}
	var changed func(watch.Change)
	var heard func() bool
	if c := w.changes; c != nil {
		changed, heard = func(k watch.Change) { c.report(o.MountID, k) }, c.heard
	}
	fs, err := passthrough.New(passthrough.Config{
		Root: root, Name: o.Tag, ProcFD: w.procFD, Limits: w.limitsOf(o),
		ReadOnly: o.Options.ReadOnly, Suid: o.Options.Suid, Dev: o.Options.Dev, ACL: o.Options.ACL,
		RootAs: o.Options.Root, UIDs: o.Options.UIDs, GIDs: o.Options.GIDs, Squash: o.Options.Squash,
		Submounts: o.Options.Submounts, Xattr: o.Options.Xattr, XattrMap: o.Options.XattrMap,
		Cache: o.Options.Cache, Writeback: o.Options.Writeback,
		Ahead: o.Ahead, Reread: o.Reread, Changed: changed, Heard: heard, Dirs: dirs, Log: w.log.With("tag", o.Tag),
	})
	if err != nil {
		return "", fmt.Errorf("export %s: %w", o.Tag, err)
	}
	fs.Watched(o.Watched)
	m := &workerMount{fs: fs, keep: o.Keep, spin: o.Spin}
	w.mounts[o.MountID] = m
	w.several.Store(len(w.mounts) > 1)
	if w.events != nil {
		fs.Act(w.events.actor(o.MountID))
	}
	return blind, nil
}

// dirsOf returns what watches the directories of an export, or why nothing can. Precondition: w.mu is held.
func (w *worker) dirsOf(root *os.File) (*passthrough.DirWatches, error) {
	if err := watch.CheckFS(int(root.Fd())); err != nil {
		return nil, err
	}
	if w.dirs == nil {
		// Who allows more of them reads the parent's log.
		d, err := passthrough.NewDirWatches(w.log, func(err error) { _ = w.conn.Send(report{Limited: err.Error()}) })
		if err != nil {
			return nil, err
		}
		w.dirs = d
	}
	return w.dirs, nil
}

// limitsOf returns the limits of a mount: those of its session, or of all
// mounts of its export. Precondition: w.mu is held.
func (w *worker) limitsOf(o *mountOrder) *passthrough.Limits {
	key := ""
	l := &passthrough.Limits{}
	if o.Options.MaxOpenFiles > 0 || o.Options.MaxInodes > 0 {
		key = fmt.Sprint(o.Tag, "/", o.Options.MaxOpenFiles, "/", o.Options.MaxInodes) // they may have changed since the mount before; a tag has no /
		l.Files, l.Nodes = int64(o.Options.MaxOpenFiles), int64(o.Options.MaxInodes)
	}
	if w.limits[key] == nil {
		w.limits[key] = l
	}
	return w.limits[key]
}

// stream serves a stream. Those that the mount has already give way to an index 0: a guest that was killed may be back before its end was noticed.
func (w *worker) stream(o *streamOrder, f *os.File) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.mounts[o.MountID]
	var err error
	switch {
	case m == nil || m.ending:
		err = fmt.Errorf("mount %d: %w", o.MountID, unix.ENOENT)
	case o.Index == 0 && m.last != nil && o.Number <= m.last.number:
		// Two that came at once: the parent knows the later one as the mount's.
		err = fmt.Errorf("mount %d: streams %d after %d: %w", o.MountID, o.Number, m.last.number, unix.EBUSY)
	case o.Index > 0 && (m.last == nil || m.last.number != o.Number || m.last.ending):
		err = fmt.Errorf("mount %d: streams %d have ended: %w", o.MountID, o.Number, unix.EBUSY)
	}
	if err != nil {
		f.Close()
		return err
	}
	c := transport.NewConn(f, o.Peer)
	if err := c.Block(); err != nil {
		c.Close()
		return err
	}
	c.Spin(m.spin)
	s := m.last
	if o.Index == 0 {
		s = &streamSet{number: o.Number, done: make(chan struct{})}
		if m.last != nil {
			s.before = m.last.done
			m.last.end(nil)
		}
		m.last = s
	}
	s.conns = append(s.conns, c)
	s.open++
	w.streams.Go(func() {
		err := w.serveStream(m, s, c, o.Reply)
		c.Shutdown() // the parent may still hold a duplicate
		c.Close()
		w.ended(o.MountID, m, s, err)
	})
	return nil
}

func (w *worker) serveStream(m *workerMount, s *streamSet, c *transport.Conn, reply bool) error {
	if s.before != nil {
		<-s.before // their requests under way are done before the first of ours
	}
	if reply {
		if err := wire.Write(c, &wire.OpenReply{}); err != nil {
			return err
		}
	}
	return w.serve(m.fs, c)
}

// ended takes away a stream that has ended with err, and with it the others of its set; with the last set its mount, unless that is kept.
func (w *worker) ended(id uint32, m *workerMount, s *streamSet, err error) {
	w.channelEnded()
	w.mu.Lock()
	s.end(err)
	if s.open--; s.open > 0 {
		w.mu.Unlock()
		return
	}
	last := m.last == s
	if last {
		m.last = nil
	}
	kept := m.keep && !m.ending && !m.fs.Destroyed()
	if last && !kept {
		delete(w.mounts, id)
		w.several.Store(len(w.mounts) > 1)
	}
	w.mu.Unlock()
	close(s.done)
	if !last {
		return // the next ones go on
	}
	err = s.err
	if !kept {
		if cerr := m.fs.Close(); err == nil {
			err = cerr
		}
	}
	text := ""
	if err != nil {
		text = err.Error()
	}
	r := report{Ended: &endedReport{MountID: id, Text: text}, Counts: counts{id: m.fs.Counts()}}
	if kept {
		r = report{Lost: &lostReport{MountID: id, Number: s.number, Text: text}}
	}
	// A parent that is gone needs no report; run sees its end.
	_ = w.conn.Send(r)
}

// unmount ends a mount, by its streams if it has any, and tells what it has served.
func (w *worker) unmount(id uint32) counts {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.mounts[id]
	if m == nil {
		return nil
	}
	c := counts{id: m.fs.Counts()}
	if m.last != nil {
		m.ending = true
		m.last.end(nil)
		return c
	}
	delete(w.mounts, id)
	w.several.Store(len(w.mounts) > 1)
	if err := m.fs.Close(); err != nil {
		w.log.Warn("unmount", "mount", id, "error", err)
	}
	return c
}

// count tells what the mounts have served.
func (w *worker) count() counts {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := counts{}
	for id, m := range w.mounts {
		c[id] = m.fs.Counts()
	}
	return c
}

// end ends all mounts and waits for their streams.
func (w *worker) end() {
	w.mu.Lock()
	ids := slices.Collect(maps.Keys(w.mounts))
	w.mu.Unlock()
	for _, id := range ids {
		w.unmount(id)
	}
	w.streams.Wait()
	if w.dirs != nil {
		w.dirs.Close()
	}
}

// logReport is a line for the parent's log.
type logReport struct {
	Level slog.Level
	Text  string
}

// reportHandler sends log records to the parent, as one text each: the parent
// believes no structure of a worker.
type reportHandler struct {
	w     *worker
	attrs []slog.Attr
}

var _ slog.Handler = reportHandler{}

func (h reportHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h reportHandler) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	add := func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	return h.w.conn.Send(report{Log: &logReport{r.Level, text[:min(len(text), 4*maxLogged)]}})
}

func (h reportHandler) WithAttrs(as []slog.Attr) slog.Handler {
	return reportHandler{h.w, append(h.attrs[:len(h.attrs):len(h.attrs)], as...)}
}

// WithGroup is not needed by a worker's packages.
func (h reportHandler) WithGroup(string) slog.Handler { return h }
