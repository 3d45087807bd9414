// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// opSetxattr sets an extended attribute.
func opSetxattr(r *request) fuse.Errno { return r.attributed((*request).setxattr) }

// attributed has change change the request's node, and tells of it if there was no error.
func (r *request) attributed(change func(*request) fuse.Errno) fuse.Errno {
	n, e := r.self()
	if e != 0 {
		return e
	}
	r.expectFile(watch.Attrib, n)
	if e = change(r); e == 0 {
		r.fs.reportFile(watch.Attrib, n)
	}
	return e
}

func (r *request) setxattr() fuse.Errno {
	fs := r.fs
	if fs.c.Xattr == XattrOff {
		return unix.ENOSYS
	}
	var in fuse.SetxattrIn
	if fs.session.Load().has(fuse.SETXATTR_EXT) {
		if !decode(r, &in) {
			return unix.EINVAL
		}
	} else {
		var c fuse.SetxattrInCompat
		if !decode(r, &c) {
			return unix.EINVAL
		}
		in.Size, in.Flags = c.Size, c.Flags
	}
	a, e := r.attribute()
	if e != 0 {
		return e
	}
	value := r.body
	switch {
	case uint64(in.Size) != uint64(len(value)) || in.Flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0:
		return unix.EINVAL
	case len(value) > xattrSizeMax:
		return unix.E2BIG
	case a.capability() && !fs.c.Suid:
		return unix.EPERM
	case !a.acl():
		return a.set(value, in.Flags)
	}
	if e := mapACL(value, fs.ids.uidIn, fs.ids.gidIn); e != 0 {
		return e
	}
	if in.SetxattrFlags&fuse.SETXATTR_ACL_KILL_SGID == 0 {
		// Else the host's kernel would take the set-group-id bit away, as if the guest's caller were not in the group.
		return fs.second.creds.withFsetid(func() fuse.Errno { return a.set(value, in.Flags) })
	}
	if e := a.set(value, in.Flags); e != 0 {
		return e
	}
	var st unix.Statx_t
	if e := statx(a.fd, emptyName, unix.AT_EMPTY_PATH, &st); e != 0 || st.Mode&unix.S_ISGID == 0 {
		return e
	}
	return fs.chmod(a.fd, uint32(st.Mode)&unix.S_IFMT, uint32(st.Mode)&^(unix.S_IFMT|unix.S_ISGID))
}

// opGetxattr reads an extended attribute, or its size.
func opGetxattr(r *request) fuse.Errno {
	if r.fs.c.Xattr == XattrOff {
		return unix.ENOSYS
	}
	var in fuse.GetxattrIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	a, e := r.attribute()
	if e == unix.EPERM {
		return unix.ENODATA
	}
	if e != 0 {
		return e
	}
	if in.Size == 0 {
		n, e := a.get(nil)
		if e != 0 {
			return e
		}
		return reply(r, &fuse.GetxattrOut{Size: uint32(n)})
	}
	b := r.room(int(min(in.Size, xattrSizeMax)))
	n, e := a.get(b)
	if e != 0 {
		return e
	}
	if a.acl() {
		out := func(f func(uint32) uint32) func(uint32) (uint32, bool) {
			return func(id uint32) (uint32, bool) { return f(id), true }
		}
		if e := mapACL(b[:n], out(r.fs.ids.uidOut), out(r.fs.ids.gidOut)); e != 0 {
			return e
		}
	}
	r.fill(n)
	return 0
}

// opListxattr lists the names of extended attributes, or tells the size of the list.
func opListxattr(r *request) fuse.Errno {
	fs := r.fs
	if fs.c.Xattr == XattrOff {
		return unix.ENOSYS
	}
	var in fuse.GetxattrIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	_, fd, e := r.path()
	if e != 0 {
		return e
	}
	room := r.room(int(min(in.Size, xattrSizeMax)))[:0]
	// The names here are not those on the host, so even the size wants the whole list.
	tmp := fs.limits.getBuffer(1<<minBufferBits, true)
	defer func() { fs.limits.putBuffer(tmp) }()
	n, e := listxattr(fd, tmp.b)
	if e == unix.ERANGE {
		fs.limits.putBuffer(tmp)
		tmp = fs.limits.getBuffer(xattrSizeMax, true)
		n, e = listxattr(fd, tmp.b)
	}
	if e != 0 {
		return e
	}
	var size uint32
	var buf [2 * xattrNameMax]byte
	for host := range bytes.SplitSeq(tmp.b[:n], []byte{0}) {
		if len(host) == 0 {
			continue
		}
		guest, ok := fs.second.names.toGuest(buf[:0], host)
		if !ok {
			continue
		}
		size += uint32(len(guest)) + 1
		if in.Size == 0 {
			continue
		}
		if len(room)+len(guest)+1 > cap(room) || size > in.Size {
			return unix.ERANGE
		}
		room = append(append(room, guest...), 0)
	}
	if in.Size == 0 {
		return reply(r, &fuse.GetxattrOut{Size: size})
	}
	r.fill(len(room))
	return 0
}

