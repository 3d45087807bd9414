// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/varlink"
)

// ServeGuest serves g at the control socket l until ctx ends, and then closes l and waits for the calls to end. It owns l. version is the
// program's, log takes refused and failed calls; nil for nowhere.
func ServeGuest(ctx context.Context, l *transport.Listener, g api.Guest, version string, log *slog.Logger) error {
	return serve(ctx, l, "transfused", version, log, guestInterface(g, newRefusals(log)))
}

// ServeHost is ServeGuest for a host.
func ServeHost(ctx context.Context, l *transport.Listener, h api.Host, version string, log *slog.Logger) error {
	return serve(ctx, l, "transfuse-host", version, log, hostInterface(h, newRefusals(log)))
}

func serve(ctx context.Context, l *transport.Listener, program, version string, log *slog.Logger, i varlink.Interface) error {
	s := &varlink.Server{
		Info:       varlink.Info{Vendor: "transfused", Product: program, Version: version, URL: "https://transfused.org/"},
		Interfaces: []varlink.Interface{i},
		Log:        log,
	}
	return s.Serve(ctx, l)
}

// access says who may call a method, and whether its failure is of interest to others than its caller.
type access int

const (
	reads    access = iota // everybody
	observes               // root: it tells what others do
	changes                // root, and its failures are logged
	reloads                // root, and who reads the configuration logs what is wrong with it
)

// method makes a varlink method of f.
func (r *refusals) method(iface, name string, a access, f varlink.Method) varlink.Method {
	return func(ctx context.Context, c *varlink.Call) error {
		if a != reads && !varlink.Privileged(c.Peer) {
			err := &api.Error{Kind: api.Denied, Errno: syscall.EPERM,
				Text: fmt.Sprintf("uid %d may not call %s: root may", c.Peer.UID, name)}
			r.denied(err, c.Peer)
			return toWire(iface, err)
		}
		err := f(ctx, c)
		if err != nil && a == changes && ctx.Err() == nil {
			r.log.Warn("asked in vain by the control socket", "method", name, "peer", c.Peer.String(), "err", err)
		}
		return toWire(iface, err)
	}
}

// refusals logs calls that are refused, at most a few a second: anybody can make them.
type refusals struct {
	log *slog.Logger

	mu    sync.Mutex
	since time.Time // of the second that is counted in
	n     int
}

const refusalsPerSecond = 5

func newRefusals(log *slog.Logger) *refusals {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &refusals{log: log}
}

func (r *refusals) denied(err error, p transport.Peer) {
	r.mu.Lock()
	if now := time.Now(); now.Sub(r.since) > time.Second {
		r.since, r.n = now, 0
	}
	r.n++
	log := r.n <= refusalsPerSecond
	r.mu.Unlock()
	if log {
		r.log.Warn("refused at the control socket", "peer", p.String(), "err", err)
	}
}

// failure is an api.Error's parameters.
type failure struct {
	Text  string        `json:"text"`
	Errno syscall.Errno `json:"errno"`
}

// toWire makes an error one that varlink can carry.
func toWire(iface string, err error) error {
	var already *varlink.Error
	if err == nil || errors.As(err, &already) {
		return err
	}
	e := api.AsError(err)
	return varlink.NewError(iface+"."+string(e.Kind), failure{Text: e.Text, Errno: e.Errno})
}

// list is s, but never null in JSON.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// none decodes the parameters of a method that has none.
func none(c *varlink.Call) error { return c.Decode(&struct{}{}) }
