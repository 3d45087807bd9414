// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"strings"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// Actor makes system calls in the guest, which change nothing: what they ask of us is answered as they want it, so that
// the guest's inotify shows what has happened on the host.
type Actor interface {
	// Thread is the id of the thread that makes the calls, as requests have it.
	Thread() uint32
	// Act has one call made, and returns its errno when it is done.
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

// acting is a call under way: which requests of its thread are part of it. What else that thread asks is served as any other's.
type acting struct {
	thread      uint32
	op          ActOp
	dir, newDir uint64 // nodes
	name        string
	newName     string
	node        uint64 // of the file; 0: the guest does not know it
	isDir       bool
}

// act has a change acted. False: the guest's kernel has not seen it all.
func (fs *FS) act(a Actor, k *change) bool {
	typ := k.mode & unix.S_IFMT // 0: it is gone
	done := true
	if k.op&watch.Rename != 0 {
		done = k.dir != 0 && k.newDir != 0 && fs.actOne(a, ActRename, k)
	}
	if k.op&watch.Delete != 0 {
		op := ActUnlink
		if k.op&watch.IsDir != 0 {
			op = ActRmdir
		}
		done = k.dir != 0 && fs.actOne(a, op, k) && done
	}
	// What was made and removed at once is gone, or was made again.
	if k.op&watch.Create != 0 && k.dir != 0 && typ != 0 {
		fs.actOne(a, creates(k), k)
	}
	if k.op&watch.Modify != 0 && typ == unix.S_IFREG {
		fs.actOne(a, ActTruncate, k)
	}
	if k.op&watch.Attrib != 0 && (typ == unix.S_IFREG || typ == unix.S_IFDIR) {
		fs.actOne(a, ActChmod, k)
	}
	if k.op&watch.CloseWrite != 0 && typ == unix.S_IFREG {
		fs.actOne(a, ActCloseWrite, k)
	}
	return done
}

func creates(k *change) ActOp {
	switch k.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return ActMkdir
	case unix.S_IFLNK:
		return ActSymlink
	}
	return ActMknod
}

func (fs *FS) actOne(a Actor, op ActOp, k *change) bool {
	x := &acting{thread: a.Thread(), op: op, dir: k.dir, name: k.name, newDir: k.newDir, newName: k.newName, node: k.node, isDir: k.op&watch.IsDir != 0}
	act := Act{Op: op, Mode: k.mode}
	var ok, newOK bool
	fs.mu.Lock()
	act.Path, ok = fs.pathOf(k.dir, k.name, k.node)
	if op == ActRename {
		act.NewPath, newOK = fs.pathOf(k.newDir, k.newName, 0)
		ok = ok && newOK
	}
	fs.mu.Unlock()
	if !ok {
		return false
	}
	fs.acting.Store(x)
	e := a.Act(act)
	fs.acting.Store(nil)
	return e == 0
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

// serve answers a request that belongs to the call under way. False: it does not.
func (x *acting) serve(r *request) (fuse.Errno, bool) {
	fs, body := r.fs, r.body
	defer func() { r.body = body }()
	at := func(dir uint64, name string, c cname) bool { return r.hdr.NodeID == dir && c.is(name) }
	switch op := r.hdr.Opcode; op {
	case fuse.OpLookup:
		c, e := r.name()
		switch {
		case e != 0:
		case x.op == ActRename && at(x.newDir, x.newName, c):
			return unix.ENOENT, true
		case !at(x.dir, x.name, c):
		case x.op == ActRename || x.op == ActUnlink || x.op == ActRmdir:
			return x.gone(r), true
		case x.op == ActMknod || x.op == ActMkdir || x.op == ActSymlink:
			return unix.ENOENT, true
		}
	case fuse.OpMknod, fuse.OpMkdir, fuse.OpSymlink:
		if op == fuse.OpMknod && x.op != ActMknod || op == fuse.OpMkdir && x.op != ActMkdir || op == fuse.OpSymlink && x.op != ActSymlink {
			break
		}
		switch op {
		case fuse.OpMknod:
			decode(r, &fuse.MknodIn{})
		case fuse.OpMkdir:
			decode(r, &fuse.MkdirIn{})
		}
		if c, e := r.name(); e == 0 && at(x.dir, x.name, c) {
			parent, dir, e := r.dir(x.dir)
			if e == 0 {
				e = r.entry(parent, dir, c)
			}
			return e, true
		}
	case fuse.OpUnlink, fuse.OpRmdir:
		if op == fuse.OpUnlink && x.op != ActUnlink || op == fuse.OpRmdir && x.op != ActRmdir {
			break
		}
		if c, e := r.name(); e == 0 && at(x.dir, x.name, c) {
			return 0, true
		}
	case fuse.OpRename, fuse.OpRename2:
		if x.op != ActRename {
			break
		}
		var newdir uint64
		if op == fuse.OpRename {
			var in fuse.RenameIn
			decode(r, &in)
			newdir = in.Newdir
		} else {
			var in fuse.Rename2In
			decode(r, &in)
			newdir = in.Newdir
		}
		c, e := r.name()
		d, e2 := r.name()
		if e == 0 && e2 == 0 && at(x.dir, x.name, c) && newdir == x.newDir && d.is(x.newName) {
			fs.renamed(&change{node: x.node, newDir: x.newDir, newName: x.newName})
			return 0, true
		}
	case fuse.OpSetattr:
		var in fuse.SetattrIn
		if decode(r, &in) && (x.op == ActTruncate && in.Valid&fuse.FATTR_SIZE != 0 || x.op == ActChmod && in.Valid&fuse.FATTR_MODE != 0) && in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID) == 0 {
			n, e := r.self()
			var st unix.Statx_t
			if e == 0 {
				e = fs.stat(n, &st)
			}
			if e == 0 {
				e = r.attrReply(n, &st)
			}
			return e, true
		}
	case fuse.OpOpen:
		if x.op == ActCloseWrite {
			fs.actedOpen.Store(true)
			return reply(r, &fuse.OpenOut{Fh: actedFh, OpenFlags: fuse.FOPEN_KEEP_CACHE}), true
		}
	}
	return 0, false
}

// actedFh is the handle of a file that was opened to be closed. No other has it. What closes it carries no thread.
const actedFh = 1<<64 - 1

// gone answers the LOOKUP of a name that is about to go: with what it was, for no time.
func (x *acting) gone(r *request) fuse.Errno {
	fs := r.fs
	fs.mu.Lock()
	n := fs.nodes[x.node]
	if n == nil {
		// The guest does not know it. It gets a node that is of no use.
		if !take(&fs.limits.nodes, fs.limits.Nodes) {
			fs.unlock()
			return unix.ENFILE
		}
		fs.lastID++
		typ := uint32(unix.S_IFREG)
		if x.isDir {
			typ = unix.S_IFDIR
		}
		n = &node{fs: fs, id: fs.lastID, typ: typ, ino: fs.lastID | 1<<63, fd: -1, removed: true, last: &unix.Statx_t{Mode: uint16(typ | 0o600)}}
		fs.nodes[n.id] = n
	}
	n.nlookup++
	fs.unlock()
	var st unix.Statx_t
	if fs.stat(n, &st) != 0 {
		st = unix.Statx_t{Mode: uint16(n.typ | 0o600)}
	}
	out := fuse.EntryOut{NodeID: n.id}
	fs.setAttr(&out.Attr, n.ino, &st)
	return reply(r, &out)
}
