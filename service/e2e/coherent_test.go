// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// How a change on the host may reach the guest's caches.
const (
	soon  = 100 * time.Millisecond // much longer than being told takes, and much shorter than not being told: a second
	stale = time.Second            // what is not seen after it never would be
)

// blind has the rig's export on a file system whose changes the host does not believe to be told of: a FUSE mount, which is one of ours without a
// cache. All else is as it was. It is how the tests of this package see what they would see if nothing was pushed.
func (r *rig) blind() {
	r.t.Helper()
	below := filepath.Join(r.dir, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		r.t.Fatal(err)
	}
	host := r.start("transfuse-host", "--listen", r.address("below"), "--export", "below="+below+",cache=none")
	host.await("listening")
	r.start("transfused", "--server", r.address("below"), "--socket", "none", "--mount", "below="+r.export)
	r.mounted(r.export)
	host.await("msg=mounted")
}

// told starts host and guest, and waits for all channels of the mount.
func (r *rig) told(export, mount string, flags ...string) (host, guest *program) {
	r.t.Helper()
	host = r.host(export, flags...)
	guest = r.guest(append([]string{"--control", r.address("c"), "--mount", "code=" + r.mnt + mount}, flags...)...)
	r.mounted(r.mnt)
	host.await("msg=mounted")
	return host, guest
}

// distribution is a text about durations.
func distribution(ds []time.Duration) string {
	if len(ds) == 0 {
		return "none"
	}
	at := func(percent int) time.Duration { return percentile(ds, percent) }
	return fmt.Sprintf("p50 %v, p90 %v, p99 %v, max %v of %d", at(50), at(90), at(99), at(100), len(ds))
}

func percentile(ds []time.Duration, percent int) time.Duration {
	ds = slices.Sorted(slices.Values(ds))
	return ds[min(len(ds)*percent/100, len(ds)-1)]
}

// busy tells how the machine is, if others use it: then times tell nothing of the product.
func busy() string {
	b, _ := os.ReadFile("/proc/loadavg")
	load, _, _ := strings.Cut(string(b), " ")
	if l, err := strconv.ParseFloat(load, 64); err == nil && l <= float64(runtime.NumCPU()) {
		return ""
	}
	return "load average " + load
}

// view is all that can be seen of a tree, by path.
func view(dir string) map[string]string {
	all := map[string]string{}
	var look func(path string)
	look = func(path string) {
		full := filepath.Join(dir, path)
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			all[path] = err.Error()
			return
		}
		what := fmt.Sprintf("mode %o size %d nlink %d mtime %d.%09d", st.Mode, st.Size, st.Nlink, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(full)
			what += fmt.Sprintf(" %x", sha256.Sum256(b))
			if err != nil {
				what += err.Error()
			}
		case unix.S_IFLNK:
			to, err := os.Readlink(full)
			what += " to " + to
			if err != nil {
				what += err.Error()
			}
		case unix.S_IFDIR:
			d, err := os.Open(full)
			var names []string
			if err == nil {
				names, err = d.Readdirnames(-1)
				d.Close()
			}
			if err != nil {
				what += err.Error()
			}
			for _, name := range names {
				look(filepath.Join(path, name))
			}
		}
		all[path] = what
	}
	look(".")
	return all
}

// agrees waits until the guest's view is the host's, and tells how long after since that was the case.
func (r *rig) agrees(since time.Time, limit time.Duration) (time.Duration, bool) {
	r.t.Helper()
	view := func(dir string) map[string]string {
		all := view(dir)
		for name, what := range all {
			if r.ignore != nil {
				all[name] = r.ignore.ReplaceAllString(what, "")
			}
		}
		return all
	}
	want := view(r.export)
	for {
		// What was seen later than this is not older than it.
		begin := time.Now()
		got := view(r.mnt)
		if cmp.Equal(want, got) {
			return max(0, begin.Sub(since)), true
		}
		if begin.Sub(since) > limit {
			r.t.Errorf("the guest's view, %v after the last change, -host +guest:\n%s", begin.Sub(since), cmp.Diff(want, got))
			return begin.Sub(since), false
		}
	}
}

// changer makes random changes to a tree, which has any kind of file under any of its names.
type changer struct {
	dir  string
	rnd  *rand.Rand
	held []int    // descriptors of regular files, whatever happens to their names
	log  []string // what was done last
}

// release closes what is held.
func (c *changer) release() {
	for _, fd := range c.held {
		unix.Close(fd)
	}
	c.held = nil
}

func (c *changer) path() string {
	depth := 1 + c.rnd.IntN(3)
	p := c.dir
	for range depth {
		p = filepath.Join(p, string(rune('a'+c.rnd.IntN(5))))
	}
	return p
}

func (c *changer) bytes() []byte {
	b := make([]byte, c.rnd.IntN(9000))
	for i := range b {
		b[i] = byte(c.rnd.Uint32())
	}
	return b
}

