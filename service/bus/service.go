// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/godbus/dbus/v5"
)

// Times of a connection.
const (
	firstTime   = 2 * time.Second  // that Start waits at most: the bus may be waiting for us
	attemptTime = 30 * time.Second // for the bus to answer: it may be started by our dialling
	minPause    = 100 * time.Millisecond
	maxPause    = time.Minute
)

// Config is how a daemon gets onto its bus.
type Config struct {
	Address string       // unix:path=…; empty: DBUS_SYSTEM_BUS_ADDRESS, or the system bus in its usual place
	Log     *slog.Logger // nil: nothing is logged

	callTime   time.Duration // 0: callTime
	promptTime time.Duration // 0: promptTime
}

// served is what a daemon has on the bus.
type served struct {
	name string          // on the bus; errors and polkit's actions begin with it
	root dbus.ObjectPath // of the manager, where the ObjectManager is
	// objects are the daemon's as it is now, root included. It does not wait.
	objects func() map[dbus.ObjectPath]object
	// watch returns a channel that has a value after something changed, until ctx ends, when it is closed.
	watch func(ctx context.Context) <-chan struct{}
}

// Service keeps a daemon on its bus.
type Service struct {
	c      Config
	served *served
	done   chan struct{}
}

// start begins to keep sd on the bus until ctx ends. It returns when the name is taken, or was not to be had at once.
func start(ctx context.Context, sd *served, c Config) *Service {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.callTime == 0 {
		c.callTime = callTime
	}
	if c.promptTime == 0 {
		c.promptTime = promptTime
	}
	s := &Service{c: c, served: sd, done: make(chan struct{})}
	tried := make(chan struct{})
	go s.run(ctx, sync.OnceFunc(func() { close(tried) }))
	select {
	case <-tried:
	case <-time.After(firstTime):
	}
	return s
}

// Wait returns when the connection is closed and no call is served any more, after the end of the context that the service was
// started with.
func (s *Service) Wait() { <-s.done }

// run connects, as often as there is a bus. It calls tried after each attempt.
func (s *Service) run(ctx context.Context, tried func()) {
	defer close(s.done)
	defer tried()
	path, err := socketPath(s.c.Address)
	if err != nil {
		s.c.Log.Error("no D-Bus", "error", err)
		return
	}
	pause, told := minPause, ""
	for ctx.Err() == nil {
		w := watchFor(path)
		c, err := s.connect(ctx, path)
		tried()
		if err == nil {
			w.close()
			told = ""
			began := time.Now()
			c.run(ctx)
			if ctx.Err() != nil {
				return
			}
			s.c.Log.Warn("D-Bus is lost: it is connected again when it is back", "name", s.served.name)
			if time.Since(began) > 10*minPause {
				pause = minPause
			}
			w = watchFor(path)
		} else if ctx.Err() == nil && err.Error() != told {
			// The same again is no news.
			told = err.Error()
			s.tellFailure(err)
		}
		if w.wait(ctx, pause) {
			pause = minPause
		} else {
			pause = min(2*pause, maxPause)
		}
		w.close()
	}
}

func (s *Service) tellFailure(err error) {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		s.c.Log.Info("D-Bus is not running: it is connected when it is", "name", s.served.name)
		return
	}
	s.c.Log.Warn("D-Bus", "name", s.served.name, "error", err)
}

// socketPath returns the path of the bus's socket.
func socketPath(address string) (string, error) {
	if address == "" {
		address = os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	}
	if address == "" {
		return "/run/dbus/system_bus_socket", nil
	}
	for a := range strings.SplitSeq(address, ";") {
		keys, ok := strings.CutPrefix(a, "unix:")
		if !ok {
			continue
		}
		for kv := range strings.SplitSeq(keys, ",") {
			if v, ok := strings.CutPrefix(kv, "path="); ok {
				return dbus.UnescapeBusAddressValue(v)
			}
		}
	}
	return "", fmt.Errorf("the bus's address is %q: unix:path=… is wanted", address)
}

// connect returns a connection that has the name, or is in the queue for it.
func (s *Service) connect(ctx context.Context, path string) (*connection, error) {
	trying, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(trying, "unix", path)
	if err != nil {
		return nil, err
	}
	// godbus takes no context here: what waits for the bus is ended so.
	stop := context.AfterFunc(trying, func() { nc.Close() })
	c, err := newConnection(s, nc)
	if err != nil {
		stop()
		nc.Close()
		return nil, err
	}
	if err = c.begin(); err == nil && !stop() {
		err = trying.Err()
	}
	if err != nil {
		stop()
		c.end()
		return nil, err
	}
	return c, nil
}

// watcher waits for a socket that is not there. Without inotify only time passes.
type watcher struct {
	path string
	w    *fsnotify.Watcher
}

// watchFor watches the directory in which path, or the next directory to it, will be made.
func watchFor(path string) watcher {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return watcher{}
	}
	for dir := filepath.Dir(path); w.Add(dir) != nil && dir != filepath.Dir(dir); {
		dir = filepath.Dir(dir)
	}
	return watcher{path, w}
}

func (w watcher) close() {
	if w.w != nil {
		w.w.Close()
	}
}

// wait returns true when something on the way to the path was made, and false after d or when ctx ends.
func (w watcher) wait(ctx context.Context, d time.Duration) bool {
	var events chan fsnotify.Event
	var errs chan error
	if w.w != nil {
		events, errs = w.w.Events, w.w.Errors
	}
	after := time.NewTimer(d)
	defer after.Stop()
	for {
		select {
		case e := <-events:
			if e.Has(fsnotify.Create) && (e.Name == w.path || strings.HasPrefix(w.path, e.Name+"/")) {
				return true
			}
		case <-errs: // of events that were lost: time passes
		case <-after.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
