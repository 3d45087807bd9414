// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Ctrl-C of either end leaves no mount and no process, whoever asked for the mount.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM} {
		t.Run("guest "+sig.String(), func(t *testing.T) {
			r := newRig(t, 0)
			host, guest := r.both("", "")
			// A terminal signals the whole group.
			if err := unix.Kill(-guest.cmd.Process.Pid, sig); err != nil {
				t.Error(err)
			}
			if guest.awaitEnd(); guest.err != nil {
				t.Error(guest.err)
			}
			r.unmounted(r.mnt)
			host.await("session ended")
			if pids := host.children(); len(pids) != 0 {
				t.Errorf("the worker goes on: %v", pids)
			}
		})
		t.Run("host "+sig.String(), func(t *testing.T) {
			r := newRig(t, 0)
			host, guest := r.both("", "")
			if err := unix.Kill(-host.cmd.Process.Pid, sig); err != nil {
				t.Error(err)
			}
			if host.awaitEnd(); host.err != nil {
				t.Error(host.err)
			}
			r.unmounted(r.mnt)
			guest.stop(sig)
		})
	}
}

// A mount that is in use does not keep the guest from its end, and its user gets an error.
func TestSignalInUse(t *testing.T) {
	r := newRig(t, 0)
	_, guest := r.both("", "")
	f, err := os.Create(filepath.Join(r.mnt, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	guest.stop(unix.SIGTERM)
	r.unmounted(r.mnt)
	if _, err := f.WriteString("x"); err == nil {
		t.Error("the file is still served")
	}
}

func TestUnmount(t *testing.T) {
	t.Run("in the guest", func(t *testing.T) {
		r := newRig(t, 0)
		host, guest := r.both("", "")
		host.await("msg=mounted")
		if err := unix.Unmount(r.mnt, 0); err != nil {
			t.Fatal(err)
		}
		guest.await("msg=unmounted")
		host.await("mount ended")
	})
	t.Run("the host asked, in the guest", func(t *testing.T) {
		r := newRig(t, 0)
		host := r.host("", "--guest", r.address("g"), "--mount", "code="+r.mnt)
		host.await("waiting for the guest at " + r.address("g"))
		guest := r.guest()
		r.mounted(r.mnt)
		host.await("msg=mounted")
		if err := unix.Unmount(r.mnt, 0); err != nil {
			t.Fatal(err)
		}
		host.await("unmounted by the guest")
		guest.stop(unix.SIGTERM)
	})
	t.Run("by the host", func(t *testing.T) {
		r := newRig(t, 0)
		host := r.host("", "--debug", "--guest", r.address("g"), "--mount", "code="+r.mnt)
		guest := r.guest()
		r.mounted(r.mnt)
		host.await("what was asked for is mounted") // what is under way it would just end
		host.stop(unix.SIGINT)
		r.unmounted(r.mnt)
		if s := guest.text(); strings.Contains(s, "the mount ended:") {
			t.Error("the host's end took the stream before it unmounted")
		}
	})
}

// What the host asks for is mounted in each version, and again when it is back.
func TestHostAsks(t *testing.T) {
	for _, version := range []string{"1", "2"} {
		t.Run("version "+version, func(t *testing.T) {
			r := newRig(t, 0)
			guest := r.guest()
			if version == "1" {
				r.forceVersion1(guest)
			}
			for range 2 {
				host := r.host("", "--guest", r.address("g"), "--mount", "code="+r.mnt)
				r.mounted(r.mnt)
				guest.await("version=" + version)
				r.sameFile("hello")
				host.stop(unix.SIGTERM)
				r.unmounted(r.mnt)
			}
		})
	}
}

// sameFile writes through the mount and reads on the host.
func (r *rig) sameFile(name string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.mnt, name), []byte(name), 0o644); err != nil {
		r.t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(r.export, name)); string(b) != name {
		r.t.Errorf("the host reads %q, %v", b, err)
	}
}

// A guest waits for its host and says so once; a host that is killed takes the mount, and brings it back.
func TestHostComes(t *testing.T) {
	r := newRig(t, 0)
	guest := r.guest("--mount", "code="+r.mnt)
	guest.await("waiting for the host at " + r.address("h"))
	host := r.host("")
	r.mounted(r.mnt)
	for range 2 {
		host.kill()
		r.unmounted(r.mnt)
		host = r.host("")
		r.mounted(r.mnt)
		r.sameFile("again")
	}
	guest.awaitTimes("msg=mounted", 3)
}

