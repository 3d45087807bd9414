// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// maxShared is how many descriptors are kept of what the guest uses without having opened it.
const maxShared = 32

// shared are those descriptors: of directories, whose names the guest's kernel caches if they are not opened (FUSE_NO_OPENDIR_SUPPORT),
// and of files that need not be opened (FUSE_NO_OPEN_SUPPORT). Requests about them have handle 0.
type shared struct {
	handles map[uint64]*handle // by node
	order   []uint64           // by age
	idle    *time.Timer        // closes what is not used; nil: there is nothing
}

// sharedIdle is for how long a descriptor is kept that nobody uses.
const sharedIdle = time.Second

// unopened tells whether the guest uses nodes of this type without opening them.
func (fs *FS) unopened(typ uint32) bool {
	s := fs.session.Load()
	switch {
	case s == nil || fs.c.Cache == CacheNone:
		return false
	case typ == unix.S_IFDIR:
		return s.has(fuse.NO_OPENDIR_SUPPORT)
	}
	return typ == unix.S_IFREG && fs.c.Cache == CacheAlways && fs.c.ReadOnly && s.has(fuse.NO_OPEN_SUPPORT)
}

// sharedHandle is handle, for handle 0.
func (r *request) sharedHandle(id uint64) (*handle, fuse.Errno) {
	fs := r.fs
	fs.mu.Lock()
	if h := fs.shared.handles[id]; h != nil {
		h.refs++
		h.used = true
		fs.mu.Unlock()
		return r.hold(h), 0
	}
	fs.mu.Unlock()
	n, e := r.node(id)
	if e != 0 {
		return nil, e
	}
	if !fs.unopened(n.typ) {
		return nil, unix.EBADF
	}
	fd, e := n.path()
	if e != 0 {
		return nil, e
	}
	if e := fs.gone(n, fd); e != 0 {
		return nil, e
	}
	if e := fs.takeFile(); e != 0 {
		return nil, e
	}
	flags := unix.O_RDONLY
	if n.typ == unix.S_IFDIR {
		flags |= unix.O_DIRECTORY
	}
	f, e := fs.reopen(fd, flags)
	if e != 0 {
		fs.giveFile()
		return nil, e
	}
	h := &handle{fd: f, node: n, flags: flags, refs: 1, used: true}
	fs.mu.Lock()
	n.pins++
	if s := &fs.shared; s.handles[id] == nil {
		if len(s.order) == maxShared {
			fs.unshare(s.order[0])
		}
		if s.handles == nil {
			s.handles = map[uint64]*handle{}
		}
		s.handles[id] = h
		s.order = append(s.order, id)
		h.refs++
		if s.idle == nil {
			s.idle = time.AfterFunc(sharedIdle, fs.closeIdle)
		}
	}
	fs.unlock()
	return r.hold(h), 0
}

// unshare needs FS.mu, and FS.unlock after it.
func (fs *FS) unshare(id uint64) {
	s := &fs.shared
	h := s.handles[id]
	if h == nil {
		return
	}
	delete(s.handles, id)
	for i, o := range s.order {
		if o == id {
			s.order = append(s.order[:i], s.order[i+1:]...)
			break
		}
	}
	fs.unrefHandle(h)
}

// closeIdle closes what was not used since it was called last.
func (fs *FS) closeIdle() {
	fs.mu.Lock()
	defer fs.unlock()
	s := &fs.shared
	if s.idle == nil {
		return
	}
	for _, id := range slices.Clone(s.order) {
		if h := s.handles[id]; h.used {
			h.used = false
		} else {
			fs.unshare(id)
		}
	}
	if len(s.order) > 0 {
		s.idle.Reset(sharedIdle)
	} else {
		s.idle = nil
	}
}

// close closes all of them. It needs FS.mu.
func (s *shared) close(fs *FS) {
	for _, h := range s.handles {
		unix.Close(h.fd)
		fs.giveFile()
	}
	s.handles, s.order = nil, nil
	if s.idle != nil {
		s.idle.Stop()
		s.idle = nil
	}
}
