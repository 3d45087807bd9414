// SPDX-License-Identifier: Apache-2.0

package ipc

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// roleEnv names the child's role to it. Child removes it, so that what the
// child itself executes is no child of ours.
const roleEnv = "TRANSFUSE_ROLE"

// childFD is the child's end of the pair: the first of exec.Cmd.ExtraFiles.
const childFD = 3

// Process is a child that Start made, and the connection to it. Its owner
// calls Wait exactly once.
type Process struct {
	*Conn
	cmd *exec.Cmd
}

// Start executes this program again as role, with sys for its attributes (nil
// for none). The child inherits standard error and nothing else but its end of
// the pair.
func Start(role string, sys *syscall.SysProcAttr) (*Process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, os.NewSyscallError("socketpair", err))
	}
	theirs := os.NewFile(uintptr(fds[1]), "ipc child")
	defer theirs.Close()
	conn, err := New(os.NewFile(uintptr(fds[0]), "ipc parent"))
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	cmd := &exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{os.Args[0] + ": " + role},
		Env:         append(os.Environ(), roleEnv+"="+role),
		Stderr:      os.Stderr,
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: sys,
	}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	return &Process{Conn: conn, cmd: cmd}, nil
}

// Pid returns the child's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Kill sends SIGKILL. It may be called at any time, from any goroutine.
func (p *Process) Kill() error { return p.cmd.Process.Kill() }

// Wait waits for the child's end and returns nil for exit status 0, else an
// *exec.ExitError.
func (p *Process) Wait() error { return p.cmd.Wait() }

// Child returns the role and the connection of a process that Start made, and
// "" in any other. A main (and a TestMain whose tests Start) calls it before
// anything else.
func Child() (role string, c *Conn, err error) {
	role = os.Getenv(roleEnv)
	if role == "" {
		return "", nil, nil
	}
	os.Unsetenv(roleEnv)
	kind, err := unix.GetsockoptInt(childFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return "", nil, fmt.Errorf("%s is set in the environment, but this process was not started by transfused; unset it", roleEnv)
	}
	unix.CloseOnExec(childFD)
	nameProcess(role)
	c, err = New(os.NewFile(childFD, "ipc parent"))
	return role, c, err
}

// commLen is how much of a process's name the kernel keeps (TASK_COMM_LEN less the NUL).
const commLen = 15

// nameProcess gives this process the name that ps, top and pgrep show: it would be "exe", of /proc/self/exe. By this file and not by
// prctl, which names the calling thread.
func nameProcess(role string) {
	program, _, _ := strings.Cut(filepath.Base(os.Args[0]), ": ")
	if room := max(commLen-1-len(role), 0); len(program) > room {
		program = program[:room]
	}
	// Without a name it works as well.
	_ = os.WriteFile("/proc/self/comm", []byte(program+":"+role), 0)
}
