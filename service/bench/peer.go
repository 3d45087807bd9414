// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	ours       = "transfused"
	bare       = "bare"
	goFuse     = "gofuse" // gofuse.go
	lax        = "sshfs-lax"
	cServer    = "c-server" // floor.c on the device
	cFloor     = "c-floor"  // floor.c behind a relay
	sftpServer = "/usr/lib/openssh/sftp-server"

	patience = 10 * time.Second // for a mount to come or a process to end

	forgetting = 300 * time.Millisecond // for the servers to hear what the kernel has let go of
)

// peerNames in the order of the table: ours last.
var peerNames = []string{bare, cServer, "bindfs", goFuse, cFloor, lax, "sshfs", ours}

// peer is one way to see the tree, at dir. A mount is there from mount to unmount.
type peer struct {
	name   string
	c      config
	src    string // the tree
	dir    string // where the peer shows it
	theirs bool   // somebody else has mounted it
	told   bool   // it counts messages, and tells them
	traced traced // of a mount that is theirs: what was asked up to now
	procs  []*process
}

// process is a server that was started, with what it said.
type process struct {
	name string
	cmd  *exec.Cmd
	log  bytes.Buffer
	done chan struct{} // closed when it has ended
}

func newPeer(name string, c config) *peer {
	p := &peer{name: name, c: c, src: filepath.Join(c.Dir, "tree"), dir: filepath.Join(c.Dir, "mnt-"+name)}
	if dir, ok := c.Dirs[name]; ok {
		p.dir, p.theirs = dir, true
		return p
	}
	switch name {
	case bare:
		p.dir = p.src
	case ours:
		p.src = filepath.Join(c.Dir, ours, "tree")
	}
	return p
}

// commands returns what is to be started, in order. All run in the foreground
// and keep attributes and names for one second.
func (p *peer) commands() [][]string {
	switch p.name {
	case "bindfs":
		return [][]string{{"bindfs", "-f", "-o", "attr_timeout=1,entry_timeout=1", p.src, p.dir}}
	case "sshfs", lax:
		// sshfs gives its ssh command one end of a socketpair; ours is a script that ignores host and options.
		options := "ssh_command=" + p.c.Dir + "/sftp.sh,dcache_timeout=1,attr_timeout=1,entry_timeout=1"
		if p.name != lax {
			options += ",default_permissions" // as bindfs and ours have it: the kernel checks permissions
		}
		return [][]string{{"sshfs", "-f", "-o", options, "localhost:" + p.src, p.dir}}
	case cServer:
		return [][]string{{filepath.Join(p.c.Dir, "floor"), "server", p.src, p.dir}}
	case cFloor:
		return [][]string{{filepath.Join(p.c.Dir, "floor"), "relay", p.src, p.dir}}
	case goFuse:
		return [][]string{{"/proc/self/exe", p.src, p.dir}}
	case ours:
		host := []string{filepath.Join(p.c.Bin, "transfuse-host"), "--listen", "unix:" + p.sock("host"), "--export", "bench=" + p.src + ",root=trust"}
		guest := []string{filepath.Join(p.c.Bin, "transfused"), "--server", "unix:" + p.sock("host"), "--socket", "unix:" + p.sock("guest"), "--mount", "bench=" + p.dir}
		if p.told {
			host, guest = append(host, "--metrics", "unix:"+p.sock("metrics")), append(guest, "--control", "unix:"+p.sock("guest-control"))
		}
		return [][]string{host, guest}
	}
	return nil
}

func (p *peer) sock(name string) string {
	if p.theirs {
		return filepath.Join(p.c.Sockets, name+".sock")
	}
	return filepath.Join(p.c.Dir, name+".sock")
}

