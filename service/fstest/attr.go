// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"time"

	"golang.org/x/sys/unix"
)

var attrCases = []testCase{
	{"attr/lookup", false, attrLookup},
	{"attr/getattr", false, attrGetattr},
	{"attr/creator", false, attrCreator},
	{"attr/statx", false, attrStatx},
	{"attr/btime", false, attrBtime},
	{"attr/mode", false, attrMode},
	{"attr/mode-bits", false, attrModeBits},
	{"attr/owner", true, attrOwner},
	{"attr/owner-symlink", true, attrOwnerSymlink},
	{"attr/size", false, attrSize},
	{"attr/size-errors", false, attrSizeErrors},
	{"attr/times", false, attrTimes},
	{"attr/times-now-omit", false, attrTimesNowOmit},
	{"attr/times-far", false, attrTimesFar},
	{"attr/times-symlink", false, attrTimesSymlink},
	{"attr/times-of-changes", false, attrTimesOfChanges},
	{"attr/ctime", false, attrCtime},
}

func attrLookup(e *env) {
	e.file("f", "x")
	e.mkdir("d")
	e.file("d/g", "x")
	for name, want := range map[string]error{
		"f": nil, "d": nil, "d/g": nil, "d/": nil, "d/.": nil, "d/..": nil, "d/../f": nil, "d//g": nil,
		"none": unix.ENOENT, "d/none": unix.ENOENT, "none/f": unix.ENOENT, "f/g": unix.ENOTDIR, "f/": unix.ENOTDIR, "f/..": unix.ENOTDIR,
	} {
		var st unix.Stat_t
		if err := unix.Lstat(e.p(name), &st); err != want {
			e.Errorf("lstat %s: got %v, want %v", name, err, want)
		}
	}
	e.eq(e.stat("d/../f").Ino, e.stat("f").Ino, "inode through ..")
	e.eq(e.stat("d/..").Ino, e.stat(".").Ino, "inode of ..")
	if e.stat("f").Ino == e.stat("d/g").Ino {
		e.Error("two files have one inode number")
	}
	// A name that was looked up in vain is there once it is made.
	e.file("none", "x")
	e.stat("none")
}

func attrGetattr(e *env) {
	e.file("f", "12345")
	st := e.stat("f")
	e.eq(st.Mode, uint32(unix.S_IFREG|0o644), "mode")
	e.eq(st.Size, int64(5), "size")
	e.eq(uint64(st.Nlink), uint64(1), "link count")
	e.eq(st.Dev, e.stat(".").Dev, "device")
	fd := e.open("f", unix.O_RDONLY, 0)
	got := e.fstat(fd)
	e.eq(got.Ino, st.Ino, "inode of fstat")
	e.eq(got.Mtim, st.Mtim, "mtime of fstat")
	p := e.open("f", unix.O_PATH, 0)
	e.eq(e.fstat(p).Ino, st.Ino, "inode of fstat on O_PATH")
	e.eq(e.stat(".").Mode, uint32(unix.S_IFDIR|0o755), "mode of a directory")
}

// attrCreator: what one makes belongs to oneself, unless the server maps users.
func attrCreator(e *env) {
	e.file("f", "x")
	e.mkdir("d")
	for _, name := range []string{"f", "d"} {
		st := e.stat(name)
		e.eq([]int{int(st.Uid), int(st.Gid)}, []int{unix.Geteuid(), unix.Getegid()}, "owner of "+name)
	}
}

func attrStatx(e *env) {
	e.file("f", "12345")
	st := e.stat("f")
	for name, flags := range map[string]int{"as stat": 0, "forced": unix.AT_STATX_FORCE_SYNC, "cached": unix.AT_STATX_DONT_SYNC} {
		var x unix.Statx_t
		e.ok(unix.Statx(unix.AT_FDCWD, e.p("f"), flags, unix.STATX_BASIC_STATS, &x), "statx "+name)
		e.eq(x.Mask&unix.STATX_BASIC_STATS, uint32(unix.STATX_BASIC_STATS), "mask, "+name)
		e.eq([]uint64{uint64(x.Mode), x.Ino, x.Size, uint64(x.Nlink), uint64(x.Uid), uint64(x.Gid)},
			[]uint64{uint64(st.Mode), st.Ino, uint64(st.Size), uint64(st.Nlink), uint64(st.Uid), uint64(st.Gid)}, "statx and lstat, "+name)
		e.eq(unix.Timespec{Sec: x.Mtime.Sec, Nsec: int64(x.Mtime.Nsec)}, st.Mtim, "mtime, "+name)
	}
	fd := e.open("f", unix.O_RDONLY, 0)
	var x unix.Statx_t
	e.ok(unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &x), "statx of a descriptor")
	e.eq(x.Size, uint64(5), "size of a descriptor")
}

