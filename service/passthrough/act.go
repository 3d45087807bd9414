// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math/rand/v2"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// Actor makes system calls in the guest, which change nothing: what they ask of us is answered as they want it, so that
// the guest's inotify shows what has happened on the host.
type Actor interface {
	// Thread is the id of the thread that makes the calls, as requests have it.
	Thread() uint32
	// Plain tells that it knows no rename, no close-write and no node but a regular file, can't tell the errno of a call, and follows
	// paths wherever they lead.
	Plain() bool
	// Act has one call made, and returns its errno when it is done, 0 if that is Plain; EPIPE when it will never be known to be.
	Act(Act) fuse.Errno
}

// Act is a call. Paths are relative to the mount's root.
type Act struct {
	Op            ActOp
	Mode          uint32 // of the file on the host, its type included
	Path, NewPath string
}

// ActOp is the kind of a call.
type ActOp int

// The calls.
const (
	ActRmdir ActOp = iota
	ActUnlink
	ActMkdir
	ActSymlink
	ActTruncate
	ActChmod
	ActMknod
	ActRename
	ActCloseWrite
	ActWatched // none: ENODATA if nobody in the guest would see one
)

// Act has the changes that come acted by a from now on; nil: by nobody.
func (fs *FS) Act(a Actor) {
	c := &fs.caching
	c.mu.Lock()
	defer c.mu.Unlock()
	c.actor = a
	if a != nil {
		fs.beginTelling()
		c.wake.Signal()
	}
}

// acting is a call under way: which requests of its thread are part of it. Others of that thread that would change something are
// refused: the guest's names may be others than we think, and the call must not be made for real.
type acting struct {
	thread      uint32
	op          ActOp
	dir, newDir uint64 // nodes
	name        string
	newName     string
	node        uint64 // of the file; 0: the guest does not know it, or it is gone
	typ         uint32 // of the file, S_IFMT bits
	gone        bool   // it has no name any more
	isDir       bool
	exchange    bool // what is under the new name goes to the old one
	plain       bool // by an Actor that is Plain
	probe       bool // there is nothing of that name

	looked, newLooked atomic.Bool // the guest has asked what the names are, and so has what it was told
	done              atomic.Bool // what the call comes to was answered with success
	seen              atomic.Pointer[seen]
}

// seen is a node as it was when a call looked for it: it may lose the name before the call is made.
type seen struct {
	id uint64
	st unix.Statx_t
}

// overdue are calls of which nobody knows any more whether they were made: their channel has ended. They may still come, and are
// refused then. A thread's id may be another's by that time, so what it asks has to be what the call would.
type overdue struct {
	n     atomic.Int32
	mu    sync.Mutex
	calls []*acting
}

// maxOverdue is how many are known. Each has cost the guest an event channel.
const maxOverdue = 256

func (o *overdue) add(x *acting) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.calls) == maxOverdue {
		o.calls = o.calls[1:]
	}
	o.calls = append(o.calls, x)
	o.n.Store(int32(len(o.calls)))
}

// has tells whether r is of an overdue call.
func (o *overdue) has(r *request) bool {
	if o.n.Load() == 0 {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.calls {
		if x.thread == r.hdr.PID && x.asks(r) {
			return true
		}
	}
	return false
}

// asks tells whether r is what the call comes to.
func (x *acting) asks(r *request) bool {
	body := r.body
	defer func() { r.body = body }()
	switch op := r.hdr.Opcode; op {
	case fuse.OpMknod:
		return x.op == ActMknod && decode(r, &fuse.MknodIn{}) && x.at(r)
	case fuse.OpMkdir:
		return x.op == ActMkdir && decode(r, &fuse.MkdirIn{}) && x.at(r)
	case fuse.OpSymlink:
		return x.op == ActSymlink && x.at(r)
	case fuse.OpUnlink:
		return x.op == ActUnlink && x.at(r)
	case fuse.OpRmdir:
		return x.op == ActRmdir && x.at(r)
	case fuse.OpRename, fuse.OpRename2:
		var in fuse.Rename2In
		if op == fuse.OpRename {
			var old fuse.RenameIn
			if !decode(r, &old) {
				return false
			}
			in.Newdir = old.Newdir
		} else if !decode(r, &in) {
			return false
		}
		if x.op != ActRename || in.Newdir != x.newDir || !x.at(r) {
			return false
		}
		c, e := r.name()
		return e == 0 && c.is(x.newName)
	case fuse.OpSetattr:
		var in fuse.SetattrIn
		return decode(r, &in) && (x.op == ActTruncate && in.Valid&fuse.FATTR_SIZE != 0 && in.Size == 0 || x.op == ActChmod && in.Valid&fuse.FATTR_MODE != 0) &&
			in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID) == 0
	case fuse.OpOpen:
		return x.op == ActCloseWrite
	case fuse.OpReadlink:
		return x.plain
	}
	return false
}

