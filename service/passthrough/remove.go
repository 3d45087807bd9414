// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
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
	victim, last := r.keep(dir, name)
	if e := unlinkat(dir, name, flags); e != 0 {
		return e
	}
	r.lost(victim, last, parent, name)
	return 0
}

// keep finds the node under a name that is about to go, and sees to it that it can still be used, since no name will lead to
// it: a directory may be somebody's working directory, and another name of a file may be known. Of a file's last name,
// where nobody has the file open, only the attributes stay: with those the guest's kernel can do no more than look at it,
// and a descriptor for each file of a tree that is removed would cost more than the removal. nil: the guest does not know it.
func (r *request) keep(dir int, name cname) (n *node, last *unix.Statx_t) {
	var st unix.Statx_t
	if statxAt(dir, name, &st) != 0 {
		return nil, nil // the system call will say it better
	}
	if n = r.known(&st); n == nil {
		return nil, nil
	}
	if st.Nlink == 1 && n.typ != unix.S_IFDIR {
		n.fs.mu.Lock()
		unused := n.fd < 0 && len(n.opens) == 0
		n.fs.mu.Unlock()
		if unused {
			st.Nlink = 0
			return n, &st
		}
	}
	_, _ = n.path() // without, the guest gets ESTALE from then on
	return n, nil
}

// lost notes that the guest has removed what keep returned from under a name.
func (r *request) lost(n *node, last *unix.Statx_t, parent *node, name cname) {
	if n == nil {
		return
	}
	fs := r.fs
	fs.mu.Lock()
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
