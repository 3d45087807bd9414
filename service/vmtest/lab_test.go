// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// scriptTime bounds one script and one daemon's end. Emulated CPUs are slow, and slower beside other work.
const scriptTime = 8 * time.Minute

// lab is the VM with our programs in it.
type lab struct {
	vm    *VM
	tools string     // the tree of what the VM runs with
	bin   string     // folder of this machine with transfused, transfuse-host and fstest.test
	built chan error // one value when bin is filled
}

// newLab boots the VM while it builds the programs.
func newLab(t *testing.T, c Config) *lab {
	images, err := Build(t.Context(), os.Stderr, Trixie)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{tools: filepath.Join(images.Tools, "root"), bin: t.TempDir(), built: make(chan error, 1)}
	go func() { l.built <- l.build(t.Context()) }()
	begin := time.Now()
	l.vm, err = Boot(t.Context(), images, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close(t) })
	t.Logf("the VM was up in %.1f s", time.Since(begin).Seconds())
	return l
}

// install copies the programs into the guest, and the token to both sides.
func (l *lab) install(t *testing.T) {
	if err := <-l.built; err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"transfused", "transfuse-host", "fstest.test"} {
		if err := l.vm.Push(t.Context(), filepath.Join(l.bin, name), "/usr/local/bin/"+name); err != nil {
			t.Fatal(err)
		}
	}
	l.guest(t, "modprobe vsock_loopback; umask 077; printf %s "+Quote(token)+" >/root/token")
	if err := os.WriteFile(filepath.Join(l.vm.Dir(), "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) build(ctx context.Context) error {
	for _, args := range [][]string{
		{"build", "-o", l.bin, "transfused.org/transfused/cmd/transfused", "transfused.org/transfused/cmd/transfuse-host"},
		{"test", "-c", "-o", filepath.Join(l.bin, "fstest.test"), "transfused.org/transfused/service/fstest"},
	} {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

func (l *lab) close(t *testing.T) {
	if t.Failed() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		journal, err := l.vm.Run(ctx, "journalctl --no-pager -o short-monotonic -n 300 | grep -v 'systemd.*shell@'")
		t.Logf("%s--- the guest's journal (%v)\n%s", l.vm.Logs(), err, journal)
	}
	if err := l.vm.Close(); err != nil {
		t.Error(err)
	}
}

// prelude gives the scripts of the guest a way to wait. findmnt --poll tells each change of the
// mount table; the timeout is for a change between the look and the poll.
const prelude = `
await() { until "$@"; do findmnt --poll --first-only --timeout 300 >/dev/null || true; done; }
mounted() { findmnt --noheadings --mountpoint "$1" >/dev/null; }
unmounted() { ! mounted "$1"; }
`

// guest runs a script in the guest, which must succeed, and returns its output.
func (l *lab) guest(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), scriptTime)
	defer cancel()
	out, err := l.vm.Run(ctx, prelude+script)
	if err != nil {
		t.Fatalf("in the guest: %s: %v", script, err)
	}
	return strings.TrimSpace(out)
}

// posix runs these cases of fstest in a directory of the guest, with small numbers, since its CPUs are emulated.
func (l *lab) posix(t *testing.T, dir, cases string, missing map[string]string) {
	t.Helper()
	args := "-test.v -test.run " + Quote(cases) + " -entries 20 -ops 20 -dir " + dir
	for c, why := range missing {
		args += " -missing " + Quote(c+"="+why)
	}
	log := "/run/fstest" + strings.ReplaceAll(dir, "/", ".")
	out := l.guest(t, "code=0; fstest.test "+args+" >"+log+" 2>&1 || code=$?; echo exit $code; grep -e '^NOT RUN' "+log+" || true; echo the slowest:; "+
		"grep -e '--- PASS' "+log+" | sed 's/.*PASS: \\(.*\\) (\\(.*\\)s)/\\2 \\1/' | sort -rn | awk 'NR <= 8'")
	t.Log(out)
	if !strings.HasPrefix(out, "exit 0\n") {
		t.Error(l.guest(t, "grep -v -e '=== ' -e '--- PASS' "+log))
	}
}

