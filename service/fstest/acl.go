// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

var aclCases = []testCase{
	{"acl/access", false, aclAccess},
	{"acl/minimal", false, aclMinimal},
	{"acl/chmod", false, aclChmod},
	{"acl/default", false, aclDefault},
	{"acl/default-umask", false, aclDefaultUmask},
	{"acl/default-of-file", false, aclDefaultOfFile},
	{"acl/enforced", true, aclEnforced},
	{"acl/inherited-enforced", true, aclInheritedEnforced},
	{"acl/invalid", false, aclInvalid},
}

const (
	aclOfAccess  = "system.posix_acl_access"
	aclOfDefault = "system.posix_acl_default"
)

// aclEntry is one line of an ACL; tags as in acl(5) and the kernel's posix_acl.h.
type aclEntry struct {
	tag, perm uint16
	id        uint32
}

const (
	aclUserObj = 1 << iota
	aclUser
	aclGroupObj
	aclGroup
	aclMask
	aclOther
	aclNoID = 0xffffffff
)

// acl encodes entries as posix_acl_xattr.h says: little-endian, version 2.
func acl(entries ...aclEntry) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, x := range entries {
		b = binary.LittleEndian.AppendUint16(b, x.tag)
		b = binary.LittleEndian.AppendUint16(b, x.perm)
		b = binary.LittleEndian.AppendUint32(b, x.id)
	}
	return b
}

// namedACL gives one user rights beside owner, group and others.
func namedACL(owner, uid, perm, group, mask, other uint16) []byte {
	return acl(aclEntry{aclUserObj, owner, aclNoID}, aclEntry{aclUser, perm, uint32(uid)}, aclEntry{aclGroupObj, group, aclNoID},
		aclEntry{aclMask, mask, aclNoID}, aclEntry{aclOther, other, aclNoID})
}

func aclAccess(e *env) {
	e.file("f", "x")
	e.noxattr("f", aclOfAccess)
	a := namedACL(6, 1234, 7, 4, 6, 0)
	e.ok(unix.Setxattr(e.p("f"), aclOfAccess, a, 0), "set the ACL")
	e.eq(e.getxattr("f", aclOfAccess), string(a), "ACL")
	e.mode("f", unix.S_IFREG|0o660) // the group bits are the mask
	e.ok(unix.Removexattr(e.p("f"), aclOfAccess), "remove the ACL")
	e.noxattr("f", aclOfAccess)
}

// aclMinimal: an ACL that says no more than a mode becomes the mode.
func aclMinimal(e *env) {
	e.file("f", "x")
	a := acl(aclEntry{aclUserObj, 7, aclNoID}, aclEntry{aclGroupObj, 5, aclNoID}, aclEntry{aclOther, 1, aclNoID})
	e.ok(unix.Setxattr(e.p("f"), aclOfAccess, a, 0), "set the ACL")
	e.mode("f", unix.S_IFREG|0o751)
	e.noxattr("f", aclOfAccess)
}

func aclChmod(e *env) {
	e.file("f", "x")
	e.ok(unix.Setxattr(e.p("f"), aclOfAccess, namedACL(6, 1234, 7, 4, 6, 0), 0), "set the ACL")
	e.ok(unix.Chmod(e.p("f"), 0o714), "chmod")
	e.eq(e.getxattr("f", aclOfAccess), string(namedACL(7, 1234, 7, 4, 1, 4)), "ACL after chmod")
	e.mode("f", unix.S_IFREG|0o714)
}

func aclDefault(e *env) {
	e.mkdir("d")
	def := namedACL(7, 1234, 6, 5, 7, 0)
	e.ok(unix.Setxattr(e.p("d"), aclOfDefault, def, 0), "set the default ACL")
	e.mode("d", unix.S_IFDIR|0o755)
	e.ok(e.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o664), "create")
	e.eq(e.getxattr("d/f", aclOfAccess), string(namedACL(6, 1234, 6, 5, 6, 0)), "ACL of a new file")
	e.mode("d/f", unix.S_IFREG|0o660)
	e.noxattr("d/f", aclOfDefault)
	e.ok(unix.Mkdir(e.p("d/sub"), 0o755), "mkdir")
	e.eq(e.getxattr("d/sub", aclOfDefault), string(def), "default ACL of a new directory")
	e.eq(e.getxattr("d/sub", aclOfAccess), string(namedACL(7, 1234, 6, 5, 5, 0)), "ACL of a new directory")
	e.ok(unix.Mkfifo(e.p("d/p"), 0o640), "mkfifo")
	e.eq(e.getxattr("d/p", aclOfAccess), string(namedACL(6, 1234, 6, 5, 4, 0)), "ACL of a new fifo")
	e.ok(unix.Symlink("x", e.p("d/s")), "symlink in a directory with a default ACL")
	e.ok(unix.Removexattr(e.p("d"), aclOfDefault), "remove the default ACL")
	e.ok(e.tryOpen("d/g", unix.O_CREAT|unix.O_RDWR, 0o664), "create")
	e.noxattr("d/g", aclOfAccess)
}

