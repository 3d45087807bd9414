// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// patience is for what the kernel does at once.
const patience = 20 * time.Second

// needRoot fails a test that uses fanotify or mounts where it can't.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("fanotify needs root: sudo -E go test ./...")
	}
}

// logs is a log to look at.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWatcher(t testing.TB) (*Watcher, *logs) {
	t.Helper()
	needRoot(t)
	l := new(logs)
	w, err := New(slog.New(slog.NewTextHandler(l, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w, l
}

// watched is a tree of a test and what it was told.
type watched struct {
	t    testing.TB
	dir  string
	tree *Tree
	mark Change // the last that changes made

	mu   sync.Mutex
	got  []Change
	more chan struct{}
}

func watchDir(t testing.TB, w *Watcher, dir string) *watched {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	o := &watched{t: t, dir: dir, more: make(chan struct{}, 1)}
	if o.tree, err = w.Add(f, o.take); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.tree.Close)
	return o
}

func (o *watched) take(c []Change) {
	o.mu.Lock()
	o.got = append(o.got, c...)
	o.mu.Unlock()
	select {
	case o.more <- struct{}{}:
	default:
	}
}

func (o *watched) p(name string) string { return filepath.Join(o.dir, name) }

// until waits for a change for which ok is true, and returns those before it.
func (o *watched) until(what string, ok func(Change) bool) []Change {
	o.t.Helper()
	limit := time.After(patience)
	for {
		o.mu.Lock()
		for i, c := range o.got {
			if ok(c) {
				got := o.got[:i:i]
				o.got = o.got[i+1:]
				o.mu.Unlock()
				return got
			}
		}
		got := fmt.Sprintf("%+v", o.got)
		o.mu.Unlock()
		select {
		case <-o.more:
		case <-limit:
			o.t.Fatalf("%s is not told, only %.2000s", what, got)
		}
	}
}

var marked atomic.Int64

// changes is what was told up to now: up to a file that is made to mark it.
func (o *watched) changes() []Change {
	o.t.Helper()
	name := fmt.Sprintf("mark-%d", marked.Add(1))
	if err := unix.Mknod(o.p(name), unix.S_IFREG|0o600, 0); err != nil {
		o.t.Fatal(err)
	}
	got := o.until(name, func(c Change) bool {
		o.mark = c
		return c.Name == name && c.Op&Create != 0
	})
	// Files whose names are not known may be any of this file system's.
	return slices.DeleteFunc(got, func(c Change) bool { return c.Dir == (Inode{}) && c.Op == Attrib && c.PID != os.Getpid() })
}

// want compares what was told with the changes, in which a PID of 0 means this process.
func (o *watched) want(what string, want ...Change) {
	o.t.Helper()
	for i := range want {
		if want[i].PID == 0 && want[i].Op != Lost {
			want[i].PID = os.Getpid()
		}
	}
	got := o.changes()
	if len(got) == 0 && len(want) == 0 {
		return
	}
	if d := cmp.Diff(want, got); d != "" {
		o.t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// wantGone wants a Delete after which the inode is gone. An overlay may keep it for a while.
func (o *watched) wantGone(what string, c Change) {
	o.t.Helper()
	c.PID = os.Getpid()
	got := o.changes()
	if strings.Contains(o.t.Name(), "overlay") && len(got) > 1 && got[0] == alone(c, Attrib) {
		got = got[1:]
	}
	c.Mode = 0
	if len(got) == 1 && got[0] == c && strings.Contains(o.t.Name(), "overlay") {
		return
	}
	c.Inode = Inode{}
	if d := cmp.Diff([]Change{c}, got); d != "" {
		o.t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func stat(t testing.TB, path string) (Inode, uint32) {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Fatalf("statx %s: %v", path, err)
	}
	return Inode{uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), st.Ino}, uint32(st.Mode)
}

func inode(t testing.TB, path string) Inode {
	t.Helper()
	i, _ := stat(t, path)
	return i
}

// entry is the change of a name that is there.
func entry(t testing.TB, op Op, path string) Change {
	t.Helper()
	i, mode := stat(t, path)
	return Change{Op: op, Dir: inode(t, filepath.Dir(path)), Name: filepath.Base(path), Inode: i, Mode: mode}
}

// alone is the change of an inode whose name is not told.
func alone(c Change, op Op) Change {
	c.Op, c.Dir, c.Name = op, Inode{}, ""
	return c
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mkdir(t testing.TB, path string) {
	t.Helper()
	ok(t, os.MkdirAll(path, 0o755))
}

func put(t testing.TB, path, data string) {
	t.Helper()
	ok(t, os.WriteFile(path, []byte(data), 0o644))
}

func mount(t testing.TB, source, dir, kind, options string) {
	t.Helper()
	mkdir(t, dir)
	if err := unix.Mount(source, dir, kind, 0, options); err != nil {
		t.Fatalf("mount %s: %v", kind, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

// onEach runs f on each file system that there is: f gets an empty directory.
func onEach(t *testing.T, f func(t *testing.T, dir string)) {
	needRoot(t)
	for _, fs := range []struct {
		name string
		dir  func(t *testing.T) string
	}{
		{"disk", func(t *testing.T) string { return t.TempDir() }},
		{"tmpfs", func(t *testing.T) string {
			dir := filepath.Join(t.TempDir(), "mnt")
			mount(t, "watch", dir, "tmpfs", "")
			return dir
		}},
		{"bind", func(t *testing.T) string { // of a part of a file system
			of, dir := filepath.Join(t.TempDir(), "a/b"), filepath.Join(t.TempDir(), "mnt")
			mkdir(t, of)
			mkdir(t, dir)
			ok(t, unix.Mount(of, dir, "", unix.MS_BIND, ""))
			t.Cleanup(func() { unix.Unmount(dir, 0) })
			return dir
		}},
		{"overlay", func(t *testing.T) string {
			base := t.TempDir()
			for _, d := range []string{"lower", "upper", "work"} {
				mkdir(t, filepath.Join(base, d))
			}
			dir := filepath.Join(base, "mnt")
			mount(t, "watch", dir, "overlay", fmt.Sprintf("index=on,nfs_export=on,lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", base))
			return dir
		}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			fstest.Leaks(t)
			f(t, fs.dir(t))
		})
	}
}
