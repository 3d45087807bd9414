// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// setAttr fills what the guest is told about an inode.
func (fs *FS) setAttr(a *fuse.Attr, ino uint64, st *unix.Statx_t) {
	*a = fuse.Attr{
		Ino: ino, Size: st.Size, Blocks: st.Blocks,
		Atime: uint64(st.Atime.Sec), Atimensec: st.Atime.Nsec,
		Mtime: uint64(st.Mtime.Sec), Mtimensec: st.Mtime.Nsec,
		Ctime: uint64(st.Ctime.Sec), Ctimensec: st.Ctime.Nsec,
		Mode: uint32(st.Mode), Nlink: st.Nlink,
		UID: fs.ids.uidOut(st.Uid), GID: fs.ids.gidOut(st.Gid),
		Rdev: encodeDev(st.Rdev_major, st.Rdev_minor), Blksize: st.Blksize,
	}
}

// encodeDev is the kernel's new_encode_dev (linux/kdev_t.h).
func encodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

func (r *request) attrReply(n *node, st *unix.Statx_t) fuse.Errno {
	out := r.attrOut(n, st)
	return reply(r, &out)
}

func (r *request) attrOut(n *node, st *unix.Statx_t) (out fuse.AttrOut) {
	_, life := r.fs.life(r, nil, n, st)
	out.AttrValid, out.AttrValidNsec = seconds(life)
	r.fs.setAttr(&out.Attr, n.ino, st)
	return out
}

// aheadLife is for how long attributes may be believed that were told ahead.
const aheadLife = 10 * time.Millisecond

// tellAhead makes the message that goes before the reply to a request which changed names in its directory: the
// attributes that the guest is about to ask for. It is nil if they can't be had, and the guest then asks.
func (r *request) tellAhead() []byte {
	n, e := r.self()
	if e != 0 {
		return nil
	}
	var st unix.Statx_t
	if r.fs.stat(n, &st) != 0 {
		return nil
	}
	out := r.attrOut(n, &st)
	if r.fs.c.Cache == CacheCoherent && r.fs.pushed() && out.AttrValid > 0 {
		// The guest's daemon hands them to its kernel a moment later, when that may have been told already that the host has changed the directory again.
		out.AttrValid, out.AttrValidNsec = seconds(aheadLife)
		n.told.Store(0)
	}
	b := r.ahead[:]
	fuse.Put(b, &fuse.OutHeader{Len: uint32(len(b)), Error: fuse.AheadCode})
	fuse.Put(b[fuse.OutHeaderSize:], &fuse.AheadOut{Unique: r.hdr.Unique, NodeID: n.id, Attr: out})
	return b
}

// tellEnd makes the message that goes before a reply with the last entries of a directory.
func (r *request) tellEnd() []byte {
	b := r.ahead[:fuse.OutHeaderSize+fuse.EndOutSize]
	fuse.Put(b, &fuse.OutHeader{Len: uint32(len(b)), Error: fuse.EndCode})
	fuse.Put(b[fuse.OutHeaderSize:], &fuse.EndOut{NodeID: r.hdr.NodeID, Offset: r.endAt})
	return b
}

func opGetattr(r *request) fuse.Errno {
	var in fuse.GetattrIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	n, e := r.self()
	if e != 0 {
		return e
	}
	if n.typ == unix.S_IFDIR {
		r.watchDir(n, -1)
	}
	// A handle in the request is not needed: it keeps its node, and that its descriptor.
	var st unix.Statx_t
	if e := r.fs.stat(n, &st); e != 0 {
		return e
	}
	return r.attrReply(n, &st)
}

func opStatx(r *request) fuse.Errno {
	var in fuse.StatxIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	n, e := r.self()
	if e != 0 {
		return e
	}
	var st unix.Statx_t
	if e := r.fs.stat(n, &st); e != 0 {
		return e
	}
	_, life := r.fs.life(r, nil, n, &st)
	valid, validNsec := seconds(life)
	sx := func(t unix.StatxTimestamp) fuse.SxTime { return fuse.SxTime{Sec: t.Sec, Nsec: t.Nsec} }
	return reply(r, &fuse.StatxOut{
		AttrValid: valid, AttrValidNsec: validNsec,
		Stat: fuse.Statx{
			Mask: st.Mask & (unix.STATX_BASIC_STATS | unix.STATX_BTIME), Blksize: st.Blksize,
			Attributes: st.Attributes, AttributesMask: st.Attributes_mask,
			Nlink: st.Nlink, UID: r.fs.ids.uidOut(st.Uid), GID: r.fs.ids.gidOut(st.Gid), Mode: st.Mode,
			Ino: n.ino, Size: st.Size, Blocks: st.Blocks,
			Atime: sx(st.Atime), Btime: sx(st.Btime), Ctime: sx(st.Ctime), Mtime: sx(st.Mtime),
			RdevMajor: st.Rdev_major, RdevMinor: st.Rdev_minor,
		},
	})
}

