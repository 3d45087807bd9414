// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// dirRig is a Dirs of a test and what it was told.
type dirRig struct {
	t    testing.TB
	d    *Dirs
	log  *logs
	gate sync.Mutex

	mu   sync.Mutex
	got  []DirChange
	more chan struct{}
}

func newDirs(t testing.TB) *dirRig {
	t.Helper()
	r := &dirRig{t: t, log: new(logs), more: make(chan struct{}, 1)}
	d, err := NewDirs(slog.New(slog.NewTextHandler(r.log, nil)), func(c []DirChange) {
		r.gate.Lock()
		defer r.gate.Unlock()
		r.mu.Lock()
		r.got = append(r.got, c...)
		r.mu.Unlock()
		select {
		case r.more <- struct{}{}:
		default:
		}
	})
	ok(t, err)
	r.d = d
	t.Cleanup(d.Close)
	return r
}

func (r *dirRig) add(path string, id uint64) {
	r.t.Helper()
	ok(r.t, addDir(r.d, path, id))
}

func addDir(d *Dirs, path string, id uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return d.Add(fd, id)
}

func (r *dirRig) until(what string, ok func(DirChange) bool) []DirChange {
	r.t.Helper()
	limit := time.After(patience)
	for {
		r.mu.Lock()
		for i, c := range r.got {
			if ok(c) {
				got := r.got[:i:i]
				r.got = r.got[i+1:]
				r.mu.Unlock()
				return got
			}
		}
		got := fmt.Sprintf("%+v", r.got)
		r.mu.Unlock()
		select {
		case <-r.more:
		case <-limit:
			r.t.Fatalf("%s is not told, only %.2000s", what, got)
		}
	}
}

// changes is what was told up to a mark that is made in dir, which is watched.
func (r *dirRig) changes(dir string) []DirChange {
	r.t.Helper()
	name := fmt.Sprintf("mark-%d", marked.Add(1))
	ok(r.t, unix.Mknod(filepath.Join(dir, name), unix.S_IFREG|0o600, 0))
	return r.until(name, func(c DirChange) bool { return c.Name == name })
}

