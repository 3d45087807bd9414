// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/transport"
)

// maxSuits is how many suitability requests there may be at once: each on a mount that does not answer keeps a thread, also
// when who asked has given up.
const maxSuits = 64

// HelperRole is the role under which the daemon starts its helper (ipc.Start).
const HelperRole = "helper"

// Operations of a call.
const (
	opSetup   = "setup"   // Roots, Fusermount
	opMount   = "mount"   // Key, Dir (empty: nowhere), Options, WireID, Keep, and the directory, if the daemon has it; answers with the device, and the mount if it is nowhere
	opAttach  = "attach"  // Key: it is seen at Dir from now on; answers with Mount
	opAdopt   = "adopt"   // Key, Dir, Options, WireID, Mount: one that an earlier process made
	opRemount = "remount" // Key, Options.ReadOnly
	opUnmount = "unmount" // Key, How
	opForget  = "forget"  // Key: it is unmounted, or, with Force, is to be
	opSuit    = "suit"    // Paths, Export; answers with Paths
	opStale   = "stale"   // Dir: take away what a helper before this one left there
	opEvents1 = "events1" // and the connection
	opThread  = "thread"  // answers with Thread
	opEvents2 = "events2" // Thread, and the connection, or none if it failed; answers when the channel has ended
	opNotify  = "notify"  // Key, Dir, and the connection and the device; answers when the channel has ended
)

// call is what the daemon asks of the helper.
type call struct {
	ID         uint64
	Op         string
	Key        uint64 `json:",omitempty"` // of the mount; the daemon chooses it
	Dir        string `json:",omitempty"`
	Options    MountOptions
	WireID     uint32   `json:",omitempty"` // MountID of version 2
	Keep       bool     `json:",omitempty"` // it stays when the daemon has ended: another will take it up
	Mount      mountID  // as the kernel knows it
	How        int      `json:",omitempty"` // howBusy, howDetach or howForce
	Force      bool     `json:",omitempty"`
	Paths      []string `json:",omitempty"`
	Export     bool     `json:",omitempty"`
	Roots      []string `json:",omitempty"`
	Fusermount string   `json:",omitempty"`
	Thread     int      `json:",omitempty"`
}

// report is what the helper says: an answer, or, with ID 0, a line for the log or a pong.
type report struct {
	ID     uint64
	Key    uint64     `json:",omitempty"` // of the mount whose device is beside it
	Errno  unix.Errno `json:",omitempty"`
	Error  string     `json:",omitempty"`
	Paths  []string   `json:",omitempty"`
	Thread int        `json:",omitempty"`
	Mount  mountID
	Log    string `json:",omitempty"`
	Pong   bool   `json:",omitempty"`
}

// helperServer is the helper process: it makes every call that looks at paths or may wait for a mount.
type helperServer struct {
	conn *ipc.Conn

	mu         sync.Mutex // guards the rest
	roots      []string
	fusermount string
	mounts     map[uint64]*helperMount
	actors     map[int]*actor // threads whose channel is being dialled
	acting     int            // threads in all
	suiting    int            // suitability requests under way
}

type helperMount struct {
	point    *point     // nil: it is in another mount namespace, or was moved; it can't be reached from here
	unseen   sync.Mutex // guards target and mnt, and is held while it is attached
	target   *os.File   // and mnt: until it is attached
	mnt      *os.File
	keep     bool
	notify   io.Closer // the notify channel, when it is there; guarded by helperServer.mu
	wireID   uint32
	readOnly atomic.Bool
	clone    actingClone
}

