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
	victim := r.keep(dir, name)
	if e := unlinkat(dir, name, flags); e != 0 {
		return e
	}
	r.lost(victim, parent, name)
	return 0
}

// keep finds the node under a name that is about to go, and sees to it that it has a descriptor: the guest may still use it
// (as its working directory, for instance), and no name will lead to it. nil: the guest does not know it.
func (r *request) keep(dir int, name cname) *node {
	var st unix.Statx_t
	if statxAt(dir, name, &st) != 0 {
		return nil // the system call will say it better
	}
	n := r.known(&st)
	if n != nil {
		_, _ = n.path() // without, the guest gets ESTALE from then on
	}
	return n
}

// lost notes that the guest has removed n, which may be nil, from under a name.
func (r *request) lost(n, parent *node, name cname) {
	if n == nil {
		return
	}
	fs := r.fs
	fs.mu.Lock()
	n.removed = true
	if n.parent == parent && name.is(n.name) {
		fs.move(n, nil, "")
	}
	fs.unlock()
}