func opReadlink(r *request) fuse.Errno {
	n, fd, e := r.path()
	if e != 0 {
		return e
	}
	if n.typ != unix.S_IFLNK {
		return unix.EINVAL
	}
	// The kernel takes a page at most, and would cut what is longer.
	k, e := readlinkat(fd, emptyName, r.room(unix.PathMax))
	if e != 0 {
		return e
	}
	r.fill(k)
	return 0
}

// setattrValid are the bits that we act on or may ignore. (The times of a change, FATTR_CTIME, are sent with WRITEBACK_CACHE
// alone; the host sets its own.)
const setattrValid = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_SIZE | fuse.FATTR_ATIME | fuse.FATTR_MTIME |
	fuse.FATTR_FH | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW | fuse.FATTR_LOCKOWNER | fuse.FATTR_CTIME | fuse.FATTR_KILL_SUIDGID

func opSetattr(r *request) fuse.Errno {
	var in fuse.SetattrIn
	if !decode(r, &in) || in.Valid&^setattrValid != 0 {
		return unix.EINVAL
	}
	n, fd, e := r.path()
	if e != 0 {
		return e
	}
	var h *handle
	if in.Valid&fuse.FATTR_FH != 0 {
		if h, e = r.handle(in.Fh); e != 0 {
			return e
		}
	}
	if in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID) != 0 {
		uid, gid := noID, noID
		if in.Valid&fuse.FATTR_UID != 0 {
			uid = in.UID
		}
		if in.Valid&fuse.FATTR_GID != 0 {
			gid = in.GID
		}
		r.expectFile(watch.Attrib, n)
		if e := r.chown(fd, uid, gid); e != 0 {
			return e
		}
	}
	// After the owner, because a change of that clears the set-id bits.
	if in.Valid&fuse.FATTR_MODE != 0 {
		if n.typ == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		r.expectFile(watch.Attrib, n)
		if e := r.fs.chmod(fd, n.typ, in.Mode); e != 0 {
			return e
		}
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		if e := r.truncate(n, fd, h, in.Size); e != 0 {
			return e
		}
	}
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) != 0 {
		ts := [2]unix.Timespec{
			timeOf(in.Valid&fuse.FATTR_ATIME != 0, in.Valid&fuse.FATTR_ATIME_NOW != 0, in.Atime, in.Atimensec),
			timeOf(in.Valid&fuse.FATTR_MTIME != 0, in.Valid&fuse.FATTR_MTIME_NOW != 0, in.Mtime, in.Mtimensec),
		}
		if in.Valid&fuse.FATTR_ATIME != 0 {
			r.expectFile(watch.Attrib, n)
		} else {
			r.expectFile(watch.Modify, n) // as the kernel tells it: a write would change the one time alone (fsnotify_change)
		}
		if e := utimensat(fd, emptyName, &ts, unix.AT_EMPTY_PATH); e != 0 {
			return e
		}
	}
	if in.Valid&fuse.FATTR_SIZE != 0 {
		r.fs.reportFile(watch.Modify, n)
	} else {
		r.fs.reportFile(watch.Attrib, n)
	}
	var st unix.Statx_t
	if e := statx(fd, emptyName, unix.AT_EMPTY_PATH, &st); e != 0 {
		return e
	}
	return r.attrReply(n, &st)
}

func timeOf(set, now bool, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case !set:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case now:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

func (r *request) truncate(n *node, fd int, h *handle, size uint64) fuse.Errno {
	if n.typ != unix.S_IFREG {
		return unix.EINVAL
	}
	if int64(size) < 0 {
		return unix.EFBIG
	}
	r.expectFile(watch.Modify, n)
	if h != nil && h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		return errnoOf(unix.Ftruncate(h.fd, int64(size)))
	}
	w, e := r.fs.reopen(fd, unix.O_WRONLY)
	if e != 0 {
		return e
	}
	r.expectFile(watch.CloseWrite, n)
	defer unix.Close(w)
	return errnoOf(unix.Ftruncate(w, int64(size)))
}
