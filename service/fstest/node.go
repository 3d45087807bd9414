// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

var nodeCases = []testCase{
	{"mknod/regular", false, mknodRegular},
	{"mknod/fifo", false, mknodFifo},
	{"mknod/socket", false, mknodSocket},
	{"mknod/device", true, mknodDevice},
	{"mknod/errors", false, mknodErrors},
	{"mkdir/basic", false, mkdirBasic},
	{"mkdir/errors", false, mkdirErrors},
	{"mkdir/link-counts", false, mkdirLinkCounts},
	{"mkdir/race", false, mkdirRace},
	{"rmdir/errors", false, rmdirErrors},
	{"unlink/errors", false, unlinkErrors},
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func mknodRegular(e *env) {
	e.ok(unix.Mknod(e.p("f"), unix.S_IFREG|0o640, 0), "mknod")
	e.mode("f", unix.S_IFREG|0o640)
	e.content("f", "")
	e.ok(unix.Mknod(e.p("g"), 0o600, 0), "mknod without a type")
	e.mode("g", unix.S_IFREG|0o600)
}

func mknodFifo(e *env) {
	e.ok(unix.Mkfifo(e.p("p"), 0o600), "mkfifo")
	e.mode("p", unix.S_IFIFO|0o600)
	e.errno(e.tryOpen("p", unix.O_WRONLY|unix.O_NONBLOCK, 0), unix.ENXIO, "open for writing without a reader")
	r := e.open("p", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	w := e.open("p", unix.O_WRONLY, 0)
	_, err := unix.Write(w, []byte("through"))
	e.ok(err, "write to the fifo")
	b := make([]byte, 16)
	n, err := unix.Read(r, b)
	e.ok(err, "read from the fifo")
	e.eq(string(b[:n]), "through", "what came through")
}

func mknodSocket(e *env) {
	e.ok(unix.Mknod(e.p("n"), unix.S_IFSOCK|0o600, 0), "mknod")
	e.mode("n", unix.S_IFSOCK|0o600)
	// An address is short: go through the directory's descriptor.
	dir := e.open(".", unix.O_PATH|unix.O_DIRECTORY, 0)
	addr := &unix.SockaddrUnix{Name: procFD(dir) + "/s"}
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	e.ok(err, "socket")
	defer unix.Close(l)
	e.ok(unix.Bind(l, addr), "bind")
	e.eq(e.stat("s").Mode&unix.S_IFMT, uint32(unix.S_IFSOCK), "type")
	e.ok(unix.Listen(l, 1), "listen")
	c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	e.ok(err, "socket")
	defer unix.Close(c)
	e.ok(unix.Connect(c, addr), "connect")
	e.errno(unix.Bind(c, addr), unix.EADDRINUSE, "bind again")
	e.ok(unix.Unlink(e.p("s")), "unlink")
}

func mknodDevice(e *env) {
	dev := int(unix.Mkdev(1, 3))
	e.ok(unix.Mknod(e.p("null"), unix.S_IFCHR|0o666, dev), "mknod")
	st := e.stat("null")
	e.eq([]uint64{uint64(st.Mode), uint64(st.Rdev)}, []uint64{unix.S_IFCHR | 0o666, uint64(dev)}, "mode and device")
	big := int(unix.Mkdev(4000, 70000))
	e.ok(unix.Mknod(e.p("blk"), unix.S_IFBLK|0o600, big), "mknod")
	st = e.stat("blk")
	e.eq([]uint64{uint64(st.Mode), uint64(st.Rdev)}, []uint64{unix.S_IFBLK | 0o600, uint64(big)}, "mode and device")
}

func mknodErrors(e *env) {
	e.file("f", "")
	e.errno(unix.Mknod(e.p("f"), unix.S_IFIFO|0o600, 0), unix.EEXIST, "mknod over a file")
	e.errno(unix.Mknod(e.p("none/f"), unix.S_IFIFO|0o600, 0), unix.ENOENT, "mknod in nothing")
	e.errno(unix.Mknod(e.p("f/f"), unix.S_IFIFO|0o600, 0), unix.ENOTDIR, "mknod in a file")
	e.ok(unix.Symlink("none", e.p("s")), "symlink")
	e.errno(unix.Mknod(e.p("s"), unix.S_IFREG|0o600, 0), unix.EEXIST, "mknod over a dangling link")
}

func mkdirBasic(e *env) {
	e.ok(unix.Mkdir(e.p("d"), 0o750), "mkdir")
	e.mode("d", unix.S_IFDIR|0o750)
	deep := "d"
	for range 50 {
		deep += "/sub"
		e.mkdir(deep)
	}
	e.file(deep+"/f", "deep")
	e.content(deep+"/f", "deep")
	e.ok(os.RemoveAll(e.p("d")), "remove all")
	e.absent("d")
	e.ok(unix.Mkdir(e.p("d/"), 0o700), "mkdir with a slash")
	e.ok(unix.Rmdir(e.p("d/")), "rmdir with a slash")
}

func mkdirErrors(e *env) {
	e.file("f", "")
	e.mkdir("d")
	e.ok(unix.Symlink("none", e.p("s")), "symlink")
	for name, want := range map[string]unix.Errno{
		"f": unix.EEXIST, "d": unix.EEXIST, "s": unix.EEXIST, ".": unix.EEXIST, "d/..": unix.EEXIST,
		"none/d": unix.ENOENT, "f/d": unix.ENOTDIR,
	} {
		e.errno(unix.Mkdir(e.p(name), 0o755), want, "mkdir "+name)
	}
}

func mkdirLinkCounts(e *env) {
	start := uint64(e.stat(".").Nlink)
	if start == 1 {
		e.notRun("this file system does not count links of directories")
	}
	e.eq(start, uint64(2), "link count of an empty directory")
	e.mkdir("a")
	e.links("a", 2)
	e.mkdir("b")
	e.file("f", "")
	e.links(".", 4)
	e.ok(unix.Rename(e.p("a"), e.p("b/a")), "rename")
	e.links(".", 3)
	e.links("b", 3)
	e.ok(unix.Rmdir(e.p("b/a")), "rmdir")
	e.links("b", 2)
}

// race runs f at once in n goroutines and returns how many succeeded; the
// others must fail by want.
func (e *env) race(n int, want unix.Errno, f func(i int) error) int32 {
	e.Helper()
	var won atomic.Int32
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			switch err := f(i); err {
			case nil:
				won.Add(1)
			case want:
			default:
				e.Errorf("in a race: got %v, want success or %v", err, want)
			}
		})
	}
	close(start)
	wg.Wait()
	return won.Load()
}

