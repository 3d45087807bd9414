// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// caps is a thread's capability sets in capset(2)'s form, version 3: the low and the high 32 bits.
type caps [2]unix.CapUserData

// creds makes files under the owner that the guest's caller is on the host, by changing the file system
// ids of one OS thread. Nothing else of the process changes, and nothing after the call.
//
// The system calls are raw, because Go's own change every thread.
type creds struct {
	base    caps // of every thread, as New found them
	fsetid  caps // base with CAP_FSETID effective; the same as base if it is already, or not permitted
	self    Cred
	groups  []uint32 // of the process
	foreign bool     // may make files for others
}

func newCreds() (*creds, error) {
	c := &creds{self: Cred{uint32(os.Geteuid()), uint32(os.Getegid())}}
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &c.base[0]); err != nil {
		return nil, fmt.Errorf("reading this process's capabilities: %w", os.NewSyscallError("capget", err))
	}
	groups, err := os.Getgroups()
	if err != nil {
		return nil, fmt.Errorf("reading this process's groups: %w", err)
	}
	for _, g := range groups {
		c.groups = append(c.groups, uint32(g))
	}
	has := func(which uint) bool { return c.base[0].Effective&(1<<which) != 0 }
	c.foreign = has(unix.CAP_SETUID) && has(unix.CAP_SETGID) && has(unix.CAP_DAC_OVERRIDE)
	c.fsetid = c.base
	c.fsetid[0].Effective |= c.base[0].Permitted & (1 << unix.CAP_FSETID)
	return c, nil
}

// as runs fn as cred, in the further group *group if that is not nil: a file that fn makes belongs to
// cred. fn keeps the process's capabilities: whether the caller may is for the guest's kernel to say, which knows
// all of its groups; the host must not refuse for the lack of one. Without privilege fn runs as the process is.
//
// It panics if it cannot give the thread its own ids back: going on would serve others as this caller.
func (c *creds) as(cred Cred, group *uint32, fn func() fuse.Errno) fuse.Errno {
	if !c.foreign || (cred == c.self && group == nil) {
		return fn()
	}
	runtime.LockOSThread()
	defer func() {
		c.restore(cred, group != nil) // if it panics the thread stays locked, and dies with its goroutine
		runtime.UnlockOSThread()
	}()
	if errno := c.become(cred, group); errno != 0 {
		return errno
	}
	return fn()
}

func (c *creds) become(cred Cred, group *uint32) fuse.Errno {
	if group != nil {
		if errno := setgroups([]uint32{*group}); errno != 0 {
			return errno
		}
	}
	// These two return the old id, never an error: asked again they tell whether they worked.
	setfsid(unix.SYS_SETFSGID, cred.GID)
	setfsid(unix.SYS_SETFSUID, cred.UID)
	if setfsid(unix.SYS_SETFSGID, cred.GID) != cred.GID || setfsid(unix.SYS_SETFSUID, cred.UID) != cred.UID {
		return fuse.Errno(unix.EOVERFLOW) // an id that this user namespace does not have
	}
	// Going from uid 0 to another has cleared the file system's capabilities from the effective set
	// (capabilities(7), "Effect of user ID changes").
	return capset(&c.base)
}

func (c *creds) restore(cred Cred, groups bool) {
	setfsid(unix.SYS_SETFSUID, c.self.UID)
	setfsid(unix.SYS_SETFSGID, c.self.GID)
	ok := setfsid(unix.SYS_SETFSUID, c.self.UID) == c.self.UID && setfsid(unix.SYS_SETFSGID, c.self.GID) == c.self.GID
	if groups {
		ok = setgroups(c.groups) == 0 && ok
	}
	// Going back to uid 0 has raised all that is permitted, CAP_FSETID too.
	if capset(&c.base) != 0 || !ok {
		panic(fmt.Sprintf("passthrough: thread stays uid %d, gid %d", cred.UID, cred.GID))
	}
}

