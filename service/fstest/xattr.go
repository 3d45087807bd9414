// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var xattrCases = []testCase{
	{"xattr/basic", false, xattrBasic},
	{"xattr/flags", false, xattrFlags},
	{"xattr/sizes", false, xattrSizes},
	{"xattr/big", false, xattrBig},
	{"xattr/list", false, xattrList},
	{"xattr/errors", false, xattrErrors},
	{"xattr/kinds", false, xattrKinds},
	{"xattr/descriptor", false, xattrDescriptor},
	{"xattr/trusted", true, xattrTrusted},
}

func (e *env) getxattr(name, attr string) string {
	e.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(e.p(name), attr, b)
	e.ok(err, "getxattr "+attr)
	return string(b[:n])
}

func (e *env) noxattr(name, attr string) {
	e.Helper()
	_, err := unix.Lgetxattr(e.p(name), attr, nil)
	e.errno(err, unix.ENODATA, "getxattr "+attr)
}

// userXattrs lists a file's user attributes, sorted.
func (e *env) userXattrs(name string) []string {
	e.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(e.p(name), b)
	e.ok(err, "listxattr")
	var all []string
	for a := range strings.SplitSeq(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(a, "user.") {
			all = append(all, a)
		}
	}
	slices.Sort(all)
	return all
}

func xattrBasic(e *env) {
	e.file("f", "x")
	e.noxattr("f", "user.a")
	for _, v := range []string{"value", "", "bytes \x00\xff\n", "longer than it was before"} {
		e.ok(unix.Setxattr(e.p("f"), "user.a", []byte(v), 0), "setxattr")
		e.eq(e.getxattr("f", "user.a"), v, "value")
	}
	e.ok(unix.Rename(e.p("f"), e.p("g")), "rename")
	e.eq(e.getxattr("g", "user.a"), "longer than it was before", "value after a rename")
	e.ok(unix.Removexattr(e.p("g"), "user.a"), "removexattr")
	e.noxattr("g", "user.a")
	e.errno(unix.Removexattr(e.p("g"), "user.a"), unix.ENODATA, "remove what is not there")
}

func xattrFlags(e *env) {
	e.file("f", "x")
	e.errno(unix.Setxattr(e.p("f"), "user.a", []byte("1"), unix.XATTR_REPLACE), unix.ENODATA, "replace what is not there")
	e.ok(unix.Setxattr(e.p("f"), "user.a", []byte("1"), unix.XATTR_CREATE), "create")
	e.errno(unix.Setxattr(e.p("f"), "user.a", []byte("2"), unix.XATTR_CREATE), unix.EEXIST, "create what is there")
	e.eq(e.getxattr("f", "user.a"), "1", "value")
	e.ok(unix.Setxattr(e.p("f"), "user.a", []byte("3"), unix.XATTR_REPLACE), "replace")
	e.eq(e.getxattr("f", "user.a"), "3", "value")
	e.errno(unix.Setxattr(e.p("f"), "user.a", nil, 1<<10), unix.EINVAL, "a flag that is none")
}

func xattrSizes(e *env) {
	e.file("f", "x")
	e.ok(unix.Setxattr(e.p("f"), "user.a", []byte("0123456789"), 0), "setxattr")
	n, err := unix.Getxattr(e.p("f"), "user.a", nil)
	e.ok(err, "ask for the size")
	e.eq(n, 10, "size")
	_, err = unix.Getxattr(e.p("f"), "user.a", make([]byte, 9))
	e.errno(err, unix.ERANGE, "a buffer that is too small")
	n, err = unix.Getxattr(e.p("f"), "user.a", make([]byte, 10))
	e.ok(err, "a buffer that fits")
	e.eq(n, 10, "size")
	n, err = unix.Listxattr(e.p("f"), nil)
	e.ok(err, "ask for the size of the list")
	if n < len("user.a")+1 {
		e.Errorf("the list has %d bytes", n)
	}
	_, err = unix.Listxattr(e.p("f"), make([]byte, 3))
	e.errno(err, unix.ERANGE, "a buffer that is too small for the list")
}

