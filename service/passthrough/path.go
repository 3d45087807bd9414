// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// maxDepth bounds how many parents are opened to reach one node. Parents may even form a ring for a while, when the host
// moves directories about while we look.
const maxDepth = 2048

// path is a descriptor (O_PATH) of n, which the caller has pinned; it is valid as long as that.
func (n *node) path() (int, fuse.Errno) { return n.fs.path(n, maxDepth) }

func (fs *FS) path(n *node, depth int) (int, fuse.Errno) {
	fs.mu.Lock()
	if n.fd >= 0 {
		fd := n.fd
		if n.used {
			fs.lruRemove(n)
			fs.lruAdd(n)
		}
		fs.mu.Unlock()
		return fd, 0
	}
	fs.mu.Unlock()
	if depth == 0 {
		return -1, unix.ESTALE
	}
	if e := fs.takeFD(); e != 0 {
		return -1, e
	}
	fd, e := fs.reach(n, depth)
	if e != 0 {
		fs.giveFD()
		return -1, e
	}
	fs.mu.Lock()
	if n.fd >= 0 { // another request was faster
		fs.dead = append(fs.dead, fd)
		fd = n.fd
	} else {
		n.fd = fd
		fs.lruAdd(n)
	}
	fs.unlock()
	return fd, 0
}

// reach opens n, that has no descriptor.
func (fs *FS) reach(n *node, depth int) (int, fuse.Errno) {
	fs.mu.Lock()
	parent, name, fh := n.parent, n.name, n.handle
	open := -1
	if len(n.opens) > 0 { // n.pins counts it, so it may end only with our caller's pin; see below
		h := n.opens[0]
		h.refs++
		open = h.fd
		defer func() {
			fs.mu.Lock()
			fs.unrefHandle(h)
			fs.unlock()
		}()
	}
	if parent != nil {
		parent.pins++
		defer func() {
			fs.mu.Lock()
			parent.pins--
			fs.unref(parent)
			fs.unlock()
		}()
	}
	fs.mu.Unlock()

	if open >= 0 {
		return fs.reopen(open, unix.O_PATH)
	}
	var st unix.Statx_t
	verified := func(fd int) (int, fuse.Errno) {
		if e := statx(fd, emptyName, unix.AT_EMPTY_PATH, &st); e != 0 || !n.is(&st) {
			unix.Close(fd)
			return -1, unix.ESTALE
		}
		return fd, 0
	}
	if fh != nil {
		if fd, e := fs.openHandle(fh); e == 0 {
			return verified(fd)
		}
	}
	if parent == nil {
		return -1, unix.ESTALE
	}
	dir, e := fs.path(parent, depth-1)
	if e != 0 {
		return -1, e
	}
	var b nameBuf
	fd, e := openat2(dir, b.set(name), &fs.how)
	switch e {
	case 0:
		return verified(fd)
	case unix.ENOENT, unix.ENOTDIR, unix.EXDEV, unix.ELOOP:
		// ESTALE makes the guest's kernel look the name up again, and so find what is there now.
		return -1, unix.ESTALE
	}
	return -1, e
}

// stat is statx of n, which the caller has pinned. It does not open n for that.
func (fs *FS) stat(n *node, st *unix.Statx_t) fuse.Errno {
	fs.mu.Lock()
	fd, parent, name := n.fd, n.parent, n.name
	byName := fd < 0 && parent != nil && n.handle == nil && len(n.opens) == 0
	if byName {
		parent.pins++
	}
	fs.mu.Unlock()
	if !byName {
		fd, e := n.path()
		if e != 0 {
			return e
		}
		return statx(fd, emptyName, unix.AT_EMPTY_PATH, st)
	}
	dir, e := parent.path()
	if e == 0 {
		var b nameBuf
		e = statxAt(dir, b.set(name), st)
		if e == unix.ENOENT || e == unix.ENOTDIR || e == 0 && !n.is(st) {
			e = unix.ESTALE
		}
	}
	fs.mu.Lock()
	parent.pins--
	fs.unref(parent)
	fs.unlock()
	return e
}

// reopen opens what fd refers to, with other flags. It follows no symbolic link but the one of /proc/self/fd itself,
// which is no path. Only for what was found to be a regular file or a directory, or with O_PATH.
func (fs *FS) reopen(fd, flags int) (int, fuse.Errno) {
	var b nameBuf
	return openat(fs.procFD, b.setInt(fd), flags, 0)
}

// lruAdd and lruRemove need FS.mu.
func (fs *FS) lruAdd(n *node) {
	n.used = true
	n.prev, n.next = &fs.lru, fs.lru.next
	n.next.prev, fs.lru.next = n, n
}

func (fs *FS) lruRemove(n *node) {
	n.used = false
	n.prev.next, n.next.prev = n.next, n.prev
	n.prev, n.next = nil, nil
}

// evict closes the descriptors of some nodes that were not used for long and can be reached without.
func (fs *FS) evict() {
	fs.mu.Lock()
	closed := 0
	for tries := 0; tries < 128 && closed < 32; tries++ {
		n := fs.lru.prev
		if n == &fs.lru {
			break
		}
		fs.lruRemove(n)
		if n.pins > 0 || !fs.reachable(n) {
			fs.lruAdd(n)
			continue
		}
		fs.dead = append(fs.dead, n.fd)
		n.fd = -1
		closed++
	}
	fs.unlock()
}

// reachable tells whether n can be opened again without its descriptor; it takes its file handle for that. It needs FS.mu.
func (fs *FS) reachable(n *node) bool {
	if fs.byHandle && n.key.mnt == fs.root.key.mnt {
		if n.handle == nil {
			n.handle = handleOf(n.fd)
		}
		if n.handle != nil {
			return true
		}
	}
	return n.parent != nil
}

// probeHandles finds out whether nodes can be opened by file handle: it needs CAP_DAC_READ_SEARCH in the first user
// namespace, and a file system that can.
func (fs *FS) probeHandles() {
	fd, e := fs.reopen(fs.root.fd, unix.O_RDONLY|unix.O_DIRECTORY)
	if e != 0 {
		return
	}
	fs.mountFD = fd
	h := handleOf(fs.root.fd)
	if h == nil {
		return
	}
	if fd, e := fs.openHandle(h); e == 0 {
		unix.Close(fd)
		fs.byHandle = true
	}
}

// handleOf is the file handle of fd: its type in four bytes, then its bytes; nil if it has none.
func handleOf(fd int) []byte {
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil
	}
	t := uint32(h.Type())
	return append([]byte{byte(t), byte(t >> 8), byte(t >> 16), byte(t >> 24)}, h.Bytes()...)
}

func (fs *FS) openHandle(h []byte) (int, fuse.Errno) {
	t := int32(uint32(h[0]) | uint32(h[1])<<8 | uint32(h[2])<<16 | uint32(h[3])<<24)
	fd, err := unix.OpenByHandleAt(fs.mountFD, unix.NewFileHandle(t, h[4:]), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return -1, errnoOf(err)
	}
	return fd, 0
}
