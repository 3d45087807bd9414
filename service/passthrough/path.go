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
func (n *node) path() (int, fuse.Errno) { return n.fs.path(n, maxDepth, 0) }

// path adds pins to those of n when it succeeds; before, n need only exist.
func (fs *FS) path(n *node, depth int, pins int32) (int, fuse.Errno) {
	fs.mu.Lock()
	if n.fd >= 0 {
		fd := n.fd
		n.pins += pins
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
	fd, e := fs.reach(n, depth)
	if e != 0 {
		return -1, e
	}
	fs.mu.Lock()
	n.pins += pins
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

// reach opens n, which has no descriptor. The new one is counted.
func (fs *FS) reach(n *node, depth int) (int, fuse.Errno) {
	fs.mu.Lock()
	if n.last != nil {
		fs.mu.Unlock()
		return -1, unix.ENOENT // not ESTALE: to look for it again could go on for ever
	}
	parent, name, fh := n.parent, n.name, n.handle
	var open *handle
	switch {
	case len(n.opens) > 0:
		open = n.opens[0]
		open.refs++
	case parent != nil:
		parent.kids++ // to exist: its descriptor is needed only once it is there, or a deep tree would need many
	}
	fs.mu.Unlock()

	if open != nil {
		fd, e := fs.counted(func() (int, fuse.Errno) { return fs.reopen(open.fd, unix.O_PATH) })
		fs.mu.Lock()
		fs.unrefHandle(open)
		fs.unlock()
		return fd, e
	}
	var pinned int32
	if parent != nil {
		defer func() {
			fs.mu.Lock()
			parent.kids--
			parent.pins -= pinned
			fs.unref(parent)
			fs.unlock()
		}()
	}
	if fh != "" {
		fd, e := fs.counted(func() (int, fuse.Errno) { return n.verified(fs.openHandle(fh)) })
		if e == 0 || parent == nil {
			return fd, e
		}
	}
	if parent == nil {
		return -1, unix.ESTALE
	}
	dir, e := fs.path(parent, depth-1, 1)
	if e != 0 {
		return -1, e
	}
	pinned = 1
	return fs.counted(func() (int, fuse.Errno) {
		var b nameBuf
		return n.verified(openat2(dir, b.set(name), &fs.how))
	})
}

// verified is fd if it is of n.
func (n *node) verified(fd int, e fuse.Errno) (int, fuse.Errno) {
	switch e {
	case 0:
		var st unix.Statx_t
		if statx(fd, emptyName, unix.AT_EMPTY_PATH, &st) == 0 && n.is(&st) {
			return fd, 0
		}
		unix.Close(fd)
		return -1, unix.ESTALE
	case unix.ENOENT, unix.ENOTDIR, unix.EXDEV, unix.ELOOP:
		// ESTALE makes the guest's kernel look the name up again, and so find what is there now.
		return -1, unix.ESTALE
	}
	return -1, e
}

// counted opens something that is counted as a descriptor.
func (fs *FS) counted(open func() (int, fuse.Errno)) (int, fuse.Errno) {
	if e := fs.takeFD(); e != 0 {
		return -1, e
	}
	fd, e := open()
	if e != 0 {
		fs.giveFD()
	}
	return fd, e
}

// stat is statx of n, which the caller has pinned. It does not open n for that.
func (fs *FS) stat(n *node, st *unix.Statx_t) fuse.Errno {
	fs.mu.Lock()
	fd, parent, name := n.fd, n.parent, n.name
	if n.last != nil {
		*st = *n.last
		fs.mu.Unlock()
		return 0
	}
	byName := fd < 0 && parent != nil && n.handle == "" && len(n.opens) == 0
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
	if n.parent == nil {
		return false // without a name it may live by our descriptor alone
	}
	if fs.byHandle && n.key.mnt == fs.root.key.mnt {
		if n.handle == "" {
			n.handle = handleOf(n.fd)
		}
	}
	return true
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
	if h == "" {
		return
	}
	if fd, e := fs.openHandle(h); e == 0 {
		unix.Close(fd)
		fs.byHandle = true
	}
}

// handleOf is the file handle of fd: its type in four bytes, then its bytes; "" if it has none.
func handleOf(fd int) string {
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return ""
	}
	t := uint32(h.Type())
	return string([]byte{byte(t), byte(t >> 8), byte(t >> 16), byte(t >> 24)}) + string(h.Bytes())
}

func (fs *FS) openHandle(h string) (int, fuse.Errno) {
	t := int32(uint32(h[0]) | uint32(h[1])<<8 | uint32(h[2])<<16 | uint32(h[3])<<24)
	fd, err := unix.OpenByHandleAt(fs.mountFD, unix.NewFileHandle(t, []byte(h[4:])), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return -1, errnoOf(err)
	}
	return fd, 0
}
