// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"errors"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/watch"
)

// DirWatches watches the directories that the guest of a session has looked into, for all its mounts that have it as Config.Dirs. It is
// for where the host's changes don't come otherwise: each directory costs a watch of the kernel's.
//
// A directory is watched before it is read for a reply that the guest may believe for long, until the guest forgets it. What is told:
//
//   - names in a directory that is watched, and the attributes of the files in it, may be believed for long;
//   - the attributes of a directory may be, once it is watched itself;
//   - of all else (the limit is reached, the file system tells nothing, the host has moved the file elsewhere) the guest asks after Config.TTL.
//
// The kernel does not say who made a change: see ownLog.
type DirWatches struct {
	log     *slog.Logger
	limited func(error)
	dirs    *watch.Dirs

	retry atomic.Int64 // time before which nothing is added, as there was no room; Unix time in ns
	told  atomic.Bool  // that there was no room

	// mu is held while a mount is told, so that it is not closed meanwhile.
	mu   sync.Mutex
	all  map[uint64]*FS // by number
	last uint64
}

const (
	// nodeBits are what a node's id has of the ids that watch.Dirs has; the number of its mount is above it.
	nodeBits = 40
	// limitWait is for how long no watch is tried to be had after there was none.
	limitWait = 10 * time.Second
	// never is the place of a directory that can't be watched.
	never = math.MaxUint64
)

// NewDirWatches makes a DirWatches; its error tells people why there is no inotify. limited is called once, when the kernel allows no
// more watches; nil: it is not. A nil log is none.
func NewDirWatches(log *slog.Logger, limited func(error)) (*DirWatches, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	w := &DirWatches{log: log, limited: limited, all: map[uint64]*FS{}}
	var err error
	if w.dirs, err = watch.NewDirs(log, w.changed); err != nil {
		return nil, err
	}
	return w, nil
}

// Close ends it. All mounts that have it are closed.
func (w *DirWatches) Close() { w.dirs.Close() }

// join gives a mount its number.
func (w *DirWatches) join(fs *FS) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	w.all[w.last] = fs
	return w.last
}

// leave ends what join began: the mount is told nothing more.
func (w *DirWatches) leave(fs *FS) {
	w.mu.Lock()
	delete(w.all, fs.dirs.number)
	w.mu.Unlock()
	var ids []uint64
	fs.mu.Lock()
	for id, n := range fs.nodes {
		if n.isWatched() {
			ids = append(ids, id)
		}
	}
	fs.mu.Unlock()
	for _, id := range ids {
		w.dirs.Remove(fs.dirs.number<<nodeBits | id)
	}
}

func (w *DirWatches) add(number, id uint64, fd int) error {
	if time.Now().UnixNano() < w.retry.Load() {
		return unix.ENOSPC
	}
	err := w.dirs.Add(fd, number<<nodeBits|id)
	if errors.Is(err, unix.ENOSPC) {
		w.retry.Store(time.Now().Add(limitWait).UnixNano())
		if !w.told.Swap(true) {
			w.log.Warn("no more directories can be watched: of the others the guest looks again after a second", "sysctl", "fs.inotify.max_user_watches", "error", err)
			if w.limited != nil {
				w.limited(err)
			}
		}
	}
	return err
}

// changed gives each mount what is its own.
func (w *DirWatches) changed(cs []watch.DirChange) {
	w.mu.Lock()
	defer w.mu.Unlock()
	const mask = 1<<nodeBits - 1
	for i := range cs {
		c := cs[i]
		if c.Op&watch.Lost != 0 {
			for _, fs := range w.all {
				fs.distrust()
			}
			continue
		}
		from, to := c.Dir>>nodeBits, c.NewDir>>nodeBits
		c.Dir, c.NewDir = c.Dir&mask, c.NewDir&mask
		if c.Op&watch.Rename != 0 && from != to { // each of two mounts has looked into one of the directories
			if fs := w.all[to]; fs != nil {
				fs.dirChanged(&watch.DirChange{Op: watch.Create | c.Op&watch.IsDir, Dir: c.NewDir, Name: c.NewName})
			}
			c = watch.DirChange{Op: watch.Delete | c.Op&watch.IsDir, Dir: c.Dir, Name: c.Name}
		}
		if fs := w.all[from]; fs != nil {
			fs.dirChanged(&c)
		}
	}
}

// dirs is what a mount with Config.Dirs keeps.
type dirs struct {
	number uint64 // of this mount
	count  atomic.Uint64
	own    ownLog

	// Guarded by FS.mu.

	types map[uint64]bool // by device: whether its file system tells what changes
	drop  []uint64        // nodes whose watches end at unlock
}

