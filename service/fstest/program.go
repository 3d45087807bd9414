// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var programCases = []testCase{
	{"exec/script", false, execScript},
	{"exec/binary", false, execBinary},
	{"git/work", false, gitWork},
	{"git/clone", false, gitClone},
	{"overlay/lower", true, overlayLower},
	{"overlay/upper", true, overlayUpper},
	{"overlay/both", true, overlayBoth},
}

func execScript(e *env) {
	e.file("s", "#!/bin/sh\necho \"$0 $1\"\n")
	e.ok(unix.Chmod(e.p("s"), 0o755), "chmod")
	out, err := exec.Command(e.p("s"), "arg").CombinedOutput()
	e.ok(err, "run a script")
	e.eq(string(out), e.p("s")+" arg\n", "output")
}

func execBinary(e *env) {
	in, err := os.Open("/proc/self/exe")
	e.ok(err, "open this program")
	defer in.Close()
	fd, err := unix.Open(e.p("b"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o755)
	e.ok(err, "create")
	out := os.NewFile(uintptr(fd), "b")
	_, err = io.Copy(out, in)
	e.ok(err, "copy this program")
	e.ok(out.Close(), "close")
	// An agent without its directory says so and ends.
	cmd := exec.Command(e.p("b"))
	cmd.Env = append(os.Environ(), agentEnv+"=1")
	got, err := cmd.CombinedOutput()
	e.ok(err, "run a binary")
	if !strings.Contains(string(got), "fstest agent") {
		e.Errorf("the binary said %q", got)
	}
}

// git runs git in dir with a configuration of its own and returns its output.
func (e *env) git(dir string, args ...string) string {
	e.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		e.notRun("git is not installed: apt-get install git")
	}
	// A file, since git does not hand configuration by environment to its helpers.
	home := e.outside()
	e.ok(os.WriteFile(home+"/.gitconfig", []byte("[user]\n\tname = fstest\n\temail = fstest@localhost\n[safe]\n\tdirectory = *\n"), 0o644), "write git's configuration")
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME="+home, "GIT_CONFIG_NOSYSTEM=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		e.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// gitTree makes a repository with n files in one commit.
func (e *env) gitTree(dir string, n int) {
	e.Helper()
	e.ok(unix.Mkdir(dir, 0o755), "mkdir")
	e.git(dir, "init", "-q", "-b", "main")
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprint("d", i%7))
		e.ok(os.MkdirAll(sub, 0o755), "mkdir")
		e.ok(os.WriteFile(filepath.Join(sub, fmt.Sprint("f", i)), random(100+i*37, byte(i)), 0o644), "write")
	}
	e.git(dir, "add", "-A")
	e.git(dir, "commit", "-q", "-m", "first")
}

func gitWork(e *env) {
	dir := e.p("repo")
	e.gitTree(dir, 100)
	e.eq(e.git(dir, "status", "--porcelain"), "", "status of a clean tree")
	e.ok(os.WriteFile(filepath.Join(dir, "d1/f1"), []byte("changed"), 0o644), "write")
	e.ok(os.Remove(filepath.Join(dir, "d2/f2")), "remove")
	e.ok(os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o755), "write")
	e.eq(e.git(dir, "status", "--porcelain"), " M d1/f1\n D d2/f2\n?? new\n", "status after changes")
	e.git(dir, "add", "-A")
	e.git(dir, "commit", "-q", "-m", "second")
	e.git(dir, "checkout", "-q", "-b", "side", "HEAD~1")
	e.git(dir, "mv", "d3/f3", "moved")
	e.git(dir, "commit", "-q", "-m", "third")
	e.git(dir, "merge", "-q", "-m", "merge", "main")
	e.git(dir, "gc", "-q", "--prune=now")
	e.git(dir, "fsck", "--strict", "--full")
	e.eq(e.git(dir, "status", "--porcelain"), "", "status at the end")
	e.eq(strings.TrimSpace(e.git(dir, "rev-list", "--count", "HEAD")), "4", "commits")
}

func gitClone(e *env) {
	e.gitTree(e.p("repo"), 50)
	e.git(e.dir, "clone", "-q", "repo", "clone") // by hard links
	e.git(e.dir, "clone", "-q", "--no-hardlinks", "repo", "copy")
	for _, dir := range []string{"clone", "copy"} {
		e.git(e.p(dir), "fsck", "--strict", "--full")
		e.eq(e.git(e.p(dir), "status", "--porcelain"), "", "status of "+dir)
	}
}

