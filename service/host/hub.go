// SPDX-License-Identifier: Apache-2.0

package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/watch"
)

// hub tells workers what changes in the directories that they serve: what fanotify sees, and what the guests of other workers do, which
// those report. Each worker is joined to it by a socket pair of packets: the number of a mount (u32; 0 from the hub), then changes as
// package watch encodes them. The hub never waits for a worker. One that does not keep up is told that changes were lost.
type hub struct {
	log *slog.Logger

	mu      sync.Mutex
	tried   bool
	watcher *watch.Watcher // nil: changes on the host can't be seen
	why     error          // and why
	trees   map[string]*tree
	members map[*member]bool
	ours    atomic.Pointer[map[int]bool] // processes whose changes need not be told, since all who should hear of them hear it from themselves
}

// tree is an exported directory, while it is mounted.
type tree struct {
	dir    string
	dev    uint64
	tree   *watch.Tree // nil: it can't be watched
	why    error
	mounts map[hubMount]bool
}

type hubMount struct {
	*member
	id uint32
}

// member is a worker. What its guest does it reports while others is not 0: while another one serves a directory of its own.
type member struct {
	hub    *hub
	others *atomic.Uint32 // in memory that the worker has too
	memory []byte
	fd     int
	pid    int
	lost   atomic.Bool      // something was not told, for lack of room
	trees  map[uint32]*tree // by mount; guarded by hub.mu
	closed bool             // guarded by hub.mu
	done   chan struct{}
}

const (
	packetSize   = 32 << 10
	packetBuffer = 1 << 20 // that wait for a worker, in bytes of the kernel's
)

func newHub(log *slog.Logger) *hub {
	return &hub{log: log, trees: map[string]*tree{}, members: map[*member]bool{}}
}

// join makes a member of the worker pid. The files are for that worker, and the caller's to close.
func (h *hub) join(pid int) (*member, []*os.File, error) {
	shared, err := unix.MemfdCreate("others", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	file := os.NewFile(uintptr(shared), "others")
	memory, err := mapOthers(file, true)
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		file.Close()
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, packetBuffer) // less is allowed
	}
	m := &member{hub: h, others: othersIn(memory), memory: memory, fd: fds[0], pid: pid, trees: map[uint32]*tree{}, done: make(chan struct{})}
	h.mu.Lock()
	h.members[m] = true
	h.mu.Unlock()
	go m.read()
	return m, []*os.File{os.NewFile(uintptr(fds[1]), "changes"), file}, nil
}

// mapOthers maps the memory that says whether there are others. The worker only reads it.
func mapOthers(f *os.File, write bool) ([]byte, error) {
	how := unix.PROT_READ
	if write {
		how |= unix.PROT_WRITE
		if err := f.Truncate(4); err != nil {
			return nil, err
		}
		// Whoever has it can't make it shorter: a read would fault.
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
	}
	b, err := unix.Mmap(int(f.Fd()), 0, 4, how, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return b, nil
}

func othersIn(memory []byte) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(unsafe.SliceData(memory)))
}

// settle works out who hears of whom. It needs h.mu.
func (h *hub) settle() {
	ours := map[int]bool{}
	for m := range h.members {
		others, all := uint32(0), len(m.trees) > 0
		serves := map[*tree]bool{}
		devs := map[uint64]bool{}
		for _, t := range m.trees {
			serves[t], devs[t.dev] = true, true
			for o := range t.mounts {
				if o.member != m {
					others = 1
				}
			}
		}
		for _, t := range h.trees {
			all = all && (serves[t] || !devs[t.dev]) // one that is not its own may be below its own, or above
		}
		if m.others.Load() != others {
			m.others.Store(others)
		}
		if all {
			ours[m.pid] = true
		}
	}
	h.ours.Store(&ours)
}

// leave ends the membership. The worker has ended.
func (m *member) leave() {
	m.hub.mu.Lock()
	if m.closed {
		m.hub.mu.Unlock()
		return
	}
	m.closed = true
	delete(m.hub.members, m)
	ids := make([]uint32, 0, len(m.trees))
	for id := range m.trees {
		ids = append(ids, id)
	}
	m.hub.mu.Unlock()
	for _, id := range ids {
		m.unmounted(id)
	}
	unix.Shutdown(m.fd, unix.SHUT_RDWR) // read ends
	<-m.done
	unix.Close(m.fd)
	m.hub.mu.Lock() // settle is not at it
	_ = unix.Munmap(m.memory)
	m.hub.mu.Unlock()
}