// withFsetid runs fn with CAP_FSETID, if the process may have it. fn may set the set-group-id bit
// on what belongs to a group that the server is not in; a write or truncate in it would not clear
// set-id bits, so there is none.
func (c *creds) withFsetid(fn func() fuse.Errno) fuse.Errno {
	if c.fsetid == c.base {
		return fn()
	}
	runtime.LockOSThread()
	defer func() {
		if capset(&c.base) != 0 {
			panic("passthrough: thread keeps CAP_FSETID")
		}
		runtime.UnlockOSThread()
	}()
	if errno := capset(&c.fsetid); errno != 0 {
		return errno
	}
	return fn()
}

func setfsid(call uintptr, id uint32) (old uint32) {
	r, _, _ := unix.RawSyscall(call, uintptr(id), 0, 0)
	return uint32(r)
}

func setgroups(gids []uint32) fuse.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(unsafe.Pointer(unsafe.SliceData(gids))), 0)
	return errno
}

func capset(c *caps) fuse.Errno {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	_, _, errno := unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&c[0])), 0)
	return errno
}

// asCaller runs fn, which makes a file, as the owner that the request's caller is on the host.
func (r *request) asCaller(fn func() fuse.Errno) fuse.Errno {
	fs := r.fs
	if !fs.second.creds.foreign {
		return fn()
	}
	uid, ok := fs.ids.uidIn(r.hdr.UID)
	gid, ok2 := fs.ids.gidIn(r.hdr.GID)
	if !ok || !ok2 {
		return unix.EOVERFLOW // as for an owner that a file system cannot store
	}
	var group *uint32
	if r.hasGroup && fs.ids.squash == nil {
		if g, ok := fs.ids.gidIn(r.group); ok {
			group = &g
		}
	}
	return fs.second.creds.as(Cred{uid, gid}, group, fn)
}

// safeMode is mode without the bits that a guest may not plant: a set-id program would
// run on the host as its owner, who is more than the guest. Set-group-id on a directory only makes files of its group.
func (fs *FS) safeMode(typ, mode uint32) uint32 {
	switch {
	case typ == unix.S_IFDIR:
		return mode &^ unix.S_ISUID
	case !fs.c.Suid:
		return mode &^ (unix.S_ISUID | unix.S_ISGID)
	}
	return mode
}

// createMode is the mode to make a file of type typ with in the directory dirfd.
func (fs *FS) createMode(dirfd int, typ, mode, umask uint32) uint32 {
	// Where the guest's kernel knows ACLs it leaves the umask to us, because a default ACL takes its place.
	if fs.c.ACL && !hasDefaultACL(dirfd) {
		mode &^= umask & 0o777
	}
	return fs.safeMode(typ, mode)
}

// chmod changes the mode of what fd (O_PATH) is, a file of type typ.
func (fs *FS) chmod(fd int, typ, mode uint32) fuse.Errno {
	var buf nameBuf
	name := buf.setInt(fd)
	mode = fs.safeMode(typ, mode&0o7777)
	if mode&unix.S_ISGID == 0 {
		return fchmodat(fs.procFD, name, mode)
	}
	return fs.second.creds.withFsetid(func() fuse.Errno { return fchmodat(fs.procFD, name, mode) })
}

// chown gives what fd (O_PATH) is to the guest's uid and gid; noID leaves one as it is. The host's kernel clears
// set-id bits and capabilities of programs with it.
func (r *request) chown(fd int, uid, gid uint32) fuse.Errno {
	ids, ok := &r.fs.ids, true
	if uid != noID {
		uid, ok = ids.uidIn(uid)
	}
	if gid != noID && ok {
		gid, ok = ids.gidIn(gid)
	}
	if !ok {
		return unix.EINVAL
	}
	chown := func() fuse.Errno { return fchownat(fd, emptyName, uid, gid, unix.AT_EMPTY_PATH) }
	if r.hdr.UID == 0 {
		// For root, set-group-id stays where it is no program's: without the group's permission to execute.
		return r.fs.second.creds.withFsetid(chown)
	}
	return chown()
}
