// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

var openCases = []testCase{
	{"open/create", false, openCreate},
	{"open/errors", false, openErrors},
	{"open/excl", false, openExcl},
	{"open/excl-race", false, openExclRace},
	{"open/trunc", false, openTrunc},
	{"open/append", false, openAppend},
	{"open/append-concurrent", false, openAppendConcurrent},
	{"open/access-modes", false, openAccessModes},
	{"open/read-only-creation", false, openReadOnlyCreation},
	{"open/direct", false, openDirect},
	{"open/direct-mixed", false, openDirectMixed},
	{"open/sync", false, openSync},
	{"open/tmpfile", false, openTmpfile},
	{"open/tmpfile-excl", false, openTmpfileExcl},
	{"open/path", false, openPath},
	{"open/many", false, openMany},
}

func openCreate(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o640)
	e.mode("f", unix.S_IFREG|0o640)
	e.write(fd, "hello", 0)
	e.content("f", "hello")
	again := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o777)
	e.eq(e.read(again, 10, 0), "hello", "content")
	e.mode("f", unix.S_IFREG|0o640)
}

func openErrors(e *env) {
	e.file("f", "")
	e.mkdir("d")
	for _, c := range []struct {
		name  string
		flags int
		want  unix.Errno
	}{
		{"none", unix.O_RDONLY, unix.ENOENT},
		{"none/f", unix.O_CREAT | unix.O_RDWR, unix.ENOENT},
		{"f/x", unix.O_RDONLY, unix.ENOTDIR},
		{"f/", unix.O_RDONLY, unix.ENOTDIR},
		{"d", unix.O_WRONLY, unix.EISDIR},
		{"d", unix.O_RDWR, unix.EISDIR},
		{"d", unix.O_CREAT | unix.O_RDONLY, unix.EISDIR},
		{"new/", unix.O_CREAT | unix.O_RDWR, unix.EISDIR},
		{"f", unix.O_DIRECTORY, unix.ENOTDIR},
	} {
		e.errno(e.tryOpen(c.name, c.flags, 0o644), c.want, fmt.Sprintf("open %s, flags %#x", c.name, c.flags))
	}
}

func openExcl(e *env) {
	e.ok(e.tryOpen("f", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600), "create")
	e.errno(e.tryOpen("f", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600), unix.EEXIST, "create again")
	e.errno(e.tryOpen(".", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600), unix.EEXIST, "create a directory's name")
}

func openExclRace(e *env) {
	for i := range 50 {
		name := fmt.Sprint("f", i)
		e.eq(e.race(8, unix.EEXIST, func(int) error { return e.tryOpen(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600) }), int32(1), "winners of O_EXCL")
	}
}

func openTrunc(e *env) {
	e.file("f", "long content")
	fd := e.open("f", unix.O_RDONLY, 0)
	w := e.open("f", unix.O_WRONLY|unix.O_TRUNC, 0)
	e.eq(e.fstat(fd).Size, int64(0), "size")
	e.eq(e.read(fd, 10, 0), "", "content")
	e.write(w, "short", 0)
	e.eq(e.read(fd, 10, 0), "short", "content")
	e.ok(e.tryOpen("new", unix.O_CREAT|unix.O_TRUNC|unix.O_RDWR, 0o600), "create with O_TRUNC")
}

func openAppend(e *env) {
	e.file("f", "start")
	fd := e.open("f", unix.O_WRONLY|unix.O_APPEND, 0)
	_, err := unix.Write(fd, []byte("+1"))
	e.ok(err, "write")
	_, err = unix.Seek(fd, 0, unix.SEEK_SET)
	e.ok(err, "seek")
	_, err = unix.Write(fd, []byte("+2"))
	e.ok(err, "write")
	e.content("f", "start+1+2")
	off, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	e.ok(err, "seek")
	e.eq(off, int64(9), "offset after an append")
	// Linux: pwrite appends too, whatever its offset (pwrite(2), bugs).
	_, err = unix.Pwrite(fd, []byte("+3"), 0)
	e.ok(err, "pwrite")
	e.content("f", "start+1+2+3")
	// The flag can be taken away and given later.
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, 0)
	e.ok(err, "clear O_APPEND")
	_, err = unix.Pwrite(fd, []byte("S"), 0)
	e.ok(err, "pwrite")
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND)
	e.ok(err, "set O_APPEND")
	_, err = unix.Pwrite(fd, []byte("+4"), 0)
	e.ok(err, "pwrite")
	e.content("f", "Start+1+2+3+4")
}

