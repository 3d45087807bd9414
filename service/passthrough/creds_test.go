// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// dropFsetid takes CAP_FSETID from the effective set of every thread of the test, as the worker does: it is
// the baseline that this package expects.
func dropFsetid() error {
	if os.Getuid() != 0 {
		return nil
	}
	var c caps
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&h, &c[0]); err != nil {
		return err
	}
	if c[0].Effective&(1<<unix.CAP_FSETID) == 0 {
		return nil
	}
	c[0].Effective &^= 1 << unix.CAP_FSETID
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&c[0])), 0)
	if errno == 0 {
		return nil
	}
	// With cgo, so with -race, Go cannot do that. Without the capability in the bounding set it is gone after an exec,
	// from the permitted set too: what has to raise it says that it does not run.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_FSETID, 0, 0, 0); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("run the tests as root: sudo make test")
	}
}

// threadState is what of a thread's credentials this package changes.
func threadState(t *testing.T) string {
	t.Helper()
	var c caps
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &c[0]); err != nil {
		t.Error(err)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Error(err)
	}
	return fmt.Sprint(setfsid(unix.SYS_SETFSUID, noID), setfsid(unix.SYS_SETFSGID, noID), groups, c)
}

func TestCredsAs(t *testing.T) {
	needRoot(t)
	c, err := newCreds()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed") // for nobody but root
	shared := filepath.Join(dir, "shared")
	for _, d := range []string{closed, shared} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// In this order: chown keeps the bit on a directory, chmod would not for a group that is not ours.
	if err := errors.Join(unix.Chmod(shared, 0o2770), unix.Chown(shared, 0, 777)); err != nil {
		t.Fatal(err)
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadState(t)
	group := uint32(777)
	for _, tc := range []struct {
		name  string
		cred  Cred
		group *uint32
		path  string
		mode  uint32
		want  []uint32 // uid, gid, permissions
		errno fuse.Errno
	}{
		{"another user in a closed directory", Cred{1000, 1001}, nil, closed + "/a", 0o640, []uint32{1000, 1001, 0o640}, 0},
		{"another group only", Cred{0, 1001}, nil, closed + "/b", 0o600, []uint32{0, 1001, 0o600}, 0},
		{"set-gid without the group", Cred{1000, 1001}, nil, shared + "/a", 0o2755, []uint32{1000, 777, 0o755}, 0},
		{"set-gid with the group", Cred{1000, 1001}, &group, shared + "/b", 0o2755, []uint32{1000, 777, 0o2755}, 0},
		{"the invalid uid", Cred{noID, 1}, nil, closed + "/c", 0o600, nil, unix.EOVERFLOW},
		{"the invalid gid", Cred{1, noID}, nil, closed + "/d", 0o600, nil, unix.EOVERFLOW},
	} {
		t.Run(tc.name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			errno := c.as(tc.cred, tc.group, func() fuse.Errno {
				fd, err := unix.Open(tc.path, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, tc.mode)
				unix.Close(fd)
				return errnoOf(err)
			})
			if errno != tc.errno {
				t.Fatalf("%v, want %v", errno, tc.errno)
			}
			if errno == 0 {
				var st unix.Stat_t
				if err := unix.Stat(tc.path, &st); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(tc.want, []uint32{st.Uid, st.Gid, st.Mode & 0o7777}); d != "" {
					t.Error("-want +got\n", d)
				}
			}
			if d := cmp.Diff(before, threadState(t)); d != "" {
				t.Error("the thread changed: -before +after\n", d)
			}
		})
	}

	func() {
		defer func() { recover() }()
		c.as(Cred{1000, 1000}, nil, func() fuse.Errno { panic("in between") })
	}()
	if d := cmp.Diff(before, threadState(t)); d != "" {
		t.Error("after a panic: -before +after\n", d)
	}
}

func TestCredsConcurrent(t *testing.T) {
	needRoot(t)
	c, err := newCreds()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := uint32(i * 1000) // 0 among them
			for j := range 50 {
				path := filepath.Join(dir, fmt.Sprint(i, "-", j))
				errno := c.as(Cred{id, id + 1}, nil, func() fuse.Errno {
					runtime.Gosched()
					return errnoOf(unix.Mkdir(path, 0o700))
				})
				var st unix.Stat_t
				if err := unix.Stat(path, &st); errno != 0 || err != nil || st.Uid != id || st.Gid != id+1 {
					t.Errorf("%v, %v: made by %d for %d", errno, err, st.Uid, id)
				}
			}
		})
	}
	wg.Wait()
}

func TestWithFsetid(t *testing.T) {
	needRoot(t)
	c, err := newCreds()
	if err != nil {
		t.Fatal(err)
	}
	if c.fsetid == c.base {
		t.Log("NOT RUN: a binary with cgo (-race) has dropped CAP_FSETID for good")
		return
	}
	dir := t.TempDir()
	if err := unix.Chown(dir, 0, 777); err != nil {
		t.Fatal(err)
	}
	chmod := func() fuse.Errno { return errnoOf(unix.Chmod(dir, 0o2755)) }
	mode := func() uint32 {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			t.Fatal(err)
		}
		return st.Mode & 0o7777
	}
	if errno := chmod(); errno != 0 || mode() != 0o755 {
		t.Errorf("without: %v, %o", errno, mode())
	}
	if errno := c.withFsetid(chmod); errno != 0 || mode() != 0o2755 {
		t.Errorf("with: %v, %o", errno, mode())
	}
	if errno := chmod(); errno != 0 || mode() != 0o755 {
		t.Errorf("afterwards: %v, %o", errno, mode())
	}
}
