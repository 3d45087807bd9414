// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// manager is what a service manager is to one unit: sockets that it passes, one on which it listens for states, and a store of descriptors.
type manager struct {
	t      *testing.T
	r      *rig
	name   string
	path   string // of states
	states *net.UnixConn
	socket *os.File // that the program listens on for its peers
	told   chan string
	ended  chan struct{} // closed when states is

	mu    sync.Mutex // guards store
	store map[string][]*os.File
}

// newManager makes a manager for a program that listens at address socket.
func (r *rig) newManager(name, socket string) *manager {
	r.t.Helper()
	m := &manager{t: r.t, r: r, name: name, path: filepath.Join(r.dir, name+".notify"), told: make(chan string, 10000), ended: make(chan struct{}), store: map[string][]*os.File{}}
	var err error
	if m.states, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"}); err != nil {
		r.t.Fatal(err)
	}
	ln, err := net.Listen("unix", strings.TrimPrefix(r.address(socket), "unix:"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { ln.Close() })
	if m.socket, err = ln.(*net.UnixListener).File(); err != nil {
		r.t.Fatal(err)
	}
	go m.listen()
	r.t.Cleanup(func() {
		m.states.Close()
		<-m.ended
		m.socket.Close()
		for name, files := range m.store {
			if m.name == "transfused" {
				r.t.Errorf("left in the store: %s", name)
			}
			for _, f := range files {
				f.Close()
			}
		}
	})
	return m
}

// listen takes what the program tells, as PID 1 does.
func (m *manager) listen() {
	defer close(m.ended)
	buf, oob := make([]byte, 4096), make([]byte, 4096)
	for {
		n, oobn, _, _, err := m.states.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		var files []*os.File
		if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for i := range msgs {
				fds, _ := unix.ParseUnixRights(&msgs[i])
				for _, fd := range fds {
					unix.CloseOnExec(fd)
					files = append(files, os.NewFile(uintptr(fd), "stored"))
				}
			}
		}
		state := string(buf[:n])
		fields := map[string]string{}
		for line := range strings.SplitSeq(state, "\n") {
			k, v, _ := strings.Cut(line, "=")
			fields[k] = v
		}
		m.mu.Lock()
		switch {
		case fields["FDSTORE"] == "1":
			if fields["FDPOLL"] != "0" {
				m.t.Error("a descriptor that wakes PID 1 for every request")
			}
			m.store[fields["FDNAME"]] = append(m.store[fields["FDNAME"]], files...)
			files = nil
		case fields["FDSTOREREMOVE"] == "1":
			files = m.store[fields["FDNAME"]]
			delete(m.store, fields["FDNAME"])
		}
		m.mu.Unlock()
		for _, f := range files { // of a barrier, too
			f.Close()
		}
		m.told <- state
	}
}

// start starts the program with the socket, and with what is stored.
func (m *manager) start(args ...string) *program {
	m.t.Helper()
	m.mu.Lock()
	files, names := []*os.File{m.socket}, []string{m.name}
	for name, stored := range m.store {
		for _, f := range stored {
			files, names = append(files, f), append(names, name)
		}
	}
	m.mu.Unlock()
	// Only a shell knows the pid before the program runs.
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, filepath.Join(bin, m.name)}, args...)...)
	cmd.ExtraFiles = files
	env := m.r.env
	m.r.env = append(env[:len(env):len(env)], fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+strings.Join(names, ":"), "NOTIFY_SOCKET="+m.path, "FDSTORE=100")
	defer func() { m.r.env = env }()
	return m.r.startCommand(m.name, cmd)
}

// stored returns the names in the store.
func (m *manager) stored() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.store))
}

// await waits until the program has told want.
func (m *manager) await(want string) {
	m.t.Helper()
	var seen []string
	timeout := time.After(patience)
	for {
		select {
		case state := <-m.told:
			if state == want {
				return
			}
			seen = append(seen, state)
		case <-timeout:
			m.t.Fatalf("%q was not told; told was %q", want, seen)
		}
	}
}

// Both programs serve the sockets that they are passed, and tell how they do.
func TestServices(t *testing.T) {
	r := newRig(t, 0)
	guestState := r.newManager("transfused", "g")
	guest := guestState.start("--server", r.address("h"), "--mount", "code="+r.mnt)
	// It does not wait for a host.
	guestState.await("READY=1")
	guestState.await(fmt.Sprintf("STATUS=0 mounts, waiting for the host at %s", r.address("h")))
	asked := filepath.Join(r.dir, "asked")
	hostState := r.newManager("transfuse-host", "h")
	host := hostState.start("--export", "code="+r.export, "--guest", r.address("g"), "--mount", "code="+asked)
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
	if diff := cmp.Diff([]string{"1.0"}, guestState.stored()); diff != "" {
		t.Errorf("in the store: %s", diff)
	}
	if err := unix.Unmount(r.mnt, 0); err != nil {
		t.Error(err)
	}
	guestState.await("STATUS=0 mounts, host connected, protocol 2")
	guest.stop(unix.SIGTERM)
	guestState.await("STOPPING=1")
	hostState.await("STATUS=exports: 1, sessions of guests: 0")
	host.stop(unix.SIGTERM)
	hostState.await("STOPPING=1")
}

