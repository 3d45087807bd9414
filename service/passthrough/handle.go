// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"sync"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// handle is an open file or directory of the guest. It keeps its node.
type handle struct {
	id    uint64
	fd    int
	node  *node
	flags int // of open(2)

	refs int  // guarded by FS.mu: the guest's, and one for each request that uses it
	used bool // guarded by FS.mu: lately, of a shared one

	// mu is held while a directory is read: pos, its position, must not move between lseek and getdents.
	mu  sync.Mutex
	pos int64
}

func (h *handle) isDir() bool { return h.node.typ == unix.S_IFDIR }

// newHandle makes a handle of fd, which it owns even where it fails. takeFile was called for it. n is pinned by the caller.
func (fs *FS) newHandle(n *node, fd, flags int) *handle {
	h := &handle{fd: fd, node: n, flags: flags, refs: 1}
	fs.mu.Lock()
	fs.lastFh++
	h.id = fs.lastFh
	fs.handles[h.id] = h
	n.pins++
	n.opens = append(n.opens, h)
	fs.mu.Unlock()
	return h
}

// closeHandle ends the guest's use of a handle of this node; requests that still use it keep it open.
func (fs *FS) closeHandle(id, fh uint64) fuse.Errno {
	fs.mu.Lock()
	h := fs.handles[fh]
	if h == nil || h.node.id != id {
		fs.mu.Unlock()
		return unix.EBADF
	}
	delete(fs.handles, fh)
	fs.unrefHandle(h)
	fs.unlock()
	return 0
}

// unrefHandle needs FS.mu, and FS.unlock after it.
func (fs *FS) unrefHandle(h *handle) {
	h.refs--
	if h.refs > 0 {
		return
	}
	n := h.node
	for i, o := range n.opens {
		if o == h {
			n.opens[i] = n.opens[len(n.opens)-1]
			n.opens = n.opens[:len(n.opens)-1]
			break
		}
	}
	if len(n.opens) == 0 {
		n.opens = nil
	}
	fs.dead = append(fs.dead, h.fd)
	fs.limits.files.Add(-1)
	n.pins--
	fs.unref(n)
}