// mount starts the peer and waits for its mount.
func (p *peer) mount(ctx context.Context) error {
	if p.theirs {
		return checkTree(p.dir, p.c.Scale)
	}
	if p.name == bare {
		return nil
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	for _, args := range p.commands() {
		pr := &process{name: filepath.Base(args[0]), cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
		pr.cmd.Stdout, pr.cmd.Stderr = &pr.log, &pr.log
		if p.name == goFuse {
			pr.name, pr.cmd.Env = goFuse, append(os.Environ(), loopbackEnv+"=1")
		}
		// Ctrl-C is for us, who then unmount.
		pr.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := pr.cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", pr.name, err)
		}
		go func() { pr.cmd.Wait(); close(pr.done) }()
		p.procs = append(p.procs, pr)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		// Only a server that answers makes the tree appear.
		if _, err := os.Stat(filepath.Join(p.dir, "stat")); err == nil {
			return nil
		}
		for _, pr := range p.procs {
			select {
			case <-pr.done:
				return fmt.Errorf("%s ended early: %v\n%s", pr.name, pr.cmd.ProcessState, &pr.log)
			default:
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			p.unmount()
			return fmt.Errorf("%s: no mount after %v", p.name, patience)
		}
	}
}

// unmount ends the mount and waits for the peer's processes.
func (p *peer) unmount() error {
	if len(p.procs) == 0 {
		return nil
	}
	var errs []error
	last := p.procs[len(p.procs)-1] // the one that mounted
	if p.name == ours {
		last.cmd.Process.Signal(syscall.SIGTERM) // it unmounts by itself
	} else if out, err := exec.Command("fusermount3", "-u", p.dir).CombinedOutput(); err != nil {
		errs = append(errs, fmt.Errorf("unmount %s: %w: %s", p.name, err, bytes.TrimSpace(out)))
		detach(p.dir)
	}
	wait := patience
	if p.name != ours {
		wait = time.Second // bindfs now and then stays after its unmounting: not our failure, and no figure's
	}
	for i := len(p.procs) - 1; i >= 0; i-- {
		pr := p.procs[i]
		if pr != last {
			pr.cmd.Process.Signal(syscall.SIGTERM)
		}
		select {
		case <-pr.done:
		case <-time.After(wait):
			pr.cmd.Process.Kill()
			<-pr.done
			if p.name == ours {
				errs = append(errs, fmt.Errorf("%s did not end:\n%s", pr.name, &pr.log))
			}
			detach(p.dir)
		}
	}
	p.procs = nil
	return errors.Join(errs...)
}

// detach takes a mount away whose server is no more; there may be none.
func detach(dir string) { exec.Command("fusermount3", "-u", "-z", dir).Run() }

// remount makes every cache of the mount cold. Of a mount that is not ours to make these are the names and attributes that the kernel lets go of.
func (p *peer) remount(ctx context.Context) error {
	if p.theirs {
		if err := p.sync(); err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return err
		}
		time.Sleep(forgetting)
		return nil
	}
	if err := p.unmount(); err != nil {
		return err
	}
	return p.mount(ctx)
}

// sync writes what the mount keeps: what is not written is not let go of.
func (p *peer) sync() error {
	fd, err := unix.Open(p.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(fd), unix.Close(fd))
}

// memory is the resident memory of one process, in KiB.
type memory struct {
	Process string
	PID     int
	RSS     int // VmRSS
	Peak    int // VmHWM
}

// memory returns that of the peer's processes and all their descendants.
func (p *peer) memory() (all []memory) {
	p.eachProcess(func(name string, pid int) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return // it has ended
		}
		m := memory{Process: name, PID: pid}
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(line, ":")
			value = strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB"))
			switch key {
			case "VmRSS":
				m.RSS, _ = strconv.Atoi(value)
			case "VmHWM":
				m.Peak, _ = strconv.Atoi(value)
			}
		}
		all = append(all, m)
	})
	return all
}

// pids are the peer's processes and all their descendants.
func (p *peer) pids() (all []int) {
	p.eachProcess(func(_ string, pid int) { all = append(all, pid) })
	return all
}

func (p *peer) eachProcess(f func(name string, pid int)) {
	var visit func(name string, pid int)
	visit = func(name string, pid int) {
		f(name, pid)
		children, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		for _, file := range children {
			b, _ := os.ReadFile(file)
			for _, s := range strings.Fields(string(b)) {
				if child, err := strconv.Atoi(s); err == nil {
					visit(name+"'s child", child) // a re-executed program has no name of its own
				}
			}
		}
	}
	for _, pr := range p.procs {
		visit(pr.name, pr.cmd.Process.Pid)
	}
}