func mkdirRace(e *env) {
	for i := range 50 {
		name := e.p("d" + strconv.Itoa(i))
		e.eq(e.race(8, unix.EEXIST, func(int) error { return unix.Mkdir(name, 0o755) }), int32(1), "winners of mkdir")
		e.eq(e.race(8, unix.ENOENT, func(int) error { return unix.Rmdir(name) }), int32(1), "winners of rmdir")
	}
}

func rmdirErrors(e *env) {
	e.file("f", "")
	e.mkdir("d")
	e.file("d/f", "")
	for name, want := range map[string]unix.Errno{
		"f": unix.ENOTDIR, "d": unix.ENOTEMPTY, "d/.": unix.EINVAL, "d/..": unix.ENOTEMPTY, "none": unix.ENOENT, "f/x": unix.ENOTDIR,
	} {
		e.errno(unix.Rmdir(e.p(name)), want, "rmdir "+name)
	}
	e.ok(unix.Unlink(e.p("d/f")), "unlink")
	e.ok(unix.Rmdir(e.p("d")), "rmdir")
	e.absent("d")
}

func unlinkErrors(e *env) {
	e.file("f", "")
	e.mkdir("d")
	for name, want := range map[string]unix.Errno{"d": unix.EISDIR, "none": unix.ENOENT, "f/x": unix.ENOTDIR, "f/": unix.ENOTDIR} {
		e.errno(unix.Unlink(e.p(name)), want, "unlink "+name)
	}
	e.ok(unix.Unlink(e.p("f")), "unlink")
	e.absent("f")
	e.errno(unix.Unlink(e.p("f")), unix.ENOENT, "unlink again")
}
