// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var ioCases = []testCase{
	{"io/offsets", false, ioOffsets},
	{"io/vectors", false, ioVectors},
	{"io/sizes", false, ioSizes},
	{"io/two-descriptors", false, ioTwoDescriptors},
	{"io/two-processes", false, ioTwoProcesses},
	{"io/parallel", false, ioParallel},
	{"io/beyond-4GiB", false, ioBeyond4GiB},
	{"io/splice", false, ioSplice},
	{"copy/whole", false, copyWhole},
	{"copy/ranges", false, copyRanges},
	{"copy/same-file", false, copySameFile},
	{"copy/errors", false, copyErrors},
	{"sync/file", false, syncFile},
	{"sync/directory", false, syncDirectory},
	{"sync/file-system", false, syncFileSystem},
}

func ioOffsets(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	for _, s := range []string{"one", "two", "three"} {
		_, err := unix.Write(fd, []byte(s))
		e.ok(err, "write")
	}
	off, err := unix.Seek(fd, 3, unix.SEEK_SET)
	e.ok(err, "seek")
	e.eq(off, int64(3), "offset")
	b := make([]byte, 3)
	_, err = unix.Read(fd, b)
	e.ok(err, "read")
	e.eq(string(b), "two", "read at the offset")
	off, err = unix.Seek(fd, -2, unix.SEEK_END)
	e.ok(err, "seek")
	e.eq(off, int64(9), "offset from the end")
	e.eq(e.read(fd, 5, 0), "onetw", "pread")
	off, err = unix.Seek(fd, 0, unix.SEEK_CUR)
	e.ok(err, "seek")
	e.eq(off, int64(9), "pread does not move the offset")
	_, err = unix.Seek(fd, -1, unix.SEEK_SET)
	e.errno(err, unix.EINVAL, "seek before the file")
	_, err = unix.Seek(fd, 100, unix.SEEK_SET)
	e.ok(err, "seek beyond the end")
	_, err = unix.Write(fd, []byte("!"))
	e.ok(err, "write")
	e.eq(e.fstat(fd).Size, int64(101), "size")
	e.eq(e.read(fd, 200, 11), strings.Repeat("\x00", 89)+"!", "the gap")
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	e.ok(err, "dup")
	defer unix.Close(dup)
	off, err = unix.Seek(dup, 0, unix.SEEK_CUR)
	e.ok(err, "seek")
	e.eq(off, int64(101), "a duplicate shares the offset")
}

func ioVectors(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	n, err := unix.Pwritev(fd, [][]byte{[]byte("aa"), {}, []byte("bbb"), bytes.Repeat([]byte("c"), 10_000)}, 5)
	e.ok(err, "pwritev")
	e.eq(n, 10_005, "bytes written")
	a, b, c := make([]byte, 6), make([]byte, 3), make([]byte, 20_000)
	n, err = unix.Preadv(fd, [][]byte{a, b, c}, 0)
	e.ok(err, "preadv")
	e.eq(n, 10_010, "bytes read")
	e.eq(string(a)+string(b)+string(c[:n-9]), "\x00\x00\x00\x00\x00aabbb"+strings.Repeat("c", 10_000), "content")
	n, err = unix.Pwritev2(fd, [][]byte{[]byte("end")}, 0, unix.RWF_APPEND)
	e.ok(err, "pwritev2 with RWF_APPEND")
	e.eq(n, 3, "bytes written")
	e.eq(e.read(fd, 10, 10_010), "end", "what was appended")
}

// random returns n bytes that don't repeat; the same for the same seed.
func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// ioSizes writes and reads across every boundary that a protocol may have.
func ioSizes(e *env) {
	data := random(4<<20+4097, 1)
	for _, size := range []int{1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 1<<20 - 1, 1 << 20, 1<<20 + 1, len(data)} {
		fd := e.open("f", unix.O_CREAT|unix.O_RDWR|unix.O_TRUNC, 0o600)
		for _, off := range []int64{0, 1, 4095} {
			n, err := unix.Pwrite(fd, data[:size], off)
			e.ok(err, "pwrite")
			e.eq(n, size, "bytes written")
			fresh := e.open("f", unix.O_RDONLY, 0)
			if got := e.read(fresh, size+10, off); got != string(data[:size]) {
				e.Fatalf("%d bytes at %d read back are not those written (%d bytes)", size, off, len(got))
			}
			unix.Close(fresh)
		}
		unix.Close(fd)
	}
}

