// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var modelCases = []testCase{{"model/random", false, modelRandom}}

// modelRandom does the same random operations here and in a plain directory
// elsewhere: every result and, at the end, both trees must be equal.
func modelRandom(e *env) {
	e.Logf("seed %d (flag -seed, or Options.Seed, repeats it)", e.o.Seed)
	r := rand.New(rand.NewPCG(e.o.Seed, 0))
	here, there := &world{dir: e.dir}, &world{dir: e.outside()}
	defer here.close()
	defer there.close()
	var last []string
	for i := range e.o.Ops {
		o := newOp(r)
		got, want := o.do(here), o.do(there)
		last = append(last, o.String()+" = "+want)
		if got != want {
			e.Fatalf("seed %d, operation %d:\n%s\ngot %s", e.o.Seed, i, strings.Join(last[max(0, len(last)-10):], "\n"), got)
		}
		if i%500 == 499 || i == e.o.Ops-1 {
			e.eq(here.tree(e), there.tree(e), fmt.Sprintf("seed %d: trees after %d operations", e.o.Seed, i+1))
		}
	}
}

// world is one of the two directories and the files open in it.
type world struct {
	dir   string
	files [4]*int
}

func (w *world) close() {
	for _, fd := range w.files {
		if fd != nil {
			unix.Close(*fd)
		}
	}
}

// tree describes everything below, one line each.
func (w *world) tree(e *env) []string {
	e.Helper()
	var lines []string
	e.ok(filepath.WalkDir(w.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == w.dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %#o", strings.TrimPrefix(p, w.dir), st.Mode)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil && os.Geteuid() == 0 {
				return err
			}
			line += fmt.Sprintf(" %d links, %d bytes, %x, mtime %d", st.Nlink, st.Size, hash(b), old(st.Mtim))
		case unix.S_IFLNK:
			s, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " " + s
		}
		lines = append(lines, line)
		return nil
	}), "walk")
	return lines
}

func hash(b []byte) (h uint64) {
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}

// old returns a time that was set by the sequence, 0 for one of now.
func old(t unix.Timespec) int64 {
	if t.Sec < 1_000_000 {
		return t.Nano()
	}
	return 0
}

// op is one operation with all that it needs, so that it can be done twice.
type op struct {
	kind string
	a, b string // names below the directory
	slot int    // of an open file
	n, m int64
	data []byte
}

func (o op) String() string {
	return fmt.Sprintf("%s %q %q slot %d, %d, %d, %d bytes", o.kind, o.a, o.b, o.slot, o.n, o.m, len(o.data))
}

var opKinds = []string{
	"create", "create", "mkdir", "mkdir", "unlink", "rmdir", "rename", "rename", "noreplace", "exchange", "link", "symlink", "readlink", "mknod",
	"chmod", "truncate", "utimes", "stat", "list", "open", "open", "opentrunc", "openexcl", "openappend",
	"pwrite", "pwrite", "pwrite", "pread", "pread", "write", "read", "seek", "ftruncate", "fstat", "fsync", "fallocate", "copy", "setxattr", "getxattr", "removexattr",
}

func newOp(r *rand.Rand) op {
	name := func() string {
		s := "/" + string(rune('a'+r.IntN(6)))
		for r.IntN(3) == 0 && len(s) < 8 {
			s += "/" + string(rune('a'+r.IntN(6)))
		}
		return s
	}
	o := op{kind: opKinds[r.IntN(len(opKinds))], a: name(), b: name(), slot: r.IntN(4), n: r.Int64N(20_000), m: r.Int64N(20_000)}
	if r.IntN(10) == 0 {
		o.n *= 50
	}
	o.data = make([]byte, r.IntN(12_000))
	for i := range o.data {
		o.data[i] = byte(r.Uint32())
	}
	return o
}