// entryKey is a name in a directory; of the directory itself if it is empty.
type entryKey struct {
	dir  uint64
	name string
}

func (n *node) isWatched() bool { w := n.watched.Load(); return w != 0 && w != never }

// watchDir sees to it that a directory, which the request has pinned, is watched, if that is of use. What the request reads afterwards
// it may tell for long. fd is of the directory; -1: it is opened if need be.
func (r *request) watchDir(n *node, fd int) {
	fs := r.fs
	w := fs.c.Dirs
	if w == nil || fs.c.Cache != CacheCoherent || !fs.pushed() {
		return
	}
	if n.watched.Load() == 0 {
		if fd < 0 {
			f, e := n.path()
			if e != 0 {
				return
			}
			fd = f
		}
		ok := fs.tells(n.key.dev, fd)
		if ok {
			switch err := w.add(fs.dirs.number, n.id, fd); {
			case err == nil:
				n.watched.CompareAndSwap(0, fs.dirs.count.Add(1))
			case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
				ok = false
			}
		}
		if !ok {
			n.watched.CompareAndSwap(0, never)
		}
	}
	r.watches = fs.dirs.count.Load()
}

// tells tells whether the file system that fd is of, on the device dev, tells what changes.
func (fs *FS) tells(dev uint64, fd int) bool {
	fs.mu.Lock()
	ok, known := fs.dirs.types[dev]
	fs.mu.Unlock()
	if known {
		return ok
	}
	err := watch.CheckFS(fd)
	if err != nil {
		fs.log.Warn("changes of a file system below the export can't be seen: the guest looks again after a second", "reason", err)
	}
	fs.mu.Lock()
	fs.dirs.types[dev] = err == nil
	fs.mu.Unlock()
	return err == nil
}

// covers tells whether a directory was watched before the request read what it is about to tell.
func (r *request) covers(dir *node) bool {
	if dir == nil {
		return false
	}
	w := dir.watched.Load()
	return w != 0 && w <= r.watches
}

// dirLife is life where directories are watched one by one.
func (fs *FS) dirLife(r *request, parent, n *node, st *unix.Statx_t) (entry, attr time.Duration) {
	entry, attr = fs.c.TTL, fs.c.TTL
	if r.covers(parent) {
		entry = longTTL * time.Second
	}
	if n.typ == unix.S_IFDIR {
		if r.covers(n) {
			attr = longTTL * time.Second
		}
	} else if st.Nlink == 1 {
		fs.mu.Lock()
		at, adrift := n.parent, n.adrift
		covered := !adrift && r.covers(at)
		fs.mu.Unlock()
		if covered {
			attr = longTTL * time.Second
		}
	}
	if attr == longTTL*time.Second {
		n.told.Store(stamp(st))
	} else {
		n.told.Store(0)
	}
	return entry, attr
}

