// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"os"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// keepFlags are the flags of open(2) that mean something for the host's file. Not among them are:
//   - O_DIRECT: in the guest it goes around the cache, and so asks us each time; the host's own demands on alignment
//     would make it fail for no gain.
//   - O_APPEND: fcntl(2) can change it, so each WRITE says whether it appends; and the kernel writes the pages of a
//     mapping through any handle of the file, whose own O_APPEND would put them at its end.
const keepFlags = unix.O_ACCMODE | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME

// openFlags are the flags to open a file with.
func (r *request) openFlags(flags uint32) (int, fuse.Errno) {
	f := int(flags) & keepFlags
	if r.fs.c.Writeback && f&unix.O_ACCMODE == unix.O_WRONLY {
		f = f&^unix.O_ACCMODE | unix.O_RDWR // the kernel reads the rest of a page that is written in part
	}
	writes := f&unix.O_ACCMODE != unix.O_RDONLY || f&unix.O_TRUNC != 0
	if writes && r.fs.c.ReadOnly {
		return 0, unix.EROFS
	}
	if f&unix.O_ACCMODE == unix.O_ACCMODE {
		return 0, unix.EINVAL // 3: open for ioctl alone, of devices
	}
	return f, 0
}

func opOpen(r *request) fuse.Errno {
	var in fuse.OpenIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	if r.fs.unopened(unix.S_IFREG) {
		return unix.ENOSYS // the kernel opens files itself from now on
	}
	flags, e := r.openFlags(in.Flags)
	if e != 0 {
		return e
	}
	n, fd, e := r.path()
	if e != 0 {
		return e
	}
	return r.openNode(n, fd, flags)
}

// openNode opens a node that exists, and replies.
func (r *request) openNode(n *node, fd, flags int) fuse.Errno {
	fs := r.fs
	if n.typ != unix.S_IFREG {
		// The guest's kernel opens devices, pipes and sockets itself.
		if n.typ == unix.S_IFLNK {
			return unix.ELOOP
		}
		return unix.ENXIO
	}
	if e := fs.gone(n, fd); e != 0 {
		return e
	}
	if e := fs.takeFile(); e != 0 {
		return e
	}
	if flags&unix.O_TRUNC != 0 {
		r.expectFile(watch.Modify, n)
	}
	f, e := fs.reopen(fd, flags)
	if e == unix.EPERM && flags&unix.O_NOATIME != 0 {
		f, e = fs.reopen(fd, flags&^unix.O_NOATIME) // only the owner may; the guest's owner may not be ours
	}
	if e != 0 {
		fs.giveFile()
		return e
	}
	h := fs.newHandle(n, f, flags)
	if flags&unix.O_TRUNC != 0 {
		fs.reportFile(watch.Modify, n)
	}
	out := fuse.OpenOut{Fh: h.id}
	var st unix.Statx_t
	if fs.c.Cache != CacheCoherent || fs.pushed() && statx(f, emptyName, unix.AT_EMPTY_PATH, &st) == 0 {
		out.OpenFlags = fs.openFlags(n, &st)
	}
	return reply(r, &out)
}

// gone is ESTALE if the host has removed n, so that the guest looks its name up again. What the guest itself has removed or
// has open it may open (again, by /proc/self/fd, or because its lookup was before the removal).
func (fs *FS) gone(n *node, fd int) fuse.Errno {
	fs.mu.Lock()
	own := n.removed || len(n.opens) > 0
	fs.mu.Unlock()
	if own {
		return 0
	}
	var st unix.Statx_t
	if e := statx(fd, emptyName, unix.AT_EMPTY_PATH, &st); e != 0 {
		return e
	}
	if st.Nlink == 0 {
		return unix.ESTALE
	}
	return 0
}

