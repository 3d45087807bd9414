// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func opLookup(r *request) fuse.Errno {
	name, e := r.name()
	if e != 0 {
		return e
	}
	parent, dir, e := r.dir(r.hdr.NodeID)
	if e != 0 {
		return e
	}
	r.watchDir(parent, dir)
	var st unix.Statx_t
	e = statxAt(dir, name, &st)
	if e == unix.ENOENT {
		if life := r.fs.absent(r, parent, name); life > 0 {
			out := fuse.EntryOut{}
			out.EntryValid, out.EntryValidNsec = seconds(life)
			return reply(r, &out)
		}
	}
	if e != 0 {
		return e
	}
	return r.entryOf(parent, name, &st)
}

// seconds is a time as the kernel wants it.
func seconds(d time.Duration) (uint64, uint32) {
	return uint64(d / time.Second), uint32(d % time.Second)
}

// entry looks name up in a directory and replies with its node, attributes and one reference more.
func (r *request) entry(parent *node, dir int, name cname) fuse.Errno {
	var st unix.Statx_t
	if e := statxAt(dir, name, &st); e != 0 {
		return e
	}
	return r.entryOf(parent, name, &st)
}

// entryOf is entry with what statx said.
func (r *request) entryOf(parent *node, name cname, st *unix.Statx_t) fuse.Errno {
	if !r.fs.visible(st) {
		return unix.ENOENT
	}
	n, e := r.fs.enter(parent, name, st)
	if e != 0 {
		return e
	}
	var out fuse.EntryOut
	r.setEntry(&out, parent, n, st)
	return reply(r, &out)
}

// setEntry fills the entry in parent of a node that is in the table.
func (r *request) setEntry(out *fuse.EntryOut, parent, n *node, st *unix.Statx_t) {
	fs := r.fs
	entry, attr := fs.life(r, parent, n, st)
	out.NodeID = n.id
	out.EntryValid, out.EntryValidNsec = seconds(entry)
	out.AttrValid, out.AttrValidNsec = seconds(attr)
	fs.setAttr(&out.Attr, n.ino, st)
}

func opForget(r *request) fuse.Errno {
	var in fuse.ForgetIn
	if decode(r, &in) {
		r.fs.forget(r.hdr.NodeID, in.Nlookup)
	}
	return 0
}

func opBatchForget(r *request) fuse.Errno {
	var in fuse.BatchForgetIn
	if !decode(r, &in) {
		return 0
	}
	var one fuse.ForgetOne
	for range in.Count {
		if !decode(r, &one) {
			break
		}
		r.fs.forget(one.NodeID, one.Nlookup)
	}
	return 0
}
