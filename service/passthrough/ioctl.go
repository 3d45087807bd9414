// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// From linux/fs.h. FS_IOC_GETFLAGS and FS_IOC_SETFLAGS say long and mean int.
const (
	fsIocFsgetxattr = 0x801c581f // _IOR('X', 31, struct fsxattr)
	fsIocFssetxattr = 0x401c5820 // _IOW('X', 32, struct fsxattr)

	fsImmutableFl    = 0x10
	fsAppendFl       = 0x20
	fsXflagImmutable = 0x08
	fsXflagAppend    = 0x10
)

// fsxattr is struct fsxattr.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	pad                                           [8]byte
}

// opIoctl knows the file attributes of chattr and lsattr, as the kernel asks for them since 5.13 (fuse_fileattr_get: the
// size is that of the value) and as it passed them on before (the size is that in the number). No other ioctl
// reaches the host: what it would do there, the guest's kernel has not checked.
func opIoctl(r *request) fuse.Errno {
	var in fuse.IoctlIn
	if !decode(r, &in) || uint64(in.InSize) != uint64(len(r.body)) {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	set := false
	var flags, was [2]uint32
	var fx, fxWas fsxattr
	switch in.Cmd {
	case unix.FS_IOC_SETFLAGS:
		set = true
		fallthrough
	case unix.FS_IOC_GETFLAGS:
		size := in.OutSize
		if set {
			size = in.InSize
		}
		if size != 4 && size != 8 {
			return unix.EINVAL
		}
		if e := ioctl(h.fd, unix.FS_IOC_GETFLAGS, unsafe.Pointer(&was)); e != 0 {
			return e
		}
		if !set {
			return r.ioctlReply(bytesOf(&was)[:size])
		}
		copy(bytesOf(&flags)[:4], r.body)
		if e := r.mayChange(flags[0]^was[0], fsImmutableFl|fsAppendFl); e != 0 {
			return e
		}
		if e := ioctl(h.fd, unix.FS_IOC_SETFLAGS, unsafe.Pointer(&flags)); e != 0 {
			return e
		}
	case fsIocFssetxattr:
		set = true
		fallthrough
	case fsIocFsgetxattr:
		size := in.OutSize
		if set {
			size = in.InSize
		}
		if int(size) != len(bytesOf(&fx)) {
			return unix.EINVAL
		}
		if e := ioctl(h.fd, fsIocFsgetxattr, unsafe.Pointer(&fxWas)); e != 0 {
			return e
		}
		if !set {
			return r.ioctlReply(bytesOf(&fxWas))
		}
		copy(bytesOf(&fx), r.body)
		// A project id says whose quota the space counts to.
		if e := r.mayChange(fx.projid^fxWas.projid, ^uint32(0)); e != 0 {
			return e
		}
		if e := r.mayChange(fx.xflags^fxWas.xflags, fsXflagImmutable|fsXflagAppend); e != 0 {
			return e
		}
		r.expectFile(watch.Attrib, h.node)
		if e := ioctl(h.fd, fsIocFssetxattr, unsafe.Pointer(&fx)); e != 0 {
			return e
		}
	default:
		return unix.ENOTTY
	}
	r.fs.reportFile(watch.Attrib, h.node)
	return r.ioctlReply(nil)
}

// mayChange refuses what only the host's root may do, for a guest whose root is not.
func (r *request) mayChange(changed, guarded uint32) fuse.Errno {
	switch {
	case r.fs.c.ReadOnly:
		return unix.EROFS
	case changed&guarded != 0 && r.fs.c.RootAs != RootTrust:
		return unix.EPERM
	}
	return 0
}

func (r *request) ioctlReply(b []byte) fuse.Errno {
	reply(r, &fuse.IoctlOut{})
	r.out = append(r.out, b...)
	return 0
}

func bytesOf[T [2]uint32 | fsxattr](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

func ioctl(fd int, cmd uintptr, arg unsafe.Pointer) fuse.Errno {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), cmd, uintptr(arg))
	return e
}