// at takes a name from the body, and tells whether it is the call's.
func (x *acting) at(r *request) bool {
	c, e := r.name()
	return e == 0 && r.hdr.NodeID == x.dir && c.is(x.name)
}

// act has a change acted. What the guest does not do it has been told of all the same.
func (fs *FS) act(a Actor, n *notifier, k *change) {
	typ := k.mode & unix.S_IFMT // 0: it is gone
	switch {
	case k.op&watch.Rename == 0 || k.dir == 0 || k.newDir == 0:
	case a.Plain(): // one name goes, and another comes
		fs.actRemove(a, n, k)
		to := *k
		to.dir, to.name = k.newDir, k.newName
		fs.actOne(a, n, creates(k), &to)
	default:
		fs.actOne(a, n, ActRename, k)
	}
	remove := k.op&watch.Delete != 0 && k.dir != 0
	// It was made again, or what was done to it was before; on its own a removal comes at either place.
	first := remove && typ != 0 && k.op&watch.Create != 0 && fs.isThere(k.dir, k.name)
	if first {
		fs.actRemove(a, n, k)
	}
	if k.op&watch.Create != 0 && k.dir != 0 {
		fs.actOne(a, n, creates(k), k)
	}
	isFile := typ == unix.S_IFREG || typ == 0 && k.dir != 0 && k.op&watch.IsDir == 0
	if k.op&watch.Modify != 0 && isFile {
		fs.actOne(a, n, ActTruncate, k)
	}
	if k.op&watch.Attrib != 0 && (isFile || typ == unix.S_IFDIR) {
		fs.actOne(a, n, ActChmod, k)
	}
	if k.op&watch.CloseWrite != 0 && isFile && !a.Plain() {
		fs.actOne(a, n, ActCloseWrite, k)
	}
	if remove && !first {
		fs.actRemove(a, n, k)
	}
}

// isThere tells whether the host has a name.
func (fs *FS) isThere(dir uint64, name string) bool {
	fs.mu.Lock()
	n := fs.nodes[dir]
	if n == nil {
		fs.mu.Unlock()
		return false
	}
	n.pins++
	fs.mu.Unlock()
	fd, e := n.path()
	if e == 0 {
		var b nameBuf
		var st unix.Statx_t
		e = statxAt(fd, b.set(name), &st)
	}
	fs.mu.Lock()
	n.pins--
	fs.unref(n)
	fs.unlock()
	return e == 0
}

func (fs *FS) actRemove(a Actor, n *notifier, k *change) {
	op := ActUnlink
	if k.op&watch.IsDir != 0 {
		op = ActRmdir
	}
	fs.actOne(a, n, op, k)
}

func creates(k *change) ActOp {
	switch k.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return ActMkdir
	case unix.S_IFLNK:
		return ActSymlink
	case 0:
		if k.op&watch.IsDir != 0 {
			return ActMkdir
		}
	}
	return ActMknod
}

