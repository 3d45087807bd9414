// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

var miscCases = []testCase{
	{"ioctl/file-flags", false, ioctlFileFlags},
	{"ioctl/unknown", false, ioctlUnknown},
	{"poll/files", false, pollFiles},
	{"poll/fifo", false, pollFifo},
	{"inotify/files", false, inotifyFiles},
	{"inotify/directories", false, inotifyDirectories},
	{"inotify/self", false, inotifySelf},
}

// nodump is FS_NODUMP_FL of linux/fs.h: a flag that does nothing.
const nodump = 0x40

func ioctlFileFlags(e *env) {
	e.mkdir("d")
	e.file("f", "x")
	for _, name := range []string{"f", "d"} {
		fd := e.open(name, unix.O_RDONLY, 0)
		before, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		e.ok(err, "FS_IOC_GETFLAGS of "+name)
		e.ok(unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, before|nodump), "FS_IOC_SETFLAGS of "+name)
		again := e.open(name, unix.O_RDONLY, 0)
		got, err := unix.IoctlGetInt(again, unix.FS_IOC_GETFLAGS)
		e.ok(err, "FS_IOC_GETFLAGS of "+name)
		e.eq(got, before|nodump, "flags of "+name)
		e.ok(unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, before), "FS_IOC_SETFLAGS of "+name)
		got, err = unix.IoctlGetInt(again, unix.FS_IOC_GETFLAGS)
		e.ok(err, "FS_IOC_GETFLAGS of "+name)
		e.eq(got, before, "flags of "+name)
	}
}

func ioctlUnknown(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	_, err := unix.IoctlGetInt(fd, 0x80047f7f)
	e.errno(err, unix.ENOTTY, "an ioctl that is none")
	_, err = unix.IoctlGetTermios(fd, unix.TCGETS)
	e.errno(err, unix.ENOTTY, "isatty")
}

func pollFiles(e *env) {
	e.file("f", "x")
	fds := []unix.PollFd{{Fd: int32(e.open("f", unix.O_RDWR, 0)), Events: unix.POLLIN | unix.POLLOUT | unix.POLLPRI}}
	n, err := unix.Poll(fds, 0)
	e.ok(err, "poll")
	e.eq([]int{n, int(fds[0].Revents)}, []int{1, unix.POLLIN | unix.POLLOUT}, "a file is always ready")
	fds[0].Fd = int32(e.open(".", unix.O_RDONLY, 0))
	_, err = unix.Poll(fds, 0)
	e.ok(err, "poll of a directory")
}

func pollFifo(e *env) {
	e.ok(unix.Mkfifo(e.p("p"), 0o600), "mkfifo")
	fd := e.open("p", unix.O_RDWR|unix.O_NONBLOCK, 0)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	e.ok(err, "poll")
	e.eq(n, 0, "an empty fifo")
	_, err = unix.Write(fd, []byte("x"))
	e.ok(err, "write")
	n, err = unix.Poll(fds, 1000)
	e.ok(err, "poll")
	e.eq(n, 1, "a fifo with data")
}

// watch returns a function that reads the events since its last call, as
// "CREATE name", and the cookies of renames.
func (e *env) watch(name string, mask uint32) func() ([]string, []uint32) {
	e.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	e.ok(err, "inotify_init")
	e.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, e.p(name), mask)
	e.ok(err, "inotify_add_watch")
	words := []struct {
		bit  uint32
		word string
	}{
		{unix.IN_CREATE, "CREATE"}, {unix.IN_OPEN, "OPEN"}, {unix.IN_MODIFY, "MODIFY"}, {unix.IN_ACCESS, "ACCESS"}, {unix.IN_ATTRIB, "ATTRIB"},
		{unix.IN_CLOSE_WRITE, "CLOSE_WRITE"}, {unix.IN_CLOSE_NOWRITE, "CLOSE_NOWRITE"}, {unix.IN_MOVED_FROM, "MOVED_FROM"}, {unix.IN_MOVED_TO, "MOVED_TO"},
		{unix.IN_DELETE, "DELETE"}, {unix.IN_DELETE_SELF, "DELETE_SELF"}, {unix.IN_MOVE_SELF, "MOVE_SELF"}, {unix.IN_IGNORED, "IGNORED"},
	}
	return func() (events []string, cookies []uint32) {
		e.Helper()
		b := make([]byte, 64<<10)
		n, err := unix.Read(fd, b)
		if err == unix.EAGAIN {
			return nil, nil
		}
		e.ok(err, "read inotify events")
		for b = b[:n]; len(b) > 0; {
			mask, cookie, l := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[8:]), binary.NativeEndian.Uint32(b[12:])
			file, _, _ := bytes.Cut(b[16:16+l], []byte{0})
			b = b[16+l:]
			var s []string
			for _, w := range words {
				if mask&w.bit != 0 {
					s = append(s, w.word)
				}
			}
			if mask&unix.IN_ISDIR != 0 {
				s = append(s, "ISDIR")
			}
			events = append(events, strings.TrimSpace(strings.Join(s, ",")+" "+string(file)))
			if cookie != 0 {
				cookies = append(cookies, cookie)
			}
		}
		return events, cookies
	}
}

func inotifyFiles(e *env) {
	read := e.watch(".", unix.IN_ALL_EVENTS&^(unix.IN_ACCESS|unix.IN_OPEN|unix.IN_CLOSE_NOWRITE))
	fd, err := unix.Open(e.p("f"), unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	e.ok(err, "create")
	e.write(fd, "x", 0)
	e.ok(unix.Close(fd), "close")
	e.ok(unix.Chmod(e.p("f"), 0o644), "chmod")
	e.ok(unix.Truncate(e.p("f"), 0), "truncate")
	e.ok(unix.Link(e.p("f"), e.p("g")), "link")
	e.ok(unix.Unlink(e.p("g")), "unlink")
	got, _ := read()
	e.eq(got, []string{"CREATE f", "MODIFY f", "CLOSE_WRITE f", "ATTRIB f", "MODIFY f", "CREATE g", "DELETE g"}, "events")
}

func inotifyDirectories(e *env) {
	e.mkdir("other")
	read := e.watch(".", unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVE)
	e.mkdir("d")
	e.file("f", "x")
	e.ok(unix.Rename(e.p("f"), e.p("g")), "rename")
	e.ok(unix.Rename(e.p("g"), e.p("other/g")), "rename out")
	e.ok(unix.Rename(e.p("other/g"), e.p("h")), "rename in")
	e.ok(unix.Rmdir(e.p("d")), "rmdir")
	got, cookies := read()
	e.eq(got, []string{"CREATE,ISDIR d", "CREATE f", "MOVED_FROM f", "MOVED_TO g", "MOVED_FROM g", "MOVED_TO h", "DELETE,ISDIR d"}, "events")
	e.eq(len(cookies), 4, "events with a cookie")
	e.eq(cookies[1], cookies[0], "cookies of one rename")
}

func inotifySelf(e *env) {
	e.file("f", "x")
	read := e.watch("f", unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ATTRIB)
	e.ok(unix.Rename(e.p("f"), e.p("g")), "rename")
	e.ok(unix.Unlink(e.p("g")), "unlink")
	got, _ := read()
	e.eq(fmt.Sprint(got), "[MOVE_SELF ATTRIB DELETE_SELF IGNORED]", "events")
}
