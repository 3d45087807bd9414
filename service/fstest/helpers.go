// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// patience bounds every wait for something that must come.
const patience = 20 * time.Second

// p returns the path of name in the case's directory.
func (e *env) p(name string) string { return e.dir + "/" + name }

// ok ends the case when err is not nil.
func (e *env) ok(err error, what string) {
	e.Helper()
	if err != nil {
		e.Fatalf("%s: %v", what, err)
	}
}

// errno ends the case when err is not want.
func (e *env) errno(err error, want unix.Errno, what string) {
	e.Helper()
	if err != error(want) {
		e.Fatalf("%s: got error %v, want %v", what, err, want)
	}
}

// eq ends the case when got is not want.
func (e *env) eq(got, want any, what string) {
	e.Helper()
	if d := cmp.Diff(want, got); d != "" {
		e.Fatalf("%s (-want +got):\n%s", what, d)
	}
}

// open opens name; the case's end closes it.
func (e *env) open(name string, flags int, mode uint32) int {
	e.Helper()
	fd, err := unix.Open(e.p(name), flags|unix.O_CLOEXEC, mode)
	e.ok(err, "open "+name)
	e.Cleanup(func() { unix.Close(fd) })
	return fd
}

// tryOpen opens name, closes it at once, and returns the error.
func (e *env) tryOpen(name string, flags int, mode uint32) error {
	fd, err := unix.Open(e.p(name), flags|unix.O_CLOEXEC, mode)
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

// file makes the file name, mode 0644, with data, and closes it.
func (e *env) file(name, data string) {
	e.Helper()
	fd, err := unix.Open(e.p(name), unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o644)
	e.ok(err, "create "+name)
	e.write(fd, data, 0)
	e.ok(unix.Close(fd), "close "+name)
}

func (e *env) mkdir(name string) {
	e.Helper()
	e.ok(unix.Mkdir(e.p(name), 0o755), "mkdir "+name)
}

// write writes data at off, all of it.
func (e *env) write(fd int, data string, off int64) {
	e.Helper()
	for b := []byte(data); len(b) > 0; {
		n, err := unix.Pwrite(fd, b, off)
		e.ok(err, "pwrite")
		b, off = b[n:], off+int64(n)
	}
}

// read returns up to n bytes from off; fewer only at the end of the file.
func (e *env) read(fd int, n int, off int64) string {
	e.Helper()
	b := make([]byte, n)
	got := 0
	for got < n {
		m, err := unix.Pread(fd, b[got:], off+int64(got))
		e.ok(err, "pread")
		if m == 0 {
			break
		}
		got += m
	}
	return string(b[:got])
}

// content checks what a file holds.
func (e *env) content(name, want string) {
	e.Helper()
	b, err := os.ReadFile(e.p(name))
	e.ok(err, "read "+name)
	if !bytes.Equal(b, []byte(want)) {
		e.Fatalf("%s holds %.60q (%d bytes), want %.60q (%d bytes)", name, b, len(b), want, len(want))
	}
}

func (e *env) stat(name string) unix.Stat_t {
	e.Helper()
	var st unix.Stat_t
	e.ok(unix.Lstat(e.p(name), &st), "lstat "+name)
	return st
}

func (e *env) fstat(fd int) unix.Stat_t {
	e.Helper()
	var st unix.Stat_t
	e.ok(unix.Fstat(fd, &st), "fstat")
	return st
}

// absent checks that a name is not there.
func (e *env) absent(name string) {
	e.Helper()
	var st unix.Stat_t
	e.errno(unix.Lstat(e.p(name), &st), unix.ENOENT, "lstat "+name)
}

// mode checks type and permissions.
func (e *env) mode(name string, want uint32) {
	e.Helper()
	if got := e.stat(name).Mode; got != want {
		e.Fatalf("mode of %s is %#o, want %#o", name, got, want)
	}
}

// links checks the link count.
func (e *env) links(name string, want uint64) {
	e.Helper()
	if got := uint64(e.stat(name).Nlink); got != want {
		e.Fatalf("link count of %s is %d, want %d", name, got, want)
	}
}

// within runs f and ends the case when it takes longer than patience.
func (e *env) within(what string, f func() error) {
	e.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		e.ok(err, what)
	case <-time.After(patience):
		e.Fatalf("%s: still waiting after %v", what, patience)
	}
}

// until polls what has no event to wait for.
func (e *env) until(what string, f func() bool) {
	e.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			e.Fatalf("%s: not so after %v", what, patience)
		}
	}
}

// outside returns a directory on another file system than the one tested, or
// at least elsewhere.
func (e *env) outside() string { return filepath.Clean(e.TempDir()) }