func xattrBig(e *env) {
	e.file("f", "x")
	v := string(random(3000, 4))
	e.ok(unix.Setxattr(e.p("f"), "user.big", []byte(v), 0), "setxattr of 3000 bytes")
	e.eq(e.getxattr("f", "user.big"), v, "value")
	// What is larger than a block of ext4 is taken by some file systems, refused by others; never cut.
	huge := string(random(64<<10, 5))
	switch err := unix.Setxattr(e.p("f"), "user.big", []byte(huge), 0); err {
	case nil:
		v = huge
	case unix.ENOSPC, unix.E2BIG:
	default:
		e.Errorf("setxattr of 64 KiB: %v", err)
	}
	if e.getxattr("f", "user.big") != v {
		e.Error("the value was damaged")
	}
	e.errno(unix.Setxattr(e.p("f"), "user.a", make([]byte, 64<<10+1), 0), unix.E2BIG, "setxattr of more than 64 KiB")
}

func xattrList(e *env) {
	e.file("f", "x")
	e.eq(e.userXattrs("f"), []string(nil), "no attributes")
	want := []string{"user.UPPER", "user.a", "user.a.b.c", "user.with space", "user.\xff"}
	for _, a := range want {
		e.ok(unix.Setxattr(e.p("f"), a, []byte(a), 0), "setxattr")
	}
	slices.Sort(want)
	e.eq(e.userXattrs("f"), want, "attributes")
	e.ok(unix.Removexattr(e.p("f"), "user.a"), "removexattr")
	e.eq(e.userXattrs("f"), slices.DeleteFunc(want, func(s string) bool { return s == "user.a" }), "attributes")
}

func xattrErrors(e *env) {
	e.file("f", "x")
	e.errno(unix.Setxattr(e.p("f"), "nonsense.a", []byte("x"), 0), unix.EOPNOTSUPP, "a namespace that is none")
	e.errno(unix.Setxattr(e.p("f"), "", []byte("x"), 0), unix.ERANGE, "an empty name")
	e.errno(unix.Setxattr(e.p("f"), "user."+strings.Repeat("n", 251), []byte("x"), 0), unix.ERANGE, "a name of 256 bytes")
	long := "user." + strings.Repeat("n", 250)
	e.ok(unix.Setxattr(e.p("f"), long, []byte("x"), 0), "a name of 255 bytes")
	e.eq(e.getxattr("f", long), "x", "value")
	e.errno(unix.Setxattr(e.p("none"), "user.a", []byte("x"), 0), unix.ENOENT, "a file that is not there")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	e.errno(unix.Lsetxattr(e.p("s"), "user.a", []byte("x"), 0), unix.EPERM, "a user attribute of a symlink")
}

func xattrKinds(e *env) {
	e.mkdir("d")
	e.ok(unix.Setxattr(e.p("d"), "user.a", []byte("dir"), 0), "setxattr of a directory")
	e.eq(e.getxattr("d", "user.a"), "dir", "value")
	e.file("f", "x")
	e.ok(unix.Link(e.p("f"), e.p("g")), "link")
	e.ok(unix.Setxattr(e.p("f"), "user.a", []byte("file"), 0), "setxattr")
	e.eq(e.getxattr("g", "user.a"), "file", "value by the other name")
}

func xattrDescriptor(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.ok(unix.Fsetxattr(fd, "user.a", []byte("x"), 0), "fsetxattr")
	b := make([]byte, 100)
	n, err := unix.Flistxattr(fd, b)
	e.ok(err, "flistxattr")
	if !bytes.Contains(b[:n], []byte("user.a\x00")) {
		e.Errorf("the list is %q", b[:n])
	}
	e.ok(unix.Unlink(e.p("f")), "unlink")
	e.ok(unix.Fsetxattr(fd, "user.a", []byte("after"), 0), "fsetxattr of an unlinked file")
	n, err = unix.Fgetxattr(fd, "user.a", b)
	e.ok(err, "fgetxattr")
	e.eq(string(b[:n]), "after", "value")
	e.ok(unix.Fremovexattr(fd, "user.a"), "fremovexattr")
}

func xattrTrusted(e *env) {
	e.file("f", "x")
	e.ok(unix.Setxattr(e.p("f"), "trusted.a", []byte("x"), 0), "setxattr")
	e.eq(e.getxattr("f", "trusted.a"), "x", "value")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	e.ok(unix.Lsetxattr(e.p("s"), "trusted.a", []byte("link"), 0), "setxattr of a symlink")
	e.eq(e.getxattr("s", "trusted.a"), "link", "value")
	e.eq(e.getxattr("f", "trusted.a"), "x", "value of its target")
}
