// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// patience is how long what a test waits for may take.
const patience = 20 * time.Second

// rig is a directory of the test's own, with an export, a mount point and sockets in it.
type rig struct {
	t      *testing.T
	dir    string
	export string
	mnt    string
	attr   *syscall.SysProcAttr // of the programs
	env    []string
	ignore *regexp.Regexp // of views that are to agree; nil: nothing
}

// newRig makes a rig whose programs run as uid. What they leave behind fails the test.
func newRig(t *testing.T, uid uint32) *rig {
	t.Helper()
	// t.TempDir is below a directory that only root may enter, and too long for a socket's path.
	dir, err := os.MkdirTemp("", "tf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	r := &rig{t: t, dir: dir, export: filepath.Join(dir, "export"), mnt: filepath.Join(dir, "mnt"),
		attr: &syscall.SysProcAttr{Setpgid: true}, env: append(os.Environ(), "XDG_RUNTIME_DIR="+dir)}
	if uid != 0 {
		r.attr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	if err := os.Mkdir(r.export, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, r.export} {
		if err := os.Chown(d, int(uid), int(uid)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, pid := range processes("") {
			t.Errorf("leaked process %d: %s", pid, commandLine(pid))
			unix.Kill(pid, unix.SIGKILL) // of a program that this test's binary directory holds
		}
		for _, pattern := range []string{"*.sock", "*.sock_*"} {
			if left, _ := filepath.Glob(filepath.Join(dir, pattern)); len(left) > 0 {
				t.Errorf("leaked sockets: %s", left)
			}
		}
	})
	fstest.Leaks(t, dir)
	return r
}

// address is that of a socket in the rig.
func (r *rig) address(name string) string { return "unix:" + filepath.Join(r.dir, name+".sock") }

// processes are those of the programs: of one by name, or of all.
func processes(name string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		exe, err := os.Readlink(filepath.Join(d, "exe"))
		pid, perr := strconv.Atoi(filepath.Base(d))
		if err == nil && perr == nil && filepath.Dir(exe) == bin && (name == "" || filepath.Base(exe) == name) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func commandLine(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// program is a running transfuse-host or transfused.
type program struct {
	t     *testing.T
	name  string
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // of Wait; after ended

	mu   sync.Mutex // guards the rest
	log  strings.Builder
	more chan struct{} // closed by what comes next in log
}

// start starts a program of bin. The test ends it, if it still runs then.
func (r *rig) start(name string, args ...string) *program {
	r.t.Helper()
	return r.startCommand(name, exec.Command(filepath.Join(bin, name), args...))
}

func (r *rig) startCommand(name string, cmd *exec.Cmd) *program {
	r.t.Helper()
	p := &program{t: r.t, name: name, cmd: cmd, ended: make(chan struct{}), more: make(chan struct{})}
	p.cmd.Dir, p.cmd.Env, p.cmd.SysProcAttr = r.dir, r.env, r.attr
	p.cmd.Stderr, p.cmd.Stdout = p, p
	if err := p.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	r.t.Cleanup(func() {
		p.stop(unix.SIGTERM)
		if strings.Contains(p.text(), "DATA RACE") {
			r.t.Errorf("%s has data races", name)
		}
		if r.t.Failed() {
			r.t.Logf("%s:\n%s", p.cmd, p.text())
		}
	})
	return p
}

// host starts transfuse-host with the rig's export under the tag code.
func (r *rig) host(options string, more ...string) *program {
	r.t.Helper()
	p := r.start("transfuse-host", append([]string{"--listen", r.address("h"), "--export", "code=" + r.export + options}, more...)...)
	p.await("listening")
	return p
}

// guest starts transfused and waits for nothing.
func (r *rig) guest(args ...string) *program {
	r.t.Helper()
	return r.start("transfused", append([]string{"--server", r.address("h"), "--socket", r.address("g")}, args...)...)
}

// both starts host and guest, with flags that both have, and waits for the mount that the guest asks for.
func (r *rig) both(export, mount string, flags ...string) (host, guest *program) {
	r.t.Helper()
	host = r.host(export, flags...)
	guest = r.guest(append([]string{"--mount", "code=" + r.mnt + mount}, flags...)...)
	r.mounted(r.mnt)
	return host, guest
}

// Write takes what the program logs.
func (p *program) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log.Write(b)
	close(p.more)
	p.more = make(chan struct{})
	return len(b), nil
}

func (p *program) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// await waits until the program has logged text.
func (p *program) await(text string) { p.awaitTimes(text, 1) }

// awaitTimes waits until the program has logged text n times.
func (p *program) awaitTimes(text string, n int) {
	p.t.Helper()
	timeout := time.After(patience)
	ended := p.ended
	for {
		p.mu.Lock()
		log, more := p.log.String(), p.more
		p.mu.Unlock()
		if strings.Count(log, text) >= n {
			return
		}
		if ended == nil {
			p.t.Fatalf("%s ended (%v) and did not log %q", p.name, p.err, text)
		}
		select {
		case <-more:
		case <-ended:
			ended = nil // look once more
		case <-timeout:
			p.t.Fatalf("%s did not log %q %d times in %v", p.name, text, n, patience)
		}
	}
}

// stop ends the program in order, which must be its exit code 0.
func (p *program) stop(sig syscall.Signal) {
	p.t.Helper()
	select {
	case <-p.ended:
		return
	default:
	}
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Error(err)
	}
	if p.awaitEnd(); p.err != nil {
		p.t.Errorf("%s: %v", p.name, p.err)
	}
}

// kill ends the program and nothing that it started.
func (p *program) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Error(err)
	}
	p.awaitEnd()
}

func (p *program) awaitEnd() {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.t.Errorf("%s does not end: killed", p.name)
		p.cmd.Process.Kill()
		<-p.ended
	}
}

// children are the processes that the program made of itself.
func (p *program) children() []int {
	var pids []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.cmd.Process.Pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(s); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	slices.Sort(pids)
	return pids
}

// child is the only process that the program made of itself.
func (p *program) child() int {
	p.t.Helper()
	pids := p.children()
	if len(pids) != 1 {
		p.t.Fatalf("%s has the children %v, want one", p.name, pids)
	}
	return pids[0]
}

// descriptors counts those of a process that are of files. Its sockets come one by one, with the channels of a mount.
func descriptors(pid int) (n int) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir)
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && strings.HasPrefix(to, "/") {
			n++
		}
	}
	return n
}

// mounted waits until dir is a mount of ours, and unmounted until it is none.
func (r *rig) mounted(dir string)   { r.t.Helper(); r.awaitMount(dir, true) }
func (r *rig) unmounted(dir string) { r.t.Helper(); r.awaitMount(dir, false) }

func (r *rig) awaitMount(dir string, want bool) {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		if err != nil {
			r.t.Fatal(err)
		}
		if (len(mounts) > 0) == want {
			if want && mounts[0].FSType != "fuse.transfuse" {
				r.t.Errorf("%s is mounted as %q", dir, mounts[0].FSType)
			}
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("mounted at %s: %v after %v", dir, !want, patience)
		}
		// Linux 6.18 wakes who polls mountinfo for some changes only.
		time.Sleep(5 * time.Millisecond)
	}
}

// run runs a command of the system and returns its output.
func (r *rig) run(name string, args ...string) string {
	r.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
