// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// CacheMode says what the guest may cache, and for how long.
type CacheMode int

const (
	// CacheCoherent: long, where the guest is told of changes (see [FS.Watched] and [FS.Notify]); elsewhere for Config.TTL.
	CacheCoherent CacheMode = iota
	// CacheNone: nothing.
	CacheNone
	// CacheAlways: for good. The tree does not change but by this guest.
	CacheAlways
)

const (
	// longTTL is how long what is told of may be cached, in seconds. It is told again after that, if it is used.
	longTTL = 3600
	// maxQueue is how many changes may wait to be told. With one more the guest is to believe nothing that it has cached.
	maxQueue = 8192
)

// caching is what a mount knows of its guest's caches.
//
// A change on the host comes by [FS.Changed], and is told to the guest's kernel in the order in which it came. What the kernel is
// told while a request is under way that has seen the state before is not lost: the kernel compares an INVAL_INODE with the
// time at which the request began (attr_version), holds an INVAL_ENTRY back until lookups in that directory are done, and waits
// for pages that are being read. Two cases are ours: a change of a node that is not in the table yet, which gets no long life
// in the reply (seq); and an INVAL_INODE of an inode that the kernel does not have yet, since its first LOOKUP is under way. The
// kernel then answers ENOENT, and is told to drop the name, for which it waits.
type caching struct {
	watched atomic.Bool   // changes on the host come
	told    atomic.Bool   // and go to the guest: there is a notify channel
	seq     atomic.Uint64 // changes that came

	mu     sync.Mutex
	wake   sync.Cond
	queue  []change
	lost   bool // tell the guest to believe nothing
	again  bool // which it will be told once more
	notify *notifier
	before bool // there has been a notify channel
	actor  Actor
	closed bool
	done   chan struct{} // closed when nothing is told any more; nil before the first channel

	absences  absences
	unsettled map[uint64]struct{} // nodes, by settle

	led led // of who tells
}

// change is a watch.Change in terms of the guest: of nodes, 0 where it does not know one.
type change struct {
	op            watch.Op
	dir, newDir   uint64
	node          uint64
	mode          uint32
	name, newName string
	exchange      bool // the rename is half of an exchange of two names
	quiet         bool // not to be acted
	strange       bool // of an inode that the guest does not know
}

// Watched says whether changes on the host come by Changed. Where they do the guest may cache for long.
func (fs *FS) Watched(yes bool) {
	if fs.caching.watched.Swap(yes) && !yes {
		fs.distrust()
	}
}

// pushed tells whether the guest hears of changes.
func (fs *FS) pushed() bool {
	return (fs.c.Dirs != nil || fs.caching.watched.Load()) && fs.caching.told.Load()
}

// life is for how long the guest may cache an entry of parent, and the attributes of what it leads to, which st describes. nil: of no entry.
func (fs *FS) life(r *request, parent, n *node, st *unix.Statx_t) (entry, attr time.Duration) {
	switch {
	case fs.c.Cache == CacheNone:
		return 0, 0
	case fs.c.Writeback && n.typ == unix.S_IFREG:
		return longTTL * time.Second, fs.c.TTL // its blocks, once they are written
	case fs.c.Cache == CacheAlways:
		return longTTL * time.Second, longTTL * time.Second
	case !fs.pushed():
		return fs.c.TTL, fs.c.TTL
	case r.seq != fs.caching.seq.Load():
		return 0, 0 // it may be old already
	case n.typ == unix.S_IFDIR && !fs.expires():
		_, attr = fs.watchedLife(r, parent, n, st)
		return min(fs.c.TTL, attr), attr // its name could not be told to be asked again
	}
	return fs.watchedLife(r, parent, n, st)
}

// watchedLife is life where the guest is told of what is watched.
func (fs *FS) watchedLife(r *request, parent, n *node, st *unix.Statx_t) (entry, attr time.Duration) {
	switch {
	case fs.c.Dirs != nil:
		return fs.dirLife(r, parent, n, st)
	case n.key.dev != fs.root.key.dev || n.key.mnt != fs.root.key.mnt:
		return fs.c.TTL, fs.c.TTL // submounts are not watched
	case st.Nlink > 1 && n.typ != unix.S_IFDIR:
		return longTTL * time.Second, fs.c.TTL // it may be changed by a name outside of the export
	}
	return longTTL * time.Second, longTTL * time.Second
}

// openFlags are those of the reply to an OPEN of n, whose state is st now.
func (fs *FS) openFlags(n *node, st *unix.Statx_t) uint32 {
	switch fs.c.Cache {
	case CacheNone:
		return fuse.FOPEN_DIRECT_IO
	case CacheAlways:
		return fuse.FOPEN_KEEP_CACHE
	}
	if !fs.pushed() {
		return 0
	}
	now := stamp(st)
	if was := n.stamp.Swap(now); was == now || was == ownStamp {
		return fuse.FOPEN_KEEP_CACHE
	}
	return 0 // it was changed, and nobody told: through a mapping, or the telling is on its way
}

