// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// maxLocks bounds the ranges that one mount may have locked, since each costs kernel memory that no resource limit
// counts.
const maxLocks = 8192

// lockTable has the POSIX locks of one mount. The host's kernel decides and enforces them: those of one owner on one
// node are open file description locks on a descriptor of their own. (One descriptor for several owners would merge
// their locks, and locks of this process would vanish whenever it closes any descriptor of the file.)
//
// The ranges are noted beside that, to bound them and to tell who holds one.
type lockTable struct {
	give func()       // called for each descriptor that was closed
	n    atomic.Int32 // owners in the table: RELEASE and FLUSH, which come with each close, look here first

	mu     sync.Mutex // serializes the lock calls with the notes of them
	nodes  map[uint64]map[uint64]*lockOwner
	ranges int
}

// lockOwner is what one owner (the guest's process, or open file with its own OFD locks) has locked of one node.
type lockOwner struct {
	fd     int    // ours
	fh     uint64 // the handle that the first lock came through
	ranges []lockRange
}

// lockRange is a locked range; end is inclusive. They are sorted, disjoint, and merged where they touch.
type lockRange struct {
	start, end uint64
	typ        uint32 // F_RDLCK or F_WRLCK
	pid        uint32 // in the guest
}

// set does SETLK for an owner. open makes the owner's descriptor, for its first lock: it is counted, and given back by give. It returns
// EAGAIN if another owner, of this mount or not, is in the way.
func (t *lockTable) set(node, owner, fh uint64, lk *fuse.FileLock, open func() (int, fuse.Errno)) fuse.Errno {
	f, errno := flock(lk)
	if errno != 0 {
		return errno
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.nodes[node][owner]
	if o == nil {
		if lk.Type == unix.F_UNLCK {
			return 0
		}
		if t.ranges >= maxLocks {
			return unix.ENOLCK
		}
		fd, errno := open()
		if errno != 0 {
			return errno
		}
		o = &lockOwner{fd: fd, fh: fh}
		if errno := ofdLock(fd, unix.F_OFD_SETLK, f); errno != 0 {
			unix.Close(fd) // nothing is locked through it
			t.give()
			return errno
		}
		if t.nodes == nil {
			t.nodes = map[uint64]map[uint64]*lockOwner{}
		}
		if t.nodes[node] == nil {
			t.nodes[node] = map[uint64]*lockOwner{}
		}
		t.nodes[node][owner] = o
		t.n.Add(1)
	} else {
		// Any call can split a range in two, so it may add two.
		if t.ranges+2 > maxLocks && lk.Type != unix.F_UNLCK {
			return unix.ENOLCK
		}
		if errno := ofdLock(o.fd, unix.F_OFD_SETLK, f); errno != 0 {
			return errno
		}
	}
	t.ranges -= len(o.ranges)
	o.ranges = setRange(o.ranges, lockRange{lk.Start, lk.End, lk.Type, lk.PID})
	t.ranges += len(o.ranges)
	if len(o.ranges) == 0 {
		t.drop(node, owner, o)
	}
	return 0
}

// get does GETLK: lk becomes the lock that is in the way of it, or of type F_UNLCK if there is none. fd is any
// descriptor of the file without locks, for owners who have none.
func (t *lockTable) get(node, owner uint64, lk *fuse.FileLock, fd int) fuse.Errno {
	f, errno := flock(lk)
	if errno != 0 || lk.Type == unix.F_UNLCK {
		return unix.EINVAL
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if o := t.nodes[node][owner]; o != nil {
		fd = o.fd
	}
	if errno := ofdLock(fd, unix.F_OFD_GETLK, f); errno != 0 {
		return errno
	}
	if f.Type == unix.F_UNLCK {
		lk.Type = unix.F_UNLCK
		return 0
	}
	lk.Type, lk.Start, lk.End, lk.PID = uint32(f.Type), uint64(f.Start), math.MaxInt64, 0
	if f.Len != 0 {
		lk.End = uint64(f.Start + f.Len - 1)
	}
	// The holder's pid is told if it is a process of this guest; one of the host's or of another guest's means nothing there.
	for id, o := range t.nodes[node] {
		if id == owner {
			continue
		}
		for _, r := range o.ranges {
			if r.typ == lk.Type && r.start <= lk.End && lk.Start <= r.end {
				lk.PID = r.pid
				return 0
			}
		}
	}
	return 0
}

// has tells whether somebody has locked of node.
func (t *lockTable) has(node uint64) bool {
	if t.n.Load() == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.nodes[node]) > 0
}

// flush drops all that owner has locked of node, as close(2) of any descriptor does. It tells whether there was any.
func (t *lockTable) flush(node, owner uint64) bool {
	return t.dropIf(node, func(id uint64, _ *lockOwner) bool { return id == owner })
}

// release drops what was locked through the handle fh: the owner of OFD locks in the guest is
// the open file, which sends no FLUSH of its own. It tells whether there was any.
func (t *lockTable) release(node, fh uint64) bool {
	return t.dropIf(node, func(_ uint64, o *lockOwner) bool { return o.fh == fh })
}

func (t *lockTable) dropIf(node uint64, match func(uint64, *lockOwner) bool) (any bool) {
	if t.n.Load() == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, o := range t.nodes[node] {
		if match(id, o) {
			t.ranges -= len(o.ranges)
			t.drop(node, id, o)
			any = true
		}
	}
	return any
}

// drop closes the owner's descriptor. Precondition: mu is held, and ranges does not count o's.
func (t *lockTable) drop(node, owner uint64, o *lockOwner) {
	unix.Close(o.fd) // the locks are gone whatever it returns
	t.give()
	delete(t.nodes[node], owner)
	if len(t.nodes[node]) == 0 {
		delete(t.nodes, node)
	}
	t.n.Add(-1)
}

// close drops everything.
func (t *lockTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for node, owners := range t.nodes {
		for id, o := range owners {
			t.drop(node, id, o)
		}
	}
	t.ranges = 0
}

// flock is lk in the form of fcntl(2).
func flock(lk *fuse.FileLock) (*unix.Flock_t, fuse.Errno) {
	if lk.Start > lk.End || lk.End > math.MaxInt64 || lk.Type > unix.F_UNLCK {
		return nil, unix.EINVAL
	}
	f := &unix.Flock_t{Type: int16(lk.Type), Whence: unix.SEEK_SET, Start: int64(lk.Start)}
	if lk.End != math.MaxInt64 { // length 0: to the end, wherever that comes to be
		f.Len = int64(lk.End-lk.Start) + 1
	}
	return f, 0
}

func ofdLock(fd, cmd int, f *unix.Flock_t) fuse.Errno {
	for {
		err := unix.FcntlFlock(uintptr(fd), cmd, f)
		switch err {
		case unix.EINTR:
			continue
		case unix.EACCES: // POSIX allows both; the kernel's own answer is EAGAIN
			return unix.EAGAIN
		}
		return errnoOf(err)
	}
}

// setRange does to sorted ranges what fcntl(2) does: add replaces what it covers, F_UNLCK leaves a hole, neighbours
// of one kind merge. It reuses rs.
func setRange(rs []lockRange, add lockRange) []lockRange {
	i := sort.Search(len(rs), func(i int) bool { return rs[i].end >= add.start })
	j := sort.Search(len(rs), func(j int) bool { return rs[j].start > add.end })
	var room [3]lockRange
	put := room[:0]
	if i < j && rs[i].start < add.start {
		put = append(put, lockRange{rs[i].start, add.start - 1, rs[i].typ, rs[i].pid})
	} else if i > 0 && rs[i-1].end+1 == add.start { // only a neighbour: to be merged
		i--
		put = append(put, rs[i])
	}
	if add.typ != unix.F_UNLCK {
		if n := len(put); n > 0 && put[n-1].typ == add.typ {
			add.start = put[n-1].start
			put[n-1] = add
		} else {
			put = append(put, add)
		}
	}
	if i < j && rs[j-1].end > add.end {
		put = appendMerged(put, lockRange{add.end + 1, rs[j-1].end, rs[j-1].typ, rs[j-1].pid})
	} else if j < len(rs) && rs[j].start == add.end+1 {
		put = appendMerged(put, rs[j])
		j++
	}
	return slices.Replace(rs, i, j, put...)
}

func appendMerged(rs []lockRange, r lockRange) []lockRange {
	if n := len(rs); n > 0 && rs[n-1].typ == r.typ && rs[n-1].end+1 == r.start {
		rs[n-1].end = r.end
		return rs
	}
	return append(rs, r)
}
