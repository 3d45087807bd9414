// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// nobody is a user and a group that own nothing.
const nobody = 65534

var permCases = []testCase{
	{"perm/access", false, permAccess},
	{"perm/files", true, permFiles},
	{"perm/directories", true, permDirectories},
	{"perm/supplementary-groups", true, permGroups},
	{"perm/creation", true, permCreation},
	{"perm/owner-only", true, permOwnerOnly},
	{"perm/chgrp", true, permChgrp},
	{"perm/sticky", true, permSticky},
	{"perm/setgid-directory", true, permSetgidDirectory},
	{"perm/exec", true, permExec},
}

// permAccess: access(2) of the caller itself, root or not.
func permAccess(e *env) {
	e.file("f", "x")
	e.ok(unix.Access(e.p("f"), unix.F_OK), "access F_OK")
	e.ok(unix.Access(e.p("f"), unix.R_OK|unix.W_OK), "access R_OK|W_OK")
	e.errno(unix.Access(e.p("f"), unix.X_OK), unix.EACCES, "access X_OK")
	e.ok(unix.Chmod(e.p("f"), 0o755), "chmod")
	e.ok(unix.Access(e.p("f"), unix.X_OK), "access X_OK")
	e.errno(unix.Access(e.p("none"), unix.F_OK), unix.ENOENT, "access of nothing")
}

func permFiles(e *env) {
	u := e.user(nobody, nobody)
	const r, w, rw = unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR
	for i, c := range []struct {
		uid, gid int
		mode     uint32
		may      []int // the flags of open that work
	}{
		{0, 0, 0o600, nil},
		{0, 0, 0o604, []int{r}},
		{0, 0, 0o602, []int{w}},
		{0, 0, 0o606, []int{r, w, rw}},
		{nobody, 0, 0o400, []int{r}},
		{nobody, 0, 0o066, nil}, // the owner's bits count alone
		{0, nobody, 0o640, []int{r}},
		{0, nobody, 0o606, nil},
		{nobody, nobody, 0o600, []int{r, w, rw}},
	} {
		name := fmt.Sprint("f", i)
		e.file(name, "x")
		e.ok(unix.Chown(e.p(name), c.uid, c.gid), "chown")
		e.ok(unix.Chmod(e.p(name), c.mode), "chmod")
		for _, flags := range []int{r, w, rw} {
			var want error = unix.EACCES
			for _, f := range c.may {
				if f == flags {
					want = nil
				}
			}
			if err := u.tryOpen(name, flags, 0); err != want {
				e.Errorf("%d:%d %#o, open with flags %d: got %v, want %v", c.uid, c.gid, c.mode, flags, err, want)
			}
			bits := int64([]int{unix.R_OK, unix.W_OK, unix.R_OK | unix.W_OK}[flags])
			if err := u.call("access", name, "", bits); err != want {
				e.Errorf("%d:%d %#o, access %d: got %v, want %v", c.uid, c.gid, c.mode, bits, err, want)
			}
		}
	}
	e.ok(u.call("truncate", "f8", "", 0), "truncate one's own file")
	e.errno(u.call("truncate", "f1", "", 0), unix.EACCES, "truncate a file that is for reading")
}

