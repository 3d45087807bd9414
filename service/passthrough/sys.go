// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// System calls as the hot path needs them: names are bytes of the request, so that nothing is allocated, and EINTR is
// tried again.

// cname is a name with its terminating NUL, checked by checkName or made by us.
type cname []byte

var (
	emptyName = cname{0}
	dotName   = cname{'.', 0}
)

func (c cname) String() string { return string(c[:len(c)-1]) }

// ptr is for a system call, which must be made in the same expression.
func (c cname) ptr() unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(c)) }

// is compares without allocating.
func (c cname) is(s string) bool { return string(c[:len(c)-1]) == s }

// nameBuf holds a cname of a node's name on the stack.
type nameBuf [fuse.NAME_MAX + 1]byte

func (b *nameBuf) set(s string) cname {
	n := copy(b[:fuse.NAME_MAX], s)
	b[n] = 0
	return b[:n+1]
}

// setInt is for names in /proc/self/fd.
func (b *nameBuf) setInt(i int) cname {
	return append(strconv.AppendInt(b[:0], int64(i), 10), 0)
}

// statxMask is what an entry's identity and attributes need.
const statxMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID

func statx(dirfd int, name cname, flags int, st *unix.Statx_t) fuse.Errno {
	for {
		_, _, e := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(name.ptr()),
			uintptr(flags), statxMask, uintptr(unsafe.Pointer(st)), 0)
		if e != unix.EINTR {
			return e
		}
	}
}

// statxAt is statx of what name is in the directory, a symbolic link itself, without starting an automount.
func statxAt(dirfd int, name cname, st *unix.Statx_t) fuse.Errno {
	return statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, st)
}

func openat2(dirfd int, name cname, how *unix.OpenHow) (int, fuse.Errno) {
	for {
		fd, _, e := unix.Syscall6(unix.SYS_OPENAT2, uintptr(dirfd), uintptr(name.ptr()),
			uintptr(unsafe.Pointer(how)), unix.SizeofOpenHow, 0, 0)
		// EAGAIN: something was renamed or mounted while we resolved, and the kernel could not tell whether we are still beneath.
		if e == 0 {
			return int(fd), 0
		}
		if e != unix.EINTR && e != unix.EAGAIN {
			return -1, e
		}
	}
}

func openat(dirfd int, name cname, flags int, mode uint32) (int, fuse.Errno) {
	for {
		fd, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(name.ptr()),
			uintptr(flags|unix.O_CLOEXEC|unix.O_LARGEFILE), uintptr(mode), 0, 0)
		if e == 0 {
			return int(fd), 0
		}
		if e != unix.EINTR {
			return -1, e
		}
	}
}

// pread reads until b is full or the file ends.
func pread(fd int, b []byte, off int64) (n int, e fuse.Errno) {
	for n < len(b) {
		m, _, e := unix.Syscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&b[n])), uintptr(len(b)-n), uintptr(off+int64(n)), 0, 0)
		switch {
		case e == unix.EINTR:
		case e != 0 && n > 0:
			return n, 0 // the guest gets the error when it asks for the rest
		case e != 0:
			return 0, e
		case m == 0:
			return n, 0
		default:
			n += int(m)
		}
	}
	return n, 0
}

// pwrite writes all of b, or as much as can be; with RWF_APPEND at the file's end, each part for itself.
func pwrite(fd int, b []byte, off int64, flags int) (n int, e fuse.Errno) {
	for n < len(b) {
		iov := unix.Iovec{Base: &b[n], Len: uint64(len(b) - n)}
		var m uintptr
		if flags == 0 {
			m, _, e = unix.Syscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(iov.Base)), uintptr(iov.Len), uintptr(off+int64(n)), 0, 0)
		} else {
			m, _, e = unix.Syscall6(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off+int64(n)), 0, uintptr(flags))
		}
		switch {
		case e == unix.EINTR:
		case e != 0 && n > 0:
			return n, 0
		case e != 0:
			return 0, e
		default:
			n += int(m)
		}
	}
	return n, 0
}

func getdents(fd int, b []byte) (int, fuse.Errno) {
	for {
		n, _, e := unix.Syscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if e == 0 {
			return int(n), 0
		}
		if e != unix.EINTR {
			return 0, e
		}
	}
}

func unlinkat(dirfd int, name cname, flags int) fuse.Errno {
	_, _, e := unix.Syscall(unix.SYS_UNLINKAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(flags))
	return e
}

func renameat2(olddir int, old cname, newdir int, new cname, flags uint32) fuse.Errno {
	_, _, e := unix.Syscall6(unix.SYS_RENAMEAT2, uintptr(olddir), uintptr(old.ptr()),
		uintptr(newdir), uintptr(new.ptr()), uintptr(flags), 0)
	return e
}

func mknodat(dirfd int, name cname, mode uint32, dev uint32) fuse.Errno {
	_, _, e := unix.Syscall6(unix.SYS_MKNODAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(mode), uintptr(dev), 0, 0)
	return e
}

func mkdirat(dirfd int, name cname, mode uint32) fuse.Errno {
	_, _, e := unix.Syscall(unix.SYS_MKDIRAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(mode))
	return e
}

func symlinkat(target cname, dirfd int, name cname) fuse.Errno {
	_, _, e := unix.Syscall(unix.SYS_SYMLINKAT, uintptr(target.ptr()), uintptr(dirfd), uintptr(name.ptr()))
	return e
}

func linkat(olddir int, old cname, newdir int, new cname, flags int) fuse.Errno {
	_, _, e := unix.Syscall6(unix.SYS_LINKAT, uintptr(olddir), uintptr(old.ptr()),
		uintptr(newdir), uintptr(new.ptr()), uintptr(flags), 0)
	return e
}

func readlinkat(dirfd int, name cname, b []byte) (int, fuse.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_READLINKAT, uintptr(dirfd), uintptr(name.ptr()),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0)
	return int(n), e
}

func fchownat(dirfd int, name cname, uid, gid uint32, flags int) fuse.Errno {
	_, _, e := unix.Syscall6(unix.SYS_FCHOWNAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(uid), uintptr(gid), uintptr(flags), 0)
	return e
}

func fchmodat(dirfd int, name cname, mode uint32) fuse.Errno {
	_, _, e := unix.Syscall(unix.SYS_FCHMODAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(mode))
	return e
}

func utimensat(dirfd int, name cname, ts *[2]unix.Timespec, flags int) fuse.Errno {
	_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(dirfd), uintptr(name.ptr()), uintptr(unsafe.Pointer(ts)), uintptr(flags), 0, 0)
	return e
}

// errnoOf is the errno of an error of package unix; nil is 0, and what is no errno EIO.
func errnoOf(err error) fuse.Errno {
	if err == nil {
		return 0
	}
	if e, ok := err.(fuse.Errno); ok {
		return e
	}
	return unix.EIO
}
