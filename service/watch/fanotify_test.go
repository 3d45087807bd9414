// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	fusefs "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Every operation is told with its names, inode, mode and process.
func TestOperations(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		w, _ := newWatcher(t)
		o := watchDir(t, w, dir)
		mkdir(t, o.p("d"))
		o.want("mkdir", entry(t, Create|IsDir, o.p("d")))

		f, err := os.OpenFile(o.p("d/f"), os.O_CREATE|os.O_RDWR, 0o640)
		ok(t, err)
		o.want("create", entry(t, Create, o.p("d/f")))
		f.WriteString("data")
		o.want("write", entry(t, Modify, o.p("d/f")))
		ok(t, f.Truncate(1))
		o.want("truncate", entry(t, Modify, o.p("d/f")))
		ok(t, f.Close())
		o.want("close", entry(t, CloseWrite, o.p("d/f")))
		ok(t, os.Chmod(o.p("d/f"), 0o600))
		o.want("chmod", entry(t, Attrib, o.p("d/f")))
		ok(t, os.Chmod(o.p("d"), 0o700))
		o.want("chmod of a directory", alone(entry(t, 0, o.p("d")), Attrib|IsDir))
		ok(t, os.Chmod(dir, 0o700))
		o.want("chmod of the tree", alone(entry(t, 0, dir), Attrib|IsDir))
		ok(t, unix.Setxattr(o.p("d/f"), "trusted.x", []byte("1"), 0))
		o.want("setxattr", entry(t, Attrib, o.p("d/f")))
		_, err = os.ReadFile(o.p("d/f"))
		ok(t, err)
		o.want("read")

		ok(t, os.Symlink("f", o.p("d/s")))
		o.want("symlink", entry(t, Create, o.p("d/s")))
		ok(t, unix.Mkfifo(o.p("d/p"), 0o600))
		o.want("mkfifo", entry(t, Create, o.p("d/p")))
		ok(t, os.Link(o.p("d/f"), o.p("g")))
		link := entry(t, Create, o.p("g"))
		o.want("link", alone(link, Attrib), link)
		fd, err := unix.Open(o.p("g"), unix.O_WRONLY, 0)
		ok(t, err)
		unix.Write(fd, []byte("x"))
		o.want("write by another name", entry(t, Modify, o.p("g")))
		ok(t, unix.Close(fd))
		o.want("close of another name", entry(t, CloseWrite, o.p("g")))

		gone := entry(t, Delete, o.p("g"))
		ok(t, os.Remove(o.p("g")))
		o.want("unlink of one of two names", alone(gone, Attrib), gone)
		gone = entry(t, Delete, o.p("d/s"))
		ok(t, os.Remove(o.p("d/s")))
		o.wantGone("unlink", gone)

		fd, err = unix.Open(o.p("d/f"), unix.O_WRONLY, 0)
		ok(t, err)
		gone = entry(t, Delete, o.p("d/f"))
		ok(t, os.Remove(o.p("d/f")))
		nameless := gone
		nameless.Mode = 0
		o.want("unlink of an open file", alone(gone, Attrib), nameless)
		unix.Write(fd, []byte("x"))
		o.want("write without a name", alone(gone, Modify))
		unix.Close(fd)
		o.changes()

		ok(t, os.Remove(o.p("d/p")))
		o.changes()
		gone = entry(t, Delete|IsDir, o.p("d"))
		ok(t, os.Remove(o.p("d")))
		o.wantGone("rmdir", gone)
	})
}

func TestPID(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		w, _ := newWatcher(t)
		o := watchDir(t, w, dir)
		c := exec.Command("mkdir", o.p("d"))
		ok(t, c.Run())
		want := entry(t, Create|IsDir, o.p("d"))
		want.PID = c.ProcessState.Pid()
		o.want("mkdir of another process", want)
	})
}

