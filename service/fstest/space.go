// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"strings"

	"golang.org/x/sys/unix"
)

var spaceCases = []testCase{
	{"fallocate/allocate", false, fallocateAllocate},
	{"fallocate/keep-size", false, fallocateKeepSize},
	{"fallocate/punch", false, fallocatePunch},
	{"fallocate/zero", false, fallocateZero},
	{"fallocate/errors", false, fallocateErrors},
	{"sparse/seek", false, sparseSeek},
	{"sparse/blocks", false, sparseBlocks},
	{"statfs/basic", false, statfsBasic},
}

func fallocateAllocate(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, "abc", 0)
	e.ok(unix.Fallocate(fd, 0, 0, 1<<20), "fallocate")
	st := e.fstat(fd)
	e.eq(st.Size, int64(1<<20), "size")
	if st.Blocks*512 < 1<<20 {
		e.Errorf("%d bytes are allocated, want 1 MiB", st.Blocks*512)
	}
	e.eq(e.read(fd, 5, 0), "abc\x00\x00", "content")
	e.ok(unix.Fallocate(fd, 0, 0, 10), "fallocate within the file")
	e.eq(e.fstat(fd).Size, int64(1<<20), "size")
}

func fallocateKeepSize(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20), "fallocate")
	st := e.fstat(fd)
	e.eq(st.Size, int64(0), "size")
	if st.Blocks*512 < 1<<20 {
		e.Errorf("%d bytes are allocated, want 1 MiB", st.Blocks*512)
	}
}

func fallocatePunch(e *env) {
	data := strings.Repeat("x", 1<<20)
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, data, 0)
	before := e.fstat(fd).Blocks
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 512<<10), "punch")
	want := data[:4096] + strings.Repeat("\x00", 512<<10) + data[4096+512<<10:]
	if e.read(fd, 2<<20, 0) != want {
		e.Error("the hole is not where it was punched")
	}
	st := e.fstat(fd)
	e.eq(st.Size, int64(1<<20), "size")
	if st.Blocks >= before {
		e.Errorf("%d blocks before, %d after", before, st.Blocks)
	}
	// Unaligned edges are zeroed.
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 10, 20), "punch a small hole")
	e.eq(e.read(fd, 40, 0), strings.Repeat("x", 10)+strings.Repeat("\x00", 20)+strings.Repeat("x", 10), "content")
	e.errno(unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE, 0, 4096), unix.EOPNOTSUPP, "punch without keeping the size")
}

func fallocateZero(e *env) {
	data := strings.Repeat("x", 64<<10)
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, data, 0)
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 100, 10_000), "zero")
	if e.read(fd, 1<<20, 0) != data[:100]+strings.Repeat("\x00", 10_000)+data[10_100:] {
		e.Error("zeros are not where they belong")
	}
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 60<<10, 100<<10), "zero, keep the size")
	e.eq(e.fstat(fd).Size, int64(64<<10), "size")
	e.ok(unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 60<<10, 100<<10), "zero beyond the end")
	e.eq(e.fstat(fd).Size, int64(160<<10), "size")
	e.eq(e.read(fd, 200<<10, 60<<10), strings.Repeat("\x00", 100<<10), "content")
}

func fallocateErrors(e *env) {
	e.file("f", "x")
	fd := e.open("f", unix.O_RDWR, 0)
	e.errno(unix.Fallocate(e.open("f", unix.O_RDONLY, 0), 0, 0, 10), unix.EBADF, "a read-only descriptor")
	e.errno(unix.Fallocate(fd, 0, 0, 0), unix.EINVAL, "length 0")
	e.errno(unix.Fallocate(fd, 0, -1, 10), unix.EINVAL, "offset -1")
	e.errno(unix.Fallocate(fd, 0, 1<<62, 1<<62), unix.EFBIG, "a huge range")
	e.content("f", "x")
}

func sparseSeek(e *env) {
	const hole, size = 64 << 10, 2<<20 + 100
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.write(fd, strings.Repeat("x", hole), 0)
	e.write(fd, strings.Repeat("y", 4096), 1<<20)
	e.ok(unix.Ftruncate(fd, size), "ftruncate")
	e.ok(unix.Fsync(fd), "fsync")
	for _, c := range []struct {
		name      string
		off       int64
		whence    int
		want      int64
		wantErrno error
	}{
		{"data at data", 0, unix.SEEK_DATA, 0, nil},
		{"hole after data", 0, unix.SEEK_HOLE, hole, nil},
		{"hole at a hole", hole + 5, unix.SEEK_HOLE, hole + 5, nil},
		{"data after a hole", hole, unix.SEEK_DATA, 1 << 20, nil},
		{"data inside data", 1<<20 + 7, unix.SEEK_DATA, 1<<20 + 7, nil},
		{"hole after the last data", 1 << 20, unix.SEEK_HOLE, 1<<20 + 4096, nil},
		{"data in the last hole", 1<<20 + 4096, unix.SEEK_DATA, 0, unix.ENXIO},
		{"data at the end", size, unix.SEEK_DATA, 0, unix.ENXIO},
		{"hole at the end", size, unix.SEEK_HOLE, 0, unix.ENXIO},
		{"hole beyond the end", size + 1, unix.SEEK_HOLE, 0, unix.ENXIO},
	} {
		got, err := unix.Seek(fd, c.off, c.whence)
		if err != c.wantErrno || err == nil && got != c.want {
			e.Errorf("%s: got %d, %v; want %d, %v", c.name, got, err, c.want, c.wantErrno)
		}
	}
	off, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	e.ok(err, "seek")
	now, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	e.ok(err, "seek")
	e.eq(now, off, "the file's offset after SEEK_HOLE")
	e.file("full", "x")
	got, err := unix.Seek(e.open("full", unix.O_RDONLY, 0), 0, unix.SEEK_HOLE)
	e.ok(err, "seek")
	e.eq(got, int64(1), "the hole that every file ends with")
}

func sparseBlocks(e *env) {
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.ok(unix.Ftruncate(fd, 1<<30), "ftruncate")
	if st := e.fstat(fd); st.Blocks != 0 {
		e.Errorf("an empty file of 1 GiB has %d blocks", st.Blocks)
	}
	e.eq(e.read(fd, 4096, 512<<20), strings.Repeat("\x00", 4096), "content")
	e.write(fd, strings.Repeat("x", 4096), 512<<20)
	if st := e.fstat(fd); st.Blocks < 8 || st.Blocks > 8192 {
		e.Errorf("one page in 1 GiB makes %d blocks", st.Blocks)
	}
}

func statfsBasic(e *env) {
	e.file("f", "x")
	var st, fst unix.Statfs_t
	e.ok(unix.Statfs(e.p("f"), &st), "statfs")
	e.ok(unix.Fstatfs(e.open("f", unix.O_RDONLY, 0), &fst), "fstatfs")
	e.eq(fst.Type, st.Type, "type by descriptor")
	e.eq(fst.Blocks, st.Blocks, "blocks by descriptor")
	if st.Bsize <= 0 || st.Blocks == 0 || st.Bfree > st.Blocks || st.Bavail > st.Bfree {
		e.Errorf("block size %d, blocks %d, free %d, available %d", st.Bsize, st.Blocks, st.Bfree, st.Bavail)
	}
	e.eq(int64(st.Namelen), int64(255), "longest name")
	e.errno(unix.Statfs(e.p("none"), &st), unix.ENOENT, "statfs of nothing")
}
