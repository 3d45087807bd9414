// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func tmpfs(t testing.TB) string {
	t.Helper()
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	mount(t, "watch", dir, "tmpfs", "")
	return dir
}

// held is a tree whose function waits while gate is locked.
func held(t testing.TB, w *Watcher, dir string) (o *watched, gate *sync.Mutex) {
	t.Helper()
	f, err := os.Open(dir)
	ok(t, err)
	defer f.Close()
	gate = new(sync.Mutex)
	o = &watched{t: t, dir: dir, more: make(chan struct{}, 1)}
	o.tree, err = w.Add(f, func(c []Change) {
		gate.Lock()
		defer gate.Unlock()
		o.take(c)
	})
	ok(t, err)
	t.Cleanup(o.tree.Close)
	return o, gate
}

// 100,000 changes while nobody takes them are Lost, in little memory, and what comes after is told, in directories that
// were moved meanwhile too.
func TestOverflow(t *testing.T) {
	dir := tmpfs(t)
	mkdir(t, filepath.Join(dir, "a/b"))
	put(t, filepath.Join(dir, "a/b/f"), "")
	w, l := newWatcher(t)
	o, gate := held(t, w, dir)
	ok(t, os.Chmod(o.p("a/b/f"), 0o600))
	o.changes()

	before := heap()
	gate.Lock()
	for i := range 100_000 {
		ok(t, unix.Mknod(o.p(strconv.Itoa(i)), unix.S_IFREG, 0))
	}
	mkdir(t, filepath.Join(dir, "z"))
	other := filepath.Join(dir, "out")
	ok(t, os.Rename(o.p("a/b"), other)) // is lost
	grown := heap() - before
	gate.Unlock()
	got := o.until("Lost", func(c Change) bool { return c.Op == Lost })
	t.Logf("%d changes were told before Lost; the heap grew by %d KiB", len(got), grown>>10)
	if len(got) == 0 || len(got) >= 100_000 {
		t.Errorf("%d changes were told before Lost", len(got))
	}
	if grown > 8<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	if !strings.Contains(l.String(), "max_queued_events") {
		t.Errorf("it is not logged: %s", l)
	}
	ok(t, os.Chmod(filepath.Join(other, "f"), 0o640))
	o.want("after it", entry(t, Attrib, filepath.Join(other, "f")))
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Without descriptors to look at what changed, it is Lost.
func TestDescriptors(t *testing.T) {
	dir := tmpfs(t)
	mkdir(t, filepath.Join(dir, "a/b"))
	w, _ := newWatcher(t)
	o := watchDir(t, w, dir)
	o.changes()
	var old unix.Rlimit
	ok(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	ok(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	for _, f := range []string{"a/b/c", "d"} { // in a directory that is not known, and in one that is
		ok(t, unix.Mknod(o.p(f), unix.S_IFREG, 0))
		o.until("Lost", func(c Change) bool { return c.Op == Lost })
	}
}

// More directories than are kept.
func TestManyDirectories(t *testing.T) {
	dir := tmpfs(t)
	w, _ := newWatcher(t)
	o := watchDir(t, w, dir)
	w.mu.Lock()
	o.tree.view.max = 50
	w.mu.Unlock()
	var files []string
	for i := range 40 {
		d := o.p(fmt.Sprintf("%d/%d/%d", i%3, i%7, i))
		mkdir(t, d)
		files = append(files, filepath.Join(d, "f"))
		put(t, filepath.Join(d, "f"), "")
	}
	o.changes()
	for range 200 {
		f := files[rand.IntN(len(files))]
		ok(t, os.Chmod(f, 0o600))
		o.want(f, entry(t, Attrib, f))
	}
	known := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		n := 0
		for d := o.tree.view.newest; d != nil; d = d.older {
			n++
		}
		if n != len(o.tree.view.dirs) {
			t.Errorf("%d directories in the list, %d in the map", n, len(o.tree.view.dirs))
		}
		return n
	}
	if n := known(); n > 50 || n < 40 {
		t.Errorf("%d directories are known", n)
	}
}

// Directories are moved about in and out of the tree, faster than it is told; what is known of them at the end is true.
func TestMoves(t *testing.T) {
	onEach(t, func(t *testing.T, base string) {
		dir := filepath.Join(base, "tree")
		w, l := newWatcher(t)
		mkdir(t, dir)
		o := watchDir(t, w, dir)
		const n = 12
		spots := []string{base, dir}
		for i := range n {
			mkdir(t, filepath.Join(dir, strconv.Itoa(i)))
			put(t, filepath.Join(dir, strconv.Itoa(i), "file"), "")
		}
		// Where each is now, to be found by the file system itself.
		find := func(i int) string {
			var found string
			for _, s := range spots {
				filepath.WalkDir(s, func(p string, e os.DirEntry, err error) error {
					if err == nil && e.IsDir() && e.Name() == strconv.Itoa(i) {
						found = p
						return filepath.SkipAll
					}
					return nil
				})
			}
			return found
		}
		r := rand.New(rand.NewPCG(1, 2))
		for range 30 {
			for range 20 {
				i, j := r.IntN(n), r.IntN(n+2)
				from, to := find(i), ""
				if j < n {
					to = find(j)
				} else {
					to = spots[j-n]
				}
				os.Rename(from, filepath.Join(to, strconv.Itoa(i))) // may be into itself
				os.Chmod(filepath.Join(find(r.IntN(n)), "file"), 0o600|os.FileMode(r.IntN(8)))
			}
			ok(t, unix.Mknod(o.p("m"), unix.S_IFREG, 0))
			ok(t, os.Remove(o.p("m")))
			o.changes()
			for i := range n {
				f := filepath.Join(find(i), "file")
				ok(t, os.Chmod(f, 0o640))
				if strings.HasPrefix(f, dir+"/") {
					o.want(f, entry(t, Attrib, f))
				} else {
					o.want(f)
				}
			}
			if t.Failed() {
				return
			}
		}
		if l.String() != "" {
			t.Error(l)
		}
	})
}

// A change is told at once.
func TestLag(t *testing.T) {
	dir := tmpfs(t)
	w, _ := newWatcher(t)
	f, err := os.Open(dir)
	ok(t, err)
	defer f.Close()
	const n = 300
	told := make(chan time.Time, n)
	_, err = w.Add(f, func(c []Change) {
		for range c {
			told <- time.Now()
		}
	})
	ok(t, err)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var got []time.Duration
	for i := range n {
		<-tick.C
		begun := time.Now()
		ok(t, unix.Mknod(filepath.Join(dir, strconv.Itoa(i)), unix.S_IFREG, 0))
		select {
		case end := <-told:
			got = append(got, end.Sub(begun))
		case <-time.After(patience):
			t.Fatal("a change is not told")
		}
	}
	slices.Sort(got)
	t.Logf("from before the change to the function: median %v, p99 %v, longest %v", got[n/2], got[n*99/100], got[n-1])
	if got[n*99/100] > 100*time.Millisecond {
		t.Error("that is slow")
	}
}

// BenchmarkTold takes changes that are in the queue already: events/s is what the watcher can carry.
func BenchmarkTold(b *testing.B) {
	for _, c := range []struct {
		name string
		op   func(dir string, i int)
	}{
		{"create", func(dir string, i int) {
			ok(b, unix.Mknod(filepath.Join(dir, strconv.Itoa(i)), unix.S_IFREG, 0))
		}},
		{"modify", func(dir string, i int) {
			ok(b, unix.Truncate(filepath.Join(dir, strconv.Itoa(i)), int64(i)+1))
		}},
		{"delete", func(dir string, i int) {
			ok(b, unix.Unlink(filepath.Join(dir, strconv.Itoa(i))))
		}},
		{"outside", func(dir string, i int) {
			ok(b, unix.Mknod(filepath.Join(dir, "../out", strconv.Itoa(i)), unix.S_IFREG, 0))
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			const round = 7000 // a delete is two events; the queue takes 16384
			base := tmpfs(b)
			dir := filepath.Join(base, "a/b/c/d/tree/e/f/g")
			mkdir(b, dir)
			mkdir(b, filepath.Join(dir, "../out"))
			w, _ := newWatcher(b)
			tree := filepath.Join(base, "a/b/c/d/tree")
			if c.name == "outside" {
				tree = dir
			}
			o, gate := held(b, w, tree)
			events := 0
			for b.Loop() {
				b.StopTimer()
				if c.name == "modify" || c.name == "delete" {
					for i := range round {
						ok(b, unix.Mknod(filepath.Join(dir, strconv.Itoa(i)), unix.S_IFREG, 0))
					}
				}
				o.changes()
				gate.Lock()
				ok(b, os.Chmod(o.dir, 0o755)) // the function waits with this one
				for i := range round {
					c.op(dir, i)
				}
				events += round
				name := fmt.Sprintf("mark-%d", marked.Add(1))
				ok(b, unix.Mknod(o.p(name), unix.S_IFREG, 0))
				b.StartTimer()
				gate.Unlock()
				got := o.until(name, func(c Change) bool { return c.Name == name })
				b.StopTimer()
				if n := slices.IndexFunc(got, func(c Change) bool { return c.Op == Lost }); n >= 0 {
					b.Fatal("changes were lost")
				}
				for i := range round { // what there is of them
					os.Remove(filepath.Join(dir, strconv.Itoa(i)))
					os.Remove(filepath.Join(dir, "../out", strconv.Itoa(i)))
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(events)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