func opRead(r *request) fuse.Errno {
	var in fuse.ReadIn
	if !decodeAlone(r, &in) || in.Size > maxTransfer || int64(in.Offset) < 0 {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if h.isDir() {
		return unix.EISDIR
	}
	if r.readIntoPipe(h.fd, int64(in.Offset), int(in.Size)) {
		return 0
	}
	n, e := pread(h.fd, r.room(int(in.Size)), int64(in.Offset))
	if e != 0 {
		return e
	}
	r.fill(n)
	return 0
}

func opWrite(r *request) fuse.Errno {
	var in fuse.WriteIn
	if !decode(r, &in) || int(in.Size) != len(r.body)+r.piped || int64(in.Offset) < 0 {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if h.isDir() {
		return unix.EISDIR
	}
	how := 0
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0 {
		how = unix.RWF_APPEND // the offset is what the guest takes for the end
	}
	r.expectFile(watch.Modify, h.node)
	n, e := r.write(h.fd, int64(in.Offset), how)
	if e != 0 {
		return e
	}
	r.fs.reportFile(watch.Modify, h.node)
	if in.WriteFlags&fuse.WRITE_CACHE != 0 && !r.fs.c.Writeback { // whose times are the kernel's own
		r.fs.settle(r.hdr.NodeID)
	}
	return reply(r, &fuse.WriteOut{Size: uint32(n)})
}

// write writes the data of a WRITE, as pwrite does.
func (r *request) write(fd int, off int64, how int) (n int, e fuse.Errno) {
	if r.piped > 0 && how == 0 {
		if n, e = r.writePiped(fd, off); e != unix.EINVAL {
			return n, e
		}
	}
	if r.piped > 0 {
		if e := r.unpipe(r.piped); e != 0 {
			return 0, e
		}
	}
	return pwrite(fd, r.body, off, how)
}

func opFlush(r *request) fuse.Errno {
	var in fuse.FlushIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	if in.Fh == actedFh && r.fs.actedOpen.Load() {
		return 0
	}
	if in.Fh == 0 && r.fs.unopened(unix.S_IFREG) {
		return unix.ENOSYS // nothing is written, and locks are the guest's own
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if r.fs.second.locks.has(r.hdr.NodeID) {
		r.expectFile(watch.CloseWrite, h.node) // of the descriptor that holds them
	}
	r.fs.flushLocks(r.hdr.NodeID, in.LockOwner)
	if h.flags&unix.O_ACCMODE == unix.O_RDONLY {
		return 0
	}
	// A network file system below reports at close what it could not write.
	d, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return errnoOf(err)
	}
	return errnoOf(unix.Close(d))
}

// NoFlush tells whether FLUSH of an export's files does nothing but drop locks: its file systems have no flush of their
// own (fs/*/file.c of Linux 6.18; network file systems have one, and report at close what they could not write).
func NoFlush(root *os.File, submounts SubmountPolicy) bool {
	if submounts != SubmountsHide {
		return false // they may be of any kind
	}
	return local(int(root.Fd()))
}

// local tells whether a file is of a file system of this machine's own disks or memory that is known to us.
func local(fd int) bool {
	var st unix.Statfs_t
	if unix.Fstatfs(fd, &st) != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return true
	}
	return false
}

func opRelease(r *request) fuse.Errno {
	var in fuse.ReleaseIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	if in.Fh == actedFh && r.fs.actedOpen.Load() {
		return 0
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if r.fs.second.locks.has(r.hdr.NodeID) {
		r.expectFile(watch.CloseWrite, h.node)
	}
	if h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		r.expectFile(watch.CloseWrite, h.node)
	}
	r.fs.releaseLocks(r.hdr.NodeID, h, &in)
	if h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		r.fs.reportFile(watch.CloseWrite, h.node)
	}
	return r.fs.closeHandle(r.hdr.NodeID, in.Fh)
}

// opFsync serves FSYNC and FSYNCDIR.
func opFsync(r *request) fuse.Errno {
	var in fuse.FsyncIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if in.FsyncFlags&fuse.FSYNC_FDATASYNC != 0 {
		return errnoOf(unix.Fdatasync(h.fd))
	}
	return errnoOf(unix.Fsync(h.fd))
}
