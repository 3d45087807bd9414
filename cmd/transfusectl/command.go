// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
)

// app is what all commands share: the flags, and how to write.
type app struct {
	socket   string
	host     bool
	json     jsonMode
	noLegend bool
	noPager  bool
	wait     bool
	timeout  time.Duration

	terminal bool // standard output is one
	color    bool
}

// answerTimeout bounds what a daemon answers at once, actTimeout what it asks its host or the kernel to do.
const (
	answerTimeout = 15 * time.Second
	actTimeout    = 90 * time.Second
)

func newCommand() *cobra.Command {
	var a app
	cmd := &cobra.Command{
		Use:   "transfusectl [flags] command",
		Short: "Ask and order the daemons of transfused",
		Long: `transfusectl asks the guest's daemon, transfused, and with --host the host's server, transfuse-host, how they do, and tells them what
to do. It talks to them over their control sockets, which needs no D-Bus. Everybody may look at the state; only root mounts,
unmounts, reloads, traces and sees sessions.

With --json the output is for programs, and tables and texts are left out. Where the output is a terminal, long ones go through a
pager ($SYSTEMD_PAGER, $PAGER, or less), and states have colors unless NO_COLOR is set.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 the daemon is not running; status and doctor say more in theirs.`,
		Example: `  transfusectl status
  transfusectl mount code /mnt/code -o ro
  transfusectl --host sessions`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs, // for an error in our own words
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(cmd, errors.New("a command is missing"))
			}
			return usage(cmd, fmt.Errorf("command %q is not known", args[0]))
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.prepare(cmd) },
	}
	cmd.SetVersionTemplate("transfusectl {{.Version}}\n")
	cmd.SetFlagErrorFunc(usage)
	fs := cmd.PersistentFlags()
	fs.SortFlags = false
	fs.StringVar(&a.socket, "socket", "", "control socket of the daemon (default "+api.GuestSocket+", with --host "+api.HostSocket+")")
	fs.BoolVar(&a.host, "host", false, "talk to the host's server")
	fs.Var(&a.json, "json", "write JSON: pretty, short (one line), or off")
	fs.BoolVar(&a.noLegend, "no-legend", false, "leave out headings and hints")
	fs.BoolVar(&a.noPager, "no-pager", false, "don't start a pager")
	fs.BoolVar(&a.wait, "wait", false, "wait for the daemon and its host where they are not there yet")
	fs.DurationVar(&a.timeout, "timeout", 0, "give up after this time, as 90s or 5m (default: with --wait never)")
	cmd.RegisterFlagCompletionFunc("json", cobra.FixedCompletions([]string{"pretty", "short", "off"}, cobra.ShellCompDirectiveNoFileComp))
	for _, c := range []*cobra.Command{
		newStatus(&a), newMounts(&a), newMount(&a), newUnmount(&a), newExports(&a), newSessions(&a), newReload(&a), newWait(&a),
		newTop(&a), newTrace(&a), newDoctor(&a), newBugReport(&a), newCatConfig(&a),
	} {
		cmd.AddCommand(c)
	}
	return cmd
}

// usage makes err one of the command line.
func usage(cmd *cobra.Command, err error) error {
	return &exitError{exitUsage, fmt.Errorf("%w (%s --help)", err, cmd.CommandPath())}
}

// arguments wants n arguments with these names.
func arguments(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usage(cmd, fmt.Errorf("%s is missing", names[len(args)]))
		case len(args) > len(names):
			return usage(cmd, fmt.Errorf("argument %q is one too many", args[len(names)]))
		}
		return nil
	}
}

func (a *app) prepare(cmd *cobra.Command) error {
	if a.timeout < 0 {
		return usage(cmd, fmt.Errorf("--timeout %s: a time from 0 is wanted", a.timeout))
	}
	if a.socket == "" {
		a.socket = api.GuestSocket
		if a.host {
			a.socket = api.HostSocket
		}
	}
	a.terminal = isTerminal(os.Stdout)
	a.color = a.terminal && a.json == jsonOff && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	return nil
}

func (a *app) guest() *admin.GuestClient { return admin.NewGuest(a.socket) }
func (a *app) server() *admin.HostClient { return admin.NewHost(a.socket) }

// guestOnly refuses --host for a command that the host's server does not have.
func (a *app) guestOnly(cmd *cobra.Command) error {
	if a.host {
		return usage(cmd, fmt.Errorf("%s is for the guest's daemon, not with --host", cmd.Name()))
	}
	return nil
}

// within bounds a command by --timeout, or where nobody waits by usual; 0 is no bound.
func (a *app) within(ctx context.Context, usual time.Duration) (context.Context, context.CancelFunc) {
	switch {
	case a.timeout > 0:
		return context.WithTimeout(ctx, a.timeout)
	case a.wait, usual == 0:
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, usual)
}

// ready waits for the daemon with --wait, and for the host where the command needs it.
func (a *app) ready(ctx context.Context, host bool) error {
	if !a.wait {
		return nil
	}
	for {
		err := a.probe(ctx, host)
		if !admin.NotRunning(err) {
			return err
		}
		// Nothing tells of a socket that is not there yet but looking.
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			if a.timeout == 0 {
				return ctx.Err()
			}
			return &exitError{exitNotRunning, fmt.Errorf("after %s: %w", a.timeout, a.failed(err))}
		}
	}
}

func (a *app) probe(ctx context.Context, host bool) (err error) {
	switch {
	case a.host:
		_, err = a.server().GetStatus(ctx)
	case host:
		err = waitHost(ctx, a.guest())
	default:
		_, err = a.guest().GetStatus(ctx)
	}
	return err
}

// failed gives an error of a daemon its exit code, and one of the control socket the mend.
func (a *app) failed(err error) error {
	program, unit := "transfused", "transfused-control.socket"
	if a.host {
		program, unit = "transfuse-host", "transfuse-host-control.socket"
	}
	var known *exitError
	switch {
	case err == nil, errors.As(err, &known):
		return err
	case admin.NotRunning(err):
		return &exitError{exitNotRunning, fmt.Errorf("%s is not running, nobody listens at %s: systemctl start %s, or name its socket by --socket", program, a.socket, unit)}
	case errors.Is(err, context.DeadlineExceeded) && a.timeout > 0:
		return fmt.Errorf("%s did not answer within %s", program, a.timeout)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s at %s does not answer", program, a.socket)
	}
	return err
}
