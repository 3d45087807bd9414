// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func opRename(r *request) fuse.Errno {
	var in fuse.RenameIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	return r.rename(in.Newdir, 0)
}

func opRename2(r *request) fuse.Errno {
	var in fuse.Rename2In
	if !decode(r, &in) || in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	return r.rename(in.Newdir, in.Flags)
}

func (r *request) rename(newdir uint64, flags uint32) fuse.Errno {
	oldname, e := r.name()
	if e != 0 {
		return e
	}
	newname, e := r.name()
	if e != 0 {
		return e
	}
	from, fromFD, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	to, toFD, e := r.dir(newdir)
	if e != 0 {
		return e
	}
	var victim *node
	if flags&(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) == 0 {
		victim = r.keep(toFD, newname)
	}
	if e := renameat2(fromFD, oldname, toFD, newname, flags); e != 0 {
		return e
	}
	r.lost(victim, nil, to, newname)
	r.found(to, toFD, newname)
	if flags&unix.RENAME_EXCHANGE != 0 {
		r.found(from, fromFD, oldname)
	}
	return 0
}

// found notes where the node under a name is now.
func (r *request) found(parent *node, dir int, name cname) {
	var st unix.Statx_t
	if statxAt(dir, name, &st) != 0 {
		return // gone again; its node finds out when it is used
	}
	n := r.known(&st)
	if n == nil || n == r.fs.root {
		return
	}
	fs := r.fs
	fs.mu.Lock()
	if n.parent != parent || !name.is(n.name) {
		fs.move(n, parent, name.String())
	}
	fs.unlock()
}
