// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var nameCases = []testCase{
	{"name/length", false, nameLength},
	{"name/too-long", false, nameTooLong},
	{"name/bytes", false, nameBytes},
	{"name/not-utf8", false, nameNotUTF8},
	{"name/case", false, nameCase},
	{"name/dots", false, nameDots},
}

func nameLength(e *env) {
	name := strings.Repeat("n", 255)
	e.file(name, "x")
	e.content(name, "x")
	e.eq(e.list("."), []string{name}, "listing")
	dir := strings.Repeat("ü", 127) + "d" // 255 bytes
	e.mkdir(dir)
	e.ok(unix.Rename(e.p(name), e.p(dir+"/"+strings.Repeat("m", 255))), "rename")
	e.eq(e.list(dir), []string{strings.Repeat("m", 255)}, "listing")
	e.ok(unix.Symlink("x", e.p(strings.Repeat("s", 255))), "symlink")
}

func nameTooLong(e *env) {
	long := e.p(strings.Repeat("n", 256))
	e.file("f", "")
	var st unix.Stat_t
	_, err := unix.Open(long, unix.O_RDONLY, 0)
	e.errno(err, unix.ENAMETOOLONG, "open")
	_, err = unix.Open(long, unix.O_CREAT|unix.O_RDWR, 0o600)
	e.errno(err, unix.ENAMETOOLONG, "create")
	_, err = unix.Readlink(long, make([]byte, 10))
	e.errno(err, unix.ENAMETOOLONG, "readlink")
	for what, err := range map[string]error{
		"lstat": unix.Lstat(long, &st), "mkdir": unix.Mkdir(long, 0o700), "mknod": unix.Mknod(long, unix.S_IFIFO|0o600, 0),
		"symlink": unix.Symlink("x", long), "link": unix.Link(e.p("f"), long), "rename": unix.Rename(e.p("f"), long),
		"unlink": unix.Unlink(long), "rmdir": unix.Rmdir(long), "a long name in the middle": unix.Lstat(long+"/x", &st),
		"a long path": unix.Lstat(e.p(strings.Repeat("./", 2048)), &st),
	} {
		e.errno(err, unix.ENAMETOOLONG, what)
	}
}

func nameBytes(e *env) {
	var want []string
	for c := 1; c < 256; c++ {
		if c == '/' {
			continue
		}
		if c != '.' {
			want = append(want, string([]byte{byte(c)}))
		}
		want = append(want, "x"+string([]byte{byte(c)})+"y")
	}
	for _, name := range want {
		e.ok(unix.Mknod(e.p(name), unix.S_IFREG|0o600, 0), "mknod")
	}
	slices.Sort(want)
	e.eq(e.list("."), want, "listing")
	for _, name := range want {
		e.stat(name)
		e.ok(unix.Unlink(e.p(name)), "unlink")
	}
}

func nameNotUTF8(e *env) {
	for _, name := range []string{"\xff\xfe", "caf\xe9", "\xc3", "a\x80b", "\xed\xa0\x80"} {
		e.ok(os.WriteFile(e.p(name), []byte("x"), 0o600), "create")
		e.eq(e.list("."), []string{name}, "listing")
		e.ok(unix.Rename(e.p(name), e.p(name+"2")), "rename")
		e.content(name+"2", "x")
		e.ok(unix.Unlink(e.p(name+"2")), "unlink")
	}
}

func nameCase(e *env) {
	e.file("a", "lower")
	e.file("A", "upper")
	// Composed and decomposed.
	e.file("\u00e9", "one")
	e.file("e\u0301", "two")
	e.content("a", "lower")
	e.content("\u00e9", "one")
	e.eq(len(e.list(".")), 4, "entries")
}

func nameDots(e *env) {
	for _, name := range []string{"...", "..x", ".x", ". ", ".. ", "x."} {
		e.file(name, name)
		e.content(name, name)
	}
	e.eq(len(e.list(".")), 6, "entries")
}
