// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
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
		if n := r.fs.lastSeen(to, newname); n != nil && n.typ == unix.S_IFDIR && n != victim {
			return unix.ESTALE // as for RMDIR
		}
	}
	r.expect(watch.Delete, from, oldname)
	r.expect(watch.Create, to, newname)
	if flags&unix.RENAME_EXCHANGE != 0 {
		r.expect(watch.Create, from, oldname)
		r.expect(watch.Delete, to, newname)
	}
	believed, exchanged := r.fs.lastSeen(from, oldname), r.fs.lastSeen(to, newname)
	if e := renameat2(fromFD, oldname, toFD, newname, flags); e != 0 {
		return e
	}
	r.lost(victim, nil, to, newname)
	// The guest's kernel moves what it believes to be there. If that is something else it has to look.
	moved := r.found(to, toFD, newname)
	if moved == nil || moved != believed {
		r.fs.notThere(to, newname)
	}
	if flags&unix.RENAME_EXCHANGE != 0 {
		if n := r.found(from, fromFD, oldname); n == nil || n != exchanged {
			r.fs.notThere(from, oldname)
		}
	}
	r.reportRename(from, oldname, to, newname, moved, flags)
	return 0
}

// notThere has the guest forget what it believes to be under a name.
func (fs *FS) notThere(dir *node, name cname) {
	if fs.c.Cache == CacheCoherent {
		fs.caching.add(change{op: watch.Create, dir: dir.id, name: name.String(), quiet: true})
	}
}

// reportRename tells of a rename. moved is what is under the new name, if the guest knows it.
func (r *request) reportRename(from *node, oldname cname, to *node, newname cname, moved *node, flags uint32) {
	r.fs.settle(to.id)
	if r.fs.c.Dirs != nil {
		from.told.Store(0)
		to.told.Store(0)
		if moved != nil {
			moved.told.Store(0)
		}
	}
	if !r.fs.heard() {
		return
	}
	c := watch.Change{Op: watch.Rename, Dir: from.inode(), Name: oldname.String(), NewDir: to.inode(), NewName: newname.String()}
	if moved != nil {
		c.Inode, c.Mode = moved.inode(), moved.typ
		if moved.typ == unix.S_IFDIR {
			c.Op |= watch.IsDir
		}
	}
	r.fs.c.Changed(c)
	if flags&(unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) != 0 { // there is something else under the old name
		r.fs.c.Changed(watch.Change{Op: watch.Create, Dir: c.Dir, Name: c.Name})
	}
}

// found notes where the node under a name is now, and returns it.
func (r *request) found(parent *node, dir int, name cname) *node {
	var st unix.Statx_t
	if statxAt(dir, name, &st) != 0 {
		return nil // gone again; its node finds out when it is used
	}
	n := r.known(&st)
	if n == nil || n == r.fs.root {
		return nil
	}
	fs := r.fs
	fs.mu.Lock()
	if n.parent != parent || !name.is(n.name) {
		fs.move(n, parent, name.String())
	}
	fs.unlock()
	return n
}