// local runs a script on this machine.
func local(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), scriptTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("on this machine: %s: %v\n%s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// daemon is one of our programs, running on either side.
type daemon struct {
	stop  func(t *testing.T)              // by SIGTERM; waits, and fails if the status is not 0
	await func(t *testing.T, text string) // returns when it has logged text
	pid   func(t *testing.T) string
}

// startInGuest starts a program in the guest as a unit, and stops it when the test ends.
// user is "" for root.
func (l *lab) startInGuest(t *testing.T, user string, args ...string) daemon {
	t.Helper()
	unit := fmt.Sprintf("%s-%d", args[0], time.Now().UnixNano())
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = Quote(a)
	}
	uid := ""
	if user != "" {
		uid = "--uid=" + user
	}
	l.guest(t, fmt.Sprintf("systemd-run --quiet --service-type=exec --unit=%s %s %s", unit, uid, strings.Join(words, " ")))
	stopped := false
	stop := func(t *testing.T) {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		l.guest(t, fmt.Sprintf("systemctl stop %s; if systemctl is-failed --quiet %[1]s; then systemctl status --no-pager -l %[1]s || true; systemctl reset-failed %[1]s; exit 1; fi", unit))
	}
	t.Cleanup(func() { stop(t) })
	return daemon{
		stop: stop,
		await: func(t *testing.T, text string) {
			t.Helper()
			l.guest(t, fmt.Sprintf("timeout 60 grep -q -m 1 -F %s <(journalctl -f -n all -o cat -u %s)", Quote(text), unit))
		},
		pid: func(t *testing.T) string {
			t.Helper()
			return l.guest(t, "systemctl show -P MainPID "+unit)
		},
	}
}

// startHere starts a program on this machine, and stops it when the test ends.
func (l *lab) startHere(t *testing.T, args ...string) daemon {
	t.Helper()
	log, err := os.CreateTemp(l.vm.Dir(), args[0]+"-*.log") // where vm.Logs finds it
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(l.bin, args[0]), args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop := func(t *testing.T) {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		cmd.Process.Signal(syscall.SIGTERM) // if it has ended, its status says so
		select {
		case <-p.done:
		case <-time.After(scriptTime):
			p.stop()
			t.Errorf("%s did not end within %v of SIGTERM", args[0], scriptTime)
		}
		if p.err != nil {
			text, _ := os.ReadFile(log.Name()) // only for the report
			t.Errorf("%s: %v\n%s", args[0], p.err, text)
		}
	}
	t.Cleanup(func() { stop(t) })
	return daemon{
		stop: stop,
		await: func(t *testing.T, text string) {
			t.Helper()
			local(t, fmt.Sprintf("timeout 60 grep -q -m 1 -F %s <(tail -n +1 -f --pid=$$ %s)", Quote(text), log.Name()))
		},
		pid: func(t *testing.T) string { return fmt.Sprint(cmd.Process.Pid) },
	}
}

// localDir makes a folder of this machine to export: not t.TempDir, which is in one that only its owner enters.
func localDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "transfused-export-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// side is where transfuse-host runs.
type side struct {
	name   string
	server string // address that the guest dials
	listen string // the same as the host names it
	back   string // address at which the host reaches the guest's port 1525
	guests string // the guest, in an export's guests=
	token  string // file with the token
	start  func(t *testing.T, args ...string) daemon
	run    func(t *testing.T, script string) string
	dir    func(t *testing.T) string // a new folder to export
}

// sides are this machine, over virtio-vsock, and the guest itself, over vsock loopback.
func (l *lab) sides() []side {
	return []side{{
		name:   "virtio",
		server: "vsock:host:1524",
		listen: "hybrid:" + l.vm.Socket() + ":1524",
		back:   "hybrid:" + l.vm.Socket() + ":1525",
		guests: l.vm.Socket(),
		token:  filepath.Join(l.vm.Dir(), "token"),
		start:  l.startHere,
		run:    local,
		dir:    localDir,
	}, {
		name:   "loopback",
		server: "vsock:local:1524",
		listen: "vsock:any:1524",
		back:   "vsock:local:1525",
		guests: "1",
		token:  "/root/token",
		start:  func(t *testing.T, args ...string) daemon { t.Helper(); return l.startInGuest(t, "", args...) },
		run:    l.guest,
		dir: func(t *testing.T) string {
			dir := l.guest(t, "mktemp -d /srv/export-XXXXXX")
			t.Cleanup(func() { l.guest(t, "rm -rf "+dir) })
			return dir
		},
	}}
}
