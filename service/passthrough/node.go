// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"maps"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// key is a host inode, as one mount shows it. The birth time tells apart two that had one number, one after the other.
type key struct {
	dev, ino, mnt uint64
}

func keyOf(st *unix.Statx_t) key {
	return key{dev: uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), ino: st.Ino, mnt: st.Mnt_id}
}

func btimeOf(st *unix.Statx_t) int64 {
	if st.Mask&unix.STATX_BTIME == 0 {
		return 0
	}
	return st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
}

// node is an inode that the guest knows. What it was when it was found never changes: its key, birth time and type.
//
// There may be a million of them: the order of the fields is the one without holes between them.
//
// It is reached by its descriptor, or, where it has none, opened again: by name in its parent, or by file handle. What
// was opened is compared with what it was; another inode under that name is ESTALE.
type node struct {
	fs    *FS
	id    uint64
	key   key
	btime int64
	ino   uint64 // for the guest

	stamp   atomic.Uint64 // of its data, when the guest last opened it; 0: it has not
	watched atomic.Uint64 // with Config.Dirs, of a directory: its place among those that were watched; 0: it is not
	told    atomic.Uint64 // with Config.Dirs: stamp of what the guest was told for long; 0: it asks before it believes that again

	typ uint32 // S_IFMT bits of the mode

	// Guarded by FS.mu.

	pins    int32         // requests under way and open handles: the descriptor stays
	kids    int32         // nodes whose parent is this one
	removed bool          // by the guest, with a descriptor kept for it, or last
	used    bool          // in FS.lru
	adrift  bool          // with Config.Dirs: the host has taken it away from where it was last seen
	nlookup uint64        // references of the guest's kernel
	parent  *node         // with name, where it was last seen; nil when it is gone from there
	name    string        //
	fd      int           // O_PATH, or -1
	handle  string        // its file handle, taken when the descriptor was closed; "": none
	opens   []*handle     // of the guest
	last    *unix.Statx_t // what it was when it was removed, if nothing else of it is left
	before  *node         // that had its place, FS.places, before it

	next, prev *node
}

// place is where a node was last seen.
type place struct {
	parent *node
	name   string
}

// is tells whether st describes n.
func (n *node) is(st *unix.Statx_t) bool {
	return keyOf(st) == n.key && btimeOf(st) == n.btime && uint32(st.Mode)&unix.S_IFMT == n.typ
}

// enter finds or makes the node of what st describes, found under name in parent, which is pinned; name "" is for
// what has none. The guest gets one reference more.
func (fs *FS) enter(parent *node, name cname, st *unix.Statx_t) (*node, fuse.Errno) {
	k, btime, typ := keyOf(st), btimeOf(st), uint32(st.Mode)&unix.S_IFMT
	newer := false
	fs.mu.Lock()
	n := fs.keys[k]
	if n != nil && (n.btime != btime || n.typ != typ) {
		// The host has given the number to another inode. Who still holds the old one gets ESTALE.
		newer = n.btime > btime // it is us who are late, with what was there before
		n = nil
	}
	if n == nil {
		if !take(&fs.limits.nodes, fs.limits.Nodes) {
			fs.unlock()
			return nil, unix.ENFILE
		}
		fs.lastID++
		n = &node{fs: fs, id: fs.lastID, key: k, btime: btime, typ: typ, ino: fs.guestIno(k), fd: -1}
		fs.nodes[n.id] = n
		fs.most = max(fs.most, len(fs.nodes))
		if !newer {
			fs.keys[k] = n // what changes is told of this one
		}
	}
	if n != fs.root {
		n.nlookup++
		if len(name) > 1 && (n.parent != parent || !name.is(n.name)) {
			fs.move(n, parent, name.String())
		}
		n.adrift = n.adrift && len(name) <= 1
	}
	fs.unlock()
	return n, 0
}

// move says where n is found; parent nil: nowhere. It needs FS.mu, and FS.unlock after it.
func (fs *FS) move(n, parent *node, name string) {
	old := n.parent
	fs.unplace(n)
	n.parent, n.name = parent, name
	if parent != nil {
		parent.kids++
		n.removed, n.adrift = false, false
		p := place{parent, name}
		n.before, fs.places[p] = fs.places[p], n
	}
	if old != nil {
		old.kids--
		fs.unref(old)
	}
}

// unplace takes n out of FS.places. It needs FS.mu.
func (fs *FS) unplace(n *node) {
	if n.parent == nil {
		return
	}
	p := place{n.parent, n.name}
	if o := fs.places[p]; o != n {
		for o.before != n {
			o = o.before
		}
		o.before = n.before
	} else if n.before != nil {
		fs.places[p] = n.before
	} else {
		delete(fs.places, p)
	}
	n.before = nil
}

// forget takes references from the guest's. More than it has are all.
func (fs *FS) forget(id, nlookup uint64) {
	fs.mu.Lock()
	if n := fs.nodes[id]; n != nil && n != fs.root {
		n.nlookup -= min(n.nlookup, nlookup)
		if n.nlookup == 0 {
			fs.unshare(id)
		}
		fs.unref(n)
	}
	fs.unlock()
}

// unref drops n if nothing refers to it, and then perhaps its parent. It needs FS.mu, and FS.unlock after it.
func (fs *FS) unref(n *node) {
	for n != nil && n.nlookup == 0 && n.pins == 0 && n.kids == 0 && n != fs.root && fs.nodes[n.id] == n {
		delete(fs.nodes, n.id)
		if fs.keys[n.key] == n {
			delete(fs.keys, n.key)
		}
		fs.limits.nodes.Add(-1)
		if n.fd >= 0 {
			fs.dead = append(fs.dead, n.fd)
			n.fd = -1
			fs.lruRemove(n)
		}
		if n.isWatched() {
			fs.dirs.drop = append(fs.dirs.drop, n.id)
		}
		fs.unplace(n)
		parent := n.parent
		n.parent = nil
		if parent != nil {
			parent.kids--
		}
		n = parent
	}
	fs.shrink()
}

const (
	// shrinkFrom is from how many nodes on their memory is given back.
	shrinkFrom = 8192
	// shrinkWait is for how long the guest may go on forgetting first.
	shrinkWait = time.Second
)

// shrink gives back memory when there are far fewer nodes than there were: a map keeps what it had, and the runtime what it does not
// use, for minutes. It needs FS.mu.
func (fs *FS) shrink() {
	if fs.most < shrinkFrom || len(fs.nodes) > fs.most/8 {
		return
	}
	fs.most = len(fs.nodes)
	fs.nodes, fs.keys, fs.places = smaller(fs.nodes), smaller(fs.keys), smaller(fs.places)
	if fs.freeing == nil {
		fs.freeing = time.AfterFunc(shrinkWait, debug.FreeOSMemory)
	} else {
		fs.freeing.Reset(shrinkWait)
	}
}

// smaller is m in as little memory as it needs, which maps.Clone does not see to.
func smaller[K comparable, V any](m map[K]V) map[K]V {
	n := make(map[K]V, len(m))
	maps.Copy(n, m)
	return n
}

// known finds the node of what st describes, if the guest has it, and pins it for the request.
func (r *request) known(st *unix.Statx_t) *node {
	fs := r.fs
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.keys[keyOf(st)]
	if n == nil || !n.is(st) {
		return nil
	}
	n.pins++
	r.pinned[r.npinned] = n
	r.npinned++
	return n
}
