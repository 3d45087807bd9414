// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// ctl runs transfusectl, or mount.transfuse, which is the same program, against the rig's daemon, and returns its output and exit code.
func (r *rig) ctl(name string, args ...string) (out string, code int) {
	r.t.Helper()
	cmd := exec.Command(filepath.Join(bin, name), args...)
	if name == "transfusectl" {
		cmd.Args = append(cmd.Args, "--timeout", patience.String(), "--socket", r.socket("c"))
	} else {
		cmd.Path, cmd.Args[0] = filepath.Join(bin, "transfusectl"), name
		cmd.Args = append(cmd.Args, "-o", "transfuse.timeout=20,transfuse.socket="+r.socket("c"))
	}
	b, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok && err != nil {
		r.t.Fatal(err)
	} else if ok {
		code = exit.ExitCode()
	}
	return string(b), code
}

// must is ctl of what has to succeed.
func (r *rig) must(name string, args ...string) string {
	r.t.Helper()
	out, code := r.ctl(name, args...)
	if code != 0 {
		r.t.Fatalf("%s %q: exit code %d: %s", name, args, code, out)
	}
	return out
}

// socket is the path of a socket in the rig.
func (r *rig) socket(name string) string { return strings.TrimPrefix(r.address(name), "unix:") }

// ctlMounts are the mounts that the daemon tells of, by directory.
func (r *rig) ctlMounts() map[string]api.Mount {
	r.t.Helper()
	var ms []api.Mount
	if err := json.Unmarshal([]byte(r.must("transfusectl", "mounts", "--json=short")), &ms); err != nil {
		r.t.Fatal(err)
	}
	byDir := map[string]api.Mount{}
	for _, m := range ms {
		byDir[m.Directory] = m
	}
	return byDir
}