// ownStamp is the stamp of a file that the guest itself has changed since.
const ownStamp = 1

// stamp is a mark of a state of a file's data, and not 0 or ownStamp.
func stamp(st *unix.Statx_t) uint64 {
	h := st.Size*0x9e3779b97f4a7c15 ^ uint64(st.Mtime.Sec)*0xff51afd7ed558ccd ^ uint64(st.Mtime.Nsec)*0xc4ceb9fe1a85ec53 ^ uint64(st.Ctime.Sec)<<32 ^ uint64(st.Ctime.Nsec)
	return h | 2
}

// Changed tells of changes on the host that are not this guest's own. It does not wait.
func (fs *FS) Changed(changes []watch.Change) {
	if fs.c.Cache != CacheCoherent {
		return
	}
	// Before the nodes are looked for: who enters one later sees that something has changed.
	fs.caching.seq.Add(1)
	for i := range changes {
		c := &changes[i]
		if c.Op&watch.Lost != 0 {
			fs.distrust()
			continue
		}
		fs.mu.Lock()
		k := change{op: c.Op, name: c.Name, newName: c.NewName, mode: c.Mode, dir: fs.idOf(c.Dir), newDir: fs.idOf(c.NewDir), node: fs.idOf(c.Inode)}
		fs.mu.Unlock()
		k.strange = k.node == 0 && c.Inode.Ino != 0
		if fs.c.Dirs != nil && fs.comesTwice(&k) {
			continue // once is enough
		}
		if k.dir != 0 || k.newDir != 0 || k.node != 0 {
			fs.caching.add(k)
		}
	}
}

// settleTime is how long after a change of the guest's own it may be told to ask again what it has changed.
const settleTime = 100 * time.Millisecond

// settle has the guest's kernel ask for the attributes of a node again, a moment after it has changed it by names in a directory, or by writing
// back pages of a mapping. After any other change it does not believe a reply to a request that began before; these do not raise the version that it tells that by
// (fuse_dir_changed and fuse_writepage_end in fs/fuse), so that it may believe old times as long as they live.
func (fs *FS) settle(id uint64) {
	if fs.c.Cache == CacheNone {
		return
	}
	c := &fs.caching
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil || c.closed {
		return
	}
	if len(c.unsettled) == 0 {
		c.unsettled = map[uint64]struct{}{}
		time.AfterFunc(settleTime, fs.settled)
	}
	c.unsettled[id] = struct{}{}
}

// settled tells what settle was asked to tell.
func (fs *FS) settled() {
	c := &fs.caching
	c.mu.Lock()
	nodes := c.unsettled
	c.unsettled = nil
	c.mu.Unlock()
	for id := range nodes {
		c.add(change{op: watch.Attrib, node: id, quiet: true})
	}
}

// idOf needs FS.mu.
func (fs *FS) idOf(i watch.Inode) uint64 {
	if n := fs.keys[key{i.Dev, i.Ino, fs.root.key.mnt}]; n != nil && i.Ino != 0 {
		return n.id
	}
	return 0
}

// add queues a change, unless the like of it waits already.
func (c *caching) add(k change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil || c.closed || c.lost {
		return // who opens a channel believes nothing of before
	}
	if len(c.queue) == maxQueue {
		c.queue, c.lost = nil, true
		c.wake.Signal()
		return
	}
	c.queue = withChange(c.queue, &k)
	if len(c.queue) == 1 {
		c.wake.Signal()
	}
}

// distrust has the guest told to believe nothing that it has cached.
func (fs *FS) distrust() {
	fs.caching.seq.Add(1)
	c := &fs.caching
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue, c.lost = nil, true
	c.wake.Signal()
}

// beginTelling starts the goroutine that tells. It needs c.mu.
func (fs *FS) beginTelling() {
	c := &fs.caching
	if c.done == nil && !c.closed {
		c.done = make(chan struct{})
		go fs.tell()
	}
}

func (c *caching) close() {
	c.mu.Lock()
	c.closed = true
	done := c.done
	if c.notify != nil {
		c.notify.conn.Close()
	}
	c.wake.Broadcast()
	c.mu.Unlock()
	if done != nil {
		<-done
	}
}

