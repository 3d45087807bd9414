// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// newFS makes a file system of dir, which ends with the test.
func newFS(t testing.TB, dir string, c Config) *FS {
	t.Helper()
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	c.Root, c.Name = root, "test"
	fs, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	return fs
}

// pair is a connected pair of sockets in the poller.
func pair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	}
	return os.NewFile(uintptr(fds[0]), "guest"), os.NewFile(uintptr(fds[1]), "host")
}

// serve serves fs on a new stream until the test ends, which fails if the stream did not end well.
func serve(t testing.TB, fs *FS) *os.File {
	t.Helper()
	guest, host := pair(t)
	done := make(chan error, 1)
	go func() { done <- fs.Serve(host) }()
	t.Cleanup(func() {
		guest.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return guest
}

func readReply(c io.Reader, b []byte) (h fuse.OutHeader, n int, err error) {
	if _, err := io.ReadFull(c, b[:fuse.OutHeaderSize]); err != nil {
		return h, 0, err
	}
	fuse.Decode(&h, b)
	n = int(h.Len)
	if n < fuse.OutHeaderSize || n > len(b) {
		return h, 0, fmt.Errorf("a reply of %d bytes", h.Len)
	}
	_, err = io.ReadFull(c, b[fuse.OutHeaderSize:n])
	return h, n, err
}

// childEnv marks the process that serves a mount, and has its Config. It is another one than that of the tests, because Go puts what it
// opens into epoll, and waits in that for FUSE's POLL without letting other goroutines run.
const childEnv = "PASSTHROUGH_TEST_MOUNT"

// mount mounts dir as c says, until the test ends; a process of its own serves it, and relays as the guest's pump does.
func mount(t testing.TB, dir string, c Config) string {
	t.Helper()
	return mountAs(t, dir, c, nil)
}

// mountAs is mount with the server being another user.
func mountAs(t testing.TB, dir string, c Config, cred *syscall.Credential) string {
	t.Helper()
	mnt := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("/dev/fuse: %v (as root: modprobe fuse)", err)
	}
	flags := uintptr(0)
	if !c.Suid {
		flags |= unix.MS_NOSUID
	}
	if !c.Dev {
		flags |= unix.MS_NODEV
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,default_permissions,allow_other,max_read=%d", fd, os.Getuid(), os.Getgid(), maxTransfer)
	if err := unix.Mount("transfused-test", mnt, "fuse.transfused-test", flags, opts); err != nil {
		unix.Close(fd)
		t.Fatalf("mount: %v (these tests need root)", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	defer dev.Close()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(config))
	cmd.ExtraFiles = []*os.File{dev, root}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(mnt, unix.MNT_DETACH)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the process that serves the mount: %v", err)
		}
	})
	return mnt
}

// serveMount is that process, from file 3, the device, and file 4, the export. It ends with the mount.
func serveMount(config string) error {
	unix.Umask(0)
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	c.Root, c.Name = os.NewFile(4, "export"), "test"
	before := descriptors()
	fs, err := New(c)
	if err != nil {
		return err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	}
	conn := os.NewFile(uintptr(fds[0]), "guest")
	dev := os.NewFile(3, "/dev/fuse")
	var failed atomic.Pointer[error]
	fail := func(err error) { failed.CompareAndSwap(nil, &err) }
	var wg sync.WaitGroup
	wg.Go(func() {
		defer unix.Shutdown(fds[0], unix.SHUT_WR)
		b := make([]byte, maxRequest)
		for {
			n, err := dev.Read(b)
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return // ENODEV: unmounted
			}
			if _, err := conn.Write(b[:n]); err != nil {
				return // after DESTROY
			}
		}
	})
	wg.Go(func() {
		b := make([]byte, maxRequest)
		for {
			h, n, err := readReply(conn, b)
			if err != nil {
				return
			}
			if _, err := dev.Write(b[:n]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
				fail(fmt.Errorf("the kernel refuses a reply of %d bytes, error %d: %w", n, h.Error, err))
			}
		}
	})
	if err := fs.Serve(os.NewFile(uintptr(fds[1]), "host")); err != nil {
		fail(err)
	}
	wg.Wait()
	conn.Close()
	if err := fs.Close(); err != nil {
		fail(err)
	}
	// The export's own has gone since.
	if after := descriptors(); after >= before {
		fail(fmt.Errorf("%d descriptors at first, %d at the end", before, after))
	}
	if l := fs.limits; l.nodes.Load() != 0 || l.files.Load() != 0 || l.descriptors.Load() != 0 || l.bytes.used != 0 {
		fail(fmt.Errorf("still counted: %d nodes, %d files, %d descriptors, %d bytes", l.nodes.Load(), l.files.Load(), l.descriptors.Load(), l.bytes.used))
	}
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// descriptors counts this process's; the poller's are there in any case.
func descriptors() int {
	e, _ := os.ReadDir("/proc/self/fd")
	return len(e)
}

// backings are the file systems that the tests run on.
func backings(t *testing.T, f func(t *testing.T, dir string)) {
	t.Run("tmpfs", func(t *testing.T) { f(t, tmpfs(t)) })
	t.Run("disk", func(t *testing.T) { f(t, t.TempDir()) })
}

func tmpfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1g"); err != nil {
		t.Fatalf("mount tmpfs: %v (these tests need root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount tmpfs: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}
