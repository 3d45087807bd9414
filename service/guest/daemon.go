// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
	"transfused.org/transfused/service/wire"
)

// maxAsks is how many mounts, unmounts and suitability requests of the host are served at once.
const maxAsks = 16

// maxMounts is how many mounts there may be: each has threads, and without threads the process ends.
const maxMounts = 1024

// goodbyeTime is how long the host has to read what it is told at the end.
const goodbyeTime = 2 * time.Second

// Daemon is one guest daemon. It implements api.Guest.
type Daemon struct {
	c         Config
	log       *slog.Logger
	ctx       context.Context // ends when the daemon is told to
	roots     []string
	listening transport.Addr
	boot      [16]byte
	session   [16]byte // of version 2; one for the life of the daemon
	host1     *host1
	helper    *helper
	control   atomic.Pointer[control] // nil while it is down
	asks      chan struct{}
	asked     atomic.Int64 // of the host, running or waiting
	ready     sync.Once
	wg        sync.WaitGroup // mounts, and what serves them
	keepers   sync.WaitGroup // who waits for mounts
	loop      watchdog.Loop  // the control channel's
	reloading sync.Mutex     // serializes Reload
	listing   sync.Mutex     // serializes list; taken before mu

	mu       sync.Mutex // guards the rest
	upOrNot  chan struct{}
	entries  map[uint64]*entry
	mounts   map[uint64]*mount
	lastID   uint64
	watchers map[*watcher]bool
	ending   bool
	leaving  bool
	untold   []*wire.Unmounted // that the host has not heard
	stale    []string          // mounts that a helper which ended could not take away
}

var _ api.Guest = (*Daemon)(nil)