// tell tells the guest what comes, until the mount ends: first what is not true any more, and then, if there is somebody to act, what
// inotify is to show. To act takes longer, so that what has come meanwhile is told between two calls.
func (fs *FS) tell() {
	c := &fs.caching
	defer close(c.done)
	var acts []change
	sure := 0 // for how many more somebody is believed to watch
	for {
		c.mu.Lock()
		for !c.closed && (len(c.queue) == 0 && !c.lost && len(acts) == 0 && (c.absences.old == nil || c.notify == nil) || c.notify == nil && c.actor == nil) {
			c.wake.Wait()
		}
		if c.closed {
			c.mu.Unlock()
			return
		}
		batch, lost, n, a := c.queue, c.lost, c.notify, c.actor
		c.queue, c.lost = nil, false
		var absent map[entryKey]struct{}
		if n != nil {
			absent, c.absences.old = c.absences.old, nil
		}
		c.mu.Unlock()
		fs.tellAbsent(absent, n)
		if lost {
			fs.tellAll(n)
			acts = nil
			continue
		}
		fs.tellSome(batch, n)
		if a == nil {
			acts = nil
			continue
		}
		for i := range batch {
			k := &batch[i]
			k.exchange = i+1 < len(batch) && k.undoneBy(&batch[i+1]) || i > 0 && k.undoneBy(&batch[i-1])
			if !k.quiet {
				acts = withChange(acts, k)
			}
		}
		if len(acts) >= manyActs && sure == 0 {
			if fs.watched(a) {
				sure = maxSure
			} else {
				acts = nil
			}
		}
		if len(acts) > maxQueue {
			fs.log.Warn("inotify in the guest does not show everything: more changes on the host than the guest can act", "lost", len(acts))
			acts = nil
		}
		if len(acts) > 0 {
			fs.act(a, n, &acts[0])
			acts = acts[1:]
			sure = max(0, sure-1)
		}
	}
}

const (
	// manyActs is how many changes have to wait to be acted before the guest is asked whether anybody is there to see them. It looks at all its processes
	// for that, which takes as long as to act about as many.
	manyActs = 32
	// maxSure is for how many it is not asked again.
	maxSure = 1024
)

// watched tells whether somebody in the guest would see what is acted. Who begins to watch later is not to see what was before.
func (fs *FS) watched(a Actor) bool { return a.Plain() || a.Act(Act{Op: ActWatched}) != unix.ENODATA }

// withChange adds a change to a queue, unless the like of it waits already, and nothing about the same file has come since.
func withChange(queue []change, k *change) []change {
	if k.op&^(watch.Modify|watch.Attrib|watch.CloseWrite|watch.IsDir) == 0 {
		for i := len(queue) - 1; i >= max(0, len(queue)-maxBatch); i-- {
			if queue[i] == *k {
				return queue
			}
			if queue[i].about(k) {
				break
			}
		}
	}
	return append(queue, *k)
}

// about tells whether k may be about the same file as o.
func (k *change) about(o *change) bool {
	return k.node == o.node && k.node != 0 || k.dir == o.dir && k.name == o.name || k.newDir == o.dir && k.newName == o.name
}

// maxBatch is how many changes are told at once, and looked at for the like of another one.
const maxBatch = 64

// tellSome tells of changes what is not true any more.
func (fs *FS) tellSome(batch []change, n *notifier) {
	for i := range batch {
		k := &batch[i]
		if k.op&(watch.Create|watch.Delete|watch.Rename) != 0 {
			n.inode(k.dir, true)
			if k.op&(watch.Delete|watch.Rename) == 0 && k.op&watch.IsDir != 0 && fs.isUnder(k.node, k.dir, k.name) {
				k.quiet = true // the guest has looked already, and may have mounted something there
			} else if fs.believes(k) {
				n.entry(k.dir, k.name)
			}
		}
		if k.op&watch.Rename != 0 {
			n.inode(k.newDir, true)
			n.entry(k.newDir, k.newName)
			fs.renamed(k, true)
		}
		n.inode(k.node, k.op&watch.Modify != 0)
		n.flushAt(fs, maxBatch)
	}
	n.flush(fs)
	// Only now the guest does not believe in the old names any more (lastSeen).
	for i := range batch {
		if batch[i].op&watch.Rename != 0 {
			fs.renamed(&batch[i], false)
		}
	}
}

