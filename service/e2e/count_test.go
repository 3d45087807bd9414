// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/splice"
)

// calls counts the system calls of a process, but for those by which the runtime schedules and collects, or waits: how many those are is a
// matter of time, what else is called is a matter of code.
type calls struct {
	t   *testing.T
	fds []int // of each thread that there was; those that they make are counted with them
}

var notCounted = []int{unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_EPOLL_PWAIT, unix.SYS_PPOLL, unix.SYS_SCHED_YIELD, unix.SYS_TGKILL, unix.SYS_GETPID,
	unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGPROCMASK, unix.SYS_SIGALTSTACK, unix.SYS_GETTID, unix.SYS_CLONE, unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_EXIT,
	unix.SYS_SCHED_GETAFFINITY}

// traced is the kernel's number of the event that each system call is.
func traced(t *testing.T) uint64 {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		t.Fatalf("mount tracefs: %v", err)
	}
	defer unix.Unmount(dir, 0)
	b, err := os.ReadFile(filepath.Join(dir, "events/raw_syscalls/sys_enter/id"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func countCalls(t *testing.T, event uint64, pid int) *calls {
	t.Helper()
	var not []string
	for _, n := range notCounted {
		not = append(not, fmt.Sprintf("id != %d", n))
	}
	filter, err := unix.BytePtrFromString(strings.Join(not, " && "))
	if err != nil {
		t.Fatal(err)
	}
	c := &calls{t: t}
	t.Cleanup(func() {
		for _, fd := range c.fds {
			unix.Close(fd)
		}
	})
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		tid, _ := strconv.Atoi(task.Name())
		attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})), Config: event, Bits: unix.PerfBitInherit}
		fd, err := unix.PerfEventOpen(&attr, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err == unix.ESRCH {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatalf("perf_event_open: %v", err)
		}
		c.fds = append(c.fds, fd)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(filter))); errno != 0 {
			t.Fatalf("PERF_EVENT_IOC_SET_FILTER: %v", errno)
		}
	}
	return c
}

func (c *calls) count() (n int) {
	c.t.Helper()
	for _, fd := range c.fds {
		var b [8]byte
		if _, err := unix.Read(fd, b[:]); err != nil {
			c.t.Fatal(err)
		}
		n += int(*(*uint64)(unsafe.Pointer(&b)))
	}
	return n
}