// aclDefaultUmask: where there is a default ACL the umask has no say.
func aclDefaultUmask(e *env) {
	e.mkdir("d")
	e.mkdir("plain")
	e.ok(unix.Setxattr(e.p("d"), aclOfDefault, namedACL(7, 1234, 7, 7, 7, 7), 0), "set the default ACL")
	defer unix.Umask(unix.Umask(0o077))
	e.ok(e.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o666), "create")
	e.mode("d/f", unix.S_IFREG|0o666)
	e.ok(unix.Mkdir(e.p("d/sub"), 0o777), "mkdir")
	e.mode("d/sub", unix.S_IFDIR|0o777)
	e.ok(e.tryOpen("plain/f", unix.O_CREAT|unix.O_RDWR, 0o666), "create")
	e.mode("plain/f", unix.S_IFREG|0o600)
	fd := e.open("d", unix.O_TMPFILE|unix.O_RDWR, 0o666)
	e.eq(e.fstat(fd).Mode, uint32(unix.S_IFREG|0o666), "mode of a temporary file")
}

func aclDefaultOfFile(e *env) {
	e.file("f", "x")
	e.errno(unix.Setxattr(e.p("f"), aclOfDefault, namedACL(7, 1, 7, 7, 7, 7), 0), unix.EACCES, "a default ACL of a file")
}

func aclEnforced(e *env) {
	e.file("f", "secret")
	e.ok(unix.Chmod(e.p("f"), 0o600), "chmod")
	u := e.user(nobody, nobody)
	e.errno(u.tryOpen("f", unix.O_RDONLY, 0), unix.EACCES, "open without an ACL")
	set := func(a []byte, what string) {
		e.Helper()
		e.ok(unix.Setxattr(e.p("f"), aclOfAccess, a, 0), what)
	}
	set(namedACL(6, nobody, 4, 0, 4, 0), "let the user read")
	e.ok(u.tryOpen("f", unix.O_RDONLY, 0), "open for reading")
	e.errno(u.tryOpen("f", unix.O_RDWR, 0), unix.EACCES, "open for writing")
	set(namedACL(6, nobody, 6, 0, 0, 0), "let the mask forbid it")
	e.errno(u.tryOpen("f", unix.O_RDONLY, 0), unix.EACCES, "open behind the mask")
	set(namedACL(6, nobody, 0, 4, 4, 4), "forbid one user what others may")
	e.errno(u.tryOpen("f", unix.O_RDONLY, 0), unix.EACCES, "open as the one who may not")
	e.ok(e.user(4242, 4242).tryOpen("f", unix.O_RDONLY, 0), "open as another")
	set(acl(aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclGroupObj, 0, aclNoID}, aclEntry{aclGroup, 4, 777},
		aclEntry{aclMask, 4, aclNoID}, aclEntry{aclOther, 0, aclNoID}), "let a group read")
	e.errno(u.tryOpen("f", unix.O_RDONLY, 0), unix.EACCES, "open outside the group")
	e.ok(e.user(nobody, nobody, 777).tryOpen("f", unix.O_RDONLY, 0), "open as a member by supplementary group")
}

func aclInheritedEnforced(e *env) {
	e.mkdir("d")
	e.ok(unix.Setxattr(e.p("d"), aclOfDefault, namedACL(7, nobody, 6, 0, 7, 0), 0), "set the default ACL")
	e.ok(e.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o660), "create")
	u := e.user(nobody, nobody)
	e.ok(u.tryOpen("d/f", unix.O_RDWR, 0), "open by an inherited right")
	e.errno(e.user(4242, 4242).tryOpen("d/f", unix.O_RDONLY, 0), unix.EACCES, "open as another")
}

func aclInvalid(e *env) {
	e.file("f", "x")
	for what, a := range map[string][]byte{
		"no owner":         acl(aclEntry{aclGroupObj, 4, aclNoID}, aclEntry{aclOther, 4, aclNoID}),
		"no mask":          acl(aclEntry{aclUserObj, 6, aclNoID}, aclEntry{aclUser, 4, 5}, aclEntry{aclGroupObj, 4, aclNoID}, aclEntry{aclOther, 4, aclNoID}),
		"half an entry":    acl(aclEntry{aclUserObj, 6, aclNoID})[:8],
		"a tag that isn't": acl(aclEntry{0x1234, 6, aclNoID}),
	} {
		e.errno(unix.Setxattr(e.p("f"), aclOfAccess, a, 0), unix.EINVAL, what)
	}
	e.mode("f", unix.S_IFREG|0o644)
}