func (e *env) btime(name string) unix.StatxTimestamp {
	e.Helper()
	var x unix.Statx_t
	e.ok(unix.Statx(unix.AT_FDCWD, e.p(name), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &x), "statx "+name)
	if x.Mask&unix.STATX_BTIME == 0 {
		e.Fatalf("no birth time of %s", name)
	}
	return x.Btime
}

func attrBtime(e *env) {
	e.file("f", "x")
	born := e.btime("f")
	if born.Sec == 0 {
		e.Fatal("the birth time is zero")
	}
	e.ok(unix.UtimesNanoAt(unix.AT_FDCWD, e.p("f"), []unix.Timespec{{Sec: 1}, {Sec: 2}}, 0), "set times")
	e.ok(unix.Chmod(e.p("f"), 0o600), "chmod")
	e.file("f", "rewritten")
	e.ok(unix.Rename(e.p("f"), e.p("g")), "rename")
	e.eq(e.btime("g"), born, "birth time after changes")
	e.mkdir("d")
	e.btime("d")
}

func attrMode(e *env) {
	e.file("f", "x")
	e.mkdir("d")
	for _, m := range []uint32{0, 0o400, 0o123, 0o777, 0o644} {
		e.ok(unix.Chmod(e.p("f"), m), "chmod f")
		e.mode("f", unix.S_IFREG|m)
		e.ok(unix.Chmod(e.p("d"), m|0o700), "chmod d")
		e.mode("d", unix.S_IFDIR|m|0o700)
	}
	fd := e.open("f", unix.O_RDONLY, 0)
	e.ok(unix.Fchmod(fd, 0o640), "fchmod")
	e.mode("f", unix.S_IFREG|0o640)
	e.errno(unix.Chmod(e.p("none"), 0), unix.ENOENT, "chmod of nothing")

	defer unix.Umask(unix.Umask(0o027))
	e.ok(unix.Close(e.open("masked", unix.O_CREAT|unix.O_RDWR, 0o666)), "close")
	e.mode("masked", unix.S_IFREG|0o640)
	e.ok(unix.Mkdir(e.p("maskedd"), 0o777), "mkdir")
	e.mode("maskedd", unix.S_IFDIR|0o750)
	e.ok(unix.Mknod(e.p("maskedn"), unix.S_IFIFO|0o666, 0), "mknod")
	e.mode("maskedn", unix.S_IFIFO|0o640)
}

func attrModeBits(e *env) {
	e.mkdir("d")
	e.ok(unix.Chmod(e.p("d"), 0o1777), "chmod sticky")
	e.mode("d", unix.S_IFDIR|0o1777)
	e.ok(unix.Mkdir(e.p("d2"), 0o1777), "mkdir sticky")
	e.mode("d2", unix.S_IFDIR|0o1777)
}

func attrOwner(e *env) {
	e.file("f", "x")
	e.ok(unix.Chown(e.p("f"), 1234, 5678), "chown")
	st := e.stat("f")
	e.eq([]uint32{st.Uid, st.Gid}, []uint32{1234, 5678}, "owner")
	e.ok(unix.Chown(e.p("f"), -1, 99), "chown of the group alone")
	st = e.stat("f")
	e.eq([]uint32{st.Uid, st.Gid}, []uint32{1234, 99}, "owner")
	e.ok(unix.Chown(e.p("f"), 77, -1), "chown of the user alone")
	st = e.stat("f")
	e.eq([]uint32{st.Uid, st.Gid}, []uint32{77, 99}, "owner")
	e.ok(unix.Chown(e.p("f"), -1, -1), "chown of nothing")
	fd := e.open("f", unix.O_RDONLY, 0)
	e.ok(unix.Fchown(fd, 1, 2), "fchown")
	st = e.stat("f")
	e.eq([]uint32{st.Uid, st.Gid}, []uint32{1, 2}, "owner")
	e.ok(unix.Chown(e.p("f"), 0xfffffffe, 0xfffffffd), "chown to large ids")
	st = e.stat("f")
	e.eq([]uint32{st.Uid, st.Gid}, []uint32{0xfffffffe, 0xfffffffd}, "owner")
}