// An operation costs so many requests of the guest's kernel, and system calls of the guest's daemon and the host's worker, and no more.
func TestCounts(t *testing.T) {
	event := traced(t)
	r := newRig(t, 0)
	const n = 200
	name := func(dir string, i int) string { return filepath.Join(r.mnt, dir, fmt.Sprint("f", i)) }
	for _, dir := range []string{"known", "new", "full"} {
		if err := os.Mkdir(filepath.Join(r.export, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		for _, f := range []string{fmt.Sprint("known/f", i), fmt.Sprint("full/d", i, "/file")} {
			path := filepath.Join(r.export, f)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, make([]byte, 8192), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	host, guest := r.told(",root=trust", "", "--spin", "0") // how often they look before they sleep is a matter of time
	worker, daemon := countCalls(t, event, host.child()), countCalls(t, event, guest.cmd.Process.Pid)

	open := func(path string, flags int) int {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
		if err != nil {
			t.Fatalf("open %s: %v", path, err)
		}
		return fd
	}
	block, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(block)
	large, err := unix.Mmap(-1, 0, splice.MaxData, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(large)
	direct := -1
	for _, c := range []struct {
		name           string
		asked          string // requests of each; the daemon answers GETATTR and FLUSH by itself after what changes a directory, and GETXATTR of a new file
		daemon, worker int    // system calls of each
		do             func(i int) error
	}{
		{"lookup", "LOOKUP", 5, 3, func(i int) error { return unix.Lstat(name("known", i), new(unix.Stat_t)) }},
		{"getattr", "GETATTR", 5, 3, func(i int) error {
			return unix.Statx(unix.AT_FDCWD, name("known", i), unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, new(unix.Statx_t))
		}},
		{"open and close", "FLUSH OPEN RELEASE", 10, 8, func(i int) error { return unix.Close(open(name("known", i), unix.O_RDONLY)) }},
		{"read", "READ", 5, 3, func(i int) error {
			if i == 0 {
				direct = open(name("known", 0), unix.O_RDWR|unix.O_DIRECT)
			}
			_, err := unix.Pread(direct, block, 0)
			return err
		}},
		{"write", "WRITE", 5, 3, func(int) error {
			_, err := unix.Pwrite(direct, block, 0)
			return err
		}},
		{"large write", "WRITE", 8, 5, func(int) error {
			_, err := unix.Pwrite(direct, large, 0)
			return err
		}},
		{"large read", "READ", 8, 5, func(int) error {
			_, err := unix.Pread(direct, large, 0)
			return err
		}},
		{"readdir", "LOOKUP READDIR READDIRPLUS", 12, 14, func(i int) error {
			entries, err := os.ReadDir(filepath.Join(r.mnt, "full", fmt.Sprint("d", i)))
			if err == nil && len(entries) != 1 {
				err = fmt.Errorf("%d entries", len(entries))
			}
			return err
		}},
		{"absent", "LOOKUP", 5, 3, func(i int) error {
			if err := unix.Lstat(name("new", i), new(unix.Stat_t)); err != unix.ENOENT {
				return fmt.Errorf("%v", err)
			}
			return nil
		}},
		{"create and close", "CREATE FLUSH GETATTR LOOKUP RELEASE", 21, 10, func(i int) error { return unix.Close(open(name("new", i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)) }},
		{"create, write and close", "CREATE FLUSH GETATTR GETXATTR LOOKUP RELEASE WRITE", 28, 14, func(i int) error {
			fd := open(name("new", i+2*n), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY)
			if _, err := unix.Write(fd, block[:100]); err != nil {
				return err
			}
			return unix.Close(fd)
		}},
		{"chmod", "SETATTR", 5, 6, func(i int) error { return unix.Chmod(name("new", i), 0o600) }},
		{"rename", "GETATTR LOOKUP RENAME", 13, 9, func(i int) error { return unix.Rename(name("new", i), name("new", i+n)) }},
		{"link", "GETATTR LINK LOOKUP", 13, 8, func(i int) error { return unix.Link(name("new", i+n), name("new", i)) }},
		{"unlink", "GETATTR UNLINK", 8, 5, func(i int) error { return unix.Unlink(name("new", i)) }},
		{"mkdir", "GETATTR LOOKUP MKDIR", 13, 8, func(i int) error { return unix.Mkdir(name("new", i), 0o755) }},
		{"rmdir", "GETATTR RMDIR", 11, 8, func(i int) error { return unix.Rmdir(name("new", i)) }},
		{"symlink", "GETATTR LOOKUP SYMLINK", 13, 8, func(i int) error { return unix.Symlink("to", name("new", i)) }},
	} {
		d, w := daemon.count(), worker.count()
		asked := r.asked(func() {
			for i := range n {
				if err := c.do(i); err != nil {
					t.Fatalf("%s: %v", c.name, err)
				}
			}
		})
		d, w = daemon.count()-d, worker.count()-w
		var ops []string
		for _, op := range slices.Sorted(maps.Keys(asked)) {
			for range (asked[op] + n/2) / n {
				ops = append(ops, op)
			}
		}
		if got := strings.Join(ops, " "); got != c.asked {
			t.Errorf("%s asks for %s; want %s", c.name, got, c.asked)
		}
		t.Logf("%s: %v; %.2f system calls of the daemon, %.2f of the worker", c.name, asked, float64(d)/n, float64(w)/n)
		// Now and then some more: two messages were not there together, or the runtime woke its poller.
		most := func(each int) int { return each*n*11/10 + n*9/10 }
		if d > most(c.daemon) || w > most(c.worker) {
			t.Errorf("%s takes %.2f system calls of the daemon and %.2f of the worker; want %d and %d", c.name, float64(d)/n, float64(w)/n, c.daemon, c.worker)
		}
	}
	unix.Close(direct)
}

// The kernel reads ahead as far as two of the largest requests reach, as long as root mounts.
func TestReadAhead(t *testing.T) {
	r := newRig(t, 0)
	r.told("", "")
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, r.mnt, 0, 0, &st); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(b)); got != "2048" {
		t.Errorf("the kernel reads %s KiB ahead", got)
	}
}
