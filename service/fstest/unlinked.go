// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

var unlinkedCases = []testCase{
	{"unlinked/file", false, unlinkedFile},
	{"unlinked/reused-name", false, unlinkedReusedName},
	{"unlinked/reopen", false, unlinkedReopen},
	{"unlinked/directory", false, unlinkedDirectory},
	{"unlinked/read-only", false, unlinkedReadOnly},
}

func unlinkedFile(e *env) {
	e.file("f", "before")
	fd := e.open("f", unix.O_RDWR, 0)
	ino := e.fstat(fd).Ino
	e.ok(unix.Unlink(e.p("f")), "unlink")
	e.absent("f")
	e.eq(len(e.list(".")), 0, "entries that are left")
	st := e.fstat(fd)
	e.eq([]uint64{st.Ino, uint64(st.Nlink), uint64(st.Size)}, []uint64{ino, 0, 6}, "inode, links and size")
	e.eq(e.read(fd, 10, 0), "before", "content")
	e.write(fd, strings.Repeat("after", 10_000), 0)
	e.eq(e.fstat(fd).Size, int64(50_000), "size")
	e.eq(e.read(fd, 5, 49_995), "after", "content")
	e.ok(unix.Ftruncate(fd, 3), "ftruncate")
	e.ok(unix.Fchmod(fd, 0o600), "fchmod")
	e.ok(unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), []unix.Timespec{{Sec: 5}, {Sec: 6}}, 0), "set times")
	st = e.fstat(fd)
	e.eq([]int64{int64(st.Mode), st.Size, st.Mtim.Sec}, []int64{unix.S_IFREG | 0o600, 3, 6}, "mode, size and mtime")
	e.ok(unix.Fsync(fd), "fsync")
}

func unlinkedReusedName(e *env) {
	var fds []int
	for range 10 {
		fd := e.open("f", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600)
		e.write(fd, string(rune('a'+len(fds))), 0)
		fds = append(fds, fd)
		e.ok(unix.Unlink(e.p("f")), "unlink")
	}
	seen := map[uint64]bool{}
	for i, fd := range fds {
		e.eq(e.read(fd, 10, 0), string(rune('a'+i)), "content")
		seen[e.fstat(fd).Ino] = true
	}
	e.eq(len(seen), len(fds), "different inodes")
}

func unlinkedReopen(e *env) {
	e.file("f", "still here")
	fd := e.open("f", unix.O_RDONLY, 0)
	e.ok(unix.Unlink(e.p("f")), "unlink")
	again, err := unix.Open(procFD(fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	e.ok(err, "open an unlinked file again")
	defer unix.Close(again)
	e.write(again, "STILL", 0)
	e.eq(e.read(fd, 10, 0), "STILL here", "content")
	e.errno(unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, e.p("back"), unix.AT_SYMLINK_FOLLOW), unix.ENOENT, "link an unlinked file")
}

func unlinkedDirectory(e *env) {
	e.mkdir("d")
	fd := e.open("d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	e.ok(unix.Rmdir(e.p("d")), "rmdir")
	_, err := unix.Openat(fd, "f", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	e.errno(err, unix.ENOENT, "create in a removed directory")
	e.errno(unix.Mkdirat(fd, "s", 0o700), unix.ENOENT, "mkdir in a removed directory")
	e.eq(e.fstat(fd).Mode&unix.S_IFMT, uint32(unix.S_IFDIR), "type")
	d := os.NewFile(uintptr(dup(e, fd)), "d")
	defer d.Close()
	if names, err := d.Readdirnames(-1); len(names) != 0 {
		e.Errorf("a removed directory has entries %q, %v", names, err)
	}
}

func dup(e *env, fd int) int {
	e.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	e.ok(err, "dup")
	return n
}

// unlinkedReadOnly: a descriptor outlives the right to open the file.
func unlinkedReadOnly(e *env) {
	e.file("f", "x")
	fd := e.open("f", unix.O_RDWR, 0)
	e.ok(unix.Chmod(e.p("f"), 0), "chmod")
	e.write(fd, "y", 0)
	e.eq(e.read(fd, 1, 0), "y", "content")
}