func (fs *FS) actOne(a Actor, n *notifier, op ActOp, k *change) {
	act := Act{Op: op, Mode: k.mode}
	var ok, newOK bool
	plain := a.Plain()
	fs.mu.Lock()
	act.Path, ok = fs.pathOf(k.dir, k.name, k.node)
	// The directory that the call is made in, or on.
	dir, dirPath := k.dir, strings.TrimPrefix(path.Dir("/"+act.Path), "/")
	if on := fs.nodes[k.node]; on != nil && op == ActChmod && on.typ == unix.S_IFDIR {
		dir, dirPath = k.node, act.Path
	} else if fs.nodes[dir] == nil && on != nil && on.parent != nil {
		dir = on.parent.id
	}
	if op == ActRename {
		act.NewPath, newOK = fs.pathOf(k.newDir, k.newName, 0)
		ok = ok && newOK
	}
	fs.mu.Unlock()
	if !ok || plain && !fs.leads(a, dir, dirPath) {
		return
	}
	for again := range 2 {
		x := &acting{thread: a.Thread(), op: op, dir: k.dir, name: k.name, newDir: k.newDir, newName: k.newName, node: k.node,
			isDir: k.op&watch.IsDir != 0, exchange: k.exchange, typ: k.mode & unix.S_IFMT, gone: k.mode == 0, plain: plain}
		switch {
		case plain && op == ActMknod:
			x.typ = unix.S_IFREG // what it is the guest hears when it asks
		case x.typ != 0:
		case x.isDir:
			x.typ = unix.S_IFDIR
		default:
			x.typ = unix.S_IFREG
		}
		fs.acting.Store(x)
		e := a.Act(act)
		if e == unix.EPIPE {
			fs.overdue.add(x) // before it is not acting any more
		}
		fs.acting.Store(nil)
		if plain && e == 0 && !x.done.Load() {
			e = unix.ENOENT // most likely
		}
		if e != unix.ENOENT && e != unix.ESTALE || again > 0 || n == nil || x.looked.Load() {
			return
		}
		// Somebody in the guest has looked for the name meanwhile, and the kernel believes that there is none, or what is not there now.
		n.entry(k.dir, k.name)
		n.flush(fs)
	}
}

// ProbeName begins the names of which a Plain actor is asked, to see where its paths lead. There are no such files.
const ProbeName = ".transfuse-probe-"

// probeAge is for how long it is believed where a path leads.
const probeAge = time.Second

// leads tells whether a directory's path leads to it when a plain actor follows it: in the guest something may be mounted on the way, or the
// mount be gone from there, and the call would be made for real on a file of the guest's own. A name that is not there can't be removed
// anywhere, but here it is asked for first.
func (fs *FS) leads(a Actor, dir uint64, dirPath string) bool {
	l := &fs.caching.led
	if l.dir == dir && l.path == dirPath && time.Since(l.at) < probeAge {
		return true
	}
	l.at = time.Time{}
	name := ProbeName + strconv.FormatUint(rand.Uint64(), 36)
	x := &acting{thread: a.Thread(), op: ActUnlink, dir: dir, name: name, plain: true, probe: true}
	fs.acting.Store(x)
	e := a.Act(Act{Op: ActUnlink, Path: path.Join(dirPath, name)})
	if e == unix.EPIPE {
		fs.overdue.add(x)
	}
	fs.acting.Store(nil)
	if e != 0 {
		return false
	}
	if !x.looked.Load() {
		if !x.newLooked.Load() && !l.warned && fs.isThere(dir, ".") {
			l.warned = true
			fs.log.Warn("inotify in the guest does not show all changes: the path of a directory leads elsewhere there, since something else is mounted on it or on the way to it", "path", "/"+dirPath)
		}
		return false
	}
	l.dir, l.path, l.at = dir, dirPath, time.Now()
	return true
}

// led is the directory that a plain actor's path led to last.
type led struct {
	dir    uint64
	path   string
	at     time.Time
	warned bool // that one did not lead there
}

// pathOf is the guest's path of a name in a directory, or of a node. It needs FS.mu.
func (fs *FS) pathOf(dir uint64, name string, node uint64) (string, bool) {
	var parts []string
	n := fs.nodes[dir]
	if n == nil {
		n = fs.nodes[node]
	} else {
		parts = append(parts, name)
	}
	for range maxDepth {
		if n == nil {
			return "", false
		}
		if n == fs.root {
			for i, j := 0, len(parts)-1; i < j; i, j = i+1, j-1 {
				parts[i], parts[j] = parts[j], parts[i]
			}
			return strings.Join(parts, "/"), true
		}
		parts = append(parts, n.name)
		n = n.parent
	}
	return "", false
}