// Helper is the main of the helper process. It returns when the daemon has ended; a daemon that was killed leaves its
// mounts, which are then detached here, unless another daemon will take them up.
func Helper(c *ipc.Conn) error {
	// A terminal and systemd signal all processes of the daemon; the daemon still needs this one to unmount.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	h := &helperServer{conn: c, mounts: make(map[uint64]*helperMount), actors: make(map[int]*actor)}
	defer h.detachAll()
	for {
		var q call
		files, err := c.Recv(&q)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if q.Op == opSetup {
			h.roots, h.fusermount = q.Roots, q.Fusermount
			continue
		}
		// Each in its own goroutine: one that waits for a dead mount stops no other.
		go func() {
			r, made, err := h.serve(q, files)
			if err != nil {
				r.Error, r.Errno = err.Error(), errnoFor(err)
			}
			r.ID = q.ID
			if made != nil {
				r.Key = q.Key
			}
			h.send(r, made...)
			for _, f := range made {
				f.Close()
			}
		}()
	}
}

// send reports to the daemon. If that is gone, Recv tells it.
func (h *helperServer) send(r report, files ...*os.File) { _ = h.conn.Send(r, files...) }

func (h *helperServer) logf(format string, args ...any) {
	h.send(report{Log: fmt.Sprintf(format, args...)})
}

// serve answers one call. It owns files.
func (h *helperServer) serve(q call, files []*os.File) (r report, made []*os.File, err error) {
	want := map[string]int{opMount: 1, opEvents1: 1, opEvents2: 1, opNotify: 2}[q.Op]
	if len(files) != want && (q.Op != opEvents2 && q.Op != opMount || len(files) != 0) {
		for _, f := range files {
			f.Close()
		}
		return r, nil, fmt.Errorf("%s with %d descriptors: %w", q.Op, len(files), unix.EINVAL)
	}
	switch q.Op {
	case opMount:
		var target *os.File
		if len(files) == 1 {
			target = files[0]
		}
		made, err = h.mount(q, target)
	case opAttach:
		r.Mount, err = h.attach(q)
	case opAdopt:
		err = h.adopt(q)
	case opRemount:
		err = h.remount(q)
	case opUnmount:
		switch m := h.take(q.Key, false); {
		case m == nil:
		case m.point != nil:
			m.neverSeen()
			err = m.point.unmount(h.fusermount, q.How)
		case q.How != howForce:
			err = fmt.Errorf("it can't be reached from here: umount it where it is: %w", unix.ENOENT)
		}
	case opForget:
		if m := h.take(q.Key, true); m != nil {
			m.neverSeen()
			if q.Force && m.point != nil {
				if err := m.point.unmount(h.fusermount, howForce); err != nil {
					h.logf("detach %s: %s", m.point.dir, err) // nobody waits for the answer
				}
			}
			m.close()
			if m.notify != nil {
				m.notify.Close() // it holds the device
			}
		}
	case opStale:
		// Preparing a point detaches a dead mount that is there.
		var target *os.File
		var p *point
		if p, target, err = preparePoint(q.Dir, h.roots); err == nil {
			target.Close()
			p.close()
		}
	case opSuit:
		r.Paths, err = h.suit(q.Paths, q.Export)
	case opEvents1:
		go h.serveEvents1(transport.NewConn(files[0], transport.Peer{}))
	case opThread:
		var a *actor
		if a, err = h.newActor(); err != nil {
			break
		}
		h.mu.Lock()
		h.actors[a.tid] = a
		h.mu.Unlock()
		r.Thread = a.tid
	case opEvents2:
		h.mu.Lock()
		a := h.actors[q.Thread]
		delete(h.actors, q.Thread)
		h.mu.Unlock()
		switch {
		case a != nil && len(files) == 1:
			h.serveEvents2(a, transport.NewConn(files[0], transport.Peer{}))
		case a != nil:
			h.endActor(a)
		}
	case opNotify:
		conn := transport.NewConn(files[0], transport.Peer{})
		h.mu.Lock()
		m := h.mounts[q.Key]
		if m != nil {
			m.notify = conn
		}
		h.mu.Unlock()
		if m == nil { // unmounted meanwhile
			conn.Close()
			files[1].Close()
			break
		}
		h.serveNotify(q.Dir, conn, files[1])
	default:
		err = fmt.Errorf("operation %q: %w", q.Op, unix.ENOSYS)
	}
	return r, made, err
}