func (r *dirRig) want(what, dir string, want ...DirChange) {
	r.t.Helper()
	if d := cmp.Diff(want, append([]DirChange(nil), r.changes(dir)...)); d != "" {
		r.t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func (r *dirRig) sizes() (ids, wds, more int) {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	return len(r.d.ids), len(r.d.wds), len(r.d.more)
}

func TestDirs(t *testing.T) {
	onEach(t, func(t *testing.T, base string) {
		p := func(name string) string { return filepath.Join(base, name) }
		mkdir(t, p("a/sub"))
		mkdir(t, p("b"))
		mkdir(t, p("out"))
		r := newDirs(t)
		r.add(p("a"), 1)
		r.add(p("b"), 2)

		f, err := os.Create(p("a/f"))
		ok(t, err)
		r.want("create", p("a"), DirChange{Op: Create, Dir: 1, Name: "f"})
		f.WriteString("data")
		r.want("write", p("a"), DirChange{Op: Modify, Dir: 1, Name: "f"})
		f.Close()
		r.want("close", p("a"), DirChange{Op: CloseWrite, Dir: 1, Name: "f"})
		ok(t, os.Chmod(p("a/f"), 0o600))
		r.want("chmod", p("a"), DirChange{Op: Attrib, Dir: 1, Name: "f"})
		ok(t, os.Chmod(p("a/sub"), 0o700))
		r.want("chmod of a directory in it", p("a"), DirChange{Op: Attrib | IsDir, Dir: 1, Name: "sub"})
		ok(t, os.Chmod(p("a"), 0o700))
		r.want("chmod of the directory", p("a"), DirChange{Op: Attrib | IsDir, Dir: 1})
		mkdir(t, p("a/d"))
		r.want("mkdir", p("a"), DirChange{Op: Create | IsDir, Dir: 1, Name: "d"})
		put(t, p("a/d/x"), "")
		r.want("below", p("a"))

		ok(t, os.Rename(p("a/f"), p("a/g")))
		r.want("rename", p("a"), DirChange{Op: Rename, Dir: 1, Name: "f", NewDir: 1, NewName: "g"})
		ok(t, os.Rename(p("a/d"), p("b/e")))
		r.want("rename of a directory", p("a"), DirChange{Op: Rename | IsDir, Dir: 1, Name: "d", NewDir: 2, NewName: "e"})
		ok(t, os.Rename(p("a/g"), p("out/g")))
		r.want("out", p("a"), DirChange{Op: Delete, Dir: 1, Name: "g"})
		ok(t, os.Rename(p("out/g"), p("b/g")))
		r.want("in", p("a"), DirChange{Op: Create, Dir: 2, Name: "g"})
		ok(t, os.Link(p("b/g"), p("out/h")))
		r.changes(p("b"))
		ok(t, os.Remove(p("b/g")))
		r.want("unlink", p("a"), DirChange{Op: Delete, Dir: 2, Name: "g"})

		// Another id for the same directory.
		r.add(p("a"), 7)
		ok(t, os.Mkdir(p("a/n"), 0o755))
		r.want("two ids", p("b"), DirChange{Op: Create | IsDir, Dir: 1, Name: "n"}, DirChange{Op: Create | IsDir, Dir: 7, Name: "n"})
		ok(t, os.Rename(p("a/n"), p("a/m")))
		r.want("rename with two ids", p("b"), DirChange{Op: Delete | IsDir, Dir: 1, Name: "n"}, DirChange{Op: Delete | IsDir, Dir: 7, Name: "n"},
			DirChange{Op: Create | IsDir, Dir: 1, Name: "m"}, DirChange{Op: Create | IsDir, Dir: 7, Name: "m"})
		r.d.Remove(1)
		r.d.Remove(1)
		ok(t, os.Remove(p("a/m")))
		r.want("the id that is left", p("b"), DirChange{Op: Delete | IsDir, Dir: 7, Name: "m"})
		r.d.Remove(7)
		ok(t, os.Mkdir(p("a/m"), 0o755))
		r.want("removed", p("b"))

		// An id that gets another directory.
		r.add(p("a"), 2)
		ok(t, os.Mkdir(p("b/x"), 0o755))
		r.want("taken from", p("a"))
		r.add(p("b"), 3)

		// A directory that goes.
		ok(t, os.RemoveAll(p("b")))
		got := r.until("that it is gone", func(c DirChange) bool { return c == DirChange{Op: Delete | IsDir, Dir: 3} })
		if len(got) == 0 {
			t.Error("what was in it is not told")
		}
		mkdir(t, p("b"))
		r.want("the name comes again", p("a"))
		r.add(p("b"), 3)
		ok(t, os.Mkdir(p("b/x"), 0o755))
		r.want("watched again", p("a"), DirChange{Op: Create | IsDir, Dir: 3, Name: "x"})
		if ids, wds, more := r.sizes(); ids != 2 || wds != 2 || more != 0 {
			t.Errorf("%d, %d and %d in the maps", ids, wds, more)
		}

		r.d.Close()
		r.d.Close()
		put(t, p("a/last"), "")
		if len(r.got) != 0 {
			t.Errorf("told after Close: %v", r.got)
		}
		if err := addDir(r.d, p("a"), 9); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Add after Close: %v", err)
		}
		r.d.Remove(3)
	})
}

// Moves are told as such although their halves may be read apart.
func TestDirsMoves(t *testing.T) {
	fstest.Leaks(t)
	dir := t.TempDir()
	mkdir(t, filepath.Join(dir, "a"))
	mkdir(t, filepath.Join(dir, "b"))
	put(t, filepath.Join(dir, "a/f"), "")
	r := newDirs(t)
	r.add(filepath.Join(dir, "a"), 1)
	r.add(filepath.Join(dir, "b"), 2)
	const n = 2000
	for i := range n {
		from, to := "a/f", "b/f"
		if i%2 == 1 {
			from, to = to, from
		}
		ok(t, os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)))
	}
	apart := 0
	got := r.changes(filepath.Join(dir, "a"))
	for i := 0; i < len(got); i++ {
		switch got[i].Op {
		case Rename:
		case Delete:
			apart++
			if i++; i == len(got) || got[i].Op != Create {
				t.Fatalf("half a move: %+v", got[i-1])
			}
		default:
			t.Fatalf("%+v", got[i])
		}
	}
	if len(got)-apart != n {
		t.Errorf("%d moves are told of %d", len(got)-apart, n)
	}
	t.Logf("%d of %d moves are told as Delete and Create", apart, n)
	if apart > n/100 {
		t.Error("those are many")
	}
}

