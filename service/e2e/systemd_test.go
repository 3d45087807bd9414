// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is what a service manager is to one program: a socket that it passes, and one on which it listens for states.
type manager struct {
	t      *testing.T
	states *net.UnixConn
}

// startService starts a program as systemd does, with a socket at address name.
func (r *rig) startService(name, socket string, args ...string) (*program, *manager) {
	r.t.Helper()
	notify := filepath.Join(r.dir, name+".notify")
	states, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { states.Close() })
	path := strings.TrimPrefix(r.address(socket), "unix:")
	ln, err := net.Listen("unix", path)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { ln.Close() })
	f, err := ln.(*net.UnixListener).File()
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	// Only a shell knows the pid before the program runs.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, filepath.Join(bin, name)}, args...)...)
	cmd.ExtraFiles = []*os.File{f}
	env := r.env
	r.env = append(env[:len(env):len(env)], "LISTEN_FDS=1", "LISTEN_FDNAMES="+name, "NOTIFY_SOCKET="+notify)
	defer func() { r.env = env }()
	return r.startCommand(name, cmd), &manager{r.t, states}
}

// await reads states until want comes.
func (m *manager) await(want string) {
	m.t.Helper()
	var seen []string
	buf := make([]byte, 4096)
	m.states.SetReadDeadline(time.Now().Add(patience))
	for {
		n, err := m.states.Read(buf)
		if err != nil {
			m.t.Fatalf("%q was not told: %v; told was %q", want, err, seen)
		}
		if string(buf[:n]) == want {
			return
		}
		seen = append(seen, string(buf[:n]))
	}
}

// Both programs serve the sockets that they are passed, and tell how they do.
func TestServices(t *testing.T) {
	r := newRig(t, 0)
	guest, guestState := r.startService("transfused", "g", "--server", r.address("h"), "--mount", "code="+r.mnt)
	// It does not wait for a host.
	guestState.await("READY=1")
	guestState.await(fmt.Sprintf("STATUS=0 mounts, waiting for the host at %s", r.address("h")))
	asked := filepath.Join(r.dir, "asked")
	host, hostState := r.startService("transfuse-host", "h", "--export", "code="+r.export, "--guest", r.address("g"), "--mount", "code="+asked)
	hostState.await("READY=1")
	hostState.await("STATUS=exports: 1, sessions of guests: 1")
	r.mounted(r.mnt)
	r.mounted(asked) // the host has dialled the guest's socket
	guestState.await("STATUS=2 mounts, host connected, protocol 2")
	if err := os.WriteFile(filepath.Join(r.mnt, "file"), []byte("x"), 0o644); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(asked, 0); err != nil {
		t.Error(err)
	}
	guestState.await("STATUS=1 mount, host connected, protocol 2")
	guest.stop(unix.SIGTERM)
	guestState.await("STOPPING=1")
	hostState.await("STATUS=exports: 1, sessions of guests: 0")
	host.stop(unix.SIGTERM)
	hostState.await("STOPPING=1")
}
