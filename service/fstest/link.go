// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

var linkCases = []testCase{
	{"symlink/basic", false, symlinkBasic},
	{"symlink/targets", false, symlinkTargets},
	{"symlink/loop", false, symlinkLoop},
	{"symlink/nofollow", false, symlinkNofollow},
	{"link/counts", false, linkCounts},
	{"link/errors", false, linkErrors},
	{"link/symlink", false, linkSymlink},
	{"link/many", false, linkMany},
	{"link/by-descriptor", false, linkByDescriptor},
}

func (e *env) readlink(name string) string {
	e.Helper()
	b := make([]byte, unix.PathMax+1)
	n, err := unix.Readlink(e.p(name), b)
	e.ok(err, "readlink "+name)
	return string(b[:n])
}

func symlinkBasic(e *env) {
	e.file("f", "target")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	st := e.stat("s")
	e.eq([]uint64{uint64(st.Mode), uint64(st.Size)}, []uint64{unix.S_IFLNK | 0o777, 1}, "mode and size")
	e.eq(e.readlink("s"), "f", "target")
	e.content("s", "target")
	e.mkdir("d")
	e.ok(unix.Symlink("../f", e.p("d/s")), "symlink")
	e.content("d/s", "target")
	e.ok(unix.Symlink("d", e.p("sd")), "symlink to a directory")
	e.content("sd/s", "target")
	e.errno(unix.Symlink("f", e.p("s")), unix.EEXIST, "symlink over a name")
	_, err := unix.Readlink(e.p("f"), make([]byte, 8))
	e.errno(err, unix.EINVAL, "readlink of a file")
	b := make([]byte, 2)
	n, err := unix.Readlink(e.p("d/s"), b)
	e.ok(err, "readlink into a short buffer")
	e.eq(string(b[:n]), "..", "a target cut short")
	e.ok(unix.Unlink(e.p("s")), "unlink the link")
	e.content("f", "target")
}

func symlinkTargets(e *env) {
	for i, target := range []string{
		"/", ".", "..", "/nowhere/at/all", "a//b/", "with space\nand newline", "\xff\xfe not UTF-8",
		strings.Repeat("x", 59), strings.Repeat("x", 60), strings.Repeat("y/", 1000), strings.Repeat("z", 4094), strings.Repeat("z", 4095),
	} {
		name := fmt.Sprint("s", i)
		if err := unix.Symlink(target, e.p(name)); err == unix.ENAMETOOLONG && len(target) > 4090 {
			continue // the block of ext4 holds one byte less than PATH_MAX
		} else {
			e.ok(err, "symlink")
		}
		e.eq(e.readlink(name), target, "target")
		e.eq(e.stat(name).Size, int64(len(target)), "size")
	}
	e.errno(unix.Symlink("", e.p("empty")), unix.ENOENT, "symlink to an empty name")
	e.errno(unix.Symlink(strings.Repeat("x", 4096), e.p("long")), unix.ENAMETOOLONG, "symlink to a long name")
}

func symlinkLoop(e *env) {
	e.ok(unix.Symlink("b", e.p("a")), "symlink")
	e.ok(unix.Symlink("a", e.p("b")), "symlink")
	e.errno(e.tryOpen("a", unix.O_RDONLY, 0), unix.ELOOP, "open a loop")
	e.ok(unix.Symlink("self", e.p("self")), "symlink")
	e.errno(e.tryOpen("self/x", unix.O_RDONLY, 0), unix.ELOOP, "open below a loop")
}

func symlinkNofollow(e *env) {
	e.file("f", "x")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	e.errno(e.tryOpen("s", unix.O_RDONLY|unix.O_NOFOLLOW, 0), unix.ELOOP, "open with O_NOFOLLOW")
	e.ok(unix.Symlink("none", e.p("dangling")), "symlink")
	e.errno(e.tryOpen("dangling", unix.O_RDONLY, 0), unix.ENOENT, "open a dangling link")
	e.errno(e.tryOpen("dangling", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644), unix.EEXIST, "create a dangling link anew")
	e.ok(e.tryOpen("dangling", unix.O_CREAT|unix.O_WRONLY, 0o644), "create through a dangling link")
	e.content("none", "")
	fd := e.open("s", unix.O_PATH|unix.O_NOFOLLOW, 0)
	e.eq(e.fstat(fd).Mode&unix.S_IFMT, uint32(unix.S_IFLNK), "type of O_PATH|O_NOFOLLOW")
}

func linkCounts(e *env) {
	e.file("a", "shared")
	e.ok(unix.Link(e.p("a"), e.p("b")), "link")
	e.mkdir("d")
	e.ok(unix.Link(e.p("b"), e.p("d/c")), "link into a directory")
	for _, name := range []string{"a", "b", "d/c"} {
		e.links(name, 3)
		e.eq(e.stat(name).Ino, e.stat("a").Ino, "inode of "+name)
	}
	fd := e.open("b", unix.O_RDWR, 0)
	e.write(fd, "SHARED", 0)
	e.content("a", "SHARED")
	e.content("d/c", "SHARED")
	e.ok(unix.Chmod(e.p("d/c"), 0o600), "chmod")
	e.mode("a", unix.S_IFREG|0o600)
	e.ok(unix.Unlink(e.p("a")), "unlink")
	e.links("b", 2)
	e.ok(unix.Rename(e.p("b"), e.p("e")), "rename")
	e.links("d/c", 2)
	e.ok(unix.Unlink(e.p("d/c")), "unlink")
	e.links("e", 1)
	e.content("e", "SHARED")
}

func linkErrors(e *env) {
	e.file("f", "")
	e.file("g", "")
	e.mkdir("d")
	e.errno(unix.Link(e.p("f"), e.p("g")), unix.EEXIST, "link over a file")
	e.errno(unix.Link(e.p("f"), e.p("d")), unix.EEXIST, "link over a directory")
	e.errno(unix.Link(e.p("none"), e.p("x")), unix.ENOENT, "link of nothing")
	e.errno(unix.Link(e.p("f"), e.p("none/x")), unix.ENOENT, "link into nothing")
	e.errno(unix.Link(e.p("d"), e.p("x")), unix.EPERM, "link of a directory")
	e.links("f", 1)
}

func linkSymlink(e *env) {
	e.file("f", "x")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	e.ok(unix.Link(e.p("s"), e.p("t")), "link of a symlink")
	e.eq(e.readlink("t"), "f", "target of the second name")
	e.links("s", 2)
	e.links("f", 1)
	e.ok(unix.Linkat(unix.AT_FDCWD, e.p("s"), unix.AT_FDCWD, e.p("g"), unix.AT_SYMLINK_FOLLOW), "link through a symlink")
	e.links("f", 2)
	e.links("s", 2)
}

func linkMany(e *env) {
	e.file("f", "x")
	for i := range 200 {
		e.ok(unix.Link(e.p("f"), e.p(fmt.Sprint("l", i))), "link")
	}
	e.links("f", 201)
	for i := range 200 {
		e.ok(unix.Unlink(e.p(fmt.Sprint("l", i))), "unlink")
	}
	e.links("f", 1)
}

func linkByDescriptor(e *env) {
	e.file("f", "x")
	fd := e.open("f", unix.O_RDONLY, 0)
	e.ok(unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, e.p("g"), unix.AT_SYMLINK_FOLLOW), "link of a descriptor")
	e.eq(e.stat("g").Ino, e.stat("f").Ino, "inode")
	e.links("f", 2)
}
