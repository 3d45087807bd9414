// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func opOpendir(r *request) fuse.Errno {
	var in fuse.OpenIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	n, fd, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	fs := r.fs
	if fs.unopened(unix.S_IFDIR) {
		return unix.ENOSYS // the kernel opens directories itself from now on, and caches their names
	}
	if e := fs.gone(n, fd); e != 0 {
		return e
	}
	if e := fs.takeFile(); e != 0 {
		return e
	}
	const flags = unix.O_RDONLY | unix.O_DIRECTORY
	f, e := fs.reopen(fd, flags)
	if e != 0 {
		fs.giveFile()
		return e
	}
	return reply(r, &fuse.OpenOut{Fh: fs.newHandle(n, f, flags).id})
}

func opReleasedir(r *request) fuse.Errno { return opRelease(r) }

func opReaddir(r *request) fuse.Errno { return r.readdir(false) }

func opReaddirplus(r *request) fuse.Errno { return r.readdir(true) }

// The layout of struct linux_dirent64: d_ino, d_off, d_reclen, d_type, d_name.
const (
	direntOff    = 8
	direntReclen = 16
	direntType   = 18
	direntName   = 19
	direntMax    = (direntName + fuse.NAME_MAX + 1 + 7) &^ 7
)

// readdir fills the reply with entries. Offsets are the host's own, so that seekdir works, and that a directory may change
// while it is read. Nothing is kept between requests: the host is asked for no more bytes than are sure to fit when they are
// made longer, so the position in the host's directory is always that of the guest.
func (r *request) readdir(plus bool) fuse.Errno {
	var in fuse.ReadIn
	if !decodeAlone(r, &in) || in.Size > maxTransfer {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if !h.isDir() {
		return unix.ENOTDIR
	}
	r.watchDir(h.node, h.fd)
	dir := -1
	if plus {
		if dir, e = h.node.path(); e != 0 {
			return e
		}
	}
	size := int(in.Size)
	space := r.room(size + size/2 + direntMax)
	start, host := len(r.out), space[size:]

	h.mu.Lock()
	defer h.mu.Unlock()
	if int64(in.Offset) != h.pos {
		if _, err := unix.Seek(h.fd, int64(in.Offset), unix.SEEK_SET); err != nil {
			return errnoOf(err)
		}
		h.pos = int64(in.Offset)
	}
	for {
		n := hostBytes(size-(len(r.out)-start), plus)
		if n < direntMax {
			if len(r.out) == start {
				return unix.EINVAL // no room for a single entry
			}
			return 0
		}
		n, e := getdents(h.fd, host[:min(n, len(host))])
		if e != 0 && len(r.out) == start {
			return e
		}
		if n == 0 || e != 0 {
			if in.Fh == 0 && n == 0 { // its end: who reads it again begins again
				r.fs.mu.Lock()
				r.fs.unshare(r.hdr.NodeID)
				r.fs.unlock()
			}
			r.end = n == 0 && len(r.out) > start
			return 0
		}
		for b := host[:n]; len(b) > 0; {
			rec := b[:binary.NativeEndian.Uint16(b[direntReclen:])]
			b = b[len(rec):]
			h.pos = int64(binary.NativeEndian.Uint64(rec[direntOff:]))
			r.dirent(h.node, dir, rec, plus)
		}
	}
}

// hostBytes is how many bytes of linux_dirent64 are sure to fit in room bytes of the reply. A record of 24 bytes, the shortest,
// becomes 32 bytes, or 160 with attributes; longer ones grow by less in proportion.
func hostBytes(room int, plus bool) int {
	if plus {
		return room * 24 / 160
	}
	return room * 24 / 32
}

func (r *request) dirent(parent *node, dir int, rec []byte, plus bool) {
	ino := binary.NativeEndian.Uint64(rec)
	off := binary.NativeEndian.Uint64(rec[direntOff:])
	typ := uint32(rec[direntType])
	name := rec[direntName:]
	name = name[:bytes.IndexByte(name, 0)+1]
	k := parent.key
	k.ino = ino
	ino = r.fs.guestIno(k)
	dots := len(name) == 2 && name[0] == '.' || len(name) == 3 && name[0] == '.' && name[1] == '.'
	if dots && parent == r.fs.root {
		ino = parent.ino // the host's parent of the root is not the guest's business
	}
	if plus {
		// Node id 0: the guest's kernel gets a name, and looks it up when it needs to.
		var out fuse.EntryOut
		if !dots {
			var st unix.Statx_t
			if statxAt(dir, cname(name), &st) == 0 {
				if !r.fs.visible(&st) {
					return
				}
				if n, e := r.fs.enter(parent, cname(name), &st); e == 0 {
					r.setEntry(&out, parent, n, &st)
					ino = n.ino
				}
			}
		}
		r.out = fuse.Append(r.out, &out)
	}
	r.out = fuse.AppendDirent(r.out, ino, off, typ, name[:len(name)-1])
	r.endAt = off
}
