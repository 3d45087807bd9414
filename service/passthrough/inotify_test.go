// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// pushed is a guest whose host watches by inotify, and what it is told.
type pushed struct {
	*guest
	w   *DirWatches
	log *bytes.Buffer

	limited []string

	mu    sync.Mutex
	got   []string // notifications, and acts
	more  chan struct{}
	marks int
}

// newPushed makes one; its root has been looked into.
func newPushed(t testing.TB, change func(*Config)) *pushed {
	t.Helper()
	p := &pushed{log: new(bytes.Buffer), more: make(chan struct{}, 1)}
	p.guest = newGuest(t, func(c *Config) {
		w, err := NewDirWatches(slog.New(slog.NewTextHandler(p.log, nil)), func(err error) { p.limited = append(p.limited, err.Error()) })
		must(t, err)
		p.w, c.Dirs = w, w
		if change != nil {
			change(c)
		}
	})
	t.Cleanup(p.w.Close)
	a, b := pair(t)
	p.fs.Notify(b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.read(a)
	}()
	t.Cleanup(func() { a.Close(); <-done })
	p.lookupNone(1, "nothing")
	return p
}

// read is the guest's kernel: it takes notifications.
func (p *pushed) read(c *os.File) {
	for {
		var head [fuse.OutHeaderSize]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		var h fuse.OutHeader
		fuse.Decode(&h, head[:])
		b := make([]byte, h.Len-uint32(len(head)))
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		text := fmt.Sprint(h.Error)
		switch fuse.NotifyCode(h.Error) {
		case fuse.NOTIFY_INVAL_INODE:
			var n fuse.NotifyInvalInodeOut
			fuse.Decode(&n, b)
			text = fmt.Sprintf("inode %d", n.Ino)
			if n.Off >= 0 {
				text += " data"
			}
		case fuse.NOTIFY_INVAL_ENTRY:
			var n fuse.NotifyInvalEntryOut
			rest, _ := fuse.Decode(&n, b)
			text = fmt.Sprintf("entry %d %s", n.Parent, rest[:n.Namelen])
			if n.Flags&fuse.EXPIRE_ONLY != 0 {
				text = "expire" + strings.TrimPrefix(text, "entry")
			}
		}
		p.told(text)
		if _, err := c.Write(make([]byte, 4)); err != nil {
			return
		}
	}
}

func (p *pushed) told(text string) {
	p.mu.Lock()
	p.got = append(p.got, text)
	p.mu.Unlock()
	select {
	case p.more <- struct{}{}:
	default:
	}
}

// until returns what was told before text, and forgets all of it.
func (p *pushed) until(text string) []string {
	p.t.Helper()
	return p.wait(text, func(s string) bool { return s == text })
}

func (p *pushed) untilPrefix(text string) []string {
	p.t.Helper()
	return p.wait(text, func(s string) bool { return strings.HasPrefix(s, text) })
}

func (p *pushed) wait(text string, ok func(string) bool) []string {
	p.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		p.mu.Lock()
		for i, s := range p.got {
			if ok(s) {
				got := p.got[:i:i]
				p.got = p.got[i+1:]
				p.mu.Unlock()
				return got
			}
		}
		got := fmt.Sprint(p.got)
		p.mu.Unlock()
		select {
		case <-p.more:
		case <-timeout:
			p.t.Fatalf("%q is not told, only %s", text, got)
		}
	}
}

// want checks what was told up to now: the host makes a mark in the root.
func (p *pushed) want(what string, want ...string) {
	p.t.Helper()
	p.marks++
	name := fmt.Sprint("mark", p.marks)
	must(p.t, unix.Mknod(p.host(name), unix.S_IFREG, 0))
	got := p.until("entry 1 " + name)
	want = append(want, "inode 1 data") // for the mark
	// Those about one change are told in any order, and what is told with others is told once.
	slices.Sort(want)
	want = slices.Compact(want)
	got = slices.Compact(slices.Sorted(slices.Values(got)))
	if diff := cmp.Diff(want, got); diff != "" {
		p.t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// lookupNone looks a name up that is not there, and returns for how long that may be believed.
func (p *pushed) lookupNone(dir uint64, name string) uint64 {
	p.t.Helper()
	a := p.call(fuse.OpLookup, dir, body(name))
	if a.errno == unix.ENOENT {
		return 0
	}
	e, _ := out[fuse.EntryOut](p.guest, a)
	if e.NodeID != 0 {
		p.t.Fatalf("%s is there", name)
	}
	return e.EntryValid
}

func (p *pushed) attrValid(node uint64) uint64 {
	p.t.Helper()
	a, _ := out[fuse.AttrOut](p.guest, p.call(fuse.OpGetattr, node, body(fuse.GetattrIn{})))
	return a.AttrValid
}

func (p *pushed) forget(node, n uint64) {
	p.t.Helper()
	p.send(fuse.OpForget, node, body(fuse.ForgetIn{Nlookup: n}))
	p.serving() // it was served
}

// watches counts the kernel's.
func watches(t testing.TB) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		if l, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.Contains(l, "inotify") {
			b, err := os.ReadFile("/proc/self/fdinfo/" + fd.Name())
			must(t, err)
			n += strings.Count(string(b), "inotify wd:")
		}
	}
	return n
}

