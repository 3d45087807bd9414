// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
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
	return r.entry(parent, dir, name)
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
	r.fs.setEntry(&out, n, st)
	return reply(r, &out)
}

func (fs *FS) setEntry(out *fuse.EntryOut, n *node, st *unix.Statx_t) {
	out.NodeID = n.id
	out.EntryValid, out.EntryValidNsec = fs.ttlSec, fs.ttlNsec
	out.AttrValid, out.AttrValidNsec = fs.ttlSec, fs.ttlNsec
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
