// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/varlink"
)

// queryTimeout bounds the methods of api.Guest and api.Host that have no context: the daemon answers them at once.
const queryTimeout = 10 * time.Second

// NotRunning tells whether err says that nobody listens at the control socket.
func NotRunning(err error) bool {
	var d *errDial
	return errors.As(err, &d) && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED))
}

// client calls an interface at a control socket, each call by a connection of its own.
type client struct{ socket, iface string }

// errDial marks errors of connecting, so that an errno of the daemon's is not taken for one.
type errDial struct{ err error }

func (e *errDial) Error() string { return e.err.Error() }
func (e *errDial) Unwrap() error { return e.err }

func (c client) dial(ctx context.Context) (*varlink.Client, error) {
	v, err := varlink.Dial(ctx, c.socket)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &errDial{err}
	}
	return v, nil
}

func (c client) call(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error) {
	v, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	got, err := v.Call(ctx, c.iface+"."+method, in, out, files...)
	return got, c.fromWire(err)
}

func (c client) more(ctx context.Context, method string, in any, f func(json.RawMessage) error) error {
	v, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer v.Close()
	return c.fromWire(v.More(ctx, c.iface+"."+method, in, f))
}

// Peer is who listens at the control socket: PID 1 where systemd opened it.
func (c client) Peer(ctx context.Context) (transport.Peer, error) {
	v, err := c.dial(ctx)
	if err != nil {
		return transport.Peer{}, err
	}
	defer v.Close()
	return v.Peer(), nil
}

// fromWire makes an error that varlink carried an api.Error again.
func (c client) fromWire(err error) error {
	var e *varlink.Error
	if !errors.As(err, &e) {
		return err
	}
	if kind, ok := strings.CutPrefix(e.Name, c.iface+"."); ok {
		var f failure
		// Parameters of another shape have no errno; the text is then the error's name.
		_ = json.Unmarshal(e.Parameters, &f)
		if f.Text == "" {
			f.Text = e.Error()
		}
		return &api.Error{Kind: api.Kind(kind), Errno: f.Errno, Text: f.Text}
	}
	kind := api.Internal
	switch e.Name {
	case varlink.InterfaceNotFound, varlink.MethodNotFound, varlink.MethodNotImplemented:
		return api.Errorf(api.Unsupported, "the program at %s does not know this: %s; are both of the same version?", c.socket, e.Error())
	case varlink.InvalidParameter:
		kind = api.Invalid
	case varlink.PermissionDenied:
		kind = api.Denied
	}
	return &api.Error{Kind: kind, Text: e.Error()}
}

// GuestClient is the guest's daemon behind a control socket. Its methods do what api.Guest says; those whose signatures there have no
// error have a twin that has one.
type GuestClient struct{ client }

var _ api.Guest = (*GuestClient)(nil)

// NewGuest returns the guest's daemon at a control socket. It connects for each call.
func NewGuest(socket string) *GuestClient {
	return &GuestClient{client{socket, api.GuestInterface}}
}

// Status is GetStatus; where that fails its Text says why.
func (c *GuestClient) Status() api.GuestStatus {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	s, err := c.GetStatus(ctx)
	if err != nil {
		s.Text = err.Error()
	}
	return s
}

// GetStatus tells how the daemon does.
func (c *GuestClient) GetStatus(ctx context.Context) (api.GuestStatus, error) {
	var out guestStatus
	_, err := c.call(ctx, "Status", nil, &out)
	return out.Status, err
}

// Mounts is GetMounts; none where that fails.
func (c *GuestClient) Mounts() []api.Mount {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	ms, _ := c.GetMounts(ctx) // the interface has no place for the error
	return ms
}

// GetMounts are all that the daemon has or wants, by ID.
func (c *GuestClient) GetMounts(ctx context.Context) ([]api.Mount, error) {
	var out mounts
	_, err := c.call(ctx, "Mounts", nil, &out)
	return out.Mounts, err
}

// Mount mounts an export; spec.At is passed, and stays the caller's.
func (c *GuestClient) Mount(ctx context.Context, spec api.MountSpec) (api.Mount, error) {
	in := mountCall{MountSpec: spec}
	var files []*os.File
	if spec.At != nil {
		in.At = new(int)
		files = append(files, spec.At)
	}
	var out mount
	_, err := c.call(ctx, "Mount", in, &out, files...)
	return out.Mount, err
}

// Detached makes a mount that is nowhere yet. The descriptor is the caller's.
func (c *GuestClient) Detached(ctx context.Context, spec api.MountSpec) (*os.File, api.Mount, error) {
	if spec.At != nil {
		return nil, api.Mount{}, api.Errorf(api.Invalid, "a detached mount has no directory of the daemon's")
	}
	var out detached
	files, err := c.call(ctx, "Detached", spec, &out)
	if err != nil {
		return nil, api.Mount{}, err
	}
	if len(files) != 1 || out.File != 0 {
		for _, f := range files {
			f.Close()
		}
		return nil, api.Mount{}, api.Errorf(api.Internal, "the daemon passed %d descriptors and named number %d: one is wanted", len(files), out.File)
	}
	return files[0], out.Mount, nil
}

// Unmount ends a mount.
func (c *GuestClient) Unmount(ctx context.Context, id string, how api.Unmounting) error {
	_, err := c.call(ctx, "Unmount", unmountCall{id, how}, nil)
	return err
}