func renamed(t testing.TB, from string, fromDir Inode, to string, more Op) Change {
	c := entry(t, Rename|more, to)
	c.NewDir, c.NewName = c.Dir, c.Name
	c.Dir, c.Name = fromDir, filepath.Base(from)
	return c
}

func TestRename(t *testing.T) {
	onEach(t, func(t *testing.T, base string) {
		dir, out := filepath.Join(base, "tree"), filepath.Join(base, "out")
		mkdir(t, filepath.Join(dir, "a/b/c"))
		mkdir(t, filepath.Join(dir, "z"))
		mkdir(t, out)
		w, l := newWatcher(t)
		o := watchDir(t, w, dir)
		a, z := inode(t, o.p("a")), inode(t, o.p("z"))

		put(t, o.p("a/f"), "f")
		o.changes()
		ok(t, os.Rename(o.p("a/f"), o.p("z/g")))
		o.want("into another directory", renamed(t, "f", a, o.p("z/g"), 0))

		put(t, o.p("z/h"), "h")
		o.changes()
		ok(t, os.Rename(o.p("z/g"), o.p("z/h")))
		o.want("over a file", renamed(t, "g", z, o.p("z/h"), 0))

		put(t, o.p("z/g"), "g")
		old, err := os.Open(o.p("z/h"))
		ok(t, err)
		over := entry(t, 0, o.p("z/h"))
		o.changes()
		ok(t, os.Rename(o.p("z/g"), o.p("z/h")))
		o.want("over an open file", renamed(t, "g", z, o.p("z/h"), 0), alone(over, Attrib))
		old.Close()

		put(t, o.p("a/x"), "x")
		o.changes()
		ok(t, unix.Renameat2(unix.AT_FDCWD, o.p("a/x"), unix.AT_FDCWD, o.p("z/h"), unix.RENAME_EXCHANGE))
		o.want("exchange", renamed(t, "x", a, o.p("z/h"), 0), renamed(t, "h", z, o.p("a/x"), 0))

		gone := entry(t, Delete, o.p("z/h"))
		ok(t, os.Rename(o.p("z/h"), filepath.Join(out, "h")))
		o.want("out of the tree", gone)
		ok(t, os.Rename(filepath.Join(out, "h"), o.p("a/h")))
		o.want("into the tree", entry(t, Create|Arrived, o.p("a/h")))

		// Directories, and what is below them afterwards.
		put(t, o.p("a/b/c/f"), "")
		o.changes()
		ok(t, os.Rename(o.p("a/b"), o.p("z/b")))
		o.want("a directory", renamed(t, "b", a, o.p("z/b"), IsDir))
		ok(t, os.Chmod(o.p("z/b/c/f"), 0o600))
		o.want("below it", entry(t, Attrib, o.p("z/b/c/f")))

		gone = entry(t, Delete|IsDir, o.p("z/b"))
		ok(t, os.Rename(o.p("z/b"), filepath.Join(out, "b")))
		o.want("a directory out of the tree", gone)
		put(t, filepath.Join(out, "b/c/f"), "f")
		o.want("below it")
		mkdir(t, filepath.Join(out, "b/c/d/e"))
		put(t, filepath.Join(out, "b/c/d/e/f"), "f")
		o.want("deeper below it")
		ok(t, os.Rename(filepath.Join(out, "b"), o.p("a/b")))
		o.want("a directory into the tree", entry(t, Create|Arrived|IsDir, o.p("a/b")))
		ok(t, os.Chmod(o.p("a/b/c/f"), 0o640))
		o.want("below it", entry(t, Attrib, o.p("a/b/c/f")))
		ok(t, os.Chmod(o.p("a/b/c/d/e/f"), 0o640))
		o.want("deeper below it", entry(t, Attrib, o.p("a/b/c/d/e/f")))

		// The upside down: a/b becomes b/a, b being known below a.
		ok(t, os.Rename(o.p("a/b"), o.p("b")))
		ok(t, os.Rename(o.p("a"), o.p("b/a")))
		ok(t, os.Rename(o.p("b"), o.p("z/b")))
		o.changes()
		ok(t, os.Chmod(o.p("z/b/c/f"), 0o600))
		o.want("upside down", entry(t, Attrib, o.p("z/b/c/f")))
		ok(t, os.Chmod(o.p("z/b/a/h"), 0o600))
		o.want("upside down", entry(t, Attrib, o.p("z/b/a/h")))

		// The tree's own directory.
		put(t, o.p("f"), "")
		o.changes()
		ok(t, os.Rename(dir, filepath.Join(out, "tree")))
		o.dir = filepath.Join(out, "tree")
		o.want("the tree is moved", Change{Op: Lost})
		if !strings.Contains(l.String(), "a watched directory was moved") {
			t.Errorf("it is not logged: %s", l)
		}
		ok(t, os.Chmod(o.p("f"), 0o600))
		o.want("in the tree that was moved", entry(t, Attrib, o.p("f")))
		ok(t, os.RemoveAll(o.dir))
		o.until("the end of the tree", func(c Change) bool { return c.Op == Lost })
		if !strings.Contains(l.String(), "a watched directory was deleted") {
			t.Errorf("it is not logged: %s", l)
		}
	})
}