// do returns what came of it in words that are the same in both worlds.
func (o op) do(w *world) string {
	res := func(err error, v ...any) string {
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(append([]any{"ok"}, v...)...)
	}
	a, b := w.dir+o.a, w.dir+o.b
	open := func(flags int) string {
		fd, err := unix.Open(a, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o644)
		if err == nil {
			if old := w.files[o.slot]; old != nil {
				unix.Close(*old)
			}
			w.files[o.slot] = &fd
		}
		return res(err)
	}
	switch o.kind {
	case "create":
		return open(unix.O_RDWR | unix.O_CREAT)
	case "open":
		return open(unix.O_RDWR)
	case "opentrunc":
		return open(unix.O_RDWR | unix.O_TRUNC)
	case "openexcl":
		return open(unix.O_RDWR | unix.O_CREAT | unix.O_EXCL)
	case "openappend":
		return open(unix.O_RDWR | unix.O_APPEND)
	case "mkdir":
		return res(unix.Mkdir(a, 0o755))
	case "unlink":
		return res(unix.Unlink(a))
	case "rmdir":
		return res(unix.Rmdir(a))
	case "rename":
		return res(unix.Rename(a, b))
	case "noreplace":
		return res(unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE))
	case "exchange":
		return res(unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE))
	case "link":
		return res(unix.Link(a, b))
	case "symlink":
		return res(unix.Symlink(strings.TrimPrefix(o.b, "/"), a))
	case "readlink":
		s, err := os.Readlink(a)
		if err != nil {
			err = err.(*fs.PathError).Err
		}
		return res(err, s)
	case "mknod":
		return res(unix.Mknod(a, unix.S_IFREG|0o640, 0))
	case "chmod":
		return res(unix.Chmod(a, 0o700|uint32(o.n)&0o77))
	case "truncate":
		return res(unix.Truncate(a, o.n))
	case "utimes":
		return res(unix.UtimesNanoAt(unix.AT_FDCWD, a, []unix.Timespec{{Sec: o.n}, {Sec: o.m}}, unix.AT_SYMLINK_NOFOLLOW))
	case "stat":
		var st unix.Stat_t
		err := unix.Lstat(a, &st)
		return res(err, describe(st))
	case "list":
		d, err := os.ReadDir(a)
		if err != nil {
			return "cannot list"
		}
		var names []string
		for _, x := range d {
			names = append(names, x.Name()+" "+x.Type().String())
		}
		slices.Sort(names)
		return res(nil, names)
	case "setxattr":
		return res(unix.Lsetxattr(a, "user.x", o.data[:min(len(o.data), 200)], 0))
	case "getxattr":
		v := make([]byte, 300)
		n, err := unix.Lgetxattr(a, "user.x", v)
		return res(err, v[:max(n, 0)])
	case "removexattr":
		return res(unix.Lremovexattr(a, "user.x"))
	}

	p := w.files[o.slot]
	if p == nil {
		return "no file"
	}
	fd := *p
	switch o.kind {
	case "pwrite":
		n, err := unix.Pwrite(fd, o.data, o.n)
		return res(err, n)
	case "write":
		n, err := unix.Write(fd, o.data)
		return res(err, n)
	case "pread":
		v := make([]byte, o.m)
		n, err := unix.Pread(fd, v, o.n)
		return res(err, n, hash(v))
	case "read":
		v := make([]byte, o.m)
		n, err := unix.Read(fd, v)
		return res(err, n, hash(v))
	case "seek":
		n, err := unix.Seek(fd, o.n-1000, int(o.m%3))
		return res(err, n)
	case "ftruncate":
		return res(unix.Ftruncate(fd, o.n))
	case "fsync":
		return res(unix.Fsync(fd))
	case "fallocate":
		return res(unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE*uint32(o.n&1)|unix.FALLOC_FL_PUNCH_HOLE*uint32(o.n&1), o.n, o.m+1))
	case "copy":
		in, out := o.n, o.m
		q := w.files[(o.slot+1)%len(w.files)]
		if q == nil {
			return "no second file"
		}
		n, err := unix.CopyFileRange(fd, &in, *q, &out, 1000, 0)
		return res(err, n)
	case "fstat":
		var st unix.Stat_t
		err := unix.Fstat(fd, &st)
		return res(err, describe(st))
	}
	panic("unknown operation " + o.kind)
}

// describe tells of a file what does not depend on the file system it is on.
func describe(st unix.Stat_t) string {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return fmt.Sprintf("%#o %d links, %d bytes, mtime %d", st.Mode, st.Nlink, st.Size, old(st.Mtim))
	case unix.S_IFLNK:
		return fmt.Sprintf("link of %d bytes, %d links", st.Size, st.Nlink)
	}
	return fmt.Sprintf("%#o", st.Mode)
}
