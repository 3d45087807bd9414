// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/wire"
)

// actor is the one OS thread of an event channel. The host knows it by its id, and answers what it asks
// as the event in progress wants: so it makes the call of each event and no other on a file system, and looks for the file of
// those that are about one. The directories of paths are resolved elsewhere.
type actor struct {
	tid  int
	work chan func()
}

func newActor() *actor {
	a := &actor{work: make(chan func())}
	started := make(chan int)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its id means nothing any more.
		runtime.LockOSThread()
		started <- unix.Gettid()
		for f := range a.work {
			f()
		}
	}()
	a.tid = <-started
	return a
}

// do runs f on the thread and waits for it.
func (a *actor) do(f func() error) error {
	done := make(chan error)
	a.work <- func() { done <- f() }
	return <-done
}

func (a *actor) close() { close(a.work) }

// maxActors is how many event channels may be open: each has a thread, and without threads the process ends.
const maxActors = 64

func (h *helperServer) newActor() (*actor, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.acting == maxActors {
		return nil, fmt.Errorf("%w: the host has %d event channels already", unix.EMFILE, maxActors)
	}
	h.acting++
	return newActor(), nil
}

func (h *helperServer) endActor(a *actor) {
	a.close()
	h.mu.Lock()
	h.acting--
	h.mu.Unlock()
}

// serveEvents1 acts the events of version 1 until the channel ends.
func (h *helperServer) serveEvents1(conn io.ReadWriteCloser) {
	defer conn.Close()
	a, err := h.newActor()
	if err != nil {
		h.channelEnded("event", err)
		return
	}
	defer h.endActor(a)
	if _, err := conn.Write([]byte(strconv.Itoa(a.tid))); err != nil {
		return
	}
	r := wire.NewEventReader(conn)
	for {
		e, err := r.Next()
		if err != nil {
			h.channelEnded("event", err)
			return
		}
		if e.Action == wire.ActionPing {
			h.send(report{Pong: true})
			continue
		}
		// That something is not there is ordinary: the host's files may be others by now, or it looks where the path leads.
		if err := h.act1(a, e); err != nil && !errors.Is(err, unix.ENOENT) {
			h.logf("Event %s %s error: %s", actionName(e.Action), e.Path, err)
		}
	}
}

// serveEvents2 acts the events of version 2, and answers each.
func (h *helperServer) serveEvents2(a *actor, conn io.ReadWriteCloser) {
	defer conn.Close()
	defer h.endActor(a)
	r := wire.NewReader(conn, wire.MaxControl)
	for {
		t, body, err := r.Next()
		var m wire.Message
		if err == nil {
			m, err = wire.ToGuest(t, body)
		}
		e, ok := m.(*wire.Event)
		if err == nil && !ok {
			err = fmt.Errorf("%w: %T on the event channel", wire.ErrProtocol, m)
		}
		if err != nil {
			h.channelEnded("event", err)
			return
		}
		// An error is ordinary: the host's files may be others by now.
		err = h.act2(a, e)
		if err := wire.Write(conn, &wire.EventDone{Number: e.Number, Errno: errnoFor(err)}); err != nil {
			return
		}
	}
}

func (h *helperServer) channelEnded(what string, err error) {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
		h.logf("%s channel ended: %s", what, err)
	}
}

// act1 finds the mount of a version 1 event, whose path is absolute in the guest.
func (h *helperServer) act1(a *actor, e wire.EventV1) error {
	m, rel := h.mountOf(e.Path)
	if m == nil {
		return fmt.Errorf("%w: it is below no mount of this host", unix.EPERM)
	}
	if e.Action > wire.ActionMknod {
		return fmt.Errorf("%w: action %d is not known", unix.EINVAL, e.Action)
	}
	return m.act(a, e.Action, rel, "", unix.S_IFREG|0o600)
}

func (h *helperServer) act2(a *actor, e *wire.Event) error {
	m := h.mountByWire(e.MountID)
	if m == nil {
		return fmt.Errorf("%w: no mount %d", unix.ENODEV, e.MountID)
	}
	if e.Action == wire.ActionWatched {
		return m.watched()
	}
	return m.act(a, e.Action, e.Path, e.NewPath, e.Mode)
}

// act makes the call of one event, below the root of m and nowhere else.
func (m *helperMount) act(a *actor, action wire.Action, rel, newRel string, mode uint32) error {
	m.point.mu.RLock()
	defer m.point.mu.RUnlock()
	root, done, err := m.actingRoot()
	if err != nil {
		return err
	}
	defer done()
	of := action == wire.ActionTruncate || action == wire.ActionChmod || action == wire.ActionCloseWrite
	if of && rel == "" {
		return actOn(a, action, root, mode)
	}
	parent, name, err := parentOf(root, rel)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	if of {
		fd := -1
		// By this thread, so that the host can name what has this name no more.
		err := a.do(func() (err error) {
			fd, err = beneath(parent, name, unix.O_PATH|unix.O_NOFOLLOW)
			return err
		})
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return actOn(a, action, fd, mode)
	}
	switch action {
	case wire.ActionRmdir:
		return a.do(func() error { return unix.Unlinkat(parent, name, unix.AT_REMOVEDIR) })
	case wire.ActionUnlink:
		return a.do(func() error { return unix.Unlinkat(parent, name, 0) })
	case wire.ActionMkdir:
		return a.do(func() error { return unix.Mkdirat(parent, name, 0) })
	case wire.ActionSymlink:
		return a.do(func() error { return unix.Symlinkat(".", parent, name) })
	case wire.ActionMknod:
		switch mode & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
		default:
			mode = unix.S_IFREG | 0o600 // devices are nothing to watch for, and nothing to make
		}
		return a.do(func() error { return unix.Mknodat(parent, name, mode&(unix.S_IFMT|0o777), 0) })
	case wire.ActionRename:
		to, newName, err := parentOf(root, newRel)
		if err != nil {
			return err
		}
		defer unix.Close(to)
		return a.do(func() error { return unix.Renameat2(parent, name, to, newName, 0) })
	}
	return fmt.Errorf("%w: action %d is not known", unix.EINVAL, action)
}