// suit returns which of paths suit.
func (h *helperServer) suit(paths []string, export bool) (good []string, err error) {
	h.mu.Lock()
	if h.suiting == maxSuits {
		h.mu.Unlock()
		return nil, fmt.Errorf("%w: %d requests wait for mounts that do not answer", unix.EAGAIN, maxSuits)
	}
	h.suiting++
	h.mu.Unlock()
	for _, p := range paths {
		if suits(p, export) {
			good = append(good, p)
		}
	}
	h.mu.Lock()
	h.suiting--
	h.mu.Unlock()
	return good, nil
}

// mount makes a mount. Where the kernel is asked directly it is nowhere until attach.
// It owns target, the directory where the caller of the daemon has it; nil: it is looked for here.
func (h *helperServer) mount(q call, target *os.File) (made []*os.File, err error) {
	m := &helperMount{wireID: q.WireID, keep: q.Keep, target: target}
	m.readOnly.Store(q.Options.ReadOnly)
	defer func() {
		if err != nil {
			m.close()
			for _, f := range made {
				f.Close()
			}
			made = nil
		}
	}()
	if target != nil {
		if err = checkEmpty(int(target.Fd())); errors.Is(err, unix.ENOTCONN) {
			target.Close() // a dead mount, which is taken away by its path
			target, m.target = nil, nil
		} else if err != nil {
			return nil, pointError(q.Dir, q.Dir, err)
		}
	}
	if target != nil {
		// It is not looked for by its path: a trap of autofs lets nobody pass but who mounts, and waits for him.
		if m.point, err = holdPoint(q.Dir); err != nil {
			return nil, err
		}
	} else if q.Dir != "" {
		if m.point, m.target, err = preparePoint(q.Dir, h.roots); err != nil {
			return nil, err
		}
	}
	var dev *os.File
	if os.Geteuid() == 0 {
		dev, m.mnt, err = makeMount(q.Options)
	} else if q.Dir == "" {
		err = fmt.Errorf("only root can mount in another namespace: %w", unix.EPERM)
	} else {
		var prog string
		if prog, err = findFusermount(h.fusermount); err == nil {
			dev, err = MountUser(prog, m.point.dir, q.Options)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", q.Dir, err)
	}
	made = []*os.File{dev}
	if m.mnt == nil {
		err = m.point.look()
	} else {
		raiseReadAhead(int(m.mnt.Fd()))
		if m.point != nil {
			m.point.id, err = mountIDOf(int(m.mnt.Fd()))
		} else {
			made = append(made, m.mnt)
			m.mnt = nil
		}
	}
	if err != nil {
		return made, fmt.Errorf("mount %s: look at it: %w", q.Dir, err)
	}
	h.mu.Lock()
	h.mounts[q.Key] = m
	h.mu.Unlock()
	return made, nil
}

// attach lets the mount be seen.
func (h *helperServer) attach(q call) (mountID, error) {
	h.mu.Lock()
	m := h.mounts[q.Key]
	h.mu.Unlock()
	if m == nil || m.point == nil {
		return mountID{}, nil // it has ended, or is for another namespace
	}
	m.unseen.Lock()
	defer m.unseen.Unlock()
	mnt, target := m.mnt, m.target
	m.mnt, m.target = nil, nil
	defer target.Close()
	if mnt == nil {
		return m.point.id, nil // fusermount3 did it, or it has ended
	}
	defer mnt.Close()
	if err := attach(mnt, int(target.Fd())); err != nil {
		return mountID{}, fmt.Errorf("mount %s: %w", m.point.dir, err)
	}
	return m.point.id, nil
}

// adopt takes over a mount of an earlier process, if it is where it was. If not it goes on all the same, but can't be reached.
func (h *helperServer) adopt(q call) error {
	m := &helperMount{wireID: q.WireID, keep: q.Keep}
	m.readOnly.Store(q.Options.ReadOnly)
	var p *point
	var err error
	if q.Dir != "" { // else it is in another namespace
		p, err = holdPoint(q.Dir)
	}
	if p != nil {
		p.id = q.Mount
		var fd int
		if fd, err = p.root(); err == nil {
			unix.Close(fd)
			m.point = p
		} else {
			p.close()
		}
	}
	h.mu.Lock()
	h.mounts[q.Key] = m
	h.mu.Unlock()
	if err != nil {
		return fmt.Errorf("the mount is no longer at %s: %w", q.Dir, err)
	}
	return nil
}

// remount makes the mount, not the superblock, read-only or writable.
func (h *helperServer) remount(q call) error {
	m := h.take(q.Key, false)
	if m == nil || m.point == nil {
		return fmt.Errorf("the mount can't be reached from here: %w", unix.ENOENT)
	}
	m.point.mu.RLock()
	defer m.point.mu.RUnlock()
	fd, err := m.point.root()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if q.Options.ReadOnly {
		attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("remount %s: %w", m.point.dir, err)
	}
	m.readOnly.Store(q.Options.ReadOnly)
	return nil
}

// neverSeen ends the attaching of m: it waits for one that is under way, and there is none after it.
func (m *helperMount) neverSeen() {
	m.unseen.Lock()
	defer m.unseen.Unlock()
	m.target.Close()
	m.mnt.Close()
	m.target, m.mnt = nil, nil
}

// close lets go of what m holds; the mount itself stays.
func (m *helperMount) close() {
	m.neverSeen()
	if m.point != nil {
		m.point.close()
	}
}

// readAheadKiB is how far the kernel reads ahead in a file that is read in order: two READs of the largest size, so that
// one is under way while the other is copied. The kernel asks INIT for its default of 128 KiB; see initReply.
const readAheadKiB = 2 * MaxData >> 10

// raiseReadAhead sets the read-ahead of the mount at root, which only root can. Without it the mount is slower.
func raiseReadAhead(root int) {
	var st unix.Statx_t
	if unix.Statx(root, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st) != nil {
		return
	}
	_ = os.WriteFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor), []byte(strconv.Itoa(readAheadKiB)), 0)
}

