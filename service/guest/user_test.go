// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// daemonEnv makes this test binary a daemon with the Config in it (TestMain).
const daemonEnv = "TRANSFUSED_TEST_DAEMON"

func testDaemon(config string) error {
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	return Run(ctx, c)
}

// openDeviceForAll gives /dev/fuse the mode that udev gives it; in a container it may have another.
func openDeviceForAll(t *testing.T) {
	st, err := os.Stat("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm()&0o006 == 0o006 {
		return
	}
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod("/dev/fuse", st.Mode().Perm()) })
}

// An ordinary user's daemon mounts by fusermount3, unmounts at its end, and may not do more than its user.
func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("fusermount3"); err != nil {
		t.Fatal("fusermount3 is missing: apt-get install fuse3")
	}
	openDeviceForAll(t)
	const uid = 65534
	as := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	// t.TempDir is below a directory that only root may enter.
	dir, err := os.MkdirTemp("", "tf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	fstest.Leaks(t, dir)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "daemon")
	if err := os.WriteFile(bin, self, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	h := &v1host{t: t, dir: dir, log: &syncBuffer{}}
	h.ln = listenUnix(t, filepath.Join(dir, "h"))
	defer h.ln.Close()
	if err := os.Chmod(filepath.Join(dir, "h"), 0o666); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(Config{Server: address(t, "unix:"+dir+"/h"), Socket: address(t, "unix:"+dir+"/g")})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	cmd.SysProcAttr = as
	cmd.Env = append(os.Environ(), daemonEnv+"="+string(config))
	cmd.Stderr = h.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := func() {
		cmd.Process.Signal(unix.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("daemon: %v", err)
		}
	}
	defer func() {
		stop()
		if t.Failed() {
			t.Logf("log:\n%s", h.log)
		}
	}()
	h.accept().Close()
	h.control = h.accept()
	defer h.control.Close()
	h.read(h.control, 6)
	h.write(h.control, "\x06\x00\x00\x00\x00\x00")
	h.accept().Close() // the Init that makes sure

	mnt := filepath.Join(dir, "mnt")
	h.mount(mnt, "fsname=x,default_permissions", &tinyFS{size: 5})
	stat := exec.Command("stat", "-c", "%s", filepath.Join(mnt, "hello"))
	stat.SysProcAttr = as
	if out, err := stat.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "5" {
		t.Errorf("stat as the user: %s, %v", out, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || !strings.Contains(string(mounts), fmt.Sprintf(" %s rw,nosuid,nodev", mnt)) {
		t.Errorf("not in the mount table: %v", err)
	}
	// What the user can't write to it can't mount over.
	h.dial("m/usr/share/transfused-test")
	h.logged(1, "permission denied")
}