// A guest daemon that is started again goes on with its mounts: files that were open stay open, what was locked stays locked, and who
// uses the mount meanwhile waits.
func TestRestart(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(*program)
	}{
		{"in order", func(p *program) { p.stop(unix.SIGTERM) }},
		{"killed", func(p *program) { p.kill() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, 0)
			host := r.host("")
			m := r.newManager("transfused", "g")
			args := []string{"--server", r.address("h"), "--mount", "code=" + r.mnt}
			guest := m.start(args...)
			r.mounted(r.mnt)

			// Others have files open: a process that did would close them in the child that is to be the daemon, and wait for it there.
			holder, reader := r.shell(), r.shell()
			holder.do("cd " + r.mnt + "; exec 3<>file; flock -x 3; exec 4>gone; rm gone")
			for round := range 5 {
				tt.end(guest)
				if len(m.stored()) != 1 {
					t.Fatalf("in the store: %v", m.stored())
				}
				// Asked while nobody is there to answer.
				holder.begin(fmt.Sprintf("echo round %d >&3; echo x >&4", round))
				reader.begin("cat " + filepath.Join(r.mnt, "file") + " >/dev/null; ls " + r.mnt)
				guest = m.start(args...)
				m.await("STATUS=1 mount, host connected, protocol 2")
				holder.end()
				if out := reader.end(); out != "file" {
					t.Errorf("ls printed %q", out)
				}
				b, err := os.ReadFile(filepath.Join(r.export, "file"))
				if want := fmt.Sprintf("round %d\n", round); err != nil || !strings.HasSuffix(string(b), want) {
					t.Errorf("the host has %q, %v; want %q", b, err, want)
				}
				if exec.Command("flock", "--nonblock", filepath.Join(r.export, "file"), "true").Run() == nil {
					t.Error("the lock was lost")
				}
				mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(r.mnt))
				if err != nil || len(mounts) != 1 {
					t.Errorf("mounts: %d, %v", len(mounts), err)
				}
			}
			b, err := os.ReadFile(filepath.Join(r.export, "file"))
			if err != nil || strings.Count(string(b), "round") != 5 {
				t.Errorf("the host has %q, %v", b, err)
			}
			holder.do("cd /; exec 3>&- 4>&-")
			if err := unix.Unmount(r.mnt, 0); err != nil {
				t.Error(err)
			}
			m.await("STATUS=0 mounts, host connected, protocol 2")
			if n := len(m.stored()); n != 0 {
				t.Errorf("%d in the store after unmounting", n)
			}
			guest.stop(unix.SIGTERM)
			host.stop(unix.SIGTERM)
		})
	}
}

// A daemon that is started again while the host is away keeps its mounts, and they go on when it is there.
func TestRestartWithoutHost(t *testing.T) {
	r := newRig(t, 0)
	host := r.host("")
	m := r.newManager("transfused", "g")
	args := []string{"--server", r.address("h"), "--mount", "code=" + r.mnt}
	guest := m.start(args...)
	r.mounted(r.mnt)
	// It stands still, and then is gone for its peers.
	if err := unix.Kill(host.cmd.Process.Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	guest.stop(unix.SIGTERM)
	guest = m.start(args...)
	m.await(fmt.Sprintf("STATUS=1 mount, waiting for the host at %s", r.address("h")))
	guest.stop(unix.SIGTERM) // while it waits
	if diff := cmp.Diff([]string{"1.0"}, m.stored()); diff != "" {
		t.Errorf("in the store: %s", diff)
	}
	r.mounted(r.mnt)
	guest = m.start(args...)
	if err := unix.Kill(host.cmd.Process.Pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	m.await("STATUS=1 mount, host connected, protocol 2")
	s := r.shell()
	s.do("echo x >" + filepath.Join(r.mnt, "file"))
	if b, err := os.ReadFile(filepath.Join(r.export, "file")); err != nil || string(b) != "x\n" {
		t.Errorf("the host has %q, %v", b, err)
	}
	if err := unix.Unmount(r.mnt, 0); err != nil {
		t.Error(err)
	}
	m.await("STATUS=0 mounts, host connected, protocol 2")
	guest.stop(unix.SIGTERM)
	host.stop(unix.SIGTERM)
}

// shell is a process that does what it is told.
type shell struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
}

func (r *rig) shell() *shell {
	r.t.Helper()
	cmd := exec.Command("bash")
	in, err := cmd.StdinPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		in.Close()
		cmd.Wait() // a command that failed was told of
	})
	return &shell{r.t, in, bufio.NewReader(out)}
}

// begin has it begin a command, and end waits for the end, which must be a success, and returns what it printed.
func (s *shell) begin(command string) {
	fmt.Fprintf(s.in, "{ %s; } 2>&1; printf '\\n%%d\\0' $?\n", command)
}

func (s *shell) end() string {
	s.t.Helper()
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := s.out.ReadString(0)
		done <- result{out, err}
	}()
	select {
	case r := <-done:
		out, ok := strings.CutSuffix(r.out, "\n0\x00")
		if r.err != nil || !ok {
			s.t.Errorf("a command failed: %q, %v", r.out, r.err)
		}
		return strings.TrimSpace(out)
	case <-time.After(patience):
		s.t.Fatal("a command does not end")
		return ""
	}
}

func (s *shell) do(command string) string {
	s.t.Helper()
	s.begin(command)
	return s.end()
}