func attrOwnerSymlink(e *env) {
	e.file("f", "x")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	e.ok(unix.Chown(e.p("f"), 3, 4), "chown")
	e.ok(unix.Lchown(e.p("s"), 5, 6), "lchown")
	e.eq(e.stat("s").Uid, uint32(5), "owner of the link")
	e.eq(e.stat("f").Uid, uint32(3), "owner of its target")
	e.ok(unix.Chown(e.p("s"), 7, 8), "chown through a link")
	e.eq(e.stat("s").Uid, uint32(5), "owner of the link")
	e.eq(e.stat("f").Uid, uint32(7), "owner of its target")
}

func attrSize(e *env) {
	e.file("f", "0123456789")
	e.ok(unix.Truncate(e.p("f"), 4), "truncate")
	e.content("f", "0123")
	e.ok(unix.Truncate(e.p("f"), 8), "truncate")
	e.content("f", "0123\x00\x00\x00\x00")
	fd := e.open("f", unix.O_RDWR, 0)
	e.ok(unix.Ftruncate(fd, 2), "ftruncate")
	e.eq(e.fstat(fd).Size, int64(2), "size")
	e.ok(unix.Ftruncate(fd, 100_000), "ftruncate")
	e.eq(e.stat("f").Size, int64(100_000), "size")
	e.eq(e.read(fd, 4, 99_998), "\x00\x00", "the end")
	e.eq(e.read(fd, 4, 0), "01\x00\x00", "the beginning")
	e.ok(unix.Truncate(e.p("f"), 0), "truncate")
	e.content("f", "")
}

func attrSizeErrors(e *env) {
	e.file("f", "x")
	e.errno(unix.Truncate(e.p("."), 0), unix.EISDIR, "truncate a directory")
	e.errno(unix.Truncate(e.p("none"), 0), unix.ENOENT, "truncate nothing")
	e.errno(unix.Truncate(e.p("f"), -1), unix.EINVAL, "truncate to -1")
	e.errno(unix.Ftruncate(e.open("f", unix.O_RDONLY, 0), 0), unix.EINVAL, "ftruncate a read-only descriptor")
	e.content("f", "x")
}

func (e *env) setTimes(name string, atime, mtime unix.Timespec, flags int) {
	e.Helper()
	e.ok(unix.UtimesNanoAt(unix.AT_FDCWD, e.p(name), []unix.Timespec{atime, mtime}, flags), "utimensat "+name)
}

func attrTimes(e *env) {
	e.file("f", "x")
	e.mkdir("d")
	a, m := unix.Timespec{Sec: 1_000_000_000, Nsec: 123_456_789}, unix.Timespec{Sec: 1_500_000_000, Nsec: 987_654_321}
	for _, name := range []string{"f", "d"} {
		e.setTimes(name, a, m, 0)
		st := e.stat(name)
		e.eq([]unix.Timespec{st.Atim, st.Mtim}, []unix.Timespec{a, m}, "times of "+name)
	}
	// By descriptor, as tar and cp do it: utimensat with a null path.
	fd := e.open("f", unix.O_RDWR, 0)
	e.ok(unix.UtimesNanoAt(unix.AT_FDCWD, procFD(fd), []unix.Timespec{m, a}, 0), "set times by descriptor")
	st := e.fstat(fd)
	e.eq([]unix.Timespec{st.Atim, st.Mtim}, []unix.Timespec{m, a}, "times")
}

// nano returns a time in nanoseconds.
func nano(t unix.Timespec) int64 { return t.Nano() }

func attrTimesNowOmit(e *env) {
	e.file("f", "x")
	a, m := unix.Timespec{Sec: 1000}, unix.Timespec{Sec: 2000}
	omit, now := unix.Timespec{Nsec: unix.UTIME_OMIT}, unix.Timespec{Nsec: unix.UTIME_NOW}
	e.setTimes("f", a, m, 0)
	e.setTimes("f", omit, unix.Timespec{Sec: 3000}, 0)
	e.eq(e.stat("f").Atim, a, "atime that was left alone")
	e.setTimes("f", unix.Timespec{Sec: 4000}, omit, 0)
	e.eq(e.stat("f").Mtim, unix.Timespec{Sec: 3000}, "mtime that was left alone")
	// "Now" is told by the clock of the file system, which gives other files their times too.
	e.file("before", "")
	e.setTimes("f", omit, now, 0)
	e.file("after", "")
	got := nano(e.stat("f").Mtim)
	if before, after := nano(e.stat("before").Mtim), nano(e.stat("after").Mtim); got < before-int64(10*time.Millisecond) || got > after+int64(10*time.Millisecond) {
		e.Fatalf("now is %d, not between %d and %d", got, before, after)
	}
	e.eq(e.stat("f").Atim, unix.Timespec{Sec: 4000}, "atime that was left alone")
	e.setTimes("f", now, omit, 0)
	if e.stat("f").Atim.Sec == 4000 {
		e.Fatal("atime was not set to now")
	}
}

