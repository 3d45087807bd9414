// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var renameCases = []testCase{
	{"rename/basic", false, renameBasic},
	{"rename/replace", false, renameReplace},
	{"rename/directories", false, renameDirectories},
	{"rename/errors", false, renameErrors},
	{"rename/same-inode", false, renameSameInode},
	{"rename/open-file", false, renameOpenFile},
	{"rename/over-open-file", false, renameOverOpenFile},
	{"rename/noreplace", false, renameNoreplace},
	{"rename/exchange", false, renameExchange},
	{"rename/whiteout", true, renameWhiteout},
	{"rename/bad-flags", false, renameBadFlags},
	{"rename/atomic", false, renameAtomic},
	{"rename/race", false, renameRace},
	{"rename/across", false, renameAcross},
}

func (e *env) rename2(from, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, e.p(from), unix.AT_FDCWD, e.p(to), flags)
}

func renameBasic(e *env) {
	e.file("a", "data")
	ino := e.stat("a").Ino
	e.ok(unix.Rename(e.p("a"), e.p("b")), "rename")
	e.absent("a")
	e.eq(e.stat("b").Ino, ino, "inode")
	e.mkdir("d")
	e.ok(unix.Rename(e.p("b"), e.p("d/c")), "rename into a directory")
	e.absent("b")
	e.content("d/c", "data")
	e.ok(unix.Rename(e.p("d/c"), e.p("a")), "rename back")
	e.ok(unix.Rename(e.p("a"), e.p("a")), "rename to itself")
	e.content("a", "data")
	e.ok(unix.Symlink("x", e.p("s")), "symlink")
	e.ok(unix.Rename(e.p("s"), e.p("t")), "rename a symlink")
	e.eq(e.readlink("t"), "x", "target")
}

func renameReplace(e *env) {
	e.file("a", "new")
	e.file("b", "old")
	e.ok(unix.Link(e.p("b"), e.p("keep")), "link")
	e.ok(unix.Rename(e.p("a"), e.p("b")), "rename over a file")
	e.absent("a")
	e.content("b", "new")
	e.content("keep", "old")
	e.links("keep", 1)
}

