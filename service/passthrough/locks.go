// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// Locks of the guest are locks of the host: flock(2) is on the descriptor of the open file, and POSIX locks are in
// the lockTable. The kernel sends both here only for regular files; those of directories it keeps to itself.
// Nothing looks for deadlocks between owners (EDEADLK): each can be interrupted.

// opGetlk tells what is in the way of a POSIX lock.
func opGetlk(r *request) fuse.Errno {
	var in fuse.LkIn
	if !decode(r, &in) || in.LkFlags != 0 {
		return unix.EINVAL
	}
	h, e := r.lockable(in.Fh)
	if e != 0 {
		return e
	}
	if e := r.fs.second.locks.get(r.hdr.NodeID, in.Owner, &in.Lk, h.fd); e != 0 {
		return e
	}
	return reply(r, &fuse.LkOut{Lk: in.Lk})
}

// opSetlk locks or unlocks, or fails at once.
func opSetlk(r *request) fuse.Errno {
	var in fuse.LkIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	h, e := r.lockable(in.Fh)
	if e != 0 {
		return e
	}
	return r.fs.lock(h, &in)
}

// opSetlkw waits for the lock. Only an INTERRUPT answers EINTR.
func opSetlkw(r *request) fuse.Errno {
	var in fuse.LkIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	h, e := r.lockable(in.Fh)
	if e != 0 {
		return e
	}
	if e := r.fs.lock(h, &in); e != unix.EAGAIN {
		return e
	}
	fs, id := r.fs, r.hdr.NodeID
	e = fs.second.waits.add(&lockWait{
		unique: r.hdr.Unique &^ uniqueResend,
		stream: r.s,
		ended:  r.s.done,
		try:    func() fuse.Errno { return fs.lockAgain(id, &in) },
		reply:  r.replier(),
	})
	if e != 0 {
		return e
	}
	return later
}

// lockAgain is lock, for who waits and keeps no handle meanwhile.
func (fs *FS) lockAgain(id uint64, in *fuse.LkIn) fuse.Errno {
	fs.mu.Lock()
	h := fs.handles[in.Fh]
	if h == nil || h.node.id != id {
		fs.mu.Unlock()
		return unix.EBADF
	}
	h.refs++
	fs.mu.Unlock()
	e := fs.lock(h, in)
	fs.mu.Lock()
	fs.unrefHandle(h)
	fs.unlock()
	return e
}

// lockable is the handle fh if it is of a regular file.
func (r *request) lockable(fh uint64) (*handle, fuse.Errno) {
	h, e := r.handle(fh)
	if e == 0 && h.isDir() {
		return nil, unix.EINVAL
	}
	return h, e
}

// lock does SETLK. EAGAIN: somebody is in the way.
func (fs *FS) lock(h *handle, in *fuse.LkIn) fuse.Errno {
	s := &fs.second
	var e fuse.Errno
	switch in.LkFlags {
	case 0:
		e = s.locks.set(h.node.id, in.Owner, in.Fh, &in.Lk, func() (int, fuse.Errno) { return fs.openForLocks(h) })
	case fuse.LK_FLOCK:
		e = flockHandle(h.fd, in.Lk.Type)
	default:
		return unix.EINVAL
	}
	if e == 0 && in.Lk.Type != unix.F_WRLCK { // a read lock may be what was a write lock
		s.waits.unlocked()
	}
	return e
}

func flockHandle(fd int, typ uint32) fuse.Errno {
	var how int
	switch typ {
	case unix.F_RDLCK:
		how = unix.LOCK_SH
	case unix.F_WRLCK:
		how = unix.LOCK_EX
	case unix.F_UNLCK:
		how = unix.LOCK_UN
	default:
		return unix.EINVAL
	}
	for {
		if err := unix.Flock(fd, how|unix.LOCK_NB); err != unix.EINTR {
			return errnoOf(err) // EWOULDBLOCK is EAGAIN
		}
	}
}

// openForLocks opens the file of h once more, for the locks of one owner. A write lock needs a descriptor for writing,
// and the owner may come to ask for one through another handle; where we may not write, the guest cannot have one
// either, and h's own mode will do.
func (fs *FS) openForLocks(h *handle) (int, fuse.Errno) {
	if fs.takeFile() != 0 {
		return -1, unix.ENOLCK
	}
	mode := unix.O_RDWR
	if fs.c.ReadOnly {
		mode = unix.O_RDONLY
	}
	fd, e := fs.reopen(h.fd, mode|unix.O_NONBLOCK|unix.O_NOCTTY)
	if e != 0 {
		fd, e = fs.reopen(h.fd, h.flags&unix.O_ACCMODE|unix.O_NONBLOCK|unix.O_NOCTTY)
	}
	if e != 0 {
		fs.giveFile()
	}
	return fd, e
}

// flushLocks drops the POSIX locks that owner has on a node: FLUSH, which is a close of one of its descriptors, does that.
func (fs *FS) flushLocks(id, owner uint64) {
	if fs.second.locks.flush(id, owner) {
		fs.second.waits.unlocked()
	}
}

// releaseLocks drops the locks that belong to an open file, before its handle is closed.
func (fs *FS) releaseLocks(id uint64, h *handle, in *fuse.ReleaseIn) {
	any := fs.second.locks.release(id, in.Fh)
	if in.ReleaseFlags&fuse.RELEASE_FLOCK_UNLOCK != 0 {
		unix.Flock(h.fd, unix.LOCK_UN) // closing it does the same, but a request under way may keep it open
		any = true
	}
	if any {
		fs.second.waits.unlocked()
	}
}