// comesTwice tells whether a change comes by the watches too.
func (fs *FS) comesTwice(k *change) bool {
	if k.name == "" {
		return false
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir := fs.nodes[k.dir]
	if dir == nil || !dir.isWatched() {
		return false
	}
	if k.op&watch.Rename != 0 {
		to := fs.nodes[k.newDir]
		return to != nil && to.isWatched()
	}
	return true
}

// touches are changes of what a file is, not of its name.
const touches = watch.Modify | watch.Attrib | watch.CloseWrite

// dirChanged takes a change in a directory that is watched.
func (fs *FS) dirChanged(c *watch.DirChange) {
	own := &fs.dirs.own
	at := entryKey{c.Dir, c.Name}
	op := c.Op &^ watch.IsDir
	switch {
	case c.Name == "" && op&watch.Delete != 0:
		fs.dirGone(c.Dir)
		return
	case op&watch.Rename != 0:
		to := entryKey{c.NewDir, c.NewName}
		was, wait := own.match(at, watch.Delete)
		is, wait2 := own.match(to, watch.Create)
		if was|is == 0 {
			fs.foreign(c, op)
			return
		}
		if !wait {
			fs.check(at, look{op: watch.Delete})
		}
		if !wait2 {
			fs.check(to, look{op: watch.Create})
		}
		return
	}
	mine, wait := own.match(at, op)
	if op&^mine != 0 {
		fs.foreign(c, op&^mine)
	}
	if mine != 0 && !wait {
		fs.check(at, look{op: mine})
	}
}

// dirGone notes that a directory is watched no more, as it is gone.
func (fs *FS) dirGone(id uint64) {
	fs.caching.seq.Add(1)
	fs.mu.Lock()
	n := fs.nodes[id]
	if n != nil {
		n.watched.Store(0)
	}
	own := n == nil || n.removed
	fs.mu.Unlock()
	if !own {
		fs.caching.add(change{op: watch.Attrib, node: id, quiet: true})
	}
}

// foreign tells of a change, op of c, that is not this guest's own.
func (fs *FS) foreign(c *watch.DirChange, op watch.Op) {
	// Before the nodes are looked for, as in Changed.
	fs.caching.seq.Add(1)
	k := change{op: op | c.Op&watch.IsDir, dir: c.Dir, name: c.Name, newDir: c.NewDir, newName: c.NewName}
	if c.Name == "" {
		k.dir, k.node = 0, c.Dir
		fs.mu.Lock()
		if n := fs.nodes[c.Dir]; n != nil && (n.parent == nil || !n.parent.isWatched()) {
			k.mode = unix.S_IFDIR // else it is told by its name too, and acted then
		}
		fs.mu.Unlock()
		fs.caching.add(k)
		return
	}
	at := entryKey{c.Dir, c.Name}
	if op&watch.Rename != 0 {
		at = entryKey{c.NewDir, c.NewName}
	}
	var st unix.Statx_t
	there := fs.lookAt(at, &st)
	fs.mu.Lock()
	if there {
		k.mode = uint32(st.Mode)
		if n := fs.keys[keyOf(&st)]; n != nil && n.is(&st) {
			k.node = n.id
		}
	}
	if op&watch.Delete != 0 {
		if n := fs.seenAt(at); n != nil && n.id != k.node {
			n.adrift = true // perhaps it was moved to where nobody watches
			k.node = n.id
		}
	}
	fs.mu.Unlock()
	fs.caching.add(k)
}

// check sees to it that the guest believes what is true of a name that it has changed itself: another's change may be hidden behind its own.
// It is not acted.
func (fs *FS) check(at entryKey, k look) {
	for {
		state := fs.dirs.own.state()
		name, n := fs.wrong(at, k.op)
		if !name && n == nil {
			return
		}
		tell, retry := fs.dirs.own.wrong(at, k, state)
		if k.tries++; retry {
			continue
		}
		if tell {
			fs.caching.seq.Add(1)
			if name {
				fs.caching.add(change{op: watch.Create, dir: at.dir, name: at.name, quiet: true})
			}
			if n != nil {
				fs.caching.add(change{op: watch.Attrib, node: n.id, quiet: true})
			}
		}
		return
	}
}

// wrong tells what the guest may believe and is not so: what is under the name, and the attributes of n, if it is not nil.
func (fs *FS) wrong(at entryKey, op watch.Op) (name bool, n *node) {
	var st unix.Statx_t
	there := fs.lookAt(at, &st)
	fs.mu.Lock()
	if there {
		if n = fs.keys[keyOf(&st)]; n != nil && !n.is(&st) {
			n = nil
		}
	}
	known := fs.seenAt(at)
	fs.mu.Unlock()
	if op&(watch.Create|watch.Delete) != 0 && at.name != "" {
		name = there && (n == nil || n != known) || !there && known != nil
	}
	if n != nil {
		if told := n.told.Load(); op&touches == 0 || told == 0 || told == stamp(&st) {
			n = nil
		}
	}
	return name, n
}

// lookAt looks what is under a name now.
func (fs *FS) lookAt(at entryKey, st *unix.Statx_t) bool {
	fs.mu.Lock()
	dir := fs.nodes[at.dir]
	if dir == nil {
		fs.mu.Unlock()
		return false
	}
	dir.pins++
	fs.mu.Unlock()
	fd, e := dir.path()
	if e == 0 {
		if at.name == "" {
			e = statx(fd, emptyName, unix.AT_EMPTY_PATH, st)
		} else {
			var b nameBuf
			e = statxAt(fd, b.set(at.name), st)
		}
	}
	fs.mu.Lock()
	dir.pins--
	fs.unref(dir)
	fs.unlock()
	return e == 0 && fs.visible(st)
}

// seenAt is who was seen last under a name, and not seen to go. It needs FS.mu.
func (fs *FS) seenAt(at entryKey) *node {
	dir := fs.nodes[at.dir]
	if dir == nil {
		return nil
	}
	n := fs.places[place{dir, at.name}]
	for n != nil && n.adrift {
		n = n.before
	}
	return n
}