// What is touched again is told once, with all that happened, unless a name changed between.
func TestDirsJoin(t *testing.T) {
	b := newDirBatch()
	d := new(Dirs)
	b.touch(DirChange{Op: Modify, Dir: 1, Name: "a"})
	b.touch(DirChange{Op: Modify, Dir: 1, Name: "b"})
	b.touch(DirChange{Op: CloseWrite, Dir: 1, Name: "a"})
	d.event(b, unix.IN_DELETE, 0, "b", []uint64{1})
	b.touch(DirChange{Op: Modify, Dir: 1, Name: "a"})
	want := []DirChange{{Op: Modify | CloseWrite, Dir: 1, Name: "a"}, {Op: Modify, Dir: 1, Name: "b"}, {Op: Delete, Dir: 1, Name: "b"}, {Op: Modify, Dir: 1, Name: "a"}}
	if diff := cmp.Diff(want, b.changes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDirsOverflow(t *testing.T) {
	fstest.Leaks(t)
	dir := tmpfs(t)
	r := newDirs(t)
	r.add(dir, 1)
	r.changes(dir)
	before := heap()
	r.gate.Lock()
	for i := range 100_000 {
		ok(t, unix.Mknod(filepath.Join(dir, strconv.Itoa(i)), unix.S_IFREG, 0))
	}
	grown := heap() - before
	r.gate.Unlock()
	got := r.until("Lost", func(c DirChange) bool { return c.Op == Lost })
	t.Logf("%d changes were told before Lost; the heap grew by %d KiB", len(got), grown>>10)
	if len(got) == 0 || len(got) >= 100_000 || grown > 8<<20 {
		t.Error("that is wrong")
	}
	if !strings.Contains(r.log.String(), "max_queued_events") {
		t.Errorf("it is not logged: %s", r.log)
	}
	ok(t, os.Mkdir(filepath.Join(dir, "after"), 0o755))
	r.want("after it", dir, DirChange{Op: Create | IsDir, Dir: 1, Name: "after"})
}

// A watch costs little here. (The kernel has its own share: the inode, and a mark.)
func TestDirsMemory(t *testing.T) {
	fstest.Leaks(t)
	dir := tmpfs(t)
	r := newDirs(t)
	n := 100_000
	if b, err := os.ReadFile("/proc/sys/fs/inotify/max_user_watches"); err == nil {
		if most, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && most < n+1000 {
			t.Logf("ONLY %d DIRECTORIES: fs.inotify.max_user_watches is %d", most/2, most)
			n = most / 2
		}
	}
	before := heap()
	begun := time.Now()
	for i := range n {
		d := filepath.Join(dir, strconv.Itoa(i))
		ok(t, os.Mkdir(d, 0o755))
		r.add(d, uint64(i))
	}
	grown := heap() - before
	t.Logf("%d directories: %d bytes each, made and added in %v each", n, grown/int64(n), time.Since(begun)/time.Duration(n))
	if grown/int64(n) > 200 {
		t.Error("those are many")
	}
	ok(t, unix.Mknod(filepath.Join(dir, "77/f"), unix.S_IFREG, 0))
	r.until("a change in one", func(c DirChange) bool { return c == DirChange{Op: Create, Dir: 77, Name: "f"} })
	for i := range n {
		r.d.Remove(uint64(i))
	}
	if ids, wds, more := r.sizes(); ids+wds+more != 0 {
		t.Errorf("%d, %d and %d in the maps", ids, wds, more)
	}
}

const limitEnv = "TRANSFUSED_WATCH_LIMIT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(limitEnv); dir != "" {
		fmt.Println(atLimit(dir))
		return
	}
	os.Exit(m.Run())
}

// atLimit runs in a user namespace, where the limit is ours to set.
func atLimit(dir string) error {
	if err := os.WriteFile("/proc/sys/user/max_inotify_watches", []byte("3"), 0); err != nil {
		return err
	}
	d, err := NewDirs(nil, func([]DirChange) {})
	if err != nil {
		return err
	}
	defer d.Close()
	for i := range 10 {
		p := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(p, 0o755); err != nil {
			return err
		}
		if err := addDir(d, p, uint64(i)); err != nil {
			if i != 3 {
				return fmt.Errorf("after %d: %w", i, err)
			}
			d.Remove(1)
			if err := addDir(d, p, uint64(i)); err != nil {
				return fmt.Errorf("after a watch was removed: %w", err)
			}
			return err
		}
	}
	return errors.New("no limit")
}

// More watches than are allowed is an error that says which setting it is.
func TestDirsLimit(t *testing.T) {
	needRoot(t)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), limitEnv+"="+t.TempDir())
	ids := []syscall.SysProcIDMap{{Size: 1}}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	b, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	if got := string(b); !strings.Contains(got, "no space left on device (user.max_inotify_watches is 3)") {
		t.Errorf("got %q", got)
	}
	if got := limit("instances"); !strings.HasPrefix(got, " (fs.inotify.max_user_instances is ") {
		t.Errorf("got %q", got)
	}
}

func TestCheckFS(t *testing.T) {
	for _, c := range []struct{ path, want string }{{"/proc", "proc: "}, {"/sys", "sysfs: "}, {t.TempDir(), ""}} {
		fd, err := unix.Open(c.path, unix.O_PATH|unix.O_CLOEXEC, 0)
		ok(t, err)
		err = CheckFS(fd)
		unix.Close(fd)
		if got := fmt.Sprint(err); c.want != "" && !strings.HasPrefix(got, c.want) || c.want == "" && err != nil {
			t.Errorf("%s: %v", c.path, err)
		}
	}
}
