// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"maps"
	"os"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// notPosix are tests of the suite that no file system of the host passes either, and why.
var notPosix = map[string]string{
	"FcntlFlockLocksFile": "it wants two POSIX locks of one process to conflict",
}

// go-fuse's suite, each of its tests on a mount of its own.
func TestPosix(t *testing.T) {
	backings(t, func(t *testing.T, dir string) {
		for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
			t.Run(name, func(t *testing.T) {
				if why := notPosix[name]; why != "" {
					t.Skip("NOT RUN: " + why)
				}
				fstest.Leaks(t)
				export, err := os.MkdirTemp(dir, "export")
				if err != nil {
					t.Fatal(err)
				}
				posixtest.All[name](t, mount(t, export, Config{RootAs: RootTrust}))
			})
		}
	})
}

// Our own suite.
func TestSuite(t *testing.T) {
	missing := map[string]string{
		"xattr/trusted": "the guest's trusted.* are user.* on the host, which symbolic links can't have (see trustedRule)",
	}
	if !raiseFsetid(t) {
		for _, c := range []string{"perm/setgid-directory", "setid/chown-by-root", "setid/foreign-group"} {
			missing[c] = "needs CAP_FSETID, which a program with cgo (-race) cannot take and give back"
		}
	}
	backings(t, func(t *testing.T, dir string) {
		fstest.Leaks(t)
		missing := maps.Clone(missing)
		if unix.Fallocate(tempFD(t, dir), unix.FALLOC_FL_ZERO_RANGE, 0, 1) == unix.EOPNOTSUPP {
			missing["fallocate/zero"] = "the host's file system has none"
		}
		mnt := mount(t, dir, Config{RootAs: RootTrust, Suid: true, Dev: true, ACL: true})
		fstest.All(t, mnt, fstest.Options{Entries: 2_000, Ops: 1_000, Missing: missing})
	})
}

// raiseFsetid gives CAP_FSETID to the test's process, which is the guest, for the time of the test.
func raiseFsetid(t *testing.T) bool {
	var c caps
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&h, &c[0]); err != nil {
		t.Fatal(err)
	}
	set := func(c caps) bool {
		_, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&h)), uintptr(unsafe.Pointer(&c[0])), 0)
		return e == 0
	}
	with := c
	with[0].Effective |= c[0].Permitted & (1 << unix.CAP_FSETID)
	if with == c || !set(with) {
		return false
	}
	t.Cleanup(func() {
		if !set(c) {
			t.Error("CAP_FSETID stays")
		}
	})
	return true
}

// tempFD is a file without a name in dir.
func tempFD(t *testing.T, dir string) int {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