// Another directory takes the tree's name.
func TestReplaced(t *testing.T) {
	onEach(t, func(t *testing.T, base string) {
		dir := filepath.Join(base, "tree")
		mkdir(t, dir)
		mkdir(t, filepath.Join(base, "new"))
		w, _ := newWatcher(t)
		o := watchDir(t, w, dir)
		ok(t, unix.Rename(filepath.Join(base, "new"), dir))
		o.until("that the tree is gone", func(c Change) bool { return c.Op == Lost })
	})
}

// A directory outside of the mount, known there with what is below it, comes in with its own parent.
func TestIntoBind(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	mnt := filepath.Join(t.TempDir(), "mnt")
	mkdir(t, filepath.Join(base, "in"))
	mkdir(t, filepath.Join(base, "out/x/y"))
	mkdir(t, mnt)
	ok(t, unix.Mount(filepath.Join(base, "in"), mnt, "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(mnt, 0) })
	w, _ := newWatcher(t)
	o := watchDir(t, w, mnt)
	put(t, filepath.Join(base, "out/x/y/f"), "f")
	o.want("outside")
	ok(t, os.Rename(filepath.Join(base, "out"), filepath.Join(base, "in/d")))
	o.want("into the mount", entry(t, Create|Arrived|IsDir, o.p("d")))
	ok(t, os.Chmod(o.p("d/x/y/f"), 0o600))
	o.want("below it", entry(t, Attrib, o.p("d/x/y/f")))
	ok(t, os.Rename(filepath.Join(base, "in/d"), filepath.Join(base, "out")))
	o.changes()
	ok(t, os.Chmod(filepath.Join(base, "out/x/y/f"), 0o640))
	o.want("outside again")
}

// A bind mount's directory has, of what is outside, the paths of others.
func TestBindPath(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	mount(t, "watch", filepath.Join(base, "fs"), "tmpfs", "")
	base = filepath.Join(base, "fs")
	// The mount is at /…/fs/m; in its own file system there is a directory of just that path.
	mkdir(t, base+"/in")
	mkdir(t, base+"/m")
	mkdir(t, base+base+"/m/d")
	ok(t, unix.Mount(base+"/in", base+"/m", "", unix.MS_BIND, ""))
	t.Cleanup(func() { unix.Unmount(base+"/m", 0) })
	w, _ := newWatcher(t)
	o := watchDir(t, w, base+"/m")
	put(t, base+base+"/m/d/f", "f")
	o.want("outside of the mount")
	whole := watchDir(t, w, base+base)
	put(t, base+base+"/m/d/f", "g")
	if got := whole.changes(); len(got) == 0 {
		t.Error("the other mount is told nothing")
	}

}

func TestOverlapping(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		mkdir(t, filepath.Join(dir, "a/b"))
		w, _ := newWatcher(t)
		outer := watchDir(t, w, dir)
		inner := watchDir(t, w, filepath.Join(dir, "a"))
		same := watchDir(t, w, filepath.Join(dir, "a"))
		ok(t, unix.Mknod(outer.p("f"), unix.S_IFREG, 0))
		outer.want("outside of the inner", entry(t, Create, outer.p("f")))
		ok(t, unix.Mknod(inner.p("b/g"), unix.S_IFREG, 0))
		want := []Change{entry(t, Create, inner.p("b/g"))}
		inner.want("in all", want...)
		same.want("in all", append(want, inner.mark)...)
		outer.want("in all", append(want, inner.mark, same.mark)...)

		ok(t, os.Rename(inner.p("b/g"), outer.p("g")))
		c := renamed(t, "g", inode(t, inner.p("b")), outer.p("g"), 0)
		outer.want("out of the inner", c)
		c.Op, c.NewDir, c.NewName = Delete, Inode{}, ""
		c.PID = os.Getpid()
		inner.until("the move", func(got Change) bool { return got == c })
		same.until("the move", func(got Change) bool { return got == c })

		inner.tree.Close()
		ok(t, unix.Mknod(same.p("h"), unix.S_IFREG, 0))
		same.until("a file", func(c Change) bool { return c.Name == "h" })
		for _, c := range inner.got {
			if c.Name == "h" {
				t.Error("a closed tree is told")
			}
		}
	})
}