// A worker that is killed ends its own guest's session and no other.
func TestWorkerKilled(t *testing.T) {
	r := newRig(t, 0)
	host, one := r.both("", "")
	first := host.child()
	other := filepath.Join(r.dir, "other")
	two := r.start("transfused", "--server", r.address("h"), "--socket", "none", "--mount", "code="+other)
	r.mounted(other)
	f, err := os.Create(filepath.Join(other, "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	host.await("worker died")
	if _, err := f.WriteString("goes on"); err != nil {
		t.Error(err)
	}
	one.awaitTimes("msg=mounted", 2) // it mounts again, with a new worker
	r.sameFile("after")
	if strings.Contains(two.text(), "the mount ended") {
		t.Error("the other guest noticed")
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if pids := host.children(); len(pids) != 2 || slices.Contains(pids, first) {
		t.Errorf("workers %v", pids)
	}
}

// Two mounts of one guest: what ends one does not touch the other.
func TestTwoMounts(t *testing.T) {
	r := newRig(t, 0)
	host := r.host("", "--export", "share=/usr/share,ro")
	other := filepath.Join(r.dir, "share")
	guest := r.guest("--mount", "code="+r.mnt, "--mount", "share="+other+",ro")
	r.mounted(r.mnt)
	r.mounted(other)
	if err := unix.Unmount(other, unix.MNT_FORCE); err != nil {
		t.Error(err)
	}
	guest.await("msg=unmounted dir=" + other)
	r.sameFile("file")
	host.awaitTimes("mount ended", 1)
}

// The daemon ends with its helper, and then the mount has nobody: it is taken away.
func TestHelperKilled(t *testing.T) {
	r := newRig(t, 0)
	host, guest := r.both("", "")
	host.await("msg=mounted")
	if err := unix.Kill(guest.child(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if guest.awaitEnd(); guest.err == nil || guest.cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("the daemon: %v, want exit code 1", guest.err)
	}
	r.unmounted(r.mnt)
}

// A daemon that is killed leaves its mounts to its helper.
func TestDaemonKilled(t *testing.T) {
	r := newRig(t, 0)
	host, guest := r.both("", "")
	host.await("msg=mounted")
	guest.kill()
	r.unmounted(r.mnt)
	host.await("session ended")
	// Its socket it can't take along; the next daemon replaces it.
	again := r.guest("--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	again.stop(unix.SIGTERM)
}

// What is ordinary is logged once and not as an error, and nothing of it twice at the host.
func TestLog(t *testing.T) {
	r := newRig(t, 0)
	guest := r.guest("--mount", "code="+r.mnt, "--mount", "nothing="+r.mnt+"2")
	guest.await("waiting for the host")
	first := r.host("")
	guest.await("no export nothing for this guest (no such file or directory): there are code")
	r.mounted(r.mnt)
	first.await("msg=mounted")
	first.stop(unix.SIGINT)
	r.unmounted(r.mnt)
	guest.awaitTimes("waiting for the host", 2)
	second := r.host("")
	r.mounted(r.mnt)
	second.await("msg=mounted")
	guest.stop(unix.SIGTERM)
	second.await("session ended")
	second.stop(unix.SIGTERM)
	for _, p := range []*program{guest, first, second} {
		for _, noise := range []string{"level=ERROR", "context canceled", "file descriptor", "pollable", `\"`, `=""`, "from the guest"} {
			if strings.Contains(p.text(), noise) {
				t.Errorf("%s logs %q", p.name, noise)
			}
		}
	}
	for text, n := range map[string]int{"waiting for the host": 2, "msg=mounted": 2, "the mount ended": 1, "msg=unmounted": 1, "no export nothing": 1, "channel": 1} {
		if got := strings.Count(guest.text(), text); got != n {
			t.Errorf("the guest logs %q %d times, want %d", text, got, n)
		}
	}
	for text, n := range map[string]int{"listening": 1, "guest connected": 1, "msg=mounted": 1, "mount refused": 1, "session ended": 1} {
		if got := strings.Count(first.text(), text); got != n {
			t.Errorf("the host logs %q %d times, want %d", text, got, n)
		}
	}
}
