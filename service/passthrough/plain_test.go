// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// plainActor makes calls as the C daemon does: by paths, wherever they lead.
type plainActor struct {
	mnt    string
	thread uint32
	work   chan func()

	mu   sync.Mutex
	acts []Act
	more chan struct{}
}

func newPlainActor(t *testing.T, mnt string) *plainActor {
	a := &plainActor{mnt: mnt, work: make(chan func()), more: make(chan struct{}, 1)}
	started := make(chan int)
	go func() {
		runtime.LockOSThread() // it ends with the goroutine
		started <- unix.Gettid()
		for f := range a.work {
			f()
		}
	}()
	a.thread = uint32(<-started)
	t.Cleanup(func() { close(a.work) })
	return a
}

func (a *plainActor) Thread() uint32 { return a.thread }
func (a *plainActor) Plain() bool    { return true }

func (a *plainActor) Act(x Act) fuse.Errno {
	p := filepath.Join(a.mnt, x.Path)
	done := make(chan struct{})
	a.work <- func() {
		defer close(done)
		// It does not tell their errors either.
		switch x.Op {
		case ActRmdir:
			unix.Rmdir(p)
		case ActUnlink:
			unix.Unlink(p)
		case ActMkdir:
			unix.Mkdir(p, 0)
		case ActSymlink:
			unix.Symlink(".", p)
		case ActTruncate:
			unix.Truncate(p, 0)
		case ActChmod:
			unix.Chmod(p, 0o700)
		case ActMknod:
			unix.Mknod(p, unix.S_IFREG|0o600, 0)
		}
	}
	<-done
	a.mu.Lock()
	a.acts = append(a.acts, x)
	a.mu.Unlock()
	select {
	case a.more <- struct{}{}:
	default:
	}
	return 0
}

// until waits until a call was made.
func (a *plainActor) until(t *testing.T, x Act) {
	t.Helper()
	for {
		a.mu.Lock()
		ok := slices.Contains(a.acts, x)
		a.mu.Unlock()
		if ok {
			return
		}
		<-a.more
	}
}

// What a plain actor is asked to do it does to nothing of the guest's own, wherever the path leads there.
func TestPlainActorStaysInside(t *testing.T) {
	outside := t.TempDir()
	precious := filepath.Join(outside, "f")
	for _, c := range []struct {
		name    string
		prepare func(o *ordered) error                         // at the host
		link    string                                         // that it made, which the guest has looked at
		use     string                                         // in the guest, where the directory outside is $outside
		changes func(o *ordered, f watch.Inode) []watch.Change // of d/f
	}{
		{"mounted over", nil, "", "cat d/f && mount --bind $outside d", func(o *ordered, f watch.Inode) []watch.Change {
			in := watch.Change{Dir: o.inode("d"), Name: "f", Inode: f, Mode: unix.S_IFREG}
			modify, attrib, remove, create, chmod := in, in, in, in, watch.Change{Op: watch.Attrib | watch.IsDir, Dir: o.inode(""), Name: "d", Inode: o.inode("d"), Mode: unix.S_IFDIR}
			modify.Op, attrib.Op, remove.Op, create.Op, create.Name = watch.Modify, watch.Attrib, watch.Delete, watch.Create, "g"
			return []watch.Change{modify, attrib, remove, create, chmod}
		}},
		{"a link in its place", func(o *ordered) error {
			return errors.Join(os.Remove(filepath.Join(o.dir, "d/f")), os.Symlink(precious, filepath.Join(o.dir, "d/f")))
		}, "d/f", "cat d/f", func(o *ordered, f watch.Inode) []watch.Change {
			in := watch.Change{Op: watch.Modify | watch.Attrib, Dir: o.inode("d"), Name: "f", Inode: f, Mode: unix.S_IFREG}
			return []watch.Change{in}
		}},
		{"a link on the way", func(o *ordered) error {
			return errors.Join(os.Rename(filepath.Join(o.dir, "d"), filepath.Join(o.dir, "moved")), os.Symlink(outside, filepath.Join(o.dir, "d")))
		}, "d", "cat d/f", func(o *ordered, f watch.Inode) []watch.Change {
			return []watch.Change{{Op: watch.Modify | watch.Attrib, Dir: o.inode("moved"), Name: "f", Inode: f, Mode: unix.S_IFREG}}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, os.WriteFile(precious, []byte("precious"), 0o640))
			o := newOrdered(t, Config{Reread: true})
			must(t, os.Mkdir(filepath.Join(o.dir, "d"), 0o755))
			must(t, os.WriteFile(filepath.Join(o.dir, "d/f"), []byte("host's"), 0o644))
			sh := func(script string) {
				t.Helper()
				cmd := exec.Command("sh", "-ec", script)
				cmd.Dir, cmd.Env = o.mnt, append(os.Environ(), "outside="+outside)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", script, err, out)
				}
			}
			sh("cat d/f")
			f := o.inode("d/f")
			if c.prepare != nil {
				must(t, c.prepare(o))
			}
			if c.link != "" {
				o.fs.Changed([]watch.Change{{Op: watch.Create, Dir: o.inode(filepath.Dir(c.link)), Name: filepath.Base(c.link), Inode: o.inode(c.link), Mode: unix.S_IFLNK}})
				o.settled()
			}
			sh(c.use)
			t.Cleanup(func() { unix.Unmount(filepath.Join(o.mnt, "d"), unix.MNT_DETACH) })
			a := newPlainActor(t, o.mnt)
			o.fs.Act(a)
			o.fs.Changed(c.changes(o, f))
			// The end of what was asked.
			must(t, os.Mkdir(filepath.Join(o.dir, "end"), 0o755))
			o.fs.Changed([]watch.Change{{Op: watch.Create | watch.IsDir, Dir: o.inode(""), Name: "end", Inode: o.inode("end"), Mode: unix.S_IFDIR | 0o755}})
			a.until(t, Act{Op: ActMkdir, Mode: unix.S_IFDIR | 0o755, Path: "end"})
			o.fs.Act(nil)
			st, err := os.Stat(precious)
			must(t, err)
			dir, err := os.Stat(outside)
			must(t, err)
			names, _ := os.ReadDir(outside)
			if st.Size() != 8 || st.Mode() != 0o640 || dir.Mode().Perm() == 0o700 || len(names) != 1 {
				t.Errorf("the guest's own: %d bytes, mode %v, in a directory of mode %v with %v", st.Size(), st.Mode(), dir.Mode(), names)
			}
		})
	}
}