// Close ends what is told, and the mark of the file system goes with its last tree.
func TestClose(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		w, _ := newWatcher(t)
		first := watchDir(t, w, dir)
		first.changes()
		first.tree.Close()
		first.tree.Close()
		if m := marks(t, w); m != 0 {
			t.Errorf("%d marks are left", m)
		}
		again := watchDir(t, w, dir)
		again.changes()
		if m := marks(t, w); m != 1 {
			t.Errorf("%d marks", m)
		}
		w.Close()
		w.Close()
		put(t, again.p("f"), "f")
		if len(again.got) != 0 {
			t.Errorf("told after Close: %v", again.got)
		}
		again.tree.Close()
		d, err := os.Open(dir)
		ok(t, err)
		defer d.Close()
		if _, err := w.Add(d, nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Add after Close: %v", err)
		}
	})
}

// marks counts the marks of the group.
func marks(t testing.TB, w *Watcher) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", w.fd))
	ok(t, err)
	return strings.Count(string(b), "fanotify sdev:")
}

// A write through a mapping is told when the mapping and the file are closed.
func TestMmap(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		put(t, filepath.Join(dir, "f"), "data")
		w, _ := newWatcher(t)
		o := watchDir(t, w, dir)
		f, err := os.OpenFile(o.p("f"), os.O_RDWR, 0)
		ok(t, err)
		m, err := unix.Mmap(int(f.Fd()), 0, 4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		ok(t, err)
		f.Close()
		if strings.Contains(t.Name(), "overlay") { // which maps the upper layer's file
			o.want("close", entry(t, CloseWrite, o.p("f")))
			m[0] = 'D'
			ok(t, unix.Munmap(m))
			o.want("write to a mapping of an overlay's file")
			return
		}
		m[0] = 'D'
		ok(t, unix.Msync(m, unix.MS_SYNC))
		o.want("write to a mapping")
		ok(t, unix.Munmap(m))
		o.want("munmap", entry(t, CloseWrite, o.p("f")))
	})
}

