// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// readSize is how much is read at once: a few thousand events of about 100 bytes.
const readSize = 256 << 10

// Watcher tells what changes below directories. Its methods may be called from any goroutine.
//
// It owns the fanotify group, and a goroutine that reads it and calls the trees' functions.
type Watcher struct {
	log  *slog.Logger
	fd   int // the fanotify group
	end  int // an event descriptor: it is to end
	done chan struct{}
	once sync.Once

	// mu guards what follows, and the trees' lists of changes. It is not held while a tree's function is called. Lock order: Tree.calling, mu.
	mu      sync.Mutex
	closed  bool
	volumes map[uint64]*volume // by file system id
	told    []*Tree            // with changes to tell
	scratch [2][]*Tree

	readErr time.Duration      // pause after an error of a read
	leftOut func(pid int) bool // guarded by mu
}

// volume is a file system that is marked.
type volume struct {
	fsid  uint64
	dev   uint64
	views []*view
}

// Tree is a directory that is watched with all that is below it.
type Tree struct {
	w      *Watcher
	volume *volume
	view   *view
	name   string
	kind   string // of its file system
	fsid   uint64
	key    string
	fd     int
	f      func([]Change)

	changes []Change // guarded by Watcher.mu until run takes them

	calling sync.Mutex // held while f runs
	closed  bool       // guarded by calling
}

// calm is how long the Watcher waits at first after it has read nothing but changes of who is left out, and maxCalm at most, when it has done so
// several times: they are many, and to be woken for each costs more than to look at it.
const (
	calm    = time.Millisecond
	maxCalm = 4 * time.Millisecond
)

// LeaveOut has changes by processes for which f is true not told. f is called with a lock held that Add and Close take.
func (w *Watcher) LeaveOut(f func(pid int) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leftOut = f
}

// New makes a Watcher. Its error tells people why fanotify can't be used here. A nil log is none.
func New(log *slog.Logger) (*Watcher, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	// The queue has the kernel's limit: it is memory that other processes fill.
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_DFID_NAME_TARGET|unix.FAN_UNLIMITED_MARKS|
		unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		why := ""
		switch err {
		case unix.EPERM:
			why = " (it needs CAP_SYS_ADMIN, in the first user namespace)"
		case unix.EINVAL:
			why = " (it needs Linux 5.17)"
		case unix.ENOSYS:
			why = " (this kernel is built without fanotify)"
		case unix.EMFILE:
			why = " (see fs.fanotify.max_user_groups)"
		}
		return nil, fmt.Errorf("fanotify: %w%s", os.NewSyscallError("fanotify_init", err), why)
	}
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	w := &Watcher{
		log:     log,
		fd:      fd,
		end:     end,
		done:    make(chan struct{}),
		volumes: make(map[uint64]*volume),
		readErr: time.Second,
	}
	go w.run()
	return w, nil
}

// Close ends the watcher and its trees: no function runs any more when it returns. A tree's function must not call it.
func (w *Watcher) Close() {
	w.once.Do(func() {
		one := [8]byte{1}
		unix.Write(w.end, one[:])
		<-w.done
		w.mu.Lock()
		defer w.mu.Unlock()
		w.closed = true
		unix.Close(w.fd)
		unix.Close(w.end)
		for _, vol := range w.volumes {
			for _, v := range vol.views {
				for _, trees := range v.roots {
					for _, t := range trees {
						unix.Close(t.fd)
					}
				}
				unix.Close(v.fd)
			}
		}
		w.volumes = nil
	})
	<-w.done
}

