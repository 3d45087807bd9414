// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var dirCases = []testCase{
	{"readdir/basic", false, readdirBasic},
	{"readdir/small-buffer", false, readdirSmallBuffer},
	{"readdir/rewind", false, readdirRewind},
	{"readdir/seek", false, readdirSeek},
	{"readdir/remove-while-reading", false, readdirRemove},
	{"readdir/errors", false, readdirErrors},
	{"readdir/large-and-changing", false, readdirLarge},
}

// dirent is an entry as getdents64(2) gives it.
type dirent struct {
	Ino  uint64
	Off  int64 // seek here to go on after this entry
	Type uint8
	Name string
}

// getdents reads once, into a buffer of size bytes.
func getdents(fd, size int) ([]dirent, error) {
	b := make([]byte, size)
	n, err := unix.Getdents(fd, b)
	if err != nil {
		return nil, err
	}
	var all []dirent
	for b = b[:n]; len(b) > 0; {
		l := binary.NativeEndian.Uint16(b[16:])
		name, _, _ := bytes.Cut(b[19:l], []byte{0})
		all = append(all, dirent{
			Ino: binary.NativeEndian.Uint64(b), Off: int64(binary.NativeEndian.Uint64(b[8:])), Type: b[18], Name: string(name),
		})
		b = b[l:]
	}
	return all, nil
}

// rest reads to the end.
func rest(fd, size int) ([]dirent, error) {
	var all []dirent
	for {
		d, err := getdents(fd, size)
		if len(d) == 0 || err != nil {
			return all, err
		}
		all = append(all, d...)
	}
}

func (e *env) getdents(fd, size int) []dirent {
	e.Helper()
	d, err := getdents(fd, size)
	e.ok(err, "getdents")
	return d
}

func (e *env) rest(fd, size int) []dirent {
	e.Helper()
	d, err := rest(fd, size)
	e.ok(err, "getdents")
	return d
}

// entries returns the sorted names of ds without the dots.
func entries(ds []dirent) []string {
	var names []string
	for _, d := range ds {
		if d.Name != "." && d.Name != ".." {
			names = append(names, d.Name)
		}
	}
	slices.Sort(names)
	return names
}

// list returns what a directory holds, sorted.
func (e *env) list(name string) []string {
	e.Helper()
	fd, err := unix.Open(e.p(name), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	e.ok(err, "open "+name)
	defer unix.Close(fd)
	return entries(e.rest(fd, 64<<10))
}

func readdirBasic(e *env) {
	e.mkdir("dir")
	e.file("file", "")
	e.ok(unix.Symlink("x", e.p("link")), "symlink")
	e.ok(unix.Mkfifo(e.p("fifo"), 0o600), "mkfifo")
	ds := e.rest(e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0), 4096)
	types := map[string]uint8{}
	for _, d := range ds {
		if _, twice := types[d.Name]; twice {
			e.Errorf("%q is listed twice", d.Name)
		}
		types[d.Name] = d.Type
		if want := e.stat(d.Name).Ino; d.Name != ".." && d.Ino != want {
			e.Errorf("inode of %q is %d in the directory, %d by stat", d.Name, d.Ino, want)
		}
	}
	e.eq(types, map[string]uint8{
		".": unix.DT_DIR, "..": unix.DT_DIR, "dir": unix.DT_DIR, "file": unix.DT_REG, "link": unix.DT_LNK, "fifo": unix.DT_FIFO,
	}, "types")
	e.eq(e.list("dir"), []string(nil), "an empty directory")
}

