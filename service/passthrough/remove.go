// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

func opUnlink(r *request) fuse.Errno { return r.remove(0) }

func opRmdir(r *request) fuse.Errno { return r.remove(unix.AT_REMOVEDIR) }

func (r *request) remove(flags int) fuse.Errno {
	name, e := r.name()
	if e != 0 {
		return e
	}
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	victim, last := r.keepLast(dir, name)
	if flags&unix.AT_REMOVEDIR != 0 && r.fs.lastSeen(parent, name) != victim {
		// The guest's kernel would take the directory for dead that it believes to be there, wherever that is now. It looks again, and
		// holds the name meanwhile.
		return unix.ESTALE
	}
	r.expect(watch.Delete, parent, name)
	if e := unlinkat(dir, name, flags); e != 0 {
		return e
	}
	r.lost(victim, last, parent, name)
	op := watch.Delete
	if flags&unix.AT_REMOVEDIR != 0 {
		op |= watch.IsDir
	}
	r.fs.report(op, parent, name, victim)
	return 0
}

// keep finds the node under a name that is about to go, and sees to it that it can still be used, since no name will lead to
// it: a directory may be somebody's working directory, another name of a file may be known, and who opens a file by a name
// that always leads to one must not fail because another is put in its place. nil: the guest does not know it.
func (r *request) keep(dir int, name cname) *node {
	var st unix.Statx_t
	n := r.under(dir, name, &st)
	if n != nil {
		_, _ = n.path() // without, the guest gets ESTALE from then on
	}
	return n
}

// lastSeen is the node that the guest was last told to be under a name, if it was not seen elsewhere since.
func (fs *FS) lastSeen(parent *node, name cname) *node {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.places[place{parent, name.String()}]
}

// under finds the node under a name, and what it is.
func (r *request) under(dir int, name cname, st *unix.Statx_t) *node {
	if statxAt(dir, name, st) != 0 {
		return nil // the system call will say it better
	}
	return r.known(st)
}

// keepLast is keep before an unlink. Of a file's last name, where nobody has the file open, only the attributes are kept: the
// guest can look at it, as a descriptor with O_PATH lets it, and to open it is ENOENT. A descriptor for each file of a
// tree that is removed would cost more than the removal.
func (r *request) keepLast(dir int, name cname) (n *node, last *unix.Statx_t) {
	var st unix.Statx_t
	if n = r.under(dir, name, &st); n == nil {
		return nil, nil
	}
	n.fs.mu.Lock()
	// A guest that writes later may still write to it.
	unused := !n.fs.c.Writeback && st.Nlink == 1 && n.typ != unix.S_IFDIR && n.fd < 0 && len(n.opens) == 0
	n.fs.mu.Unlock()
	if unused {
		st.Nlink = 0
		return n, &st
	}
	_, _ = n.path() // without, the guest gets ESTALE from then on
	return n, nil
}

// lost notes that the guest has removed what keep or keepLast returned from under a name.
func (r *request) lost(n *node, last *unix.Statx_t, parent *node, name cname) {
	if n == nil {
		return
	}
	fs := r.fs
	var st unix.Statx_t
	lives := n.typ == unix.S_IFDIR && fs.stat(n, &st) == 0 && st.Nlink > 0
	fs.mu.Lock()
	if lives {
		// The host has put another directory in its place since we looked. To the guest's kernel it is dead: where it is seen next
		// it is a new node.
		if fs.keys[n.key] == n {
			delete(fs.keys, n.key)
		}
		fs.unlock()
		return
	}
	n.removed = true
	if last != nil && n.fd < 0 && len(n.opens) == 0 {
		n.last = last
		delete(fs.keys, n.key) // its number is free for another
	}
	if n.parent == parent && name.is(n.name) {
		fs.move(n, nil, "")
	}
	fs.unlock()
}
