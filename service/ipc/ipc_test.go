// SPDX-License-Identifier: Apache-2.0

package ipc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

type message struct {
	Text string
	N    int
}

func TestMain(m *testing.M) {
	role, c, err := Child()
	switch {
	case err != nil:
		panic(err)
	case role == "echo":
		os.Exit(echo(c))
	case role == "exit7":
		os.Exit(7)
	}
	os.Exit(m.Run())
}

// echo appends the message's text to each file that came with it, and sends
// message and files back, until its parent is gone.
func echo(c *Conn) int {
	for {
		var m message
		files, err := c.Recv(&m)
		if err == io.EOF {
			return 0
		}
		if err != nil {
			return 1
		}
		for _, f := range files {
			f.WriteString(m.Text)
		}
		m.N = len(files)
		if os.Getenv(roleEnv) != "" {
			m.Text = "role still in the environment"
		}
		if c.Send(m, files...) != nil {
			return 1
		}
		for _, f := range files {
			f.Close()
		}
	}
}

func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range []**Conn{&a, &b} {
		if *p, err = New(os.NewFile(uintptr(fds[i]), "pair")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*p).Close() })
	}
	return a, b
}

func TestChildEchoesMessagesAndFiles(t *testing.T) {
	p, err := Start("echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := p.Send(message{Text: "through the child"}, f); err != nil {
		t.Fatal(err)
	}
	var m message
	files, err := p.Recv(&m)
	if err != nil {
		t.Fatal(err)
	}
	if want := (message{"through the child", 1}); m != want || len(files) != 1 {
		t.Fatalf("got %+v and %d files, want %+v and 1 file", m, len(files), want)
	}
	flags, err := unix.FcntlInt(files[0].Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("received descriptor: flags %#x, %v; want close-on-exec", flags, err)
	}
	files[0].Close()
	if b, _ := os.ReadFile(path); string(b) != "through the child" {
		t.Errorf("file holds %q", b)
	}
	p.Close() // the child's Recv gets EOF, and it ends by itself
	if err := p.Wait(); err != nil {
		t.Errorf("child: %v", err)
	}
}

func TestParentSeesTheChildsEnd(t *testing.T) {
	p, err := Start("exit7", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var m message
	if _, err := p.Recv(&m); err != io.EOF {
		t.Errorf("Recv: %v, want EOF", err)
	}
	var ee *exec.ExitError
	if err := p.Wait(); !errors.As(err, &ee) || ee.ExitCode() != 7 {
		t.Errorf("Wait: %v, want exit status 7", err)
	}
	if err := p.Send(message{}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Send to a dead child: %v, want EPIPE", err)
	}
}

func TestBounds(t *testing.T) {
	a, b := pair(t)
	if err := a.Send(message{Text: strings.Repeat("x", MaxMessage)}); err == nil {
		t.Error("Send over MaxMessage: no error")
	}
	if err := a.Send(message{}, make([]*os.File, MaxFiles+1)...); err == nil {
		t.Error("Send over MaxFiles: no error")
	}
	big := message{Text: strings.Repeat("x", MaxMessage-100)}
	go a.Send(big)
	var got message
	if _, err := b.Recv(&got); err != nil || got != big {
		t.Errorf("a message just below the limit: %v", err)
	}
	// A peer that is not ours, or broken, sends more than a message may hold.
	if err := a.rc.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 4*MaxMessage)
		if err := unix.Send(int(fd), make([]byte, MaxMessage+1), 0); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Recv(&got); err == nil {
		t.Error("Recv of a message over MaxMessage: no error")
	}
}

func TestTooManyDescriptorsAreClosed(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fds := make([]int, 2*MaxFiles)
	for i := range fds {
		fds[i] = int(w.Fd())
	}
	if err := a.rc.Control(func(fd uintptr) {
		if err := unix.Sendmsg(int(fd), []byte(`{}`), unix.UnixRights(fds...), nil, 0); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var m message
	if files, err := b.Recv(&m); err == nil {
		t.Errorf("Recv of %d descriptors: no error, %d files", len(fds), len(files))
	}
	// The pipe ends only when no copy of its writing end is left anywhere.
	r.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("pipe: %v, want EOF: a descriptor leaked", err)
	}
}

func TestNotJSON(t *testing.T) {
	a, b := pair(t)
	if err := a.rc.Control(func(fd uintptr) { unix.Send(int(fd), []byte("garbage"), 0) }); err != nil {
		t.Fatal(err)
	}
	var m message
	if _, err := b.Recv(&m); err == nil {
		t.Error("Recv of garbage: no error")
	}
}

func TestCloseWakesRecv(t *testing.T) {
	a, _ := pair(t)
	done := make(chan error)
	go func() {
		var m message
		_, err := a.Recv(&m)
		done <- err
	}()
	a.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Recv after Close: %v, want os.ErrClosed", err)
	}
}

func TestChildRefusesAForeignEnvironment(t *testing.T) {
	if fi, err := os.Stat("/proc/self/fd/3"); err == nil && fi.Mode()&os.ModeSocket != 0 {
		t.Skip("NOT RUN: descriptor 3 of this process is a socket of somebody else")
	}
	t.Setenv(roleEnv, "worker")
	if role, _, err := Child(); err == nil {
		t.Errorf("Child in a process that Start did not make: role %q, no error", role)
	}
}

// ps, top and pgrep show what a child is, within the 15 bytes that the kernel keeps.
func TestChildIsNamed(t *testing.T) {
	for _, tt := range []struct{ program, want string }{
		{"/usr/bin/transfuse-host", "transfuse-:echo"},
		{"short", "short:echo"},
	} {
		self := os.Args[0]
		os.Args[0] = tt.program
		p, err := Start("echo", nil)
		os.Args[0] = self
		if err != nil {
			t.Fatal(err)
		}
		var m message
		if err := p.Send(m); err != nil {
			t.Error(err)
		}
		if _, err := p.Recv(&m); err != nil { // it is up
			t.Error(err)
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid()))
		if got := strings.TrimSpace(string(comm)); got != tt.want || err != nil {
			t.Errorf("%q, %v, want %q", got, err, tt.want)
		}
		p.Close()
		if err := p.Wait(); err != nil {
			t.Error(err)
		}
	}
}
