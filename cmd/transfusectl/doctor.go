// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// level is how bad a finding is.
type level string

const (
	levelOK      level = "ok"
	levelWarning level = "warning" // it works, but not all or not well
	levelError   level = "error"   // it can't work
)

// finding is what doctor says about one thing.
type finding struct {
	Check string `json:"check"`
	Level level  `json:"level"`
	Text  string `json:"text"`           // what is there
	Mend  string `json:"mend,omitempty"` // what to do about it
}

// findings collects what the checks say.
type findings []finding

func (f *findings) ok(check, format string, args ...any) {
	*f = append(*f, finding{Check: check, Level: levelOK, Text: fmt.Sprintf(format, args...)})
}

func (f *findings) warn(check, mend, format string, args ...any) {
	*f = append(*f, finding{check, levelWarning, fmt.Sprintf(format, args...), mend})
}

func (f *findings) err(check, mend, format string, args ...any) {
	*f = append(*f, finding{check, levelError, fmt.Sprintf(format, args...), mend})
}

func (f findings) count(l level) (n int) {
	for _, x := range f {
		if x.Level == l {
			n++
		}
	}
	return n
}

// machine is where doctor looks. Tests have one of their own.
type machine struct {
	root     string                 // of its files
	socket   func() error           // whether the kernel has vsock
	cid      func() (uint32, error) // this machine's own
	lookPath func(string) (string, error)
	run      func(ctx context.Context, name string, args ...string) (string, error)
}

// thisMachine is the one that transfusectl runs on. Nothing is ever dialled by vsock: on a host that is no VM, CID 2 is somebody else.
func thisMachine() machine {
	return machine{
		root: "/",
		socket: func() error {
			fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		},
		cid:      vsock.ContextID,
		lookPath: exec.LookPath,
		run: func(ctx context.Context, name string, args ...string) (string, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, name, args...)
			cmd.Env = append(os.Environ(), "LC_ALL=C", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0")
			cmd.WaitDelay = time.Second
			out, err := cmd.Output()
			return string(out), err
		},
	}
}

func (m machine) path(name string) string { return filepath.Join(m.root, name) }

// read is a file's text without the space around it; empty where there is none.
func (m machine) read(name string) string {
	b, err := os.ReadFile(m.path(name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func (m machine) exists(name string) bool {
	_, err := os.Stat(m.path(name))
	return err == nil
}

func newDoctor(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong here, and say how to mend it",
		Long: `doctor looks at the kernel, FUSE, vsock, limits, systemd's units and the daemon, and says of each whether it is well, and where it is not how
to mend it. It looks at what the guest's daemon needs, or with --host at what the host's server does. It changes nothing; whether the
host can be reached it asks the daemon.

Exit codes: 0 nothing is wrong, or only warnings, 1 there is an error.`,
		Example: `  transfusectl doctor
  transfusectl --host doctor --json=pretty`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.within(cmd.Context(), actTimeout)
			defer cancel()
			f := a.diagnose(ctx, thisMachine())
			if err := a.show(cmd, f, func(w io.Writer) { a.writeFindings(w, f) }); err != nil {
				return err
			}
			if f.count(levelError) > 0 {
				return &exitError{code: exitFailure}
			}
			return nil
		},
	}
}

// diagnose makes all checks.
func (a *app) diagnose(ctx context.Context, m machine) findings {
	var f findings
	m.checkKernel(&f, a.host)
	if !a.host {
		m.checkFUSE(&f)
	}
	if server := a.otherTransport(ctx); server != "" {
		f.ok("vsock", "it is not needed: the host is at %s", server)
	} else {
		m.checkVsock(&f, a.host)
	}
	m.checkSysctls(&f)
	m.checkSystemd(ctx, &f, a.host)
	if a.host {
		a.checkServer(ctx, &f)
	} else {
		m.checkFusermount(&f)
		a.checkDaemon(ctx, &f)
	}
	m.checkLimits(ctx, &f, a.host)
	return f
}

func (a *app) writeFindings(w io.Writer, f findings) {
	marks := map[level]struct {
		mark string
		style
	}{levelOK: {"ok     ", good}, levelWarning: {"warning", notice}, levelError: {"error  ", bad}}
	for _, x := range f {
		m := marks[x.Level]
		fmt.Fprintf(w, "%s  %-11s  %s\n", a.paint(m.style, m.mark), x.Check, clean(x.Text))
		if x.Mend != "" {
			fmt.Fprintf(w, "%22s%s\n", "", a.paint(bold, clean(x.Mend)))
		}
	}
	if !a.noLegend {
		fmt.Fprintf(w, "\n%s, %s.\n", count(f.count(levelError), "error"), count(f.count(levelWarning), "warning"))
	}
}