func openAppendConcurrent(e *env) {
	e.file("log", "")
	const lines = 200
	var wg sync.WaitGroup
	for _, who := range []string{"a", "b", "c", "d"} {
		fd := e.open("log", unix.O_WRONLY|unix.O_APPEND, 0)
		wg.Go(func() {
			for i := range lines {
				line := fmt.Sprintf("%s %d %s\n", who, i, strings.Repeat(who, i%97))
				if n, err := unix.Write(fd, []byte(line)); n != len(line) {
					e.Errorf("append: %d, %v", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	next := map[string]int{}
	fd := e.open("log", unix.O_RDONLY, 0)
	for line := range strings.Lines(e.read(fd, 1<<20, 0)) {
		who := line[:1]
		if want := fmt.Sprintf("%s %d %s\n", who, next[who], strings.Repeat(who, next[who]%97)); line != want {
			e.Fatalf("line %q, want %q", line, want)
		}
		next[who]++
	}
	e.eq(next, map[string]int{"a": lines, "b": lines, "c": lines, "d": lines}, "lines of each descriptor")
}

func openAccessModes(e *env) {
	e.file("f", "x")
	r, w := e.open("f", unix.O_RDONLY, 0), e.open("f", unix.O_WRONLY, 0)
	_, err := unix.Pwrite(r, []byte("y"), 0)
	e.errno(err, unix.EBADF, "write to O_RDONLY")
	_, err = unix.Pread(w, make([]byte, 1), 0)
	e.errno(err, unix.EBADF, "read from O_WRONLY")
	d := e.open(".", unix.O_RDONLY, 0)
	_, err = unix.Pread(d, make([]byte, 1), 0)
	e.errno(err, unix.EISDIR, "read from a directory")
	_, err = unix.Pread(r, make([]byte, 1), -1)
	e.errno(err, unix.EINVAL, "read at -1")
	// Zero bytes at the end and beyond.
	for _, off := range []int64{1, 2, 1 << 40} {
		e.eq(e.read(r, 10, off), "", "read at the end")
	}
}

// openReadOnlyCreation: a file made without the right to write is written
// through the descriptor that made it, as git and tar do.
func openReadOnlyCreation(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o444)
	e.write(fd, "read only", 0)
	e.content("f", "read only")
	e.mode("f", unix.S_IFREG|0o444)
	none := e.open("n", unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0)
	e.write(none, "secret", 0)
	e.eq(e.read(none, 10, 0), "secret", "content of a file of mode 0")
	e.mode("n", unix.S_IFREG)
}

// aligned returns n bytes that begin on a page.
func (e *env) aligned(n int) []byte {
	e.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	e.ok(err, "map memory")
	e.Cleanup(func() { unix.Munmap(b) })
	return b
}

func openDirect(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o600)
	b := e.aligned(1 << 20)
	for i := range b {
		b[i] = byte(i >> 12)
	}
	n, err := unix.Pwrite(fd, b, 0)
	e.ok(err, "direct write")
	e.eq(n, len(b), "bytes written")
	got := e.aligned(1 << 20)
	n, err = unix.Pread(fd, got, 0)
	e.ok(err, "direct read")
	e.eq(n, len(b), "bytes read")
	if !bytes.Equal(b, got) {
		e.Fatal("a direct read differs from what was written")
	}
	n, err = unix.Pread(fd, got[:4096], int64(len(b)-4096))
	e.ok(err, "direct read at the end")
	e.eq(n, 4096, "bytes read")
	n, err = unix.Pread(fd, got[:4096], int64(len(b)))
	e.ok(err, "direct read past the end")
	e.eq(n, 0, "bytes read")
	e.ok(unix.Ftruncate(fd, 5000), "ftruncate")
	n, err = unix.Pread(fd, got[:8192], 0)
	e.ok(err, "direct read of a short file")
	e.eq(n, 5000, "bytes read")
}

// openDirectMixed: direct and buffered descriptors of one file agree.
func openDirectMixed(e *env) {
	e.file("f", strings.Repeat("a", 8192))
	buffered := e.open("f", unix.O_RDWR, 0)
	e.eq(e.read(buffered, 1, 0), "a", "content") // it is cached now
	direct := e.open("f", unix.O_RDWR|unix.O_DIRECT, 0)
	b := e.aligned(4096)
	copy(b, strings.Repeat("b", 4096))
	_, err := unix.Pwrite(direct, b, 0)
	e.ok(err, "direct write")
	e.eq(e.read(buffered, 8192, 0), strings.Repeat("b", 4096)+strings.Repeat("a", 4096), "buffered read after a direct write")
	e.write(buffered, "C", 0)
	_, err = unix.Pread(direct, b, 0)
	e.ok(err, "direct read")
	e.eq(string(b[:2]), "Cb", "direct read after a buffered write")
}

func openSync(e *env) {
	for name, flag := range map[string]int{"sync": unix.O_SYNC, "dsync": unix.O_DSYNC} {
		fd := e.open(name, unix.O_CREAT|unix.O_RDWR|flag, 0o600)
		e.write(fd, "durable", 0)
		e.content(name, "durable")
		got, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		e.ok(err, "F_GETFL")
		e.eq(got&flag, flag, "flags of "+name)
	}
}

func openTmpfile(e *env) {
	fd := e.open(".", unix.O_TMPFILE|unix.O_RDWR, 0o640)
	st := e.fstat(fd)
	e.eq([]uint64{uint64(st.Mode), uint64(st.Nlink)}, []uint64{unix.S_IFREG | 0o640, 0}, "mode and links")
	e.write(fd, "unnamed", 0)
	e.eq(e.read(fd, 10, 0), "unnamed", "content")
	e.eq(len(e.list(".")), 0, "entries of the directory")
	e.ok(unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, e.p("named"), unix.AT_SYMLINK_FOLLOW), "link the file")
	e.content("named", "unnamed")
	e.links("named", 1)
	e.eq(e.stat("named").Ino, st.Ino, "inode")
	e.write(fd, "after", 7)
	e.content("named", "unnamedafter")
	e.errno(e.tryOpen(".", unix.O_TMPFILE|unix.O_RDONLY, 0o640), unix.EINVAL, "O_TMPFILE for reading only")
	for range 20 { // some that are never named
		e.ok(e.tryOpen(".", unix.O_TMPFILE|unix.O_WRONLY, 0o600), "O_TMPFILE")
	}
	e.eq(e.list("."), []string{"named"}, "entries of the directory")
}

func openTmpfileExcl(e *env) {
	fd := e.open(".", unix.O_TMPFILE|unix.O_RDWR|unix.O_EXCL, 0o600)
	e.errno(unix.Linkat(unix.AT_FDCWD, procFD(fd), unix.AT_FDCWD, e.p("named"), unix.AT_SYMLINK_FOLLOW), unix.ENOENT, "link what was opened with O_EXCL")
	e.absent("named")
}

func openPath(e *env) {
	e.file("f", "x")
	fd := e.open("f", unix.O_PATH, 0)
	_, err := unix.Pread(fd, make([]byte, 1), 0)
	e.errno(err, unix.EBADF, "read from O_PATH")
	again, err := unix.Open(procFD(fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
	e.ok(err, "open an O_PATH descriptor again")
	defer unix.Close(again)
	e.ok(unix.Rename(e.p("f"), e.p("g")), "rename")
	e.write(again, "y", 0)
	e.content("g", "y")
	e.ok(unix.Unlink(e.p("g")), "unlink")
	e.eq(uint64(e.fstat(fd).Nlink), uint64(0), "links of O_PATH")
	p := (*byte)(unsafe.Pointer(&[]byte("\x00")[0]))
	_, _, errno := unix.Syscall6(unix.SYS_FACCESSAT2, uintptr(fd), uintptr(unsafe.Pointer(p)), unix.R_OK, unix.AT_EMPTY_PATH, 0, 0)
	e.eq(errno, unix.Errno(0), "access of O_PATH")
}

// openMany: a thousand descriptors of one file and of a thousand files.
func openMany(e *env) {
	n := min(500, e.o.Entries)
	fds := make([]int, 0, 2*n)
	for i := range n {
		fds = append(fds, e.open(fmt.Sprint("f", i), unix.O_CREAT|unix.O_RDWR, 0o600), e.open("one", unix.O_CREAT|unix.O_RDWR, 0o600))
	}
	for i, fd := range fds {
		e.write(fd, fmt.Sprintf("%04d", i), int64(i*4))
	}
	for i, fd := range fds {
		e.eq(e.read(fd, 4, int64(i*4)), fmt.Sprintf("%04d", i), "content")
	}
}