// An administrator mounts, looks, and unmounts by the control socket.
func TestControl(t *testing.T) {
	r := newRig(t, 0)
	if err := os.WriteFile(filepath.Join(r.export, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	host := r.host("")
	r.guest("--control", r.address("c"), "--mount", "code="+r.mnt)
	r.must("transfusectl", "wait", "--wait")
	r.mounted(r.mnt)
	if out := r.must("transfusectl", "exports", "--no-legend"); !strings.HasPrefix(out, "code ") {
		t.Errorf("exports: %s", out)
	}

	if out := r.must("transfusectl", "status"); !strings.HasPrefix(out, "● transfused unknown\n") {
		t.Errorf("status: %s", out)
	}

	second := filepath.Join(r.dir, "second")
	if out, code := r.ctl("mount.transfuse", "code", second); code != 32 || !strings.Contains(out, "make it first") {
		t.Errorf("a mount point that is not there: exit code %d: %s", code, out)
	}
	if err := os.Mkdir(second, 0o755); err != nil {
		t.Fatal(err)
	}
	r.must("mount.transfuse", "code", second, "-o", "noexec,nofail")
	r.mounted(second)
	if b, err := os.ReadFile(filepath.Join(second, "file")); string(b) != "content" {
		t.Errorf("the mount's file holds %q, %v", b, err)
	}
	m := r.ctlMounts()[second]
	if m.State != api.Active || m.Configured || m.Tag != "code" {
		t.Errorf("the daemon tells %+v", m)
	}
	if out, code := r.ctl("transfusectl", "mount", "absent", filepath.Join(r.dir, "third")); code != 1 || !strings.Contains(out, "absent") {
		t.Errorf("an export that is not there: exit code %d: %s", code, out)
	}

	r.must("mount.transfuse", "code", second, "-o", "remount,ro")
	if err := os.WriteFile(filepath.Join(second, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing to what was made read-only: %v", err)
	}
	r.must("mount.transfuse", "code", second, "-o", "remount,rw")
	if err := os.WriteFile(filepath.Join(second, "new"), nil, 0o644); err != nil {
		t.Errorf("writing to what was made writable: %v", err)
	}

	trace := r.start("transfusectl", "--socket", r.socket("c"), "trace", "--mount", second, "--operation", "mkdir", "--lines", "1")
	trace.await("OPERATION")
	// Each is one more chance: the heading says that the trace is asked for, not that it has begun. And top, below, tells
	// the ten operations that were asked for most.
	for i := 0; ; i++ {
		if err := os.Mkdir(filepath.Join(second, "dir"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(second, "dir")); err != nil {
			t.Fatal(err)
		}
		select {
		case <-trace.ended:
		default:
			if i < 10000 {
				continue
			}
		}
		if i < 10 {
			continue
		}
		break
	}
	if out := trace.text(); strings.Count(out, "\n") != 2 || !strings.Contains(out, " MKDIR ") {
		t.Errorf("the trace is %s", out)
	}
	if out := r.must("transfusectl", "top", "--iterations", "1", "--interval", "10ms"); !strings.Contains(out, "\nMKDIR ") {
		t.Errorf("top is %s", out)
	}

	f, err := os.Open(filepath.Join(second, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if out, code := r.ctl("transfusectl", "unmount", second); code != 1 || !strings.Contains(out, "busy") {
		t.Errorf("unmounting what is in use: exit code %d: %s", code, out)
	}
	f.Close()
	r.must("transfusectl", "unmount", m.ID)
	r.unmounted(second)

	// The host goes: the mount is to be made again, and that is said.
	host.stop(unix.SIGTERM)
	r.awaitState(r.mnt, api.Mounting)
	if out, code := r.ctl("transfusectl", "status"); code != 1 || !strings.Contains(out, "not connected") {
		t.Errorf("status without a host: exit code %d: %s", code, out)
	}
}

// awaitState waits until the daemon tells that a mount is in a state; the zero value for that there is none.
func (r *rig) awaitState(dir string, want api.State) {
	r.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if r.ctlMounts()[dir].State == want {
			return
		}
	}
	r.t.Fatalf("%s does not become %q: %+v", dir, want, r.ctlMounts()[dir])
}

// In a mount namespace of its own the caller has a mount that nobody else sees, and that ends with the namespace.
func TestControlNamespace(t *testing.T) {
	r := newRig(t, 0)
	if err := os.WriteFile(filepath.Join(r.export, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.host("")
	r.guest("--control", r.address("c"))
	r.must("transfusectl", "wait", "--wait")
	if err := os.Mkdir(r.mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	helper := filepath.Join(r.dir, "mount.transfuse")
	if err := os.Symlink(filepath.Join(bin, "transfusectl"), helper); err != nil {
		t.Fatal(err)
	}
	inside := exec.Command("unshare", "-m", "sh", "-c", `"$0" code "$1" -o "transfuse.socket=$2,noatime" && findmnt -n -o SOURCE,FSTYPE "$1" && cat "$1/file" && read line`,
		helper, r.mnt, r.socket("c"))
	in, err := inside.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := r.startCommand("unshare", inside)
	p.await("content")
	if out := strings.Fields(p.text()); len(out) < 2 || out[0] != "code" || out[1] != "fuse.transfuse" {
		t.Errorf("inside there is %s", out)
	}
	if entries, err := os.ReadDir(r.mnt); err != nil || len(entries) != 0 {
		t.Errorf("outside there is %v, %v", entries, err)
	}
	if m := r.ctlMounts()[r.mnt]; m.State != api.Active {
		t.Errorf("the daemon tells %+v", m)
	}
	in.Write([]byte("\n"))
	if p.awaitEnd(); p.err != nil {
		t.Errorf("inside: %v", p.err)
	}
	r.awaitState(r.mnt, "")
}

// Others than root look, and change nothing.
func TestControlOfOthers(t *testing.T) {
	r := newRig(t, 0)
	r.host("")
	guest := r.guest("--control", r.address("c"), "--mount", "code="+r.mnt)
	r.must("transfusectl", "wait", "--wait")
	r.mounted(r.mnt)
	// systemd makes it so (SocketMode=0666).
	for path, mode := range map[string]os.FileMode{r.dir: 0o755, r.socket("c"): 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"mounts"}, r.mnt, 0},
		{[]string{"unmount", r.mnt}, "transfusectl: uid 65534 may not call Unmount: root may\n", 1},
		{[]string{"trace"}, "uid 65534 may not call Trace", 1},
	} {
		cmd := exec.Command(filepath.Join(bin, "transfusectl"), append(tt.args, "--socket", r.socket("c"))...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != tt.code || !strings.Contains(string(out), tt.want) {
			t.Errorf("%q: %v: %s", tt.args, err, out)
		}
	}
	guest.await("refused at the control socket")
}