// mounted has the changes of dir told to m, and tells whether those on the host can be seen; if not, why. root is the directory.
func (m *member) mounted(id uint32, dir string, root *os.File) (watched bool, why error) {
	h := m.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.trees[dir]
	if t == nil {
		t = &tree{dir: dir, mounts: map[hubMount]bool{}}
		var st unix.Stat_t
		if unix.Fstat(int(root.Fd()), &st) == nil {
			t.dev = st.Dev
		}
		h.trees[dir] = t
		t.tree, t.why = h.watch(t, root)
	}
	t.mounts[hubMount{m, id}] = true
	m.trees[id] = t
	h.settle()
	return t.tree != nil, t.why
}

// watch needs h.mu.
func (h *hub) watch(t *tree, root *os.File) (*watch.Tree, error) {
	if !h.tried {
		h.tried = true
		if h.watcher, h.why = watch.New(h.log); h.watcher != nil {
			h.watcher.LeaveOut(func(pid int) bool { ours := h.ours.Load(); return ours != nil && (*ours)[pid] })
		}
	}
	if h.watcher == nil {
		return nil, h.why
	}
	return h.watcher.Add(root, func(cs []watch.Change) { h.told(t, nil, cs) })
}

// unmounted undoes mounted.
func (m *member) unmounted(id uint32) {
	h := m.hub
	h.mu.Lock()
	t := m.trees[id]
	if t == nil {
		h.mu.Unlock()
		return
	}
	delete(m.trees, id)
	delete(t.mounts, hubMount{m, id})
	var last *watch.Tree
	if len(t.mounts) == 0 {
		delete(h.trees, t.dir)
		last = t.tree
	}
	h.settle()
	h.mu.Unlock()
	if last != nil {
		last.Close()
	}
}

// told passes changes below a tree on to the workers that serve it, but to from. Of what a worker has done fanotify tells too: those
// that have heard it from the worker itself don't hear it again. So a worker is heard by all who serve one of its trees: they may lie within each other.
func (h *hub) told(t *tree, from *member, cs []watch.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	theirs := map[int]bool{}
	to := map[*member]bool{}
	for m := range t.mounts {
		to[m.member] = true
		theirs[m.pid] = true
	}
	if from != nil {
		for _, o := range from.trees {
			for m := range o.mounts {
				if o.dev == t.dev {
					to[m.member] = true
				}
			}
		}
	}
	delete(to, from)
	for m := range to {
		var b []byte
		for i := range cs {
			if from == nil && theirs[cs[i].PID] && cs[i].Op&watch.Lost == 0 {
				continue
			}
			if len(b) == 0 {
				b = make([]byte, 4, 512)
			}
			if b = watch.Append(b, &cs[i]); len(b) > packetSize-watch.MaxEncoded {
				m.send(b)
				b = nil
			}
		}
		if len(b) > 0 {
			m.send(b)
		}
	}
}

// send never waits.
func (m *member) send(b []byte) {
	if m.lost.Load() {
		lost := watch.Append(make([]byte, 4), &watch.Change{Op: watch.Lost})
		if unix.Sendto(m.fd, lost, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil) != nil {
			return
		}
		m.lost.Store(false)
	}
	if err := unix.Sendto(m.fd, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil); err != nil && !m.lost.Swap(true) && !errors.Is(err, unix.EPIPE) {
		m.hub.log.Warn("a worker does not keep up with what changes: its guest looks at everything again", "worker", m.pid, "error", err)
	}
}

// read takes what the worker reports of its guest.
func (m *member) read() {
	defer close(m.done)
	b := make([]byte, packetSize)
	for {
		n, err := unix.Read(m.fd, b)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return
		}
		id, cs, err := decodePacket(b[:n])
		if err != nil {
			continue // it is broken, and believed no further than its guest
		}
		m.hub.mu.Lock()
		t := m.trees[id]
		m.hub.mu.Unlock()
		if t != nil {
			m.hub.told(t, m, cs)
		}
	}
}

func decodePacket(b []byte) (id uint32, cs []watch.Change, err error) {
	if len(b) < 4 {
		return 0, nil, fmt.Errorf("a packet of %d bytes", len(b))
	}
	id, b = binary.LittleEndian.Uint32(b), b[4:]
	for len(b) > 0 {
		var c watch.Change
		if c, b, err = watch.Decode(b); err != nil {
			return 0, nil, err
		}
		cs = append(cs, c)
	}
	return id, cs, nil
}

// close ends the watching. All members have left.
func (h *hub) close() {
	h.mu.Lock()
	w := h.watcher
	h.mu.Unlock()
	if w != nil {
		w.Close()
	}
}