// overlay mounts an overlay over a lower tree made by makeLower and changes it.
// Each of lower and upper is a directory for the overlay's use.
func (e *env) overlay(lower, upper string) {
	e.Helper()
	work, merged := filepath.Join(upper, "work"), filepath.Join(e.outside(), "merged")
	upper = filepath.Join(upper, "upper")
	for _, d := range []string{upper, work, merged} {
		e.ok(os.Mkdir(d, 0o755), "mkdir")
	}
	write := func(path, data string) { e.Helper(); e.ok(os.WriteFile(path, []byte(data), 0o644), "write") }
	read := func(path string) string { e.Helper(); b, err := os.ReadFile(path); e.ok(err, "read"); return string(b) }
	write(lower+"/keep", "lower")
	write(lower+"/change", "lower")
	write(lower+"/remove", "lower")
	e.ok(os.Mkdir(lower+"/dir", 0o755), "mkdir")
	write(lower+"/dir/file", "lower")
	e.ok(os.Mkdir(lower+"/old", 0o755), "mkdir")
	write(lower+"/old/file", "lower")
	e.ok(os.Symlink("keep", lower+"/link"), "symlink")

	// The test's name is in the paths, and may have a comma in it.
	quote := strings.NewReplacer(`\`, `\\`, `,`, `\,`, `:`, `\:`).Replace
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", quote(lower), quote(upper), quote(work))
	err := unix.Mount("fstest", merged, "overlay", 0, options)
	if err == unix.ENODEV {
		e.notRun("this kernel has no overlay file system")
	}
	e.ok(err, "mount the overlay")
	unmounted := false
	unmount := func() {
		if !unmounted {
			e.ok(unix.Unmount(merged, 0), "unmount the overlay")
			unmounted = true
		}
	}
	e.Cleanup(unmount)

	m := func(name string) string { return merged + "/" + name }
	e.eq(read(m("keep")), "lower", "content")
	f, err := os.OpenFile(m("change"), os.O_WRONLY|os.O_APPEND, 0)
	e.ok(err, "open for a copy up")
	_, err = f.WriteString(" and upper")
	e.ok(err, "write")
	e.ok(f.Close(), "close")
	e.eq(read(m("change")), "lower and upper", "content")
	e.ok(os.Remove(m("remove")), "remove")
	// Its copy has no attributes on an upper layer whose links can't have them; that must not cost directories theirs.
	e.ok(os.Rename(m("link"), m("linked")), "rename a symlink")
	e.ok(os.RemoveAll(m("old")), "remove a directory")
	e.ok(os.Mkdir(m("old"), 0o755), "mkdir over a whiteout")
	write(m("old/new"), "upper")
	e.ok(os.Rename(m("dir/file"), m("dir/renamed")), "rename")
	write(m("new"), "upper")
	e.ok(os.Chmod(m("keep"), 0o600), "chmod")

	check := func() {
		e.Helper()
		var names []string
		e.ok(filepath.WalkDir(merged, func(p string, d os.DirEntry, err error) error {
			if err == nil && p != merged {
				names = append(names, strings.TrimPrefix(p, merged+"/"))
			}
			return err
		}), "walk")
		e.eq(names, []string{"change", "dir", "dir/renamed", "keep", "linked", "new", "old", "old/new"}, "the merged tree")
		e.eq(read(m("change")), "lower and upper", "content")
		e.eq(read(m("dir/renamed")), "lower", "content")
	}
	check()
	unmount()
	e.eq(read(lower+"/change"), "lower", "content of the lower layer")
	e.eq(read(upper+"/change"), "lower and upper", "content of the upper layer")
	var st unix.Stat_t
	e.ok(unix.Lstat(upper+"/remove", &st), "look at the whiteout")
	e.eq([]uint64{uint64(st.Mode & unix.S_IFMT), uint64(st.Rdev)}, []uint64{unix.S_IFCHR, 0}, "the whiteout")

	e.ok(unix.Mount("fstest", merged, "overlay", 0, options), "mount the overlay again")
	unmounted = false
	check()
	unmount()
}

// tmpfs mounts a file system that is good for every layer.
func (e *env) tmpfs() string {
	e.Helper()
	dir := e.outside()
	e.ok(unix.Mount("fstest", dir, "tmpfs", 0, "size=64m"), "mount a tmpfs")
	e.Cleanup(func() { e.ok(unix.Unmount(dir, 0), "unmount a tmpfs") })
	return dir
}

func overlayLower(e *env) { e.overlay(e.dir, e.tmpfs()) }
func overlayUpper(e *env) { e.overlay(e.tmpfs(), e.dir) }
func overlayBoth(e *env) {
	e.mkdir("l")
	e.mkdir("u")
	e.overlay(e.p("l"), e.p("u"))
}
