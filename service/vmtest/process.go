// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"os/exec"
	"runtime"
	"syscall"
)

// process is a program that ends, by SIGKILL, at the latest when this one does.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended and err is set
	err  error         // of Wait
}

// start starts cmd. The goroutine that does it keeps its thread until the program ends:
// the kernel sends the parent-death signal when the thread that forked ends, not the process.
func start(cmd *exec.Cmd) (*process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, <-started
}

// stop kills the program and waits for its end.
func (p *process) stop() {
	p.cmd.Process.Kill() // fails only if it has ended
	<-p.done
}