// write is os.WriteFile, but does not wait for who reads a pipe.
func write(path string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, mode)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write(b)
	return err
}

// rename is renameat2, which does not refuse what os.Rename does.
func rename(from, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
}

// openRegular opens a regular file, and nothing else.
func openRegular(path string, flags int) (fd int, size int64, err error) {
	fd, err = unix.Open(path, flags|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, 0, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.EINVAL
	}
	if err != nil {
		unix.Close(fd)
	}
	return fd, st.Size, err
}

// mapped gives f a shared mapping of a file. That the file becomes shorter meanwhile ends f, not the process.
func mapped(path string, flags, prot int, f func(b []byte)) error {
	fd, size, err := openRegular(path, flags)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if size == 0 {
		return nil
	}
	b, err := unix.Mmap(fd, 0, int(size), prot, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
		}
	}()
	f(b)
	return nil
}

// steps are the changes; the more often one is here, the more often it is made.
var steps = []struct {
	name  string
	times int
	do    func(c *changer, p string) error
}{
	{"write", 8, func(c *changer, p string) error { return write(p, c.bytes(), 0o644) }},
	{"overwrite", 8, func(c *changer, p string) error {
		f, err := os.OpenFile(p, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt(c.bytes(), int64(c.rnd.IntN(5000)))
		return err
	}},
	{"append", 4, func(c *changer, p string) error {
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Write(c.bytes())
		return err
	}},
	{"truncate", 4, func(c *changer, p string) error { return os.Truncate(p, int64(c.rnd.IntN(9000))) }},
	{"replace", 8, func(c *changer, p string) error {
		temp := filepath.Join(filepath.Dir(p), ".temp")
		if err := write(temp, c.bytes(), 0o600); err != nil {
			return err
		}
		if err := rename(temp, p, 0); err != nil {
			os.Remove(temp)
			return err
		}
		return nil
	}},
	{"unlink", 3, func(c *changer, p string) error { return unix.Unlink(p) }},
	{"delete and create", 6, func(c *changer, p string) error {
		if err := unix.Unlink(p); err != nil {
			return err
		}
		return write(p, c.bytes(), 0o640)
	}},
	{"chmod", 6, func(c *changer, p string) error { return unix.Chmod(p, uint32(c.rnd.IntN(0o1000))) }},
	{"utimes", 2, func(c *changer, p string) error {
		ts := []unix.Timespec{{Sec: c.rnd.Int64N(1 << 30)}, {Sec: c.rnd.Int64N(1 << 30), Nsec: c.rnd.Int64N(1e9)}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW)
	}},
	{"rename", 8, func(c *changer, p string) error { return rename(p, c.path(), 0) }},
	{"exchange", 2, func(c *changer, p string) error { return rename(p, c.path(), unix.RENAME_EXCHANGE) }},
	{"link", 4, func(c *changer, p string) error { return unix.Link(p, c.path()) }},
	{"symlink", 3, func(c *changer, p string) error {
		return unix.Symlink([]string{"a", "b/c", "nowhere"}[c.rnd.IntN(3)], p)
	}},
	{"mkdir", 12, func(c *changer, p string) error { return unix.Mkdir(p, 0o755) }},
	{"rmdir", 4, func(c *changer, p string) error { return unix.Rmdir(p) }},
	{"remove all", 1, func(c *changer, p string) error {
		if _, err := os.Lstat(p); err != nil {
			return err
		}
		return os.RemoveAll(p)
	}},
	{"mkfifo", 1, func(c *changer, p string) error { return unix.Mkfifo(p, 0o600) }},
	{"map", 6, func(c *changer, p string) error {
		return mapped(p, os.O_RDWR, unix.PROT_READ|unix.PROT_WRITE, func(b []byte) { b[c.rnd.IntN(len(b))] = byte(c.rnd.Uint32()) })
	}},
	{"hold", 6, func(c *changer, p string) error {
		fd, _, err := openRegular(p, os.O_RDWR)
		if err != nil {
			return err
		}
		if c.held = append(c.held, fd); len(c.held) > 8 {
			unix.Close(c.held[0])
			c.held = c.held[1:]
		}
		return nil
	}},
	{"use what is held", 12, func(c *changer, _ string) error {
		if len(c.held) == 0 {
			return unix.ENOENT
		}
		fd := c.held[c.rnd.IntN(len(c.held))]
		n := c.rnd.Int64N(9000)
		var err error
		switch c.rnd.IntN(7) {
		case 0, 1:
			_, err = unix.Pwrite(fd, c.bytes(), n)
		case 2:
			_, err = unix.Pread(fd, make([]byte, 9000), n)
		case 3:
			err = unix.Ftruncate(fd, n)
		case 4:
			err = unix.Fchmod(fd, uint32(n&0o777))
		case 5:
			err = unix.Fdatasync(fd)
		case 6:
			err = unix.Flock(fd, []int{unix.LOCK_SH, unix.LOCK_EX, unix.LOCK_UN}[n%3]|unix.LOCK_NB)
		}
		return err
	}},
}

// impossible are the errors of changes that are not possible as the tree is just now, or is no more.
var impossible = []error{unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.EEXIST, unix.ENOTEMPTY, unix.EINVAL, unix.ELOOP, unix.ENXIO, unix.EPERM, unix.EBUSY,
	unix.EPIPE, unix.ESPIPE, unix.EAGAIN, unix.ESTALE}

// unexpected tells an error that the state of the tree is no reason for.
func unexpected(err error) bool {
	return err != nil && !slices.ContainsFunc(impossible, func(e error) bool { return errors.Is(err, e) })
}

// step makes one change. What is not possible is not tried to the end.
func (c *changer) step() error {
	all := 0
	for _, s := range steps {
		all += s.times
	}
	for {
		n, p := c.rnd.IntN(all), c.path()
		for _, s := range steps {
			if n -= s.times; n >= 0 {
				continue
			}
			err := whileMapped(s.name == "map", func() error { return s.do(c, p) })
			switch {
			case err == nil:
				c.log = append(c.log, s.name+" "+p[len(c.dir):])
				return nil
			case unexpected(err):
				return fmt.Errorf("%s %s: %w", s.name, p, err)
			}
			break
		}
	}
}

// mapping is held while something is stored through a mapping, and shared by all other changes. What is stored behind the end that a file has
// meanwhile is nothing that anybody may rely on: FUSE keeps it in the guest's page, where it shows when the file grows again, and the host never gets it.
var mapping sync.RWMutex

func whileMapped(maps bool, do func() error) error {
	if maps {
		mapping.Lock()
		defer mapping.Unlock()
	} else {
		mapping.RLock()
		defer mapping.RUnlock()
	}
	return do()
}

// readers look at random names of a tree in every way until stop is closed. What no reader may see is told.
func readers(t *testing.T, n int, dir string, seed uint64, stop chan struct{}) (wait func()) {
	var wg sync.WaitGroup
	var looks, stales atomic.Uint64
	for i := range n {
		c := &changer{dir: dir, rnd: rand.New(rand.NewPCG(seed, uint64(i+1)))}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				p := c.path()
				var err error
				switch c.rnd.IntN(5) {
				case 0:
					_, err = os.Lstat(p)
				case 1:
					var f *os.File
					if f, err = os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err == nil {
						if st, serr := f.Stat(); serr == nil && st.Mode().IsRegular() {
							_, err = io.Copy(io.Discard, f)
						}
						f.Close()
					}
				case 2:
					_, err = os.ReadDir(p)
				case 3:
					_, err = os.Readlink(p)
				case 4:
					err = mapped(p, os.O_RDONLY, unix.PROT_READ, func(b []byte) { sha256.Sum256(b) })
				}
				looks.Add(1)
				switch {
				case errors.Is(err, unix.ESTALE):
					stales.Add(1)
				case errors.Is(err, unix.EIO), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.ENOTCONN):
					t.Error(err)
					return
				}
			}
		})
	}
	return func() {
		wg.Wait()
		t.Logf("the guest looked %d times, and %d of them were told ESTALE", looks.Load(), stales.Load())
	}
}