func permDirectories(e *env) {
	u := e.user(nobody, nobody)
	for _, d := range []struct {
		name string
		mode uint32
	}{{"none", 0o700}, {"r", 0o704}, {"x", 0o701}, {"rx", 0o705}, {"wx", 0o703}, {"rwx", 0o707}} {
		e.mkdir(d.name)
		e.file(d.name+"/f", "x")
		e.ok(unix.Chmod(e.p(d.name), d.mode), "chmod")
		can := func(s string) error {
			if strings.Contains(d.name, s) {
				return nil
			}
			return unix.EACCES
		}
		check := func(what string, err, want error) {
			e.Helper()
			if err != want {
				e.Errorf("directory with rights %s: %s: got %v, want %v", d.name, what, err, want)
			}
		}
		check("open a file", u.tryOpen(d.name+"/f", unix.O_RDONLY, 0), can("x"))
		check("list", u.call("list", d.name, ""), can("r"))
		check("create", u.tryOpen(d.name+"/new", unix.O_CREAT|unix.O_RDWR, 0o600), can("wx"))
		check("mkdir", u.call("mkdir", d.name+"/dir", "", 0o700), can("wx"))
		check("rename", u.call("rename", d.name+"/f", d.name+"/g"), can("wx"))
		check("symlink", u.call("symlink", d.name+"/s", "x"), can("wx"))
		if can("wx") == nil {
			check("unlink somebody else's file", u.call("unlink", d.name+"/g", ""), nil)
			check("rmdir", u.call("rmdir", d.name+"/dir", ""), nil)
		} else {
			check("unlink", u.call("unlink", d.name+"/f", ""), unix.EACCES)
		}
	}
}

func permGroups(e *env) {
	e.file("f", "x")
	e.ok(unix.Chown(e.p("f"), 0, 4321), "chown")
	e.ok(unix.Chmod(e.p("f"), 0o660), "chmod")
	e.mkdir("d")
	e.ok(unix.Chown(e.p("d"), 0, 4322), "chown")
	e.ok(unix.Chmod(e.p("d"), 0o770), "chmod")
	outside, inside := e.user(nobody, nobody), e.user(nobody, nobody, 1, 2, 3, 4321, 4322)
	e.errno(outside.tryOpen("f", unix.O_RDONLY, 0), unix.EACCES, "open outside the group")
	e.ok(inside.tryOpen("f", unix.O_RDWR, 0), "open as a member")
	e.errno(outside.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o600), unix.EACCES, "create outside the group")
	for what, err := range map[string]error{
		"create":  inside.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o600),
		"mkdir":   inside.call("mkdir", "d/d", "", 0o700),
		"mknod":   inside.call("mknod", "d/p", "", unix.S_IFIFO|0o600, 0),
		"symlink": inside.call("symlink", "d/s", "x"),
		"rename":  inside.call("rename", "d/s", "d/t"),
		"list":    inside.call("list", "d", ""),
		"unlink":  inside.call("unlink", "d/t", ""),
	} {
		e.ok(err, what+" by supplementary group")
	}
}

func permCreation(e *env) {
	e.ok(unix.Chmod(e.p("."), 0o777), "chmod")
	u := e.user(1111, 2222, 3333)
	e.ok(u.tryOpen("f", unix.O_CREAT|unix.O_RDWR, 0o640), "create")
	e.ok(u.call("mkdir", "d", "", 0o750), "mkdir")
	e.ok(u.call("mknod", "p", "", unix.S_IFIFO|0o600, 0), "mknod")
	e.ok(u.call("symlink", "s", "x"), "symlink")
	for _, name := range []string{"f", "d", "p", "s"} {
		st := e.stat(name)
		e.eq([]uint32{st.Uid, st.Gid}, []uint32{1111, 2222}, "owner of "+name)
	}
	u.call("umask", "", "", 0o077)
	e.ok(u.tryOpen("masked", unix.O_CREAT|unix.O_RDWR, 0o666), "create")
	e.mode("masked", unix.S_IFREG|0o600)
	// What was made read-only is written through the descriptor that made it.
	fd, err := u.open("ro", unix.O_CREAT|unix.O_RDWR, 0o400)
	e.ok(err, "create read-only")
	e.ok(u.call("pwrite", "", "data", fd, 0), "write")
	e.content("ro", "data")
	e.errno(u.tryOpen("ro", unix.O_RDWR, 0), unix.EACCES, "open for writing")
}