// believes tells whether the guest may believe anything about the name that a change is about. Most that is made on the host it has never heard of. What is moved
// may have taken the place of something that it has.
func (fs *FS) believes(k *change) bool {
	if !k.strange || k.op&(watch.Rename|watch.Arrived) != 0 || fs.caching.believesAbsent(entryKey{k.dir, k.name}) {
		return true
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir := fs.nodes[k.dir]
	return dir != nil && fs.places[place{dir, k.name}] != nil // whoever has its number by now
}

// isUnder tells whether a node was last seen under that name, and still is: the host may have given its number to another.
func (fs *FS) isUnder(id, dir uint64, name string) bool {
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil || n.parent == nil || n.parent.id != dir || n.name != name {
		fs.mu.Unlock()
		return false
	}
	n.pins++
	fs.mu.Unlock()
	var st unix.Statx_t
	e := fs.stat(n, &st)
	fs.mu.Lock()
	n.pins--
	fs.unref(n)
	fs.unlock()
	return e == 0 && st.Nlink > 0
}

// undoneBy tells whether o is a rename the other way round.
func (k *change) undoneBy(o *change) bool {
	return k.op&watch.Rename != 0 && o.op&watch.Rename != 0 && k.dir == o.newDir && k.newDir == o.dir && k.name == o.newName && k.newName == o.name
}

// renamed notes where a node is that the host has renamed, unless it was seen elsewhere than under the old name since. early: only
// if it is found by its name alone, and could not be until the guest has been told.
func (fs *FS) renamed(k *change, early bool) {
	fs.mu.Lock()
	n, to := fs.nodes[k.node], fs.nodes[k.newDir]
	since := n != nil && n.parent != nil && k.dir != 0 && (n.parent.id != k.dir || n.name != k.name)
	if n != nil && n != fs.root && !since && !(early && n.handle != "") && (n.parent != to || n.name != k.newName) {
		fs.move(n, to, k.newName)
	}
	fs.unlock()
}

// tellAll tells the guest to believe nothing that it has cached.
func (fs *FS) tellAll(n *notifier) {
	if n == nil {
		return
	}
	expires := fs.expires()
	type name struct {
		id, dir uint64
		name    string
	}
	fs.mu.Lock()
	names := make([]name, 0, len(fs.nodes))
	for id, x := range fs.nodes {
		k := name{id: id}
		if x.parent != nil && (expires || x.typ != unix.S_IFDIR) {
			k.dir, k.name = x.parent.id, x.name
		}
		names = append(names, k)
	}
	fs.mu.Unlock()
	for _, k := range names {
		n.inode(k.id, true)
		if expires {
			n.name(k.dir, k.name, fuse.EXPIRE_ONLY)
		} else {
			n.entry(k.dir, k.name)
		}
		n.flushAt(fs, maxBatch)
	}
	c := &fs.caching
	c.mu.Lock()
	absent := maps.Clone(c.absences.now)
	before := c.absences.before // which is not written to any more
	c.mu.Unlock()
	fs.tellAbsent(absent, n)
	fs.tellAbsent(before, n)
	c.mu.Lock()
	defer c.mu.Unlock()
	// A reply that was on its way may have given a name new life: once more, when it has arrived.
	if c.again = !c.again; c.again && !c.closed {
		time.AfterFunc(time.Second, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.lost = true
			c.wake.Signal()
		})
	}
}

// expires tells whether the guest's kernel can be told to ask again what a name leads to, without forgetting it (Linux 6.2). To forget the
// name of a directory takes away what is mounted there.
func (fs *FS) expires() bool {
	s := fs.session.Load()
	return s != nil && s.has(fuse.HAS_EXPIRE_ONLY)
}

// heard tells whether anybody is to hear of changes.
func (fs *FS) heard() bool { return fs.c.Changed != nil && (fs.c.Heard == nil || fs.c.Heard()) }

// report tells of a change that the guest has made, to whom it may concern.
func (fs *FS) report(op watch.Op, dir *node, name cname, n *node) {
	if fs.c.Dirs != nil {
		dir.told.Store(0)
		if n != nil && op&watch.Delete != 0 {
			n.told.Store(0)
		}
	}
	if !fs.heard() {
		return
	}
	c := watch.Change{Op: op}
	if dir != nil {
		c.Dir, c.Name = dir.inode(), name.String()
	}
	if n != nil {
		c.Inode, c.Mode = n.inode(), n.typ
		if n.typ == unix.S_IFDIR {
			c.Op |= watch.IsDir
		}
	}
	fs.c.Changed(c)
}

// reportFile is report of a file's data or attributes, by the name under which it was last seen.
func (fs *FS) reportFile(op watch.Op, n *node) {
	if op&watch.Modify != 0 && n.stamp.Load() != ownStamp {
		n.stamp.Store(ownStamp)
	}
	if fs.c.Dirs != nil && op != watch.CloseWrite {
		n.told.Store(0)
	}
	if !fs.heard() {
		return
	}
	c := watch.Change{Op: op, Inode: n.inode(), Mode: n.typ}
	if n.typ == unix.S_IFDIR {
		c.Op |= watch.IsDir
	}
	fs.mu.Lock()
	if n.parent != nil {
		c.Dir, c.Name = n.parent.inode(), n.name
	}
	fs.mu.Unlock()
	fs.c.Changed(c)
}

func (n *node) inode() watch.Inode { return watch.Inode{Dev: n.key.dev, Ino: n.key.ino} }