// churn makes n random changes while the guest looks, and compares both views after each few. It tells how long it took each time until they agreed.
func (r *rig) churn(n, each int, seed uint64) (lags []time.Duration) {
	r.t.Helper()
	r.t.Logf("seed %d", seed)
	c := &changer{dir: r.export, rnd: rand.New(rand.NewPCG(seed, 0))}
	defer c.release()
	stop := make(chan struct{})
	wait := readers(r.t, 2, r.mnt, seed, stop)
	defer wait()
	defer close(stop)
	for i := range n {
		if err := c.step(); err != nil {
			r.t.Fatal(err)
		}
		if (i+1)%each > 0 {
			continue
		}
		lag, ok := r.agrees(time.Now(), stale)
		if !ok {
			r.t.Fatalf("step %d; the last ones were:\n%s", i+1, strings.Join(c.log, "\n"))
		}
		lags = append(lags, lag)
		c.log = c.log[:0]
	}
	return lags
}

func TestCoherent(t *testing.T) {
	t.Run("random", func(t *testing.T) {
		r := newRig(t, 0)
		r.told("", "")
		lags := r.churn(10_000, 100, 1)
		t.Logf("the views agreed after %s", distribution(lags))
	})
	t.Run("random, untold", func(t *testing.T) {
		r := newRig(t, 0)
		r.blind()
		r.told("", "")
		// What is looked at for the first time, or after a second, is seen as it is.
		for seed := range uint64(50) {
			if lag := slices.Max(r.churn(50, 50, seed)); lag >= soon {
				t.Logf("the views agreed after %v", lag)
				return
			}
		}
		t.Error("nobody tells the guest, and it sees all the same")
	})
}
