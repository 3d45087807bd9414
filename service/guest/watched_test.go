// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// watcherEnv makes this test binary watch the directory in it, by a thread that is not its first, which ends.
const watcherEnv = "TRANSFUSED_TEST_WATCHER"

func init() {
	dir := os.Getenv(watcherEnv)
	if dir == "" {
		return
	}
	runtime.LockOSThread() // the first
	ready := make(chan error)
	go func() {
		_, err := watchDir(dir)
		ready <- err
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil { // until it is closed
			os.Exit(0)
		}
	}()
	if err := <-ready; err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("watching")
	unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

func watchDir(dir string) (fd int, err error) {
	if fd, err = unix.InotifyInit1(unix.IN_CLOEXEC); err == nil {
		_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE)
	}
	return fd, err
}

// devOf is a directory's device as fdinfo has it.
func devOf(t *testing.T, dir string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return strconv.FormatUint(uint64(unix.Major(st.Dev))<<20|uint64(unix.Minor(st.Dev)), 16)
}

// Who watches a file system is found, whichever way it watches, and nobody else.
func TestWatchers(t *testing.T) {
	needRoot(t)
	if os.Getpid() != 1 { // among processes of its own: others may be nobody's to look at
		out, err := exec.Command("unshare", "-p", "-f", "--kill-child", "-m", "--mount-proc", os.Args[0], "-test.run=^TestWatchers$").CombinedOutput()
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("watched", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	w := watchers{dev: devOf(t, dir)}
	look := func(what string, want bool) {
		t.Helper()
		if yes, err := w.inProcesses("/proc"); yes != want || err != nil {
			t.Errorf("%s: %v, %v", what, yes, err)
		}
	}
	elsewhere, err := watchDir("/proc/self") // another file system
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(elsewhere)
	look("nobody watches", false)
	fd, err := watchDir(sub)
	if err != nil {
		t.Fatal(err)
	}
	look("inotify", true)
	unix.Close(fd)
	look("it is closed", false)

	for what, flags := range map[string]uint{"an inode": 0, "its file system": unix.FAN_MARK_FILESYSTEM, "its mount": unix.FAN_MARK_MOUNT} {
		fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC, unix.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|flags, unix.FAN_MODIFY, unix.AT_FDCWD, sub); err != nil {
			t.Fatal(err)
		}
		look("fanotify of "+what, true)
		unix.Close(fd)
		look("fanotify is closed", false)
	}

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), watcherEnv+"="+sub)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said [9]byte
	if n, err := out.Read(said[:]); string(said[:n]) != "watching\n" {
		t.Fatalf("it says %q: %v", said[:n], err)
	}
	for { // its first thread is about to end
		if names, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", cmd.Process.Pid)); len(names) == 0 {
			break
		}
		runtime.Gosched()
	}
	look("a process whose first thread has ended", true)
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	look("all have ended", false)
}