// take returns a mount, and removes it if asked.
func (h *helperServer) take(key uint64, remove bool) *helperMount {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.mounts[key]
	if remove {
		delete(h.mounts, key)
	}
	return m
}

// mountOf returns the innermost mount that holds path, and the rest of path.
func (h *helperServer) mountOf(path string) (m *helperMount, rel string) {
	// Not cleaned: an event with .. in its path is refused where it is resolved.
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.mounts {
		if c.point != nil && (path == c.point.dir || strings.HasPrefix(path, c.point.dir+"/")) && (m == nil || len(c.point.dir) > len(m.point.dir)) {
			m = c
		}
	}
	if m != nil {
		rel = strings.TrimLeft(path[len(m.point.dir):], "/")
	}
	return m, rel
}

func (h *helperServer) mountByWire(id uint32) *helperMount {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.mounts {
		if m.wireID == id && m.point != nil {
			return m
		}
	}
	return nil
}

// detachAll is for the end: what is still mounted has lost its daemon.
func (h *helperServer) detachAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.mounts {
		if !m.keep && m.point != nil {
			// There is nobody left to tell of a failure.
			_ = m.point.unmount(h.fusermount, howForce)
		}
	}
}

// cleanRoots makes the roots absolute and free of symbolic links, once, in the words of who runs the daemon.
func cleanRoots(roots []string) ([]string, error) {
	var clean []string
	for _, r := range roots {
		if !filepath.IsAbs(r) {
			return nil, fmt.Errorf("--mount-root %q: an absolute path is wanted", r)
		}
		p, err := filepath.EvalSymlinks(r)
		if errors.Is(err, os.ErrNotExist) {
			p, err = filepath.Clean(r), nil
		}
		if err != nil {
			return nil, fmt.Errorf("--mount-root: %w: name a directory", err)
		}
		clean = append(clean, p)
	}
	return clean, nil
}
