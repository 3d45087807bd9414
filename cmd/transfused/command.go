// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/bus"
	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
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
	control    string
	tokenFile  string
	spin       string
	mounts     []string
	mountRoots []string
	allowSuid  bool
	allowDev   bool
	bus        bool
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

Started by systemd it listens on the sockets that it is passed instead of --socket and --control (the one that is
named control), tells when it is ready and how it does (Type=notify), and logs to the journal. With a descriptor
store (FileDescriptorStoreMax=) its mounts outlive it: the next process goes on with them, and who uses them waits.

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
			return f.service(cmd, c, all, log)
		},
	}
	cmd.AddCommand(newCleanUp())
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.SetHelpCommand(&cobra.Command{Hidden: true})
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
	fs.StringVar(&f.control, "control", noSocket, `address of the control socket, for transfusectl: unix:PATH; "none" for none`)
	fs.BoolVar(&f.bus, "bus", false, "be org.transfused1 on the system bus (D-Bus)")
	fs.StringVarP(&f.pidfile, "pidfile", "p", "", "file to write the process id to when the host has answered")
	fs.StringVarP(&f.logfile, "logfile", "l", "", "file to append the log to (default: standard error)")
	fs.StringVar(&f.config, "config", "", "TOML file with the same settings, read alone; flags win")
	fs.StringVar(&f.spin, "spin", transport.DefaultSpin.String(), "how long to look for the next message before sleeping, while that pays; 0: not at all")
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
	if c.Spin, err = transport.ParseSpin(f.spin); err != nil {
		return c, f, fmt.Errorf("spin: %w", err)
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

// service runs the daemon, with what the service manager has passed, until a signal ends it.
func (f flags) service(cmd *cobra.Command, c guest.Config, all flags, out *os.File) error {
	var level slog.LevelVar
	if all.debug {
		level.Set(slog.LevelDebug)
	}
	c.Log = slog.New(sd.TextHandler(out, &level))
	if out == os.Stderr {
		c.Log = slog.New(sd.LogHandler(os.Stderr, &level))
	}
	passed, errs := sd.Take()
	for _, err := range errs {
		c.Log.Error("a socket that was passed is not used", "error", err)
	}
	control := passed.Control
	switch n := len(passed.Listeners); {
	case n > 1:
		passed.Close()
		return fmt.Errorf("%d sockets for the host were passed to this process: pass the one that the host dials", n)
	case n == 1:
		c.Listener = passed.Listeners[0]
	case control != nil || len(errs) > 0:
		// The sockets are the service manager's business; a VM without vsock has none for its host.
		c.Socket = transport.Addr{}
	}
	if control == nil && all.control != noSocket {
		a, err := transport.Parse(all.control)
		if err == nil && a.Family != transport.Unix {
			err = fmt.Errorf("%s: a Unix socket is wanted, unix:PATH", a)
		}
		if err != nil {
			return &usageError{fmt.Errorf("--control: %w", err)}
		}
		if control, err = transport.Listen(a); err != nil {
			return err
		}
	}
	if control != nil {
		defer control.Close()
	}
	store, err := sd.OpenStore(passed.Stored)
	if err != nil {
		c.Log.Error("mounts will not outlive this process", "error", err)
	}
	if store != nil {
		c.Store, c.Stored = store, passed.Stored
		c.Leave = func() bool {
			stop, err := sd.Stop()
			if err != nil {
				c.Log.Error("it is not known whether this is a stop: the mounts are left for the next process", "error", err)
			}
			return !stop
		}
	}
	c.Stay = control != nil || store != nil
	passedSocket, socket := c.Listener != nil || c.Socket == (transport.Addr{}), c.Socket
	c.Reload = func() (guest.Config, error) {
		sd.Reloading()
		defer sd.Ready()
		c, _, err := f.settings(cmd.Flags().Changed)
		if passedSocket {
			c.Socket = socket // what is configured is not used
		}
		return c, err
	}
	c.Status = sd.Status
	return f.run(cmd.Context(), c, control, &level)
}

// run runs the daemon, and beside it what serves the administrator and the service manager.
func (f flags) run(ctx context.Context, c guest.Config, control *transport.Listener, level *slog.LevelVar) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer stop()
	stopping := make(chan struct{})
	untold := context.AfterFunc(ctx, func() { sd.Stopping(); close(stopping) })
	defer func() {
		if !untold() {
			<-stopping // or the process could end before it is told
		}
	}()
	// What goes on beside the daemon ends after it.
	beside, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()

	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	wg.Go(func() {
		for {
			select {
			case <-hup:
				if level.Level() == slog.LevelDebug {
					level.Set(slog.LevelInfo)
				} else {
					level.Set(slog.LevelDebug)
				}
				c.Log.Info("log level", "level", level.Level())
			case <-beside.Done():
				return
			}
		}
	})
	c.Watchdog = &watchdog.Watchdog{}
	wg.Go(func() { sd.Watch(beside, c.Watchdog, c.Log) })
	var d *guest.Daemon
	var onBus *bus.Service
	defer func() {
		end()
		if onBus != nil {
			onBus.Wait()
		}
	}()
	c.Ready = func() {
		if control != nil {
			wg.Go(func() {
				if err := admin.ServeGuest(beside, control, d, version, c.Log); err != nil {
					c.Log.Error("the control socket is not served any more", "error", err)
				}
			})
		}
		if f.bus {
			onBus = bus.StartGuest(beside, d, bus.Config{Log: c.Log})
		}
		sd.Ready()
	}
	var err error
	if d, err = guest.New(c); err != nil {
		return &usageError{err}
	}
	if err = d.Run(ctx); err != nil {
		sd.Failed(err)
	}
	return err
}

// newCleanUp makes the command of transfused-clean-up.service.
func newCleanUp() *cobra.Command {
	return &cobra.Command{
		Use:    "clean-up",
		Short:  "Detach mounts that nobody serves any more, when the service is being stopped",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return guest.CleanUp(guest.StateDir())
		},
	}
}
