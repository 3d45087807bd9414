// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"strings"

	"golang.org/x/sys/unix"
)

var mmapCases = []testCase{
	{"mmap/shared", false, mmapShared},
	{"mmap/private", false, mmapPrivate},
	{"mmap/coherent", false, mmapCoherent},
	{"mmap/two-maps", false, mmapTwoMaps},
	{"mmap/two-processes", false, mmapTwoProcesses},
	{"mmap/rights", false, mmapRights},
	{"mmap/truncate", false, mmapTruncate},
	{"mmap/unlinked", false, mmapUnlinked},
	{"mmap/large", false, mmapLarge},
}

func (e *env) mmap(fd, n, prot, flags int) []byte {
	e.Helper()
	m, err := unix.Mmap(fd, 0, n, prot, flags)
	e.ok(err, "mmap")
	e.Cleanup(func() { unix.Munmap(m) })
	return m
}

const protRW = unix.PROT_READ | unix.PROT_WRITE

func mmapShared(e *env) {
	e.file("f", strings.Repeat("a", 10_000))
	fd := e.open("f", unix.O_RDWR, 0)
	m := e.mmap(fd, 10_000, protRW, unix.MAP_SHARED)
	e.eq(string(m[9_998:]), "aa", "content by mmap")
	m[0], m[5_000], m[9_999] = 'X', 'Y', 'Z'
	e.ok(unix.Msync(m, unix.MS_SYNC), "msync")
	want := "X" + strings.Repeat("a", 4_999) + "Y" + strings.Repeat("a", 4_998) + "Z"
	e.content("f", want)
	e.ok(unix.Close(fd), "close") // the map lives on
	m[1] = 'W'
	e.ok(unix.Msync(m, unix.MS_SYNC), "msync after close")
	e.content("f", "XW"+want[2:])
}

func mmapPrivate(e *env) {
	e.file("f", strings.Repeat("a", 4096))
	m := e.mmap(e.open("f", unix.O_RDONLY, 0), 4096, protRW, unix.MAP_PRIVATE)
	m[0] = 'X'
	e.eq(string(m[:2]), "Xa", "content by mmap")
	e.content("f", strings.Repeat("a", 4096))
}

func mmapCoherent(e *env) {
	e.file("f", strings.Repeat("a", 8192))
	fd := e.open("f", unix.O_RDWR, 0)
	m := e.mmap(fd, 8192, protRW, unix.MAP_SHARED)
	e.write(fd, "written", 100)
	e.eq(string(m[100:107]), "written", "what write put there, by mmap")
	copy(m[200:], "mapped")
	e.eq(e.read(fd, 6, 200), "mapped", "what mmap put there, by read")
	other := e.open("f", unix.O_RDONLY, 0)
	e.eq(e.read(other, 6, 200), "mapped", "what mmap put there, by another descriptor")
}

func mmapTwoMaps(e *env) {
	e.file("f", strings.Repeat("a", 4096))
	a := e.mmap(e.open("f", unix.O_RDWR, 0), 4096, protRW, unix.MAP_SHARED)
	b := e.mmap(e.open("f", unix.O_RDONLY, 0), 4096, unix.PROT_READ, unix.MAP_SHARED)
	a[7] = 'Q'
	e.eq(b[7], byte('Q'), "the other map")
}

func mmapTwoProcesses(e *env) {
	e.file("f", strings.Repeat("a", 4096))
	p := e.agent()
	theirs := p.mustOpen("f")
	m := e.mmap(e.open("f", unix.O_RDWR, 0), 4096, protRW, unix.MAP_SHARED)
	copy(m, "shared")
	p.begin("pread", "", "", theirs, 6, 0)
	r, err := p.end()
	e.ok(err, "read in another process")
	e.eq(r.Text, "shared", "what another process reads")
	e.ok(p.call("pwrite", "", "back", theirs, 10), "write in another process")
	e.eq(string(m[10:14]), "back", "what another process wrote, by mmap")
}

func mmapRights(e *env) {
	e.file("f", strings.Repeat("a", 4096))
	_, err := unix.Mmap(e.open("f", unix.O_RDONLY, 0), 0, 4096, protRW, unix.MAP_SHARED)
	e.errno(err, unix.EACCES, "a shared, writable map of a read-only descriptor")
	_, err = unix.Mmap(e.open("f", unix.O_WRONLY, 0), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	e.errno(err, unix.EACCES, "a map of a write-only descriptor")
	_, err = unix.Mmap(e.open(".", unix.O_RDONLY, 0), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	e.errno(err, unix.ENODEV, "a map of a directory")
}

func mmapTruncate(e *env) {
	e.file("f", strings.Repeat("a", 100))
	fd := e.open("f", unix.O_RDWR, 0)
	m := e.mmap(fd, 8192, protRW, unix.MAP_SHARED)
	e.eq(string(m[99:102]), "a\x00\x00", "the rest of the last page")
	m[200] = 'x' // beyond the end: never written
	e.ok(unix.Ftruncate(fd, 8192), "ftruncate")
	m[4096] = 'b'
	e.eq(e.read(fd, 2, 4096), "b\x00", "the new page")
	e.ok(unix.Ftruncate(fd, 50), "ftruncate")
	e.ok(unix.Ftruncate(fd, 100), "ftruncate")
	e.eq(e.read(fd, 100, 0), strings.Repeat("a", 50)+strings.Repeat("\x00", 50), "content")
	e.eq(m[60], byte(0), "what was cut off, by mmap")
}

func mmapUnlinked(e *env) {
	e.file("f", strings.Repeat("a", 4096))
	fd := e.open("f", unix.O_RDWR, 0)
	m := e.mmap(fd, 4096, protRW, unix.MAP_SHARED)
	e.ok(unix.Unlink(e.p("f")), "unlink")
	copy(m, "gone")
	e.ok(unix.Msync(m, unix.MS_SYNC), "msync")
	e.eq(e.read(fd, 4, 0), "gone", "content")
}

func mmapLarge(e *env) {
	const size = 16 << 20
	fd := e.open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
	e.ok(unix.Ftruncate(fd, size), "ftruncate")
	m := e.mmap(fd, size, protRW, unix.MAP_SHARED)
	for i := 0; i < size; i += 4096 {
		m[i], m[i+4095] = byte(i>>12), byte(i>>20)
	}
	e.ok(unix.Msync(m, unix.MS_SYNC), "msync")
	direct := e.open("f", unix.O_RDONLY|unix.O_DIRECT, 0)
	b := e.aligned(1 << 20)
	for off := 0; off < size; off += len(b) {
		_, err := unix.Pread(direct, b, int64(off))
		e.ok(err, "direct read")
		for i := 0; i < len(b); i += 4096 {
			if b[i] != byte((off+i)>>12) || b[i+4095] != byte((off+i)>>20) {
				e.Fatalf("page at %d is not what was mapped", off+i)
			}
		}
	}
}