// serve answers a request of the call's thread. False: it is not for us.
//
// What a name that goes or moves leads to is asked by the kernel only if it does not believe to know it. But what it knows may be of before
// or of later, and then another file would go; a directory that went so can't be used any more, although it is there. So a call is
// not done before the kernel has asked: after ESTALE it asks, and holds the names until the call is done.
func (x *acting) serve(r *request) (fuse.Errno, bool) {
	switch {
	case r.hdr.Opcode == fuse.OpLookup:
		return x.lookup(r)
	case x.plain && r.hdr.Opcode == fuse.OpReadlink:
		return unix.ELOOP, true // it would go out of the mount by it
	}
	if !x.asks(r) {
		var in fuse.OpenIn
		body := r.body
		opens := r.hdr.Opcode == fuse.OpOpen && decode(r, &in) && in.Flags&(unix.O_ACCMODE|unix.O_TRUNC) != 0
		r.body = body
		if opens || ops[r.hdr.Opcode].writes {
			return unix.ESTALE, true
		}
		return 0, false
	}
	e := x.answerCall(r)
	if e == 0 {
		x.done.Store(true)
	}
	return e, true
}

// answerCall answers the request that the call comes to.
func (x *acting) answerCall(r *request) fuse.Errno {
	fs := r.fs
	switch x.op {
	case ActMknod, ActMkdir, ActSymlink:
		parent, dir, e := r.dir(x.dir)
		if e != 0 {
			return e
		}
		var b nameBuf
		var st unix.Statx_t
		name := b.set(x.name)
		if statxAt(dir, name, &st) == 0 && uint32(st.Mode)&unix.S_IFMT == x.typ {
			return r.entryOf(parent, name, &st)
		}
		return x.unknown(r) // it is gone again, or another
	case ActUnlink, ActRmdir:
		if !x.looked.Load() {
			return unix.ESTALE
		}
		return 0
	case ActRename:
		if !x.looked.Load() || !x.newLooked.Load() {
			return unix.ESTALE
		}
		fs.renamed(&change{node: x.node, newDir: x.newDir, newName: x.newName}, false)
		return 0
	case ActCloseWrite:
		fs.actedOpen.Store(true)
		return reply(r, &fuse.OpenOut{Fh: actedFh, OpenFlags: fuse.FOPEN_KEEP_CACHE})
	}
	n, e := r.self()
	var st unix.Statx_t
	if e != 0 {
		return e
	}
	if e := fs.stat(n, &st); e != 0 {
		was := x.seen.Load()
		if was == nil || was.id != n.id {
			return e
		}
		out := fuse.AttrOut{} // for no time
		fs.setAttr(&out.Attr, n.ino, &was.st)
		return reply(r, &out)
	}
	return r.attrReply(n, &st)
}

// lookup answers a LOOKUP of the call's names.
func (x *acting) lookup(r *request) (fuse.Errno, bool) {
	body := r.body
	defer func() { r.body = body }()
	c, e := r.name()
	switch {
	case e != 0:
	case x.op == ActRename && r.hdr.NodeID == x.newDir && c.is(x.newName):
		x.newLooked.Store(true)
		if x.isDir || x.exchange {
			return unix.ENOENT, true
		}
		if n, st := x.victim(r, x.newDir, c); n != nil && n.id != x.node {
			return x.answer(r, n, st), true // who watches the file that is replaced hears that it goes
		}
		return unix.ENOENT, true
	case x.probe && c.is(x.name):
		x.looked.Store(r.hdr.NodeID == x.dir)
		x.newLooked.Store(true)
		return unix.ENOENT, true
	case r.hdr.NodeID != x.dir || !c.is(x.name):
	case x.op == ActUnlink || x.op == ActRmdir:
		x.looked.Store(true)
		if n, st := x.victim(r, x.dir, c); n != nil {
			return x.answer(r, n, st), true
		}
		return x.unknown(r), true
	case x.op == ActRename:
		x.looked.Store(true)
		return x.moved(r), true
	case x.op == ActMknod || x.op == ActMkdir || x.op == ActSymlink:
		return unix.ENOENT, true
	default: // what is done to a file that has no such name any more is shown by the name that it had
		x.looked.Store(true)
		parent, dir, e := r.dir(x.dir)
		if e != 0 {
			return e, true
		}
		var st unix.Statx_t
		if statxAt(dir, c, &st) != 0 {
			return x.unknown(r), true
		}
		if e = r.entryOf(parent, c, &st); e == 0 {
			var out fuse.EntryOut
			fuse.Decode(&out, r.out[fuse.OutHeaderSize:])
			x.seen.Store(&seen{out.NodeID, st})
		}
		return e, true
	}
	return 0, false
}