func equal[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// What is looked into is watched, and nothing else, until it is forgotten. Only what is watched may be believed for long.
func TestWatchedDirs(t *testing.T) {
	p := newPushed(t, nil)
	must(t, os.MkdirAll(p.host("a/b"), 0o755))
	must(t, os.Mkdir(p.host("c"), 0o755))
	must(t, os.WriteFile(p.host("a/f"), []byte("x"), 0o644))
	p.want("what the guest does not know", "entry 1 a", "entry 1 c")
	equal(t, "watches with the root", watches(t), 1)

	a := p.lookup(1, "a")
	equal(t, "a's name is for", a.EntryValid, longTTL)
	equal(t, "a's attributes are for", a.AttrValid, 1)
	c := p.lookup(1, "c")
	equal(t, "watches with what was only seen", watches(t), 1)
	equal(t, "c's attributes are for", p.attrValid(c.NodeID), longTTL)
	equal(t, "watches with what was asked for", watches(t), 2)

	f := p.lookup(a.NodeID, "f")
	equal(t, "watches with what was looked into", watches(t), 3)
	equal(t, "f's name is for", f.EntryValid, longTTL)
	equal(t, "f's attributes are for", f.AttrValid, longTTL)
	equal(t, "f's attributes are for, asked again", p.attrValid(f.NodeID), longTTL)
	equal(t, "what is not there is not there for", p.lookupNone(a.NodeID, "none"), longTTL)
	must(t, os.Link(p.host("a/f"), p.host("a/g")))
	equal(t, "the attributes of a file with two names are for", p.lookup(a.NodeID, "g").AttrValid, 1)
	b := p.lookup(a.NodeID, "b")
	p.want("a link", fmt.Sprintf("inode %d data", a.NodeID), fmt.Sprintf("entry %d g", a.NodeID), fmt.Sprintf("inode %d", f.NodeID))

	// The node stays as long as the guest knows what is in it.
	p.forget(a.NodeID, 1)
	equal(t, "watches with what is forgotten, but not what is in it", watches(t), 3)
	p.forget(f.NodeID, 2)
	p.forget(b.NodeID, 1)
	equal(t, "watches with a forgotten", watches(t), 2)
	p.forget(c.NodeID, 1)
	equal(t, "watches with all forgotten", watches(t), 1)
	must(t, os.WriteFile(p.host("a/n"), nil, 0o644))
	p.want("in what is forgotten")
}

// Each kind of change of the host is told.
func TestWatchedDirsTold(t *testing.T) {
	p := newPushed(t, nil)
	for _, d := range []string{"a", "b", "out"} {
		must(t, os.Mkdir(p.host(d), 0o755))
	}
	for _, f := range []string{"f", "g", "h"} {
		must(t, os.WriteFile(p.host("a/"+f), []byte("x"), 0o644))
	}
	a, b := p.lookup(1, "a").NodeID, p.lookup(1, "b").NodeID
	equal(t, "what is not there is not there for", p.lookupNone(b, "f"), longTTL)
	f, g, h := p.lookup(a, "f").NodeID, p.lookup(a, "g").NodeID, p.lookup(a, "h").NodeID
	p.until("entry 1 out")
	inode := func(id uint64) string { return fmt.Sprintf("inode %d", id) }
	data := func(id uint64) string { return inode(id) + " data" }
	entry := func(id uint64, name string) string { return fmt.Sprintf("entry %d %s", id, name) }

	must(t, os.Truncate(p.host("a/f"), 0))
	p.want("truncate", data(f))
	must(t, os.Chmod(p.host("a/f"), 0o600))
	p.want("chmod", inode(f))
	must(t, os.Chmod(p.host("a"), 0o700))
	p.want("chmod of a directory", inode(a)) // by its own watch, and by that of the root
	must(t, os.Remove(p.host("a/f")))
	p.want("unlink", data(a), inode(f), entry(a, "f"))
	must(t, os.Rename(p.host("a/g"), p.host("b/f")))
	p.want("rename", data(a), data(b), inode(g), entry(a, "g"), entry(b, "f"))
	equal(t, "the attributes of what was moved are for", p.attrValid(g), longTTL)
	fh := p.open(h, unix.O_RDONLY)
	must(t, os.Rename(p.host("a/h"), p.host("out/h")))
	p.want("a move to where nobody watches", data(a), inode(h), entry(a, "h"))
	equal(t, "the attributes of what is elsewhere are for", p.attrValid(h), 1)
	p.release(h, fh)
	must(t, os.Rename(p.host("out/h"), p.host("b/h")))
	p.want("a move from where nobody watches", data(b), entry(b, "h"), inode(h))
	equal(t, "the attributes of what has come back are for", p.lookup(b, "h").AttrValid, longTTL)
	must(t, os.Remove(p.host("b/h")))
	must(t, os.Remove(p.host("b/f")))
	must(t, os.Remove(p.host("b")))
	p.until(entry(1, "b"))
}

// actor acts nothing, and tells what it was to act.
type actor struct{ p *pushed }

func (a actor) Thread() uint32 { return 1 << 31 }
func (a actor) Plain() bool    { return false }
func (a actor) Act(x Act) fuse.Errno {
	a.p.told(fmt.Sprintf("act %d %s", x.Op, x.Path))
	return 0
}

// What the guest has done itself is neither told nor acted.
func TestWatchedDirsOwn(t *testing.T) {
	p := newPushed(t, nil)
	must(t, os.WriteFile(p.host("there"), []byte("x"), 0o644))
	p.want("the host's", "entry 1 there")
	p.fs.Act(actor{p})
	mark := func(what string, more ...string) {
		t.Helper()
		p.marks++
		name := fmt.Sprint("mark", p.marks)
		must(t, unix.Mknod(p.host(name), unix.S_IFREG, 0))
		got := p.until(fmt.Sprintf("act %d %s", ActMknod, name))
		// A moment after changes of its own the guest is told to ask for attributes again: see settle.
		got = slices.DeleteFunc(got, regexp.MustCompile(`^inode \d+$`).MatchString)
		if !cmp.Equal(got[:len(got)-2], more) && len(got)-2+len(more) > 0 {
			t.Errorf("%s: %s", what, got)
		}
	}
	mark("nothing")
	for i := range 200 {
		d := fmt.Sprint("d", i)
		dir, _ := out[fuse.EntryOut](p.guest, p.call(fuse.OpMkdir, 1, body(fuse.MkdirIn{Mode: 0o755}, d)))
		p.lookupNone(dir.NodeID, "f")
		p.lookupNone(dir.NodeID, "g")
		f, fh := p.create(dir.NodeID, "f", 0o644)
		for range 3 {
			p.want0(fuse.OpWrite, f.NodeID, fuse.WriteIn{Fh: fh, Size: 4}, []byte("data"))
		}
		p.attrValid(f.NodeID)
		p.release(f.NodeID, fh)
		p.want0(fuse.OpSetattr, f.NodeID, fuse.SetattrIn{Valid: fuse.FATTR_MODE | fuse.FATTR_SIZE | fuse.FATTR_MTIME, Mode: 0o600, Size: 1})
		p.want0(fuse.OpSetattr, f.NodeID, fuse.SetattrIn{Valid: fuse.FATTR_ATIME | fuse.FATTR_MTIME})
		p.guest.want(0, p.setxattr(f.NodeID, "user.x", "y", 0, 0))
		p.want0(fuse.OpSymlink, dir.NodeID, "s", "target")
		p.want0(fuse.OpRename, dir.NodeID, fuse.RenameIn{Newdir: 1}, "f", "f"+d)
		p.want0(fuse.OpRename, 1, fuse.RenameIn{Newdir: dir.NodeID}, "f"+d, "f")
		p.want0(fuse.OpSetattr, dir.NodeID, fuse.SetattrIn{Valid: fuse.FATTR_MODE, Mode: 0o700})
		p.want0(fuse.OpUnlink, dir.NodeID, "s")
		p.want0(fuse.OpUnlink, dir.NodeID, "f")
		p.want0(fuse.OpRmdir, 1, d)
	}
	mark("the guest's own")

	// Of the names of a file the last one alone is known. That the guest is told of another it may bear, but not that it hears events twice.
	l, fh := p.create(1, "l0", 0o644)
	for i := range 100 {
		p.want0(fuse.OpLink, 1, fuse.LinkIn{Oldnodeid: l.NodeID}, fmt.Sprint("l", i+1))
		p.want0(fuse.OpUnlink, 1, fmt.Sprint("l", i))
	}
	p.release(l.NodeID, fh)
	must(t, unix.Mknod(p.host("end"), unix.S_IFREG, 0))
	for _, s := range p.until(fmt.Sprintf("act %d end", ActMknod)) {
		if strings.HasPrefix(s, "act") {
			t.Errorf("of links: %s", s)
		}
	}

	// Another's change of the same thing is told, even if it is taken for the guest's own, and acted when that is used up.
	f, fh := p.create(1, "f", 0o644)
	mark("a file")
	for range 2 { // one event: the kernel joins them, so that a note may be left
		p.want0(fuse.OpWrite, f.NodeID, fuse.WriteIn{Fh: fh, Size: 4}, []byte("data"))
	}
	equal(t, "what the guest has written is for", p.lookup(1, "f").AttrValid, longTTL)
	must(t, os.WriteFile(p.host("f"), []byte("another"), 0o644))
	p.untilPrefix(fmt.Sprintf("inode %d", f.NodeID)) // at least that
	p.release(f.NodeID, fh)
	p.mu.Lock()
	p.got = nil
	p.mu.Unlock()
	// The guest's own attempt fails, and the other's change is not taken for it.
	p.lookupNone(1, "x")
	must(t, os.Mkdir(p.host("x"), 0o755))
	p.want1(unix.EEXIST, fuse.OpMkdir, 1, fuse.MkdirIn{Mode: 0o755}, "x")
	p.until("entry 1 x")
}

func (p *pushed) want0(op fuse.Opcode, node uint64, parts ...any) {
	p.t.Helper()
	p.want1(0, op, node, parts...)
}

func (p *pushed) want1(e fuse.Errno, op fuse.Opcode, node uint64, parts ...any) {
	p.t.Helper()
	p.guest.want(e, p.call(op, node, body(parts...)))
}

// Two mounts of one tree by one guest: what is done in one is told in the other.
func TestWatchedDirsShared(t *testing.T) {
	p := newPushed(t, nil)
	root, err := os.Open(p.dir)
	must(t, err)
	fs, err := New(Config{Root: root, Name: "second", Dirs: p.w})
	must(t, err)
	g := &guest{t: t, fs: fs, dir: p.dir, early: map[uint64]answer{}}
	ended := g.dial()
	g.init()
	a, b := pair(t)
	defer a.Close() // not before: its end is that of the channel
	fs.Notify(b)
	g.call(fuse.OpLookup, 1, body("nothing"))
	equal(t, "watches of one directory", watches(t), 1)
	g.want(0, g.call(fuse.OpMkdir, 1, body(fuse.MkdirIn{Mode: 0o755}, "d")))
	p.want("the other mount's change", "inode 1 data", "entry 1 d")
	g.c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	must(t, fs.Close())
	p.want("after its end")
}

// Where events were lost the guest is to believe nothing.
func TestWatchedDirsLost(t *testing.T) {
	p := newPushed(t, nil)
	must(t, os.Mkdir(p.host("d"), 0o755))
	p.until("entry 1 d")
	d := p.lookup(1, "d").NodeID
	for p.lookupNone(1, "none") != longTTL { // as long as its making is yet to be told
		time.Sleep(time.Millisecond)
	}
	for range 2 { // at once, and when replies that were on their way have arrived; names may be mounted on, and are not forgotten
		if d != 0 {
			p.w.changed([]watch.DirChange{{Op: watch.Lost}})
			d = 0
		}
		p.until("expire 1 d")
		p.until("expire 1 none")
	}
}

// Of more absent names than are remembered, the guest forgets those that it has asked about first.
func TestAbsences(t *testing.T) {
	p := newPushed(t, nil)
	for i := range 2 * maxAbsences {
		if life := p.lookupNone(1, fmt.Sprint("none", i)); life != longTTL {
			t.Fatalf("name %d may be believed not to be there for %d s", i, life)
		}
	}
	for range maxAbsences {
		if before := p.untilPrefix("expire 1 no"); len(before) > 0 {
			t.Fatal(before)
		}
	}
	p.want("those that were asked about later")
	equal(t, "a name that was forgotten is not there for", p.lookupNone(1, "none0"), longTTL)
}

// A file system that can't tell what changes is not watched.
func TestWatchedDirsOfProc(t *testing.T) {
	p := newPushed(t, func(c *Config) {
		c.Root.Close()
		root, err := os.Open("/proc/sys")
		must(t, err)
		c.Root = root
	})
	equal(t, "its root's attributes are for", p.attrValid(1), 1)
	equal(t, "what is not there is not there for", p.lookupNone(1, "none"), 0)
	equal(t, "watches", watches(t), 0)
}

const dirsLimitEnv = "PASSTHROUGH_TEST_LIMIT"

// Where no more watches are allowed, only what is watched may be believed for long, and it is said once.
func TestWatchedDirsLimit(t *testing.T) {
	if os.Getenv(dirsLimitEnv) == "" {
		c := exec.Command("/proc/self/exe", "-test.run=^TestWatchedDirsLimit$", "-test.v")
		c.Env = append(os.Environ(), dirsLimitEnv+"=1")
		ids := []syscall.SysProcIDMap{{Size: 1}}
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
		if b, err := c.CombinedOutput(); err != nil || !bytes.Contains(b, []byte("--- PASS: TestWatchedDirsLimit")) {
			t.Fatalf("in a user namespace: %v\n%s", err, b)
		}
		return
	}
	must(t, os.WriteFile("/proc/sys/user/max_inotify_watches", []byte("3"), 0))
	p := newPushed(t, nil)
	for i := range 5 {
		d := fmt.Sprint("d", i)
		must(t, os.MkdirAll(p.host(d+"/e"), 0o755))
		ttl, none := uint64(longTTL), uint64(longTTL)
		if i >= 2 {
			ttl, none = 1, 0
		}
		// Its making may be yet to be told, and nothing is believed while it is.
		is := func(what string, want uint64, get func() uint64) {
			t.Helper()
			for begin := time.Now(); get() != want; time.Sleep(time.Millisecond) {
				if time.Since(begin) > 20*time.Second {
					t.Fatalf("%s %s for %d, not %d", what, d, get(), want)
				}
			}
		}
		is("the name of", longTTL, func() uint64 { return p.lookup(1, d).EntryValid })
		n := p.lookup(1, d).NodeID
		is("what is in", ttl, func() uint64 { return p.lookup(n, "e").EntryValid })
		is("what is not in", none, func() uint64 { return p.lookupNone(n, "none") })
		is("the attributes of", ttl, func() uint64 { return p.attrValid(n) })
	}
	if len(p.limited) != 1 || !strings.Contains(p.limited[0], "user.max_inotify_watches is 3") || strings.Count(p.log.String(), "max_inotify_watches is 3") != 1 {
		t.Errorf("told %q, logged %s", p.limited, p.log)
	}
}

// The guest's own changes need no more room than others' do.
func TestOwnLogBound(t *testing.T) {
	var l ownLog
	for i := range 10 * maxOwn {
		at := entryKey{uint64(i), "name"}
		l.expect(at, 1, true)
		l.settle(at)
	}
	if len(l.m) > maxOwn {
		t.Errorf("%d names", len(l.m))
	}
}

// What 100,000 directories cost.
func TestWatchedDirsMemory(t *testing.T) {
	n := 5_000 // $TRANSFUSED_DIRS, for figures 100,000
	if s := os.Getenv("TRANSFUSED_DIRS"); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		must(t, err)
	}
	if b, err := os.ReadFile("/proc/sys/fs/inotify/max_user_watches"); err == nil {
		if most, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && most < n+10_000 {
			t.Logf("ONLY %d DIRECTORIES: fs.inotify.max_user_watches is %d", most/2, most)
			n = most / 2
		}
	}
	dir := tmpfs(t)
	for i := range n {
		must(t, os.MkdirAll(filepath.Join(dir, strconv.Itoa(i%316), strconv.Itoa(i)), 0o755))
	}
	cost := func(with bool) (bytes int64, took time.Duration) {
		root, err := os.Open(dir)
		must(t, err)
		p := newPushed(t, func(c *Config) {
			c.Root.Close()
			c.Root, c.Limits = root, &Limits{Descriptors: 1000}
			if !with {
				c.Dirs = nil
			}
		})
		before, begun := heapSize(), time.Now()
		at := map[int]uint64{}
		for i := range 316 {
			at[i] = p.lookup(1, strconv.Itoa(i)).NodeID
		}
		for i := range n {
			p.call(fuse.OpLookup, p.lookup(at[i%316], strconv.Itoa(i)).NodeID, body("none"))
		}
		took = time.Since(begun)
		bytes = heapSize() - before
		if with {
			equal(t, "watches", watches(t), n+316+1)
		}
		runtime.KeepAlive(p)
		return bytes / int64(n), took
	}
	bytes0, took0 := cost(false)
	bytes1, took1 := cost(true)
	t.Logf("%d directories looked into: %d bytes each in %v; watched: %d bytes each in %v", n, bytes0, took0, bytes1, took1)
	if bytes1-bytes0 > 400 {
		t.Error("those are many")
	}
}

func heapSize() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