func ioTwoDescriptors(e *env) {
	a := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	b := e.open("f", unix.O_RDWR, 0)
	e.write(a, "from a", 0)
	e.eq(e.read(b, 10, 0), "from a", "read by the other")
	e.write(b, "B", 5)
	e.eq(e.read(a, 10, 0), "from B", "read by the first")
	e.ok(unix.Ftruncate(b, 4), "ftruncate")
	e.eq(e.read(a, 10, 0), "from", "read by the first")
}

func ioTwoProcesses(e *env) {
	e.file("f", "")
	p := e.agent()
	theirs := p.mustOpen("f")
	mine := e.open("f", unix.O_RDWR, 0)
	e.write(mine, "mine", 0)
	p.begin("pread", "", "", theirs, 10, 0)
	r, err := p.end()
	e.ok(err, "read in another process")
	e.eq(r.Text, "mine", "read in another process")
	e.ok(p.call("pwrite", "", "theirs", theirs, 2), "write in another process")
	e.eq(e.read(mine, 10, 0), "mitheirs", "read")
}

func ioParallel(e *env) {
	const workers, blocks, size = 8, 32, 16 << 10
	e.file("f", "")
	fd := e.open("f", unix.O_RDWR, 0)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range blocks {
				b := bytes.Repeat([]byte{byte('a' + w)}, size)
				off := int64(i*workers+w) * size
				if n, err := unix.Pwrite(fd, b, off); n != size {
					e.Errorf("pwrite: %d, %v", n, err)
				}
				got := make([]byte, size)
				if n, err := unix.Pread(fd, got, off); n != size || !bytes.Equal(got, b) {
					e.Errorf("pread of what was just written: %d, %v, equal %v", n, err, bytes.Equal(got, b))
				}
			}
		})
	}
	wg.Wait()
	all := e.read(fd, workers*blocks*size+1, 0)
	e.eq(len(all), workers*blocks*size, "size")
	for i := range workers * blocks {
		if all[i*size:(i+1)*size] != strings.Repeat(string(rune('a'+i%workers)), size) {
			e.Fatalf("block %d is not what was written", i)
		}
	}
}

func ioBeyond4GiB(e *env) {
	const far = 5<<30 + 1
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, "near", 1)
	e.write(fd, "far away", far)
	e.eq(e.stat("f").Size, int64(far+8), "size")
	e.eq(e.read(fd, 20, far-2), "\x00\x00far away", "content")
	e.eq(e.read(fd, 4, 1), "near", "content")
	off, err := unix.Seek(fd, 0, unix.SEEK_END)
	e.ok(err, "seek")
	e.eq(off, int64(far+8), "offset of the end")
	if used := e.fstat(fd).Blocks * 512; used > 1<<30 {
		e.Errorf("a sparse file uses %d bytes", used)
	}
	e.ok(unix.Ftruncate(fd, 6<<30), "ftruncate")
	e.eq(e.fstat(fd).Size, int64(6<<30), "size")
	e.eq(e.read(fd, 8, far), "far away", "content")
	m, err := unix.Mmap(fd, 5<<30, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	e.ok(err, "mmap")
	e.eq(string(m[1:9]), "far away", "content by mmap")
	copy(m[1:], "FAR")
	e.ok(unix.Munmap(m), "munmap")
	e.eq(e.read(fd, 8, far), "FAR away", "content")
	e.ok(unix.Ftruncate(fd, far+3), "ftruncate")
	e.eq(e.read(fd, 8, far), "FAR", "content")
}

func ioSplice(e *env) {
	data := string(random(60_000, 2))
	e.file("from", data)
	from, to := e.open("from", unix.O_RDONLY, 0), e.open("to", unix.O_CREAT|unix.O_RDWR, 0o600)
	var p [2]int
	e.ok(unix.Pipe2(p[:], unix.O_CLOEXEC), "pipe")
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	var in, out int64
	for out < int64(len(data)) {
		n, err := unix.Splice(from, &in, p[1], nil, len(data), 0)
		e.ok(err, "splice from a file")
		for n > 0 {
			m, err := unix.Splice(p[0], nil, to, &out, int(n), 0)
			e.ok(err, "splice to a file")
			n -= m
		}
	}
	e.content("to", data)
	sent := e.open("sent", unix.O_CREAT|unix.O_RDWR, 0o600)
	var off int64
	for off < int64(len(data)) {
		_, err := unix.Sendfile(sent, from, &off, len(data))
		e.ok(err, "sendfile")
	}
	e.content("sent", data)
}

func copyWhole(e *env) {
	data := string(random(3<<20+17, 3))
	e.file("from", data)
	from, to := e.open("from", unix.O_RDONLY, 0), e.open("to", unix.O_CREAT|unix.O_RDWR, 0o600)
	for total := 0; ; {
		n, err := unix.CopyFileRange(from, nil, to, nil, 1<<30, 0)
		e.ok(err, "copy_file_range")
		if total += n; n == 0 {
			e.eq(total, len(data), "bytes copied")
			break
		}
	}
	e.content("to", data)
	e.eq(e.fstat(to).Size, int64(len(data)), "size")
}

