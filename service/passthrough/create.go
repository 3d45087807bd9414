// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

func opMknod(r *request) fuse.Errno {
	var in fuse.MknodIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	typ := in.Mode & unix.S_IFMT
	switch typ {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
		in.Rdev = 0
	case unix.S_IFCHR, unix.S_IFBLK:
		// Device 0/0 opens nothing: it is overlayfs's mark of a removed name.
		if !r.fs.c.Dev && (typ != unix.S_IFCHR || in.Rdev != 0) {
			return unix.EPERM
		}
	default:
		return unix.EINVAL
	}
	return r.make(typ, func(dir int, name cname) fuse.Errno {
		return mknodat(dir, name, typ|r.fs.createMode(dir, typ, in.Mode, in.Umask), in.Rdev)
	})
}

func opMkdir(r *request) fuse.Errno {
	var in fuse.MkdirIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	return r.make(unix.S_IFDIR, func(dir int, name cname) fuse.Errno {
		return mkdirat(dir, name, r.fs.createMode(dir, unix.S_IFDIR, in.Mode, in.Umask))
	})
}

func opSymlink(r *request) fuse.Errno {
	name, e := r.name()
	if e != 0 {
		return e
	}
	target, e := r.text()
	if e != 0 {
		return e
	}
	if len(target) > unix.PathMax {
		return unix.ENAMETOOLONG
	}
	return r.makeNamed(unix.S_IFLNK, name, func(dir int, name cname) fuse.Errno { return symlinkat(target, dir, name) })
}

// make makes what the rest of the body names, as the caller, and replies with it.
func (r *request) make(typ uint32, fn func(dir int, name cname) fuse.Errno) fuse.Errno {
	name, e := r.name()
	if e != 0 {
		return e
	}
	return r.makeNamed(typ, name, fn)
}

func (r *request) makeNamed(typ uint32, name cname, fn func(dir int, name cname) fuse.Errno) fuse.Errno {
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	r.expect(watch.Create, parent, name)
	if e := r.asCaller(func() fuse.Errno { return fn(dir, name) }); e != 0 {
		return e
	}
	return r.made(typ, parent, dir, name)
}

func opLink(r *request) fuse.Errno {
	var in fuse.LinkIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	name, e := r.name()
	if e != 0 {
		return e
	}
	n, e := r.node(in.Oldnodeid)
	if e != 0 {
		return e
	}
	fd, e := n.path()
	if e != 0 {
		return e
	}
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	r.expect(watch.Create, parent, name)
	// AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
	var b nameBuf
	if e := linkat(r.fs.procFD, b.setInt(fd), dir, name, unix.AT_SYMLINK_FOLLOW); e != 0 {
		return e
	}
	r.fs.reportFile(watch.Attrib, n) // one link more
	return r.made(n.typ, parent, dir, name)
}

// made is entry, of what the request has made. Where the host has already put something of another type in its place it is gone, which
// would be EIO to the guest's kernel.
func (r *request) made(typ uint32, parent *node, dir int, name cname) fuse.Errno {
	var st unix.Statx_t
	e := statxAt(dir, name, &st)
	if e == 0 && uint32(st.Mode)&unix.S_IFMT != typ {
		e = unix.ENOENT
	}
	if e == 0 {
		e = r.entryOf(parent, name, &st)
	}
	if e == 0 && (r.fs.heard() || r.fs.c.Dirs != nil) {
		var out fuse.EntryOut
		fuse.Decode(&out, r.out[fuse.OutHeaderSize:])
		n, _ := r.node(out.NodeID)
		r.fs.report(watch.Create, parent, name, n)
	}
	return e
}

func opCreate(r *request) fuse.Errno {
	var in fuse.CreateIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	name, e := r.name()
	if e != 0 {
		return e
	}
	flags, e := r.openFlags(in.Flags)
	if e != 0 {
		return e
	}
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	mode := r.fs.createMode(dir, unix.S_IFREG, in.Mode, in.Umask)
	if e := r.fs.takeFile(); e != 0 {
		return e
	}
	r.expect(watch.Create, parent, name)
	var fd int
	// Exclusive, so that what is opened was made here; nothing that lies in wait under the name is.
	e = r.asCaller(func() (e fuse.Errno) {
		fd, e = openat(dir, name, flags|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode)
		return e
	})
	if e == unix.EEXIST && in.Flags&unix.O_EXCL == 0 {
		r.fs.giveFile()
		return r.openExisting(parent, dir, name, flags)
	}
	if e != 0 {
		r.fs.giveFile()
		return e
	}
	return r.opened(parent, name, fd, flags)
}

// openExisting is CREATE of a name that exists.
func (r *request) openExisting(parent *node, dir int, name cname, flags int) fuse.Errno {
	if e := r.entry(parent, dir, name); e != 0 {
		return e
	}
	var out fuse.EntryOut
	fuse.Decode(&out, r.out[fuse.OutHeaderSize:])
	n, e := r.node(out.NodeID)
	if e == 0 {
		var fd int
		if fd, e = n.path(); e == 0 {
			e = r.openNode(n, fd, flags)
		}
	}
	if e != 0 {
		r.fs.forget(out.NodeID, 1)
	}
	return e
}

// opened replies with the new file fd, which takeFile was called for. name "" is for a file without.
func (r *request) opened(parent *node, name cname, fd, flags int) fuse.Errno {
	var st unix.Statx_t
	e := statx(fd, emptyName, unix.AT_EMPTY_PATH, &st)
	if e == 0 {
		e = r.entryOf(parent, name, &st)
	}
	if e != 0 {
		unix.Close(fd)
		r.fs.giveFile()
		return e
	}
	var out fuse.EntryOut
	fuse.Decode(&out, r.out[fuse.OutHeaderSize:])
	n, e := r.node(out.NodeID)
	if e != 0 { // a second FORGET came before we had told about the node: hostile
		unix.Close(fd)
		r.fs.giveFile()
		return e
	}
	h := r.fs.newHandle(n, fd, flags)
	if len(name) > 1 {
		r.fs.report(watch.Create, parent, name, n)
	}
	open := fuse.OpenOut{Fh: h.id}
	if r.fs.c.Cache != CacheCoherent || r.fs.pushed() {
		open.OpenFlags = r.fs.openFlags(n, &st)
	}
	return reply(r, &open)
}

func opTmpfile(r *request) fuse.Errno {
	var in fuse.CreateIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	flags, e := r.openFlags(in.Flags)
	if e != 0 {
		return e
	}
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	if e := r.fs.takeFile(); e != 0 {
		return e
	}
	var fd int
	mode := r.fs.createMode(dir, unix.S_IFREG, in.Mode, in.Umask)
	e = r.asCaller(func() (e fuse.Errno) {
		// O_EXCL says that it will never get a name.
		fd, e = openat(dir, dotName, flags|unix.O_TMPFILE|int(in.Flags)&unix.O_EXCL, mode)
		return e
	})
	if e != 0 {
		r.fs.giveFile()
		return e
	}
	return r.opened(parent, emptyName, fd, flags)
}
