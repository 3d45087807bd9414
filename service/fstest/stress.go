// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var stressCases = []testCase{
	{"stress/directories", false, stressDirectories},
	{"stress/tree", false, stressTree},
	{"stress/forget", true, stressForget},
}

// crowd runs f in n goroutines for a while and waits for all: who locks two
// inodes in two orders hangs here.
func (e *env) crowd(n int, f func(r *rand.Rand) error) {
	e.Helper()
	end := time.Now().Add(300 * time.Millisecond)
	e.within("the end of a crowd", func() error {
		var wg sync.WaitGroup
		for i := range n {
			r := rand.New(rand.NewPCG(e.o.Seed, uint64(i)))
			wg.Go(func() {
				for time.Now().Before(end) {
					if err := f(r); err != nil {
						e.Errorf("seed %d: %v", e.o.Seed, err)
						return
					}
				}
			})
		}
		wg.Wait()
		return nil
	})
}

// stressDirectories moves and exchanges directories between parents, both ways at once.
func stressDirectories(e *env) {
	const parents, children = 3, 4
	for p := range parents {
		for c := range children {
			e.ok(os.MkdirAll(e.p(fmt.Sprintf("%d/c%d.%d", p, p, c)), 0o755), "mkdir")
		}
	}
	dir := func(r *rand.Rand) string {
		return fmt.Sprintf("%d/c%d.%d", r.IntN(parents), r.IntN(parents), r.IntN(children))
	}
	e.crowd(6, func(r *rand.Rand) error {
		from, to := dir(r), dir(r)
		flags := []uint{0, unix.RENAME_EXCHANGE, unix.RENAME_NOREPLACE}[r.IntN(3)]
		switch err := e.rename2(from, to, flags); err {
		case nil, unix.ENOENT, unix.EEXIST:
			return nil
		default:
			return fmt.Errorf("rename %s %s, flags %d: %w", from, to, flags, err)
		}
	})
	// Each directory that is left is whole.
	for p := range parents {
		for _, name := range e.list(strconv.Itoa(p)) {
			e.eq(e.stat(fmt.Sprintf("%d/%s/..", p, name)).Ino, e.stat(strconv.Itoa(p)).Ino, "the .. of "+name)
		}
	}
}

// stressTree does everything to few names at once. What each call may answer is
// open, but not every errno: EIO or ESTALE would say that the file system lost its way.
func stressTree(e *env) {
	allowed := []error{nil, unix.ENOENT, unix.EEXIST, unix.ENOTDIR, unix.EISDIR, unix.ENOTEMPTY, unix.EINVAL, unix.EPERM, unix.ELOOP, unix.EBUSY, unix.ENODATA}
	name := func(r *rand.Rand) string {
		s := e.p(string(rune('a' + r.IntN(3))))
		for r.IntN(2) == 0 && len(s) < len(e.dir)+8 {
			s += "/" + string(rune('a'+r.IntN(3)))
		}
		return s
	}
	e.crowd(8, func(r *rand.Rand) error {
		a, b := name(r), name(r)
		var err error
		var st unix.Stat_t
		op := r.IntN(13)
		switch op {
		case 0, 1:
			var fd int
			if fd, err = unix.Open(a, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o644); err == nil {
				_, err = unix.Pwrite(fd, []byte(a), r.Int64N(10_000))
				if err == nil {
					_, err = unix.Pread(fd, make([]byte, 100), 0)
				}
				if err == nil {
					err = unix.Fstat(fd, &st)
				}
				unix.Close(fd)
			}
		case 2, 3:
			err = unix.Mkdir(a, 0o755)
		case 4:
			err = unix.Unlink(a)
		case 5:
			err = unix.Rmdir(a)
		case 6:
			err = unix.Rename(a, b)
		case 7:
			err = unix.Link(a, b)
		case 8:
			err = unix.Symlink("nowhere", a)
		case 9:
			err = unix.Lstat(a, &st)
		case 10:
			err = unix.Chmod(a, 0o755)
		case 11:
			_, err = unix.Lgetxattr(a, "user.x", make([]byte, 10))
		case 12:
			var fd int
			if fd, err = unix.Open(a, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
				_, err = rest(fd, 4096)
				unix.Close(fd)
			}
		}
		if !slices.Contains(allowed, err) {
			return fmt.Errorf("operation %d on %s and %s: %w", op, a, b, err)
		}
		return nil
	})
}

// stressForget makes the kernel forget what it can and looks for all of it
// again; what is open, or somebody's working directory, must survive.
func stressForget(e *env) {
	n := min(2000, e.o.Entries)
	e.mkdir("d")
	inodes := make([]uint64, n)
	for i := range n {
		name := fmt.Sprint("d/f", i)
		e.file(name, strconv.Itoa(i))
		inodes[i] = e.stat(name).Ino
	}
	fd := e.open("d/f0", unix.O_RDWR, 0)
	dir := e.open("d", unix.O_PATH|unix.O_DIRECTORY, 0)
	e.ok(unix.Unlink(e.p("d/f0")), "unlink")
	agent := e.agent()
	for range 3 {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
			e.notRun("dropping caches: " + err.Error())
		}
		for i := 1; i < n; i += 1 + i%7 {
			st := e.stat(fmt.Sprint("d/f", i))
			e.eq([]uint64{st.Ino, uint64(st.Size)}, []uint64{inodes[i], uint64(len(strconv.Itoa(i)))}, "inode and size")
		}
		e.eq(e.read(fd, 10, 0), "0", "content of what was unlinked")
		e.eq(e.fstat(fd).Ino, inodes[0], "inode of what was unlinked")
		var st unix.Stat_t
		e.ok(unix.Fstatat(dir, fmt.Sprint("f", n-1), &st, 0), "stat below a descriptor")
		e.ok(agent.call("stat", "d/f7", ""), "stat below another's working directory")
	}
	e.content(fmt.Sprint("d/f", n/2), strconv.Itoa(n/2))
}