// New makes a daemon that runs by Run. A mistake in c is an error.
func New(c Config) (*Daemon, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	roots, err := cleanRoots(c.MountRoots)
	if err != nil {
		return nil, err
	}
	if len(c.Mounts) > 0 && os.Geteuid() != 0 {
		if _, err := findFusermount(c.Fusermount); err != nil {
			return nil, err
		}
	}
	if c.StateDir == "" {
		c.StateDir = StateDir()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Watchdog == nil {
		c.Watchdog = &watchdog.Watchdog{}
	}
	d := &Daemon{c: c, roots: roots, boot: bootID(), asks: make(chan struct{}, maxAsks),
		entries: make(map[uint64]*entry), mounts: make(map[uint64]*mount), watchers: make(map[*watcher]bool), upOrNot: make(chan struct{})}
	d.log = slog.New(&relay{Handler: c.Log.Handler(), to: &d.control})
	d.host1 = newHost1(c.StateDir, c.Server, d.boot)
	rand.Read(d.session[:]) // never fails
	return d, nil
}

// Run makes a daemon and runs it.
func Run(ctx context.Context, c Config) error {
	d, err := New(c)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// Run is the daemon. It serves until ctx ends, and then unmounts everything, or leaves it to the next process, ends its helper and returns nil. It
// returns an error where it can't begin, where none of the mounts that it was to make can be made, or when its helper
// process has ended. It is called once. Config.Ready is called when the other methods may be. The program's main must hand the role HelperRole to Helper.
func (d *Daemon) Run(ctx context.Context) (err error) {
	transport.PrepareBlocking()
	ln := d.c.Listener
	if ln == nil && d.c.Socket.Family != 0 {
		if ln, err = transport.Listen(d.c.Socket); err != nil {
			return err
		}
	}
	if ln != nil {
		defer ln.Close()
		d.listening = ln.Addr()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	d.ctx = ctx
	if d.c.Store != nil {
		if lock, err := lockState(d.c.StateDir, unix.LOCK_SH); err != nil {
			d.log.Error("nothing keeps clean-up from detaching what this daemon mounts", "error", err)
		} else {
			defer lock.Close()
		}
	}
	d.helper, err = startHelper(d.roots, d.c.Fusermount, func(s string) { d.log.Warn(s) }, d.pong)
	if err != nil {
		return err
	}
	defer d.helper.end()
	go func() {
		select {
		case <-d.helper.done:
			cancel(errHelperEnded)
		case <-ctx.Done():
		}
	}()
	return d.serve(ctx, cancel, ln)
}

// serve starts everything, waits for the end, and ends everything in the order that lets mounts write back.
func (d *Daemon) serve(ctx context.Context, cancel context.CancelCauseFunc, ln *transport.Listener) error {
	// The control channel outlives ctx: unmounting tells the host.
	cctx, endControl := context.WithCancel(context.WithoutCancel(ctx))
	defer endControl()
	d.takeUp()
	var channels, askers sync.WaitGroup
	channels.Go(func() { d.c.Watchdog.Probe(cctx, "the daemon's lock", time.Second, &d.mu) })
	channels.Go(func() { d.controlLoop(cctx) })
	if ln != nil {
		askers.Go(func() { d.acceptLoop(ctx, ln) })
	}
	d.keepAll(cancel, ln != nil)
	if d.c.Ready != nil {
		d.c.Ready()
	}
	d.tell()

	<-ctx.Done()
	if ln != nil {
		ln.Close()
	}
	leave := d.c.Store != nil && (errors.Is(context.Cause(ctx), errHelperEnded) || d.c.Leave != nil && d.c.Leave())
	d.mu.Lock()
	d.ending, d.leaving = true, leave
	var left []*mount
	for _, m := range d.mounts {
		if leave && m.recordFile != nil {
			m.leave()
		} else {
			left = append(left, m)
		}
	}
	d.mu.Unlock()
	var unmounts sync.WaitGroup
	for _, m := range left {
		unmounts.Go(func() { d.unmount(m, wire.ReasonShutdown) })
	}
	unmounts.Wait()
	// A host that does not read must not keep this waiting for room to tell it something.
	defer time.AfterFunc(goodbyeTime, endControl).Stop()
	askers.Wait()
	d.keepers.Wait()
	if c := d.control.Load(); c != nil {
		c.flush()
	}
	endControl()
	channels.Wait()
	d.wg.Wait() // until here somebody may add to it
	d.detachStale()
	if d.c.Pidfile != "" {
		if b, err := os.ReadFile(d.c.Pidfile); err == nil && string(b) == strconv.Itoa(os.Getpid())+"\n" {
			os.Remove(d.c.Pidfile) // if it stays, the pid in it is of no process
		}
	}
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// detachStale has a new helper take away what the one that ended left. Nobody serves these mounts any more, so nothing waits.
func (d *Daemon) detachStale() {
	if len(d.stale) == 0 {
		return
	}
	h, err := startHelper(d.roots, d.c.Fusermount, func(s string) { d.log.Warn(s) }, func() {})
	if err != nil {
		d.log.Error("mounts are left: unmount them by umount -l", "dirs", d.stale, "error", err)
		return
	}
	defer h.end()
	ctx, cancel := context.WithTimeout(context.Background(), unmountTime)
	defer cancel()
	for _, dir := range d.stale {
		if _, err := h.call(ctx, call{Op: opStale, Dir: dir}); err != nil {
			d.log.Error("detach", "dir", dir, "error", err)
		}
	}
}

// keepAll keeps the configured mounts. When none of them can be made and nobody can ask for others, the daemon ends.
func (d *Daemon) keepAll(cancel context.CancelCauseFunc, listens bool) {
	var (
		mu     sync.Mutex
		failed int
	)
	d.apply(d.c.Mounts, func(err error) {
		mu.Lock()
		failed++
		last := failed == len(d.c.Mounts)
		mu.Unlock()
		if last && !d.c.Stay && !(listens && d.host1.known()) {
			cancel(err)
			return
		}
		d.warn(err)
	})
}

// warn logs err. What the host itself said it does not hear again.
func (d *Daemon) warn(err error) {
	log := d.log
	if errors.As(err, new(*refusal)) {
		log = d.c.Log
	}
	log.Warn(err.Error(), sd.MountFailed.Attr())
}

// up makes c the control channel, and tells who waits for one.
func (d *Daemon) up(c *control) {
	d.ready.Do(func() {
		if d.c.Pidfile == "" {
			return
		}
		if err := os.WriteFile(d.c.Pidfile, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
			d.log.Error("pidfile: " + err.Error())
		}
	})
	d.control.Store(c)
	d.log.Info(fmt.Sprintf("connected to the host at %s", d.c.Server), "version", c.version, sd.HostConnected.Attr())
	d.mu.Lock()
	close(d.upOrNot)
	d.upOrNot = make(chan struct{})
	d.mu.Unlock()
	d.tell()
}

func (d *Daemon) down(c *control) {
	if d.control.CompareAndSwap(c, nil) {
		d.tell()
	}
}

// tell tells how the daemon does.
func (d *Daemon) tell() {
	d.mu.Lock() // also so that what is told last is the latest
	defer d.mu.Unlock()
	for w := range d.watchers {
		w.put(api.Change{Kind: api.StatusChanged})
	}
	if d.c.Status != nil {
		d.c.Status(d.textLocked())
	}
}

// textLocked is how the daemon does, in words. Precondition: d.mu is held.
func (d *Daemon) textLocked() string {
	n := len(d.mounts)
	mounts := fmt.Sprintf("%d mounts", n)
	if n == 1 {
		mounts = "1 mount"
	}
	failed := 0
	for _, e := range d.entries {
		if e.state == api.Failed {
			failed++
		}
	}
	if failed > 0 {
		mounts += fmt.Sprintf(", %d failed", failed)
	}
	if c := d.control.Load(); c != nil {
		return fmt.Sprintf("%s, host connected, protocol %d", mounts, c.version)
	}
	return fmt.Sprintf("%s, waiting for the host at %s", mounts, d.c.Server)
}

// waitControl waits for a control channel that is up; nil when ctx ends.
func (d *Daemon) waitControl(ctx context.Context) *control {
	for {
		d.mu.Lock()
		changed := d.upOrNot
		d.mu.Unlock()
		if ctx.Err() != nil {
			return nil
		}
		if c := d.control.Load(); c != nil {
			return c
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// pong answers an event of version 1 that asks for it.
func (d *Daemon) pong() {
	if c := d.control.Load(); c != nil {
		c.offer(&wire.Pong{}) // it is the helper's reader who calls: it must not wait for the host
	}
}