// Add watches dir and what is below it, as far as it is of the same file system. All that changes after Add has returned is
// told to f, which one goroutine calls with changes in their order; the slice is the Watcher's again when f returns. f must not block
// for long (the kernel's queue fills, and changes are lost), and must not close the tree. dir is the caller's; the tree has a
// descriptor of its own, so the file system can't be unmounted while it is watched. The error says why this file system's
// changes can't be told.
func (w *Watcher) Add(dir *os.File, f func([]Change)) (*Tree, error) {
	t := &Tree{w: w, name: dir.Name(), f: f, fd: -1}
	if err := t.open(dir); err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	if err := w.add(t); err != nil {
		unix.Close(t.fd)
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	return t, nil
}

func (t *Tree) open(dir *os.File) error {
	c, err := dir.SyscallConn()
	if err != nil {
		return err
	}
	if e := c.Control(func(fd uintptr) {
		if err = t.check(int(fd)); err != nil { // before an open that somebody else would have to answer
			return
		}
		t.fd, err = unix.Openat(int(fd), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}); e != nil {
		return e
	}
	if errno, ok := err.(unix.Errno); ok {
		return &os.PathError{Op: "open", Path: t.name, Err: errno}
	}
	return err
}

// check looks at the file system.
func (t *Tree) check(fd int) error {
	kind, fs, err := fileSystem(fd)
	if err != nil {
		return err
	}
	t.kind = kind
	id := binary.NativeEndian.AppendUint32(nil, uint32(fs.Fsid.Val[0]))
	t.fsid = binary.NativeEndian.Uint64(binary.NativeEndian.AppendUint32(id, uint32(fs.Fsid.Val[1])))
	return nil
}

func (w *Watcher) add(t *Tree) error {
	kind, fsid := t.kind, t.fsid
	var st unix.Statx_t
	if err := statx(t.fd, &st); err != nil {
		return os.NewSyscallError("statx", err)
	}
	var err error
	if t.key, err = handleOf(t.fd); err != nil {
		return fmt.Errorf("%s gives no file handles: %w", kind, os.NewSyscallError("name_to_handle_at", err))
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return os.ErrClosed
	}
	vol, dev := w.volumes[fsid], inodeOf(&st).Dev
	if vol == nil {
		vol = &volume{fsid: fsid, dev: dev}
	} else if vol.dev != dev {
		return fmt.Errorf("%s has the same file system id as another one that is watched", kind)
	}
	i := slices.IndexFunc(vol.views, func(v *view) bool { return v.mount == st.Mnt_id })
	if i >= 0 {
		t.view = vol.views[i]
	} else {
		fd, err := unix.FcntlInt(uintptr(t.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		t.view = newView(st.Mnt_id, fd)
		if kind == "overlay" {
			t.view.tries = 2
		}
		if err := t.view.usable(t.key); err != nil {
			unix.Close(fd)
			return fmt.Errorf("%s can't be used: %w%s", kind, err, hint(kind))
		}
	}
	if len(vol.views) == 0 {
		if err := w.mark(unix.FAN_MARK_ADD, t.fd); err != nil {
			unix.Close(t.view.fd)
			return markError(kind, err)
		}
		w.volumes[fsid] = vol
	}
	if i < 0 {
		vol.views = append(vol.views, t.view)
	}
	t.volume = vol
	t.view.addRoot(t)
	return nil
}

// usable tries what telling a change needs.
func (v *view) usable(key string) error {
	fd, err := v.open([]byte(key))
	if err == unix.EPERM {
		return fmt.Errorf("%w (it needs CAP_DAC_READ_SEARCH, in the first user namespace)", os.NewSyscallError("open_by_handle_at", err))
	}
	if err != nil {
		return os.NewSyscallError("open_by_handle_at", err)
	}
	return unix.Close(fd)
}

// mark adds or removes the mark of the file system that fd is of. It needs w.mu.
func (w *Watcher) mark(flag uint, fd int) error {
	return unix.FanotifyMark(w.fd, flag|unix.FAN_MARK_FILESYSTEM, mask, fd, "")
}

// hint says what helps.
func hint(kind string) string {
	if kind == "overlay" {
		return " (mount it with index=on,nfs_export=on)"
	}
	return ""
}

// markError says what the kernel means.
func markError(kind string, err error) error {
	why := ""
	switch err {
	case unix.EXDEV:
		why = " (a subvolume: only the file system's first gives events)"
	case unix.ENODEV:
		why = " (it has no file system id)"
	case unix.EOPNOTSUPP:
		why = " (it has no file handles to open files by)" + hint(kind)
	}
	return fmt.Errorf("%s gives no events: %w%s", kind, os.NewSyscallError("fanotify_mark", err), why)
}

// Close ends the tree: its function runs no more when it returns, and must not call it.
func (t *Tree) Close() {
	t.calling.Lock()
	defer t.calling.Unlock()
	if t.closed {
		return
	}
	t.closed = true
	t.w.remove(t)
}

func (w *Watcher) remove(t *Tree) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return // and t.fd was closed with it
	}
	v := t.view
	v.removeRoot(t)
	if len(v.roots) == 0 {
		t.volume.views = slices.DeleteFunc(t.volume.views, func(o *view) bool { return o == v })
		unix.Close(v.fd)
	}
	if len(t.volume.views) == 0 {
		delete(w.volumes, t.volume.fsid)
		if err := w.mark(unix.FAN_MARK_REMOVE, t.fd); err != nil {
			w.log.Warn("fanotify: a mark stays", "dir", t.name, "err", err)
		}
	}
	unix.Close(t.fd)
}

// run reads events and tells them.
func (w *Watcher) run() {
	defer close(w.done)
	buf, b := make([]byte, readSize), newBatch()
	var calmed time.Duration
	for {
		if w.wait(w.fd, -1) {
			return
		}
		n, err := unix.Read(w.fd, buf)
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		err = os.NewSyscallError("read", err)
		if err == nil {
			err = b.fill(buf[:n])
		} else {
			b.fill(nil)
		}
		w.mu.Lock()
		others := err != nil
		for i := range b.events {
			e := &b.events[i]
			// Where directories are must be known whoever moves them.
			if w.leftOut != nil && !e.overflow && e.op&(IsDir|Rename) != IsDir|Rename && w.leftOut(int(e.pid)) {
				continue
			}
			others = true
			w.take(e)
		}
		if err != nil {
			w.log.Error("changes of the host's files were lost", "err", err)
			w.lost()
		}
		told := w.told
		w.told = nil
		w.mu.Unlock()
		for _, t := range told {
			t.tell()
		}
		pause := time.Duration(0)
		switch {
		case err != nil:
			pause = w.readErr
		case !others:
			pause = min(max(2*calmed, calm), maxCalm)
			calmed = pause
		default:
			calmed = 0
		}
		if pause > 0 && w.wait(-1, pause) {
			return
		}
	}
}

// wait waits until fd can be read (-1: none), for so long at most (negative: for ever), and tells whether the watcher is to end.
// It is a thread of its own that waits: the runtime's poller would be woken by each change during a pause, too.
func (w *Watcher) wait(fd int, limit time.Duration) (end bool) {
	fds := []unix.PollFd{{Fd: int32(w.end), Events: unix.POLLIN}, {Fd: int32(fd), Events: unix.POLLIN}}
	ms := -1
	if limit >= 0 {
		ms = int(limit.Milliseconds())
	}
	// Interrupted, it is a short pause, or a read that finds nothing.
	_, _ = unix.Poll(fds, ms)
	return fds[0].Revents != 0
}

// tell gives the tree's changes to its function.
func (t *Tree) tell() {
	t.calling.Lock()
	defer t.calling.Unlock()
	t.w.mu.Lock()
	changes := t.changes
	t.changes = nil
	t.w.mu.Unlock()
	if !t.closed {
		t.f(changes)
	}
}

// give adds a change to what the tree is told.
func (w *Watcher) give(t *Tree, c Change) {
	if len(t.changes) == 0 {
		w.told = append(w.told, t)
	}
	t.changes = append(t.changes, c)
}

// lost tells it to all trees, and forgets where directories are, as moves may have been lost.
func (w *Watcher) lost() {
	for _, vol := range w.volumes {
		for _, v := range vol.views {
			v.clear()
			for _, trees := range v.roots {
				for _, t := range trees {
					w.give(t, Change{Op: Lost})
				}
			}
		}
	}
}

// take finds out what an event means, and gives it to the trees it is for.
func (w *Watcher) take(e *event) {
	if e.overflow {
		w.log.Warn("changes of the host's files were lost: too many at once", "sysctl", "fs.fanotify.max_queued_events")
		w.lost()
		return
	}
	vol := w.volumes[e.fsid]
	if vol == nil || e.op&^IsDir == 0 {
		return
	}
	s := subject{e: e}
	for _, v := range vol.views {
		switch {
		case e.self():
			w.takeSelf(v, e, &s)
		case e.op&Rename != 0:
			w.takeRename(v, e, &s)
		default:
			w.takeEntry(v, e, &s)
		}
		if e.op&IsDir != 0 && e.op&(Rename|Delete) != 0 {
			w.rootGone(v, e)
		}
		if v.err != nil {
			w.log.Error("changes of the host's files were lost", "err", v.err)
			v.err = nil
			w.lost()
		}
	}
}

// subject is the file that an event is of, looked at once when it is needed.
type subject struct {
	e     *event
	known bool
	inode Inode // zero: it is gone
	mode  uint32
	nlink uint32
}

func (s *subject) look(v *view) {
	if s.known {
		return
	}
	s.known = true
	key := s.e.file
	if s.e.self() {
		key = s.e.dir
	}
	fd, err := v.open(key)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := statx(fd, &st); err != nil {
		v.err = os.NewSyscallError("statx", err)
	} else {
		s.inode, s.mode, s.nlink = inodeOf(&st), uint32(st.Mode), st.Nlink
		if st.Nlink == 0 && s.e.op&Delete != 0 {
			s.mode = 0 // somebody has it open
		}
	}
}

func (s *subject) change(v *view) Change {
	s.look(v)
	return Change{Op: s.e.op, Inode: s.inode, Mode: s.mode, PID: int(s.e.pid)}
}

// takeSelf is for what happened to a directory itself.
func (w *Watcher) takeSelf(v *view, e *event, s *subject) {
	for _, t := range v.roots[string(e.dir)] {
		var st unix.Statx_t
		if statx(t.fd, &st) != nil || st.Nlink == 0 { // another directory was moved over it
			w.goneRoot(t, "deleted")
		}
	}
	d := v.lookup(e.dir)
	trees := treesOf(w.scratch[0][:0], d)
	w.scratch[0] = trees
	if len(trees) == 0 {
		return
	}
	c := s.change(v)
	for _, t := range trees {
		w.give(t, c)
	}
}

// takeEntry is for what happened to one name.
func (w *Watcher) takeEntry(v *view, e *event, s *subject) {
	var d *dir
	if e.dir != nil {
		d = v.lookup(e.dir)
	}
	if d == nil {
		w.takeNameless(v, e, s)
		return
	}
	trees := treesOf(w.scratch[0][:0], d)
	w.scratch[0] = trees
	if len(trees) == 0 {
		return
	}
	c := s.change(v)
	// A file that has no name any more is written to; the name it had may be another file's.
	if e.op&^touches != 0 || s.nlink != 0 || s.inode == (Inode{}) {
		c.Dir, c.Name = d.inode, string(e.name)
	}
	for _, t := range trees {
		w.give(t, c)
	}
}

// takeNameless is for a file whose directory is not known: it may be below any tree.
func (w *Watcher) takeNameless(v *view, e *event, s *subject) {
	if s.look(v); s.inode == (Inode{}) {
		return
	}
	c := s.change(v)
	for _, trees := range v.roots {
		for _, t := range trees {
			w.give(t, c)
		}
	}
}

// takeRename is for a name that became another.
func (w *Watcher) takeRename(v *view, e *event, s *subject) {
	var from, to *dir
	if e.dir != nil {
		from = v.lookup(e.dir)
	}
	if e.newDir != nil {
		to = v.lookup(e.newDir)
	}
	if e.op&IsDir != 0 {
		if to != nil && !to.top().outside && (from == nil || from.top().outside) {
			v.gen++
		}
		if d := v.dirs[string(e.file)]; d != nil {
			v.moved(d)
		}
	}
	out := treesOf(w.scratch[0][:0], from)
	in := treesOf(w.scratch[1][:0], to)
	w.scratch = [2][]*Tree{out, in}
	if len(out) == 0 && len(in) == 0 {
		return
	}
	c := s.change(v)
	name, newName := string(e.name), string(e.newN)
	for _, t := range out {
		c := c
		c.Dir, c.Name = from.inode, name
		if slices.Contains(in, t) {
			c.NewDir, c.NewName = to.inode, newName
		} else {
			c.Op = Delete | e.op&IsDir
		}
		w.give(t, c)
	}
	c.Op = Create | Arrived | e.op&IsDir
	for _, t := range in {
		if !slices.Contains(out, t) {
			c.Dir, c.Name = to.inode, newName
			w.give(t, c)
		}
	}
}

// rootGone tells the trees whose own directory was deleted or moved.
func (w *Watcher) rootGone(v *view, e *event) {
	how := "moved"
	if e.op&Delete != 0 {
		how = "deleted"
	}
	for _, t := range v.roots[string(e.file)] {
		w.goneRoot(t, how)
	}
}

func (w *Watcher) goneRoot(t *Tree, how string) {
	w.log.Error("a watched directory was "+how, "dir", t.name)
	w.give(t, Change{Op: Lost})
}
