// SPDX-License-Identifier: Apache-2.0

// Transfuse-host serves directories of this machine to guests. It wires flags
// and configuration to package host.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/bus"
	"transfused.org/transfused/service/host"
	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/watchdog"
)

var version = "unknown" // set by the linker

// Exit codes, told in the help.
const (
	exitOK      = 0
	exitFailure = 1 // at run time: a port in use, no right to listen
	exitUsage   = 2 // a flag or the configuration
)

func main() { os.Exit(run("", os.Args[1:])) }

// run is the program, with the configuration below root.
func run(root string, args []string) int {
	role, conn, err := ipc.Child()
	if err == nil && role == host.RoleWorker {
		err = host.Worker(conn)
		if err == nil {
			return exitOK
		}
	} else if err == nil && role != "" {
		err = fmt.Errorf("role %q is not one of transfuse-host", role)
	}
	if err == nil {
		err = command(root, args).Execute()
	}
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "transfuse-host: "+strings.ReplaceAll(err.Error(), "\n", " "))
	if r := (*runError)(nil); errors.As(err, &r) {
		return exitFailure
	}
	return exitUsage
}

// runError is an error at run time; the others are of usage.
type runError struct{ error }

func (e *runError) Unwrap() error { return e.error }

// command makes the command; root is that of config.ReadAll.
func command(root string, args []string) *cobra.Command {
	f := &flags{root: root}
	cmd := &cobra.Command{
		Use:   "transfuse-host --listen ADDR --export TAG=DIR[,option…]",
		Short: "serve directories of this machine to virtual machines",
		Long: `Transfuse-host serves directories of this machine to virtual machines, over vsock
(QEMU and others), hybrid vsock (Firecracker, Cloud Hypervisor) or Unix sockets.

Addresses:
  vsock:any:PORT       every VM of this machine, by virtio-vsock
  hybrid:PATH:PORT     the VM whose VMM has the vsock socket PATH
  unix:PATH            processes of this machine

Options of an export (a comma in a directory is written \,):
  ro                           read-only
  guests=CID|PATH|any          who may mount it; may be repeated. Without it: over a
                               Unix socket, the user who runs this server, and root; over vsock, nobody
  root=owner|trust             the guest's root is the directory's owner (default), or root
  uidmap=, gidmap=GUEST:HOST:COUNT   may be repeated
  squash=UID:GID               everybody in the guest is that user here
  suid, dev, acl               keep set-id bits; allow device nodes; POSIX ACLs
  submounts=hide|follow        file systems mounted below the directory (default hide)
  xattr=on|off|user            extended attributes; user: kept as user.*, for servers without privilege
  xattrmap=GUEST:HOST          rename attributes by prefix; may be repeated
  cache=coherent|none|always   what guests keep: changes are told to them (default); nothing; everything, for good
  writeback                    guests write when they like; only with cache=always
  max-open-files=N, max-inodes=N    bounds of one guest's session
  max-streams=N                connections of one mount, 1 to 4

The configuration is TOML: listen, token-file, allow-unprivileged-guests, control, metrics, spin and debug,
tables [export.TAG] with dir and the options above, and tables [guest.NAME] with address and mounts. It is
/etc/transfuse/host.toml, or that of /run or /usr/lib, with drop-ins in host.toml.d beside each; --config
names one file instead.
Flags win: --listen replaces the file's list; an --export or --guest replaces the one of
the same tag or address.

While it runs, transfusectl reload --host has it read the configuration again, and shows its exports and sessions,
by the control socket (--control). Metrics are served by HTTP at http://ADDR/metrics (--metrics).

Started by systemd it listens on the sockets that it is passed (ListenStream=vsock::1524; one that
is named control is the control socket) beside those of --listen, tells when it is ready and how it
does (Type=notify), and logs to the journal.

Exit codes: 0 ended in order (SIGINT, SIGTERM), 1 failed at run time, 2 bad usage or configuration.`,
		Example: `  transfuse-host --listen unix:/tmp/h.sock --export code=/usr/share,ro
  transfuse-host --listen vsock:any:1524 --export code=/srv/code,guests=7 --guest vsock:7:1525 --mount code=/mnt/code`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.serve(cmd.Flags())
		},
	}
	cmd.SetVersionTemplate("transfuse-host {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		// The value is in what our parsers say.
		if bad := (*pflag.InvalidValueError)(nil); errors.As(err, &bad) {
			if _, ours := bad.GetFlag().Value.(settable); ours {
				return fmt.Errorf("--%s: %w", bad.GetFlag().Name, errors.Unwrap(bad))
			}
		}
		return usageHint(err)
	})
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageHint(fmt.Errorf("argument %q: no arguments are taken, only flags", args[0]))
		}
		return nil
	}
	f.define(cmd.Flags())
	cmd.SetArgs(args)
	return cmd
}

func usageHint(err error) error { return fmt.Errorf("%w (transfuse-host --help)", err) }

// serve runs the server until a signal ends it.
func (f *flags) serve(set *pflag.FlagSet) error {
	var level slog.LevelVar
	log := slog.New(sd.LogHandler(os.Stderr, &level))
	passed, errs := sd.Take()
	for _, err := range errs {
		log.Error("a socket that was passed is not used", "error", err)
	}
	dog := &watchdog.Watchdog{}
	read := func() (settings, error) {
		all, err := f.config(set, passed.Listeners)
		all.Log, all.Version, all.Software = log, version, "transfuse-host "+version
		all.Watchdog = dog
		all.Ready, all.Reloading, all.Status = sd.Ready, sd.Reloading, sd.Status
		all.Taken = func() { level.Set(all.level()) }
		return all, err
	}
	all, err := read()
	if err != nil {
		passed.Close()
		return err
	}
	all.Taken()
	all.Reread = func() (host.Config, error) {
		now, err := read()
		if err == nil && (now.control != all.control || now.metrics != all.metrics) {
			err = errors.New("control and metrics don't change while the server runs: restart it, or leave them as they were")
		}
		return now.Config, err
	}
	s, err := host.New(all.Config)
	if err != nil {
		passed.Close()
		return err
	}
	return f.run(s, all, passed)
}

// run runs s, and beside it what serves the administrator.
func (f *flags) run(s *host.Server, all settings, passed *sd.Passed) error {
	control, metrics, err := all.listen(passed.Control)
	if err != nil {
		passed.Close()
		return &runError{err}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A second signal ends the process at once.
	stopping := make(chan struct{})
	untold := context.AfterFunc(ctx, func() { sd.Stopping(); stop(); close(stopping) })
	defer func() {
		if !untold() {
			<-stopping // or the process could end before it is told
		}
	}()
	// What goes on beside the server ends after it.
	beside, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	wg.Go(func() { sd.Watch(beside, all.Watchdog, all.Log) })
	if control != nil {
		wg.Go(func() {
			if err := admin.ServeHost(beside, control, s, version, all.Log); err != nil {
				all.Log.Error("the control socket is not served any more", "error", err)
			}
		})
	}
	if metrics != nil {
		wg.Go(func() {
			if err := serveMetrics(beside, metrics, s.Metrics()); err != nil {
				all.Log.Error("the metrics are not served any more", "error", err)
			}
		})
	}
	if f.bus {
		// Calls that it has under way end when the server begins to.
		defer bus.StartHost(ctx, s, bus.Config{Log: all.Log}).Wait()
	}
	if err := s.Run(ctx); err != nil {
		stop()
		sd.Failed(err)
		return &runError{err}
	}
	return nil
}