// Remount makes a mount read-only, or writable.
func (c *GuestClient) Remount(ctx context.Context, id string, readOnly bool) error {
	_, err := c.call(ctx, "Remount", remountCall{id, readOnly}, nil)
	return err
}

// Exports are what the host offers.
func (c *GuestClient) Exports(ctx context.Context) ([]api.Export, error) {
	var out exports
	_, err := c.call(ctx, "Exports", nil, &out)
	return out.Exports, err
}

// Reload has the daemon read its configuration again.
func (c *GuestClient) Reload(ctx context.Context) error {
	_, err := c.call(ctx, "Reload", nil, nil)
	return err
}

// Wait returns when the host is connected, or ctx ends.
func (c *GuestClient) Wait(ctx context.Context) error {
	_, err := c.call(ctx, "Wait", nil, nil)
	return err
}

// Statistics is GetStatistics within a few seconds.
func (c *GuestClient) Statistics(id string) (api.Statistics, error) {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	return c.GetStatistics(ctx, id)
}

// GetStatistics are the counts of a mount.
func (c *GuestClient) GetStatistics(ctx context.Context, id string) (api.Statistics, error) {
	var out statistics
	_, err := c.call(ctx, "Statistics", statisticsCall{id}, &out)
	return out.Statistics, err
}

// Trace calls f for each request until ctx ends.
func (c *GuestClient) Trace(ctx context.Context, filter api.TraceFilter, f func(api.Request)) error {
	return c.more(ctx, "Trace", filter, func(b json.RawMessage) error {
		var r requests
		if err := json.Unmarshal(b, &r); err != nil {
			return fmt.Errorf("Trace: %w", err)
		}
		for _, r := range r.Requests {
			f(r)
		}
		return nil
	})
}

// Watch returns the mounts and the changes after that. Where the daemon can't be asked, or ends, there are none, and the channel is closed
// before ctx ends. The daemon leaves changes out only for a reader that is behind by more than the socket holds.
func (c *GuestClient) Watch(ctx context.Context) ([]api.Mount, <-chan api.Change) {
	first := make(chan []api.Mount, 1)
	changes := make(chan api.Change)
	go func() {
		defer close(changes)
		defer close(first)
		begun := false
		// An error ends the channel: that is how it is told.
		_ = c.more(ctx, "Watch", nil, func(b json.RawMessage) error {
			var w watched
			if err := json.Unmarshal(b, &w); err != nil {
				return err
			}
			if w.Mounts != nil && !begun {
				begun = true
				first <- *w.Mounts
			}
			if w.Change == nil {
				return nil
			}
			ch := api.Change{Kind: w.Change.Kind}
			if w.Change.Mount != nil {
				ch.Mount = *w.Change.Mount
			}
			select {
			case changes <- ch:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	return <-first, changes
}

// HostClient is the host's server behind a control socket, as GuestClient is the guest's daemon.
type HostClient struct{ client }

var _ api.Host = (*HostClient)(nil)

// NewHost returns the host's server at a control socket. It connects for each call.
func NewHost(socket string) *HostClient {
	return &HostClient{client{socket, api.HostInterface}}
}

// Status is GetStatus; where that fails its Text says why.
func (c *HostClient) Status() api.HostStatus {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	s, err := c.GetStatus(ctx)
	if err != nil {
		s.Text = err.Error()
	}
	return s
}

// GetStatus tells how the server does.
func (c *HostClient) GetStatus(ctx context.Context) (api.HostStatus, error) {
	var out hostStatus
	_, err := c.call(ctx, "Status", nil, &out)
	return out.Status, err
}

// Exports is GetExports; none where that fails.
func (c *HostClient) Exports() []api.Export {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	e, _ := c.GetExports(ctx) // the interface has no place for the error
	return e
}

// GetExports are what can be mounted.
func (c *HostClient) GetExports(ctx context.Context) ([]api.Export, error) {
	var out exports
	_, err := c.call(ctx, "Exports", nil, &out)
	return out.Exports, err
}

// Sessions is GetSessions; none where that fails.
func (c *HostClient) Sessions() []api.Session {
	ctx, cancel := context.WithTimeout(context.Background(), queryTimeout)
	defer cancel()
	s, _ := c.GetSessions(ctx) // the interface has no place for the error
	return s
}

// GetSessions are the guests that are there.
func (c *HostClient) GetSessions(ctx context.Context) ([]api.Session, error) {
	var out sessions
	_, err := c.call(ctx, "Sessions", nil, &out)
	return out.Sessions, err
}

// Reload has the server read its configuration again.
func (c *HostClient) Reload(ctx context.Context) error {
	_, err := c.call(ctx, "Reload", nil, nil)
	return err
}

// Watch returns a channel that has a value after something changed. It is closed when ctx or the server ends.
func (c *HostClient) Watch(ctx context.Context) <-chan struct{} {
	begun := make(chan struct{})
	changed := make(chan struct{}, 1)
	go func() {
		defer close(changed)
		first := true
		_ = c.more(ctx, "Watch", nil, func(json.RawMessage) error {
			if first {
				first = false
				close(begun)
				return nil
			}
			select {
			case changed <- struct{}{}:
			default:
			}
			return nil
		})
		if first {
			close(begun)
		}
	}()
	<-begun
	return changed
}