func permOwnerOnly(e *env) {
	e.ok(unix.Chmod(e.p("."), 0o777), "chmod")
	e.file("f", "x")
	e.ok(unix.Chmod(e.p("f"), 0o666), "chmod")
	u := e.user(nobody, nobody)
	e.errno(u.call("chmod", "f", "", 0o777), unix.EPERM, "chmod somebody else's file")
	e.errno(u.call("chown", "f", "", nobody, -1), unix.EPERM, "take somebody else's file")
	e.errno(u.call("utimes", "f", "", 1), unix.EPERM, "set times of somebody else's file")
	e.ok(u.call("utimes", "f", "", unix.UTIME_NOW), "touch a file that one may write")
	e.ok(unix.Chmod(e.p("f"), 0o644), "chmod")
	e.errno(u.call("utimes", "f", "", unix.UTIME_NOW), unix.EACCES, "touch a file that one may not write")
	e.ok(u.tryOpen("own", unix.O_CREAT|unix.O_RDWR, 0o600), "create")
	e.ok(u.call("chmod", "own", "", 0o640), "chmod one's own file")
	e.ok(u.call("utimes", "own", "", 1), "set times of one's own file")
	e.errno(u.call("chown", "own", "", 0, -1), unix.EPERM, "give a file away")
}

func permChgrp(e *env) {
	e.ok(unix.Chmod(e.p("."), 0o777), "chmod")
	u := e.user(nobody, nobody, 777)
	e.ok(u.tryOpen("f", unix.O_CREAT|unix.O_RDWR, 0o640), "create")
	e.ok(u.call("chown", "f", "", -1, 777), "chgrp to a supplementary group")
	e.eq(e.stat("f").Gid, uint32(777), "group")
	e.errno(u.call("chown", "f", "", -1, 778), unix.EPERM, "chgrp to a foreign group")
}

func permSticky(e *env) {
	e.mkdir("d")
	e.ok(unix.Chmod(e.p("d"), 0o1777), "chmod")
	a, b := e.user(1001, 1001), e.user(1002, 1002)
	e.ok(a.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o666), "create")
	e.ok(b.tryOpen("d/g", unix.O_CREAT|unix.O_RDWR, 0o666), "create")
	e.errno(b.call("unlink", "d/f", ""), unix.EPERM, "unlink somebody else's file")
	e.errno(b.call("rename", "d/f", "d/x"), unix.EPERM, "rename somebody else's file")
	e.errno(b.call("rename", "d/g", "d/f"), unix.EPERM, "rename over somebody else's file")
	e.ok(a.call("rename", "d/f", "d/x"), "rename one's own file")
	e.ok(a.call("unlink", "d/x", ""), "unlink one's own file")
}

func permSetgidDirectory(e *env) {
	e.mkdir("d")
	e.ok(unix.Chown(e.p("d"), 0, 4321), "chown")
	e.ok(unix.Chmod(e.p("d"), 0o2777), "chmod")
	u := e.user(nobody, nobody)
	e.ok(u.tryOpen("d/f", unix.O_CREAT|unix.O_RDWR, 0o644), "create")
	e.ok(u.call("mkdir", "d/sub", "", 0o755), "mkdir")
	e.ok(u.call("symlink", "d/s", "x"), "symlink")
	e.ok(u.call("mknod", "d/p", "", unix.S_IFIFO|0o600, 0), "mknod")
	for _, name := range []string{"d/f", "d/sub", "d/s", "d/p"} {
		st := e.stat(name)
		e.eq([]uint32{st.Uid, st.Gid}, []uint32{nobody, 4321}, "owner of "+name)
	}
	e.mode("d/sub", unix.S_IFDIR|0o2755)
	e.mode("d/f", unix.S_IFREG|0o644)
	// Who is not in the group gets no program of that group.
	e.ok(u.tryOpen("d/prog", unix.O_CREAT|unix.O_RDWR, 0o2775), "create a set-gid file outside the group")
	e.mode("d/prog", unix.S_IFREG|0o775)
}

func permExec(e *env) {
	e.file("script", "#!/bin/sh\nexit 0\n")
	u := e.user(nobody, nobody)
	err := u.call("exec", "script", "")
	e.errno(err, unix.EACCES, "run a file without the right")
	e.ok(unix.Chmod(e.p("script"), 0o755), "chmod")
	e.ok(u.call("exec", "script", ""), "run a script")
}