func renameDirectories(e *env) {
	e.mkdir("a")
	e.file("a/f", "x")
	e.mkdir("b")
	e.ok(unix.Rename(e.p("a"), e.p("b")), "rename over an empty directory")
	e.content("b/f", "x")
	e.mkdir("c")
	e.ok(unix.Rename(e.p("b"), e.p("c/b")), "rename into another directory")
	e.eq(e.stat("c/b/..").Ino, e.stat("c").Ino, "the new ..")
	e.content("c/b/f", "x")
	// An open directory is found at its new place, too.
	fd := e.open("c/b", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	e.ok(unix.Rename(e.p("c/b"), e.p("moved")), "rename")
	g, err := unix.Openat(fd, "f", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	e.ok(err, "open below the moved directory")
	unix.Close(g)
	got, err := os.Readlink(procFD(fd))
	e.ok(err, "read the name of a descriptor")
	e.eq(got, e.p("moved"), "path of the descriptor")
}

func renameErrors(e *env) {
	e.file("f", "")
	e.mkdir("d")
	e.mkdir("full")
	e.file("full/x", "")
	e.mkdir("d/sub")
	for _, c := range []struct {
		from, to string
		want     unix.Errno
	}{
		{"none", "x", unix.ENOENT},
		{"f", "none/x", unix.ENOENT},
		{"f", "f/x", unix.ENOTDIR},
		{"f", "d", unix.EISDIR},
		{"d", "f", unix.ENOTDIR},
		{"d", "full", unix.ENOTEMPTY},
		{"d", "d/sub/x", unix.EINVAL},
		{"d", "d/x", unix.EINVAL},
		{"d/sub", "d", unix.ENOTEMPTY},
		{"d/.", "x", unix.EBUSY},
		{"f", "d/..", unix.EBUSY},
		{"f", "x/", unix.ENOTDIR},
	} {
		e.errno(unix.Rename(e.p(c.from), e.p(c.to)), c.want, "rename "+c.from+" "+c.to)
	}
}

func renameSameInode(e *env) {
	e.file("a", "x")
	e.ok(unix.Link(e.p("a"), e.p("b")), "link")
	e.ok(unix.Rename(e.p("a"), e.p("b")), "rename to another name of the same file")
	e.links("a", 2)
	e.links("b", 2)
}

func renameOpenFile(e *env) {
	e.file("a", "x")
	fd := e.open("a", unix.O_RDWR, 0)
	e.ok(unix.Rename(e.p("a"), e.p("b")), "rename")
	e.write(fd, "written", 0)
	e.content("b", "written")
	e.eq(e.fstat(fd).Ino, e.stat("b").Ino, "inode")
}

func renameOverOpenFile(e *env) {
	e.file("old", "old data")
	e.file("new", "new data")
	fd := e.open("old", unix.O_RDWR, 0)
	e.ok(unix.Rename(e.p("new"), e.p("old")), "rename over an open file")
	e.content("old", "new data")
	e.eq(e.read(fd, 100, 0), "old data", "what the descriptor reads")
	e.eq(uint64(e.fstat(fd).Nlink), uint64(0), "link count")
	e.write(fd, "more old data", 0)
	e.eq(e.read(fd, 100, 0), "more old data", "what the descriptor reads")
	e.content("old", "new data")
}

func renameNoreplace(e *env) {
	e.file("a", "a")
	e.file("b", "b")
	e.errno(e.rename2("a", "b", unix.RENAME_NOREPLACE), unix.EEXIST, "rename over a file")
	e.content("b", "b")
	e.ok(e.rename2("a", "c", unix.RENAME_NOREPLACE), "rename to a new name")
	e.absent("a")
	e.content("c", "a")
	e.errno(e.rename2("c", "c", unix.RENAME_NOREPLACE), unix.EEXIST, "rename to itself")
}

func renameExchange(e *env) {
	e.file("f", "file")
	e.mkdir("d")
	e.file("d/x", "in d")
	e.ok(e.rename2("f", "d", unix.RENAME_EXCHANGE), "exchange a file and a directory")
	e.content("d", "file")
	e.content("f/x", "in d")
	e.errno(e.rename2("f", "none", unix.RENAME_EXCHANGE), unix.ENOENT, "exchange with nothing")
	e.mkdir("e")
	e.mkdir("e/sub")
	e.file("e/sub/y", "in sub")
	e.ok(e.rename2("f", "e/sub", unix.RENAME_EXCHANGE), "exchange directories of two parents")
	e.content("f/y", "in sub")
	e.content("e/sub/x", "in d")
	e.eq(e.stat("f/..").Ino, e.stat(".").Ino, "the new ..")
	e.errno(e.rename2("e", "e/sub", unix.RENAME_EXCHANGE), unix.EINVAL, "exchange with a child")
}

func renameWhiteout(e *env) {
	e.file("a", "x")
	e.ok(e.rename2("a", "b", unix.RENAME_WHITEOUT), "rename")
	e.content("b", "x")
	st := e.stat("a")
	e.eq([]uint64{uint64(st.Mode & unix.S_IFMT), uint64(st.Rdev)}, []uint64{unix.S_IFCHR, 0}, "type and device of the whiteout")
	e.ok(unix.Unlink(e.p("a")), "remove the whiteout")
	e.file("c", "over")
	e.ok(e.rename2("b", "c", unix.RENAME_WHITEOUT), "rename over a file")
	e.content("c", "x")
	e.eq(e.stat("b").Mode&unix.S_IFMT, uint32(unix.S_IFCHR), "type of the whiteout")
}

func renameBadFlags(e *env) {
	e.file("a", "x")
	e.file("b", "y")
	e.errno(e.rename2("a", "b", unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE), unix.EINVAL, "two flags that exclude each other")
	e.errno(e.rename2("a", "b", 1<<20), unix.EINVAL, "a flag that is none")
	e.content("a", "x")
}

// renameAtomic: while a name is replaced again and again it is always there.
func renameAtomic(e *env) {
	e.file("name", "0")
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if b, err := os.ReadFile(e.p("name")); err != nil || len(b) != 1 {
					e.Errorf("while it is replaced: read %q, %v", b, err)
					return
				}
			}
		})
	}
	for i := range min(200, e.o.Ops) {
		e.file("tmp", fmt.Sprint(i%10))
		e.ok(unix.Rename(e.p("tmp"), e.p("name")), "rename")
	}
	close(stop)
	wg.Wait()
}

func renameRace(e *env) {
	for i := range 50 {
		name, to := fmt.Sprint("f", i), fmt.Sprint("t", i)
		e.file(name, "x")
		e.eq(e.race(8, unix.ENOENT, func(j int) error { return unix.Rename(e.p(name), e.p(fmt.Sprint(to, ".", j))) }), int32(1), "winners of rename")
	}
}

func renameAcross(e *env) {
	out := e.outside()
	var there unix.Stat_t
	e.ok(unix.Stat(out, &there), "stat")
	if there.Dev == e.stat(".").Dev {
		e.notRun("the temporary directory lies on the same file system")
	}
	e.file("f", "x")
	e.errno(unix.Rename(e.p("f"), out+"/f"), unix.EXDEV, "rename to another file system")
	e.errno(unix.Link(e.p("f"), out+"/f"), unix.EXDEV, "link to another file system")
	e.content("f", "x")
}
