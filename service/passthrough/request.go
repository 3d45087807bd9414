// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// request is one request under way. A goroutine that serves keeps one and uses it again, so an operation must hold
// nothing of it (body, out, names) after it has returned.
type request struct {
	fs   *FS
	s    *stream
	hdr  fuse.InHeader
	body []byte // what follows the header, without extensions
	out  []byte // the reply: room for its header, then what the operation appends

	seq     uint64 // caching.seq when the request began
	watches uint64 // dirs.count when it began to look

	expected  [2]entryKey // by expect
	nexpected int

	group    uint32 // the supplementary group to create with, if hasGroup
	hasGroup bool

	pipe  *splice.Pipe // of large data; nil: they are in body or out
	piped int          // bytes in it
	sends bool         // they are of the reply

	pinned   [6]*node // released with the request
	npinned  int
	held     [2]*handle
	nheld    int
	inBuf    *buffer // body, where it does not fit inSmall
	outBuf   *buffer // out, where it does not fit outSmall
	inSmall  [4096]byte
	outSmall [1024]byte
	end      bool   // READDIR has reached the end of the directory
	endAt    uint64 // the offset of its last entry in the reply
	ahead    [fuse.OutHeaderSize + fuse.AheadOutSize]byte
}

// node finds a node by id and keeps it, and its descriptor, until the request ends.
func (r *request) node(id uint64) (*node, fuse.Errno) {
	fs := r.fs
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil {
		fs.mu.Unlock()
		return nil, unix.ESTALE
	}
	n.pins++
	fs.mu.Unlock()
	r.pinned[r.npinned] = n
	r.npinned++
	return n, 0
}

// self is the node that the request is about.
func (r *request) self() (*node, fuse.Errno) { return r.node(r.hdr.NodeID) }

// path is the node that the request is about, and a descriptor of it (O_PATH), valid until the request ends.
func (r *request) path() (*node, int, fuse.Errno) {
	n, e := r.self()
	if e != 0 {
		return nil, -1, e
	}
	fd, e := n.path()
	return n, fd, e
}

// dir is path, for a request on a name in a directory.
func (r *request) dir(id uint64) (*node, int, fuse.Errno) {
	n, e := r.node(id)
	if e != 0 {
		return nil, -1, e
	}
	if n.typ != unix.S_IFDIR {
		return nil, -1, unix.ENOTDIR
	}
	fd, e := n.path()
	return n, fd, e
}

// handle finds an open file or directory of the request's node and keeps it open until the request ends.
func (r *request) handle(fh uint64) (*handle, fuse.Errno) { return r.handleOf(r.hdr.NodeID, fh) }

func (r *request) handleOf(id, fh uint64) (*handle, fuse.Errno) {
	if fh == 0 {
		return r.sharedHandle(id)
	}
	fs := r.fs
	fs.mu.Lock()
	h := fs.handles[fh]
	if h == nil || h.node.id != id {
		fs.mu.Unlock()
		return nil, unix.EBADF
	}
	h.refs++
	fs.mu.Unlock()
	return r.hold(h), 0
}

// hold keeps a handle, of which the request has a reference, until the request ends.
func (r *request) hold(h *handle) *handle {
	r.held[r.nheld] = h
	r.nheld++
	return h
}

// release gives back all that the request kept.
func (r *request) release() {
	if r.nexpected > 0 {
		r.settle()
	}
	if r.npinned|r.nheld != 0 {
		fs := r.fs
		fs.mu.Lock()
		for _, h := range r.held[:r.nheld] {
			fs.unrefHandle(h)
		}
		for _, n := range r.pinned[:r.npinned] {
			n.pins--
			fs.unref(n)
		}
		fs.unlock()
		clear(r.held[:])
		clear(r.pinned[:])
		r.npinned, r.nheld = 0, 0
	}
	r.givePipe()
	if r.inBuf != nil {
		r.fs.limits.putBuffer(r.inBuf)
		r.inBuf = nil
	}
	if r.outBuf != nil {
		r.fs.limits.putBuffer(r.outBuf)
		r.outBuf = nil
	}
	r.body, r.out = nil, nil
}

// decode takes a structure from the beginning of the body; the rest stays in it.
func decode[T fuse.Struct](r *request, v *T) bool {
	rest, ok := fuse.Decode(v, r.body)
	if ok {
		r.body = rest
	}
	return ok
}

// decodeAlone is decode, for a body that is v and nothing else. The operations with large replies use it: a request
// must not hold two large buffers, since the second is not waited for (byteGauge).
func decodeAlone[T fuse.Struct](r *request, v *T) bool {
	return decode(r, v) && len(r.body) == 0 && r.inBuf == nil
}

// reply appends a structure to the reply.
func reply[T fuse.Struct](r *request, v *T) fuse.Errno {
	r.out = fuse.Append(r.out, v)
	return 0
}

// outLead is where a reply begins in a buffer, in bytes, for the data behind its header to begin with a cache line. Where
// data begin 1 to 31 bytes into a page, some processors (AMD's Zen 3) copy them there four times slower, pread(2)'s page by page.
const outLead = 64 - fuse.OutHeaderSize

// room makes place for n more bytes in the reply, n at most maxTransfer plus 4096, and returns them. What
// the operation fills of them it appends: r.out = append(r.out, b[:k]...) costs no copy but is not needed, r.fill(k) is enough.
func (r *request) room(n int) []byte {
	if cap(r.out)-len(r.out) < n {
		b := r.fs.limits.getBuffer(outLead+len(r.out)+n, r.inBuf != nil || r.outBuf != nil)
		out := append(b.b[outLead:outLead], r.out...)
		if r.outBuf != nil {
			r.fs.limits.putBuffer(r.outBuf)
		}
		r.outBuf, r.out = b, out
	}
	return r.out[len(r.out) : len(r.out)+n]
}

// fill appends the first n bytes of what room returned.
func (r *request) fill(n int) { r.out = r.out[:len(r.out)+n] }

// name takes a name of a directory entry from the body: with its NUL, not empty, without a slash, not "." or "..",
// not longer than a host's file system takes.
func (r *request) name() (cname, fuse.Errno) {
	c, e := r.text()
	if e != 0 {
		return nil, e
	}
	switch n := len(c) - 1; {
	case n == 0, n == 1 && c[0] == '.', n == 2 && c[0] == '.' && c[1] == '.':
		return nil, unix.EINVAL
	case n > fuse.NAME_MAX:
		return nil, unix.ENAMETOOLONG
	case bytes.IndexByte(c, '/') >= 0:
		return nil, unix.EINVAL
	}
	return c, 0
}

// text takes a NUL-terminated string from the body, whatever it holds.
func (r *request) text() (cname, fuse.Errno) {
	s, rest, ok := fuse.Name(r.body)
	if !ok {
		return nil, unix.EINVAL
	}
	c := cname(r.body[:len(s)+1])
	r.body = rest
	return c, 0
}