// opRemovexattr removes an extended attribute.
func opRemovexattr(r *request) fuse.Errno { return r.attributed((*request).removexattr) }

func (r *request) removexattr() fuse.Errno {
	if r.fs.c.Xattr == XattrOff {
		return unix.ENOSYS
	}
	a, e := r.attribute()
	if e == unix.EPERM {
		return unix.ENODATA
	}
	if e != 0 {
		return e
	}
	e = a.remove()
	if e == unix.EPERM && a.capability() {
		// The guest's kernel removes it before it writes; for that no privilege is needed, but for the call, without
		// CAP_SETFCAP, it is. A chown that changes no owner makes the kernel remove it.
		return fchownat(a.fd, emptyName, noID, noID, unix.AT_EMPTY_PATH)
	}
	return e
}

// attribute is an extended attribute of the request's node.
type attribute struct {
	fd   int // O_PATH
	name [xattrNameMax + 1]byte
	n    int // the host's name is name[:n], then a NUL
	caps bool
}

// attribute takes the name from the body.
func (r *request) attribute() (a attribute, e fuse.Errno) {
	guest, e := r.text()
	if e != 0 {
		return a, e
	}
	var buf [2 * xattrNameMax]byte
	host, e := r.fs.second.names.toHost(buf[:0], guest[:len(guest)-1])
	if e != 0 {
		return a, e
	}
	a.n = copy(a.name[:xattrNameMax], host)
	a.caps = guest.is(capability) || string(host) == capability
	_, a.fd, e = r.path()
	return a, e
}

// capability tells whether it is file capabilities, under whatever name.
func (a *attribute) capability() bool { return a.caps }

// acl tells whether it is a POSIX ACL, whose value holds owners.
func (a *attribute) acl() bool { return bytes.HasPrefix(a.name[:a.n], []byte(aclPrefix)) }

// The calls go by a path, since they take no O_PATH descriptor, and others only some types of files can have
// (setxattrat and its like came with Linux 6.13). /proc/self/fd/N leads to what the descriptor refers to, and no further, even if
// that is a symbolic link. A worker's root holds that directory, for this.

func (a *attribute) set(value []byte, flags uint32) fuse.Errno {
	p := procPath(a.fd)
	_, _, e := unix.Syscall6(unix.SYS_SETXATTR, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a.name)),
		uintptr(unsafe.Pointer(unsafe.SliceData(value))), uintptr(len(value)), uintptr(flags), 0)
	return e
}

func (a *attribute) get(b []byte) (int, fuse.Errno) {
	p := procPath(a.fd)
	n, _, e := unix.Syscall6(unix.SYS_GETXATTR, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a.name)),
		uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0)
	return int(n), e
}

func (a *attribute) remove() fuse.Errno {
	p := procPath(a.fd)
	_, _, e := unix.Syscall(unix.SYS_REMOVEXATTR, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(&a.name)), 0)
	return e
}

func listxattr(fd int, b []byte) (int, fuse.Errno) {
	p := procPath(fd)
	n, _, e := unix.Syscall(unix.SYS_LISTXATTR, uintptr(unsafe.Pointer(&p)), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), e
}

// hasDefaultACL tells whether what is made in the directory fd (O_PATH) gets its mode from the directory's ACL.
func hasDefaultACL(fd int) bool {
	a := attribute{fd: fd}
	a.n = copy(a.name[:], "system.posix_acl_default")
	_, e := a.get(nil)
	return e == 0
}

const procDir = "/proc/self/fd/"

// procPath makes a path of a descriptor, with a NUL.
func procPath(fd int) (p [len(procDir) + 11]byte) {
	strconv.AppendInt(append(p[:0], procDir...), int64(fd), 10)
	return p
}