func TestRefused(t *testing.T) {
	needRoot(t)
	w, _ := newWatcher(t)
	base := t.TempDir()
	fuse := filepath.Join(base, "fuse")
	mkdir(t, fuse)
	server, err := fs.Mount(fuse, new(fs.Inode), &fs.Options{MountOptions: fusefs.MountOptions{DirectMountStrict: true}})
	ok(t, err)
	defer server.Unmount()
	for _, d := range []string{"lower", "upper", "work"} {
		mkdir(t, filepath.Join(base, d))
	}
	overlay := filepath.Join(base, "overlay")
	mount(t, "watch", overlay, "overlay", fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", base))
	for _, c := range []struct{ dir, want string }{
		{fuse, "fuse: what changes elsewhere is not told"},
		{"/proc", "proc: what the kernel changes is not told"},
		{"/sys", "sysfs: what the kernel changes is not told"},
		{overlay, "nfs_export=on"},
		{"/proc/self/exe", "not a directory"},
	} {
		fd, err := unix.Open(c.dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		ok(t, err)
		f := os.NewFile(uintptr(fd), c.dir)
		_, err = w.Add(f, func([]Change) {})
		f.Close()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want %q", c.dir, err, c.want)
		} else {
			t.Log(err)
		}
	}
	if m := marks(t, w); m != 0 {
		t.Errorf("%d marks are left", m)
	}
}

// Without a capability the error says which.
func TestPrivilege(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		drop uint
		want string
	}{
		{unix.CAP_SYS_ADMIN, "needs CAP_SYS_ADMIN"},
		{unix.CAP_DAC_READ_SEARCH, "needs CAP_DAC_READ_SEARCH"},
	} {
		got := make(chan error)
		go func() {
			runtime.LockOSThread() // and this thread ends with the goroutine
			got <- func() error {
				head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
				var data [2]unix.CapUserData
				if err := unix.Capget(&head, &data[0]); err != nil {
					return err
				}
				data[c.drop/32].Effective &^= 1 << (c.drop % 32)
				if err := unix.Capset(&head, &data[0]); err != nil {
					return err
				}
				w, err := New(nil)
				if err != nil {
					return err
				}
				defer w.Close()
				d, err := os.Open(t.TempDir())
				if err != nil {
					return err
				}
				defer d.Close()
				_, err = w.Add(d, func([]Change) {})
				return err
			}()
		}()
		if err := <-got; err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got error %v, want %q", err, c.want)
		} else {
			t.Log(err)
		}
	}
}

// watchEnv names the directory that a process of its own watches, leaving everybody out, until its input ends.
const watchEnv = "TRANSFUSED_TEST_WATCH"

// Changes of who is left out wake the watcher's process now and then, not each time: it may share a CPU with who makes them.
func TestLeftOutWakesSeldom(t *testing.T) {
	if dir := os.Getenv(watchEnv); dir != "" {
		w, _ := newWatcher(t)
		w.LeaveOut(func(int) bool { return true })
		watchDir(t, w, dir)
		fmt.Println("watched")
		io.Copy(io.Discard, os.Stdin)
		return
	}
	dir := tmpfs(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLeftOutWakesSeldom$")
	cmd.Env = append(os.Environ(), watchEnv+"="+dir)
	in, err := cmd.StdinPipe()
	ok(t, err)
	out, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != "watched\n" {
		t.Fatalf("the watching process says %q, %v", line, err)
	}
	begin, before := time.Now(), switches(t, cmd.Process.Pid)
	const n = 10000
	for range n / 2 {
		ok(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		ok(t, os.Remove(filepath.Join(dir, "d")))
	}
	// Most of a pause's ten are of the runtime's own threads.
	pauses := int(time.Since(begin)/maxCalm) + 5
	if woken := switches(t, cmd.Process.Pid) - before; woken > 10*pauses {
		t.Errorf("%d changes in %v put the threads to sleep %d times; want %d at most", n, time.Since(begin), woken, 10*pauses)
	}
	in.Close()
	ok(t, cmd.Wait())
}

// switches counts how often the threads of a process went to sleep.
func switches(t testing.TB, pid int) (n int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	ok(t, err)
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // it may have ended
		if _, rest, found := strings.Cut(string(b), "\nvoluntary_ctxt_switches:"); found {
			var k int
			fmt.Sscan(rest, &k)
			n += k
		}
	}
	return n
}