func attrTimesFar(e *env) {
	e.file("f", "x")
	for _, sec := range []int64{0, 1, -1, -1_000_000_000, 1 << 31, 1 << 32, 4_102_444_800} {
		ts := unix.Timespec{Sec: sec, Nsec: 7}
		e.setTimes("f", ts, ts, 0)
		st := e.stat("f")
		e.eq([]unix.Timespec{st.Atim, st.Mtim}, []unix.Timespec{ts, ts}, "far times")
	}
}

func attrTimesSymlink(e *env) {
	e.file("f", "x")
	e.ok(unix.Symlink("f", e.p("s")), "symlink")
	target := e.stat("f").Mtim
	ts := unix.Timespec{Sec: 12345}
	e.setTimes("s", ts, ts, unix.AT_SYMLINK_NOFOLLOW)
	e.eq(e.stat("s").Mtim, ts, "mtime of the link")
	e.eq(e.stat("f").Mtim, target, "mtime of its target")
}

// attrTimesOfChanges sets old times and looks whose are renewed by what.
func attrTimesOfChanges(e *env) {
	old := unix.Timespec{Sec: 1000}
	renewed := func(name, what string) {
		e.Helper()
		if e.stat(name).Mtim == old {
			e.Errorf("%s did not renew the mtime of %s", what, name)
		}
		e.setTimes(name, old, old, 0)
	}
	e.file("f", "0123456789")
	fd := e.open("f", unix.O_RDWR, 0)
	e.setTimes("f", old, old, 0)
	e.write(fd, "x", 0)
	renewed("f", "write")
	e.ok(unix.Ftruncate(fd, 3), "ftruncate")
	renewed("f", "ftruncate")
	e.ok(unix.Truncate(e.p("f"), 20), "truncate")
	renewed("f", "truncate")

	e.mkdir("d")
	e.setTimes("d", old, old, 0)
	steps := []struct {
		name string
		do   func() error
	}{
		{"create", func() error { return e.tryOpen("d/f", unix.O_CREAT|unix.O_WRONLY, 0o644) }},
		{"mkdir", func() error { return unix.Mkdir(e.p("d/d"), 0o755) }},
		{"symlink", func() error { return unix.Symlink("x", e.p("d/s")) }},
		{"mknod", func() error { return unix.Mknod(e.p("d/p"), unix.S_IFIFO|0o644, 0) }},
		{"link", func() error { return unix.Link(e.p("d/f"), e.p("d/l")) }},
		{"rename", func() error { return unix.Rename(e.p("d/f"), e.p("d/g")) }},
		{"unlink", func() error { return unix.Unlink(e.p("d/g")) }},
		{"rmdir", func() error { return unix.Rmdir(e.p("d/d")) }},
		{"rename out", func() error { return unix.Rename(e.p("d/l"), e.p("l")) }},
	}
	for _, s := range steps {
		e.ok(s.do(), s.name)
		renewed("d", s.name)
	}
	e.ok(unix.Chmod(e.p("f"), 0o600), "chmod")
	e.setTimes("f", old, old, 0)
	e.ok(unix.Chmod(e.p("f"), 0o644), "chmod")
	e.eq(e.stat("f").Mtim, old, "mtime after chmod")
}

func attrCtime(e *env) {
	e.file("f", "x")
	last := nano(e.stat("f").Ctim)
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"chmod", func() error { return unix.Chmod(e.p("f"), 0o600) }},
		{"utimensat", func() error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, e.p("f"), []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
		}},
		{"link", func() error { return unix.Link(e.p("f"), e.p("g")) }},
		{"unlink", func() error { return unix.Unlink(e.p("g")) }},
		{"truncate", func() error { return unix.Truncate(e.p("f"), 100) }},
	} {
		// A clock tick of the kernel may be 10 ms: do it until the time has moved.
		e.until("ctime moves by "+s.name, func() bool {
			switch s.name {
			case "link":
				unix.Unlink(e.p("g"))
			case "unlink":
				unix.Link(e.p("f"), e.p("g"))
			}
			e.ok(s.do(), s.name)
			return nano(e.stat("f").Ctim) > last
		})
		last = nano(e.stat("f").Ctim)
	}
}
