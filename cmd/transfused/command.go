// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
)

// usageError is one that the command line or the configuration is to blame for.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// flags are the options as they are typed; config.go has those of the file.
type flags struct {
	root       string // in front of the configuration's directories, for tests
	config     string
	pidfile    string
	server     string
	socket     string
	fusermount string
	logfile    string
	tokenFile  string
	mounts     []string
	mountRoots []string
	allowSuid  bool
	allowDev   bool
	debug      bool
}

// noSocket is the address of --socket to listen nowhere.
const noSocket = "none"

// newCommand makes the command; root is that of config.ReadAll.
func newCommand(root string) *cobra.Command {
	f := flags{root: root}
	cmd := &cobra.Command{
		Use:   "transfused [flags]",
		Short: "Mount directories of the host in this VM",
		Long: `transfused mounts directories of the host in this VM, over vsock. It mounts what it is told by --mount, and what
the host asks for over the socket; it waits for a host that is not there yet.

Its configuration is /etc/transfuse/transfused.toml, or that of /run or /usr/lib, with drop-ins in transfused.toml.d
beside each, and the systemd credential transfused.toml; --config names one file instead. Flags win.

As root it mounts by itself, as an ordinary user by fusermount3. On SIGTERM and SIGINT it unmounts
everything and ends; SIGHUP switches debug logging on and off.

Started by systemd it listens on the socket that it is passed (ListenStream=vsock::1525) instead of --socket, tells
when it is ready and how it does (Type=notify), and logs to the journal.

Exit codes: 0 ended in order, 1 failed at run time, 2 bad usage or configuration.`,
		Example: `  transfused --mount code=/mnt/code
  transfused --server unix:/tmp/h.sock --socket unix:/tmp/g.sock --mount code=/mnt/code,ro`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, all, err := f.settings(cmd.Flags().Changed)
			if err != nil {
				return &usageError{err}
			}
			log, err := all.log()
			if err != nil {
				return &usageError{err}
			}
			passed, errs := sd.Take()
			if len(errs) > 0 {
				return errs[0]
			}
			if n := len(passed.Listeners); n > 1 {
				return fmt.Errorf("%d sockets for the host were passed to this process: pass the one that the host dials", n)
			} else if n == 1 {
				c.Listener = passed.Listeners[0]
			}
			return daemon(cmd.Context(), c, log, all.debug)
		},
	}
	cmd.SetVersionTemplate("transfused {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageHint(err) })
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageHint(fmt.Errorf("argument %q: no arguments are taken, only flags", args[0]))
		}
		return nil
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVarP(&f.server, "server", "d", guest.DefaultServer, "address of the host: vsock:CID:PORT or unix:PATH")
	fs.StringVarP(&f.socket, "socket", "s", guest.DefaultSocket, `address to listen on for a host that asks for mounts; "none" for nowhere`)
	fs.StringArrayVar(&f.mounts, "mount", nil, "mount export TAG at DIR: TAG=DIR[,option…] (repeatable)")
	fs.StringArrayVar(&f.mountRoots, "mount-root", nil, "make mounts only below this directory (repeatable)")
	fs.BoolVar(&f.allowSuid, "allow-suid", false, "let the host ask for mounts where set-id bits count")
	fs.BoolVar(&f.allowDev, "allow-dev", false, "let the host ask for mounts where device nodes work")
	fs.StringVar(&f.tokenFile, "token-file", "", "file with the token that proves this guest to the host")
	fs.StringVarP(&f.fusermount, "fusermount", "f", "", "program that mounts for an ordinary user (default: fusermount3 in the path)")
	fs.StringVarP(&f.pidfile, "pidfile", "p", "", "file to write the process id to when the host has answered")
	fs.StringVarP(&f.logfile, "logfile", "l", "", "file to append the log to (default: standard error)")
	fs.StringVar(&f.config, "config", "", "TOML file with the same settings, read alone; flags win")
	fs.BoolVar(&f.debug, "debug", false, "log what is useful for finding faults")
	return cmd
}

func usageHint(err error) error { return &usageError{fmt.Errorf("%w (transfused --help)", err)} }

// settings merges the configuration with the flags, which win, and checks the outcome. It changes nothing, so that the
// daemon can have it again when it is told to reload. All is f with what the configuration says.
func (f flags) settings(given func(flag string) bool) (c guest.Config, all flags, err error) {
	c.Software = "transfused " + version
	specs, err := f.readConfig(given)
	if err != nil {
		return c, f, err
	}
	if given("mount") {
		specs = nil
		for _, s := range f.mounts {
			m, err := guest.ParseMountSpec(s)
			if err != nil {
				return c, f, fmt.Errorf("--mount: %w", err)
			}
			specs = append(specs, m)
		}
	}
	c.Mounts = specs
	if c.Server, err = transport.Parse(f.server); err != nil {
		return c, f, fmt.Errorf("server: %w", err)
	}
	if f.socket != noSocket {
		if c.Socket, err = transport.Parse(f.socket); err != nil {
			return c, f, fmt.Errorf("socket: %w", err)
		}
	}
	if f.tokenFile != "" {
		c.Token, err = config.Token(f.tokenFile)
	} else if !given("token-file") {
		c.Token, err = config.CredentialToken(f.root, "transfused")
	}
	if err != nil {
		return c, f, err
	}
	c.MountRoots, c.Fusermount = f.mountRoots, f.fusermount
	c.AllowSuid, c.AllowDev = f.allowSuid, f.allowDev
	if f.pidfile != "" {
		if c.Pidfile, err = filepath.Abs(f.pidfile); err != nil {
			return c, f, fmt.Errorf("pidfile: %w", err)
		}
		// It is written much later, when nobody looks any more.
		if _, err := os.Stat(filepath.Dir(c.Pidfile)); err != nil {
			return c, f, fmt.Errorf("pidfile: %w", config.Reason(err))
		}
	}
	return c, f, c.Check()
}

// log opens what the log is written to until this process ends.
func (f *flags) log() (*os.File, error) {
	if f.logfile == "" {
		return os.Stderr, nil
	}
	file, err := os.OpenFile(f.logfile, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", config.Reason(err))
	}
	return file, nil
}

// daemon runs the daemon until a signal ends it.
func daemon(ctx context.Context, c guest.Config, out *os.File, debug bool) error {
	var level slog.LevelVar
	if debug {
		level.Set(slog.LevelDebug)
	}
	c.Log = slog.New(sd.TextHandler(out, &level))
	if out == os.Stderr {
		c.Log = slog.New(sd.LogHandler(os.Stderr, &level))
	}
	c.Ready, c.Status = sd.Ready, sd.Status
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, sd.Stopping)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	toggled := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(toggled)
		for {
			select {
			case <-hup:
				if level.Level() == slog.LevelDebug {
					level.Set(slog.LevelInfo)
				} else {
					level.Set(slog.LevelDebug)
				}
				c.Log.Info("log level", "level", level.Level())
			case <-done:
				return
			}
		}
	}()
	err := guest.Run(ctx, c)
	close(done)
	<-toggled
	return err
}