// copyRange copies exactly n bytes.
func (e *env) copyRange(from int, in int64, to int, out int64, n int) {
	e.Helper()
	for n > 0 {
		m, err := unix.CopyFileRange(from, &in, to, &out, n, 0)
		e.ok(err, "copy_file_range")
		if m == 0 {
			e.Fatalf("copy_file_range ends %d bytes early", n)
		}
		n -= m
	}
}

func copyRanges(e *env) {
	e.file("from", "0123456789")
	e.file("to", "abcdefghij")
	from, to := e.open("from", unix.O_RDONLY, 0), e.open("to", unix.O_RDWR, 0)
	e.eq(e.read(to, 100, 0), "abcdefghij", "content") // it is cached now
	e.copyRange(from, 2, to, 4, 3)
	e.eq(e.read(to, 100, 0), "abcd234hij", "content")
	e.copyRange(from, 0, to, 20, 10)
	e.eq(e.read(to, 100, 0), "abcd234hij"+strings.Repeat("\x00", 10)+"0123456789", "content")
	in, out := int64(8), int64(0)
	n, err := unix.CopyFileRange(from, &in, to, &out, 100, 0)
	e.ok(err, "copy_file_range")
	e.eq([]int64{int64(n), in, out}, []int64{2, 10, 2}, "bytes copied and offsets at the end of the file")
	n, err = unix.CopyFileRange(from, &in, to, &out, 100, 0)
	e.ok(err, "copy_file_range")
	e.eq(n, 0, "bytes copied at the end of the file")
	// What is written but not yet flushed is copied too.
	w := e.open("from", unix.O_RDWR, 0)
	e.write(w, "XYZ", 0)
	e.copyRange(w, 0, to, 0, 3)
	e.eq(e.read(to, 3, 0), "XYZ", "content")
}

func copySameFile(e *env) {
	e.file("f", "0123456789")
	fd := e.open("f", unix.O_RDWR, 0)
	e.copyRange(fd, 0, fd, 5, 5)
	e.content("f", "0123401234")
	in, out := int64(0), int64(2)
	_, err := unix.CopyFileRange(fd, &in, fd, &out, 5, 0)
	e.errno(err, unix.EINVAL, "copy onto itself")
}

func copyErrors(e *env) {
	e.file("f", "x")
	e.file("g", "")
	r, w := e.open("f", unix.O_RDONLY, 0), e.open("g", unix.O_WRONLY, 0)
	_, err := unix.CopyFileRange(r, nil, r, nil, 1, 0)
	e.errno(err, unix.EBADF, "copy to a read-only descriptor")
	_, err = unix.CopyFileRange(w, nil, w, nil, 1, 0)
	e.errno(err, unix.EBADF, "copy from a write-only descriptor")
	app := e.open("g", unix.O_WRONLY|unix.O_APPEND, 0)
	_, err = unix.CopyFileRange(r, nil, app, nil, 1, 0)
	e.errno(err, unix.EBADF, "copy to an appending descriptor")
	dir := e.open(".", unix.O_RDONLY, 0)
	_, err = unix.CopyFileRange(dir, nil, w, nil, 1, 0)
	e.errno(err, unix.EISDIR, "copy from a directory")
	_, err = unix.CopyFileRange(r, nil, w, nil, 1, 1)
	e.errno(err, unix.EINVAL, "copy with a flag")
}

func syncFile(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, "data", 0)
	e.ok(unix.Fsync(fd), "fsync")
	e.write(fd, "more", 4)
	e.ok(unix.Fdatasync(fd), "fdatasync")
	e.ok(unix.Fsync(e.open("f", unix.O_RDONLY, 0)), "fsync of a read-only descriptor")
	e.ok(unix.Unlink(e.p("f")), "unlink")
	e.ok(unix.Fsync(fd), "fsync of an unlinked file")
	e.eq(e.read(fd, 10, 0), "datamore", "content")
}

func syncDirectory(e *env) {
	e.mkdir("d")
	e.file("d/f", "x")
	fd := e.open("d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	e.ok(unix.Fsync(fd), "fsync")
	e.ok(unix.Fdatasync(fd), "fdatasync")
}

func syncFileSystem(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, "x", 0)
	e.ok(unix.Syncfs(fd), "syncfs")
	e.ok(unix.Syncfs(e.open(".", unix.O_RDONLY, 0)), "syncfs by a directory")
}