// actOn acts on a file that fd, an O_PATH descriptor, holds: a name would follow symbolic links that the host itself
// supplies.
func actOn(a *actor, action wire.Action, fd int, mode uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFREG && (action != wire.ActionChmod || kind != unix.S_IFDIR) {
		return fmt.Errorf("%w: it is no regular file", unix.EINVAL)
	}
	self := "/proc/self/fd/" + strconv.Itoa(fd)
	switch action {
	case wire.ActionTruncate:
		return a.do(func() error { return unix.Truncate(self, 0) })
	case wire.ActionChmod:
		if mode&0o7777 == 0 {
			mode = 0o700
		}
		return a.do(func() error { return unix.Chmod(self, mode&0o777) })
	default:
		return a.do(func() error {
			w, err := unix.Open(self, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				err = unix.Close(w)
			}
			return err
		})
	}
}

// beneath opens rel below root without following a symbolic link or crossing into another mount.
func beneath(root int, rel string, flags int) (int, error) {
	if rel == "" {
		rel = "."
	}
	return openat2(root, rel, flags, unix.RESOLVE_BENEATH|noLinks|unix.RESOLVE_NO_XDEV)
}

// parentOf opens the directory of rel, and returns the name in it.
func parentOf(root int, rel string) (int, string, error) {
	dir, name := path.Split(rel)
	if name == "" || name == "." || name == ".." {
		return -1, "", fmt.Errorf("%w: the path names no entry of the mount", unix.EINVAL)
	}
	fd, err := beneath(root, strings.TrimSuffix(dir, "/"), unix.O_PATH|unix.O_DIRECTORY)
	return fd, name, err
}

// actingClone is a detached clone of a mount, kept for as long as events follow each other: the kernel takes up to tens of milliseconds to
// take one away (it waits for all CPUs), and the next event would wait for that.
type actingClone struct {
	mu       sync.Mutex
	root     *os.File // nil: there is none
	readOnly bool     // of the mount, when it was made
	made     time.Time
	users    int
	idle     *time.Timer // takes it away
}

const (
	cloneIdle = 20 * time.Millisecond // for how long a clone is kept that nobody uses
	cloneAge  = time.Second           // for how long any: a mount that is gone must end
)

// actingRoot opens the root to act from: that of a detached clone of the mount, so that the mount itself is not busy meanwhile and can be
// unmounted. inotify fires on the inode, which both have. A clone of a mount that is read-only is not so (the superblock is writable). done
// gives it back.
func (m *helperMount) actingRoot() (root int, done func(), err error) {
	c := &m.clone
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.root != nil && c.users == 0 && (c.readOnly != m.readOnly.Load() || time.Since(c.made) > cloneAge) {
		go c.root.Close()
		c.root = nil
	}
	if c.root == nil {
		fd, cloned, err := m.newActingRoot()
		if err != nil {
			return -1, nil, err
		}
		if !cloned {
			return fd, func() { unix.Close(fd) }, nil
		}
		c.root, c.readOnly, c.made = os.NewFile(uintptr(fd), "clone"), m.readOnly.Load(), time.Now()
	}
	c.users++
	if c.idle != nil {
		c.idle.Stop()
	}
	return int(c.root.Fd()), c.done, nil
}

func (c *actingClone) done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users--; c.users == 0 {
		c.idle = time.AfterFunc(cloneIdle, c.close)
	}
}

// close takes a clone away that nobody uses.
func (c *actingClone) close() {
	c.mu.Lock()
	root := c.root
	if root == nil || c.users > 0 {
		c.mu.Unlock()
		return
	}
	c.root = nil
	c.mu.Unlock()
	root.Close()
}

// newActingRoot opens a root to act from, and tells whether it is a clone's.
func (m *helperMount) newActingRoot() (fd int, cloned bool, err error) {
	readOnly := m.readOnly.Load()
	// By the name and not by a descriptor of the root, for whose time the mount would be busy.
	clone, err := unix.OpenTree(int(m.point.parent.Fd()), m.point.name, unix.AT_SYMLINK_NOFOLLOW|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil && !readOnly {
		root, err := m.point.root()
		return root, false, err // without privilege
	}
	if err != nil {
		return -1, false, fmt.Errorf("act on a read-only mount: open_tree: %w", err)
	}
	// The clone is another mount; of this file system there is but the one.
	if id, err := mountIDOf(clone); err != nil || id.Dev1 != m.point.id.Dev1 || id.Dev2 != m.point.id.Dev2 {
		unix.Close(clone)
		return -1, false, unix.ENODEV
	}
	if !readOnly {
		return clone, true, nil
	}
	if err := unix.MountSetattr(clone, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		unix.Close(clone)
		return -1, false, fmt.Errorf("act on a read-only mount: mount_setattr: %w", err)
	}
	return clone, true, nil
}

func actionName(a wire.Action) string {
	names := []string{"rmdir", "unlink", "mkdir", "symlink", "truncate", "chmod", "mknod", "rename", "close-write", "watched"}
	if int(a) < len(names) {
		return names[a]
	}
	return strconv.Itoa(int(a))
}

// errnoFor is what a peer is told of err.
func errnoFor(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno):
		return errno
	case errors.Is(err, fs.ErrNotExist):
		return unix.ENOENT
	}
	return unix.EIO
}