// files makes n files and returns their names, sorted.
func (e *env) files(n int) []string {
	e.Helper()
	var names []string
	for i := range n {
		name := fmt.Sprintf("%s%03d", strings.Repeat("n", i%40), i)
		e.ok(unix.Mknod(e.p(name), unix.S_IFREG|0o600, 0), "mknod")
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func readdirSmallBuffer(e *env) {
	want := e.files(min(300, e.o.Entries))
	fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	for _, size := range []int{80, 200, 4096, 1 << 20} {
		_, err := unix.Seek(fd, 0, unix.SEEK_SET)
		e.ok(err, "rewind")
		e.eq(entries(e.rest(fd, size)), want, fmt.Sprintf("names through a buffer of %d bytes", size))
	}
}

func readdirRewind(e *env) {
	e.files(50)
	fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	e.eq(len(entries(e.rest(fd, 4096))), 50, "entries")
	e.eq(len(e.getdents(fd, 4096)), 0, "entries after the end")
	e.file("new", "")
	e.ok(unix.Unlink(e.p("000")), "unlink")
	_, err := unix.Seek(fd, 0, unix.SEEK_SET)
	e.ok(err, "rewind")
	got := entries(e.rest(fd, 4096))
	e.eq([]bool{slices.Contains(got, "new"), slices.Contains(got, "000")}, []bool{true, false}, "a new and a removed entry after a rewind")
	e.eq(got, e.list("."), "the same through another descriptor")
}

func readdirSeek(e *env) {
	e.files(200)
	fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	all := e.rest(fd, 1024)
	names := func(ds []dirent) (s []string) {
		for _, d := range ds {
			s = append(s, d.Name)
		}
		return s
	}
	for _, i := range []int{150, 0, 77, 199, 3, 78} {
		_, err := unix.Seek(fd, all[i].Off, unix.SEEK_SET)
		e.ok(err, "seek")
		e.eq(names(e.rest(fd, 512)), names(all[i+1:]), fmt.Sprintf("entries after seeking to the %dth", i))
	}
	// The offset of a directory is told, too.
	_, err := unix.Seek(fd, 0, unix.SEEK_SET)
	e.ok(err, "rewind")
	d := e.getdents(fd, 512)
	off, err := unix.Seek(fd, 0, unix.SEEK_CUR)
	e.ok(err, "tell")
	e.eq(off, d[len(d)-1].Off, "offset")
}

// readdirRemove empties a directory as rm -r does: remove each batch that was read.
func readdirRemove(e *env) {
	n := min(500, e.o.Entries)
	e.files(n)
	fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	removed := 0
	for {
		ds := e.getdents(fd, 1024)
		if len(ds) == 0 {
			break
		}
		for _, name := range entries(ds) {
			e.ok(unix.Unlink(e.p(name)), "unlink "+name)
			removed++
		}
	}
	e.eq(removed, n, "entries removed in one pass")
	e.eq(len(e.list(".")), 0, "entries that are left")
}

func readdirErrors(e *env) {
	e.files(1)
	fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	_, err := unix.Getdents(fd, make([]byte, 8))
	e.errno(err, unix.EINVAL, "a buffer that holds no entry")
	e.file("f", "")
	_, err = unix.Getdents(e.open("f", unix.O_RDONLY, 0), make([]byte, 4096))
	e.errno(err, unix.ENOTDIR, "getdents of a file")
}

// readdirLarge reads a directory several times while other names come, go and
// change: POSIX leaves open whether those are seen, but each entry that
// stays must be seen exactly once.
func readdirLarge(e *env) {
	const workers = 16
	stable := e.o.Entries
	each := func(f func(i int) error) {
		e.Helper()
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for i := w; i < stable; i += workers {
					if err := f(i); err != nil {
						e.Errorf("entry %d: %v", i, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	name := func(i int) string { return e.p("stable-" + strconv.Itoa(i)) }
	each(func(i int) error { return unix.Mknod(name(i), unix.S_IFREG|0o600, 0) })
	if e.Failed() {
		return
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	var churned int
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			a, b := e.p(fmt.Sprint("churn-a-", i%500)), e.p(fmt.Sprint("churn-b-", i%700))
			if err := unix.Mknod(a, unix.S_IFREG|0o600, 0); err != nil && err != unix.EEXIST {
				e.Errorf("mknod: %v", err)
				return
			}
			if i%2 == 0 {
				unix.Rename(a, b)
			}
			if i%3 == 0 {
				unix.Unlink(b)
			}
			churned++
		}
	})
	var readers sync.WaitGroup
	for r := range 2 {
		fd := e.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		readers.Go(func() {
			for pass := range 2 {
				if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
					e.Errorf("rewind: %v", err)
					return
				}
				ds, err := rest(fd, 32<<10<<r)
				if err != nil {
					e.Errorf("getdents: %v", err)
					return
				}
				seen := make(map[string]int, stable)
				for _, d := range ds {
					if strings.HasPrefix(d.Name, "stable-") {
						seen[d.Name]++
					}
				}
				twice := 0
				for n := range maps.Values(seen) {
					if n > 1 {
						twice++
					}
				}
				if len(seen) != stable || twice > 0 {
					e.Errorf("pass %d: %d of %d stable entries seen, %d of them more than once", pass, len(seen), stable, twice)
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	wg.Wait()
	if churned == 0 {
		e.Error("nothing changed while the directory was read")
	}
	each(func(i int) error { return unix.Unlink(name(i)) })
}