// actedFh is the handle of a file that was opened to be closed. No other has it. What closes it carries no thread.
const actedFh = 1<<64 - 1

// victim finds the node that has lost a name, and what it is: the one that the change told, or else the last that was seen under the
// name and is not there now. It is pinned. nil: the guest does not know one.
func (x *acting) victim(r *request, dirID uint64, name cname) (*node, *unix.Statx_t) {
	fs := r.fs
	told := uint64(0)
	if x.op != ActRename {
		told = x.node
	}
	var now, st unix.Statx_t
	parent, dir, e := r.dir(dirID)
	if e != 0 {
		return nil, nil
	}
	there := statxAt(dir, name, &now) == 0
	fs.mu.Lock()
	n := fs.nodes[told]
	if n == nil {
		for n = fs.places[place{parent, name.String()}]; n != nil && (there && n.is(&now) || (n.typ == unix.S_IFDIR) != x.isDir); {
			n = n.before
		}
	}
	if n == nil {
		fs.mu.Unlock()
		return nil, nil
	}
	n.pins++
	r.pinned[r.npinned] = n
	r.npinned++
	held := n.fd >= 0 || n.handle != ""
	fs.mu.Unlock()
	e = fs.stat(n, &st)
	if n.typ == unix.S_IFDIR && (!held || e == 0 && st.Nlink > 0) {
		return nil, nil // perhaps it has only moved, and it would be dead in the guest
	}
	if e == 0 {
		st.Nlink++ // the kernel takes one away
	} else if told != 0 && !x.gone {
		return nil, nil // it has other names, or is in use; we can't tell what it is
	} else {
		st = unix.Statx_t{Mode: uint16(n.typ | 0o600), Nlink: 1}
	}
	return n, &st
}

// moved answers the LOOKUP of a name that is about to become another.
func (x *acting) moved(r *request) fuse.Errno {
	fs := r.fs
	n, e := r.node(x.node)
	if e != 0 {
		return x.unknown(r)
	}
	fs.renamed(&change{node: x.node, newDir: x.newDir, newName: x.newName}, false) // where it is found now
	var st unix.Statx_t
	if e := fs.stat(n, &st); e != 0 {
		return unix.ENOENT // it is elsewhere by now
	}
	return x.answer(r, n, &st)
}

// answer tells what n is, for no time.
func (x *acting) answer(r *request, n *node, st *unix.Statx_t) fuse.Errno {
	r.fs.mu.Lock()
	n.nlookup++
	r.fs.mu.Unlock()
	out := fuse.EntryOut{NodeID: n.id}
	r.fs.setAttr(&out.Attr, n.ino, st)
	return reply(r, &out)
}

// unknown answers the LOOKUP of a name that the guest does not know, with a node that is of no use.
func (x *acting) unknown(r *request) fuse.Errno {
	fs := r.fs
	if !take(&fs.limits.nodes, fs.limits.Nodes) {
		return unix.ENFILE
	}
	typ := x.typ
	st := unix.Statx_t{Mode: uint16(typ | 0o600), Nlink: 1}
	fs.mu.Lock()
	fs.lastID++
	n := &node{fs: fs, id: fs.lastID, typ: typ, ino: fs.lastID | 1<<63, fd: -1, removed: true, last: &st}
	fs.nodes[n.id] = n
	fs.mu.Unlock()
	return x.answer(r, n, &st)
}
