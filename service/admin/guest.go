// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	_ "embed"
	"fmt"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/varlink"
)

//go:embed guest.varlink
var guestDescription string

// Parameters of calls and replies, as guest.varlink has them.
type (
	guestStatus struct {
		Status api.GuestStatus `json:"status"`
	}
	mounts struct {
		Mounts []api.Mount `json:"mounts"`
	}
	mount struct {
		Mount api.Mount `json:"mount"`
	}
	mountCall struct {
		api.MountSpec
		At *int `json:"at,omitempty"` // index of a descriptor
	}
	detached struct {
		Mount api.Mount `json:"mount"`
		File  int       `json:"mountFileDescriptor"` // index of it
	}
	unmountCall struct {
		ID string `json:"id"`
		api.Unmounting
	}
	remountCall struct {
		ID       string `json:"id"`
		ReadOnly bool   `json:"readOnly"`
	}
	exports struct {
		Exports []api.Export `json:"exports"`
	}
	statisticsCall struct {
		ID string `json:"id"`
	}
	statistics struct {
		Statistics api.Statistics `json:"statistics"`
	}
	requests struct {
		Requests []api.Request `json:"requests"`
	}
	watched struct {
		Mounts *[]api.Mount `json:"mounts,omitempty"` // of the first reply
		Change *change      `json:"change,omitempty"` // of the others
	}
	change struct {
		Kind  api.ChangeKind `json:"kind"`
		Mount *api.Mount     `json:"mount,omitempty"` // none for api.StatusChanged
	}
)

// guestInterface is org.transfused.Guest of g.
func guestInterface(g api.Guest, r *refusals) varlink.Interface {
	s := guestServer{g}
	i := varlink.Interface{Name: api.GuestInterface, Description: guestDescription, Methods: map[string]varlink.Method{}}
	for _, m := range []struct {
		name string
		a    access
		f    varlink.Method
	}{
		{"Status", reads, s.status},
		{"Mounts", reads, s.mounts},
		{"Mount", changes, s.mount},
		{"Detached", changes, s.detached},
		{"Unmount", changes, s.unmount},
		{"Remount", changes, s.remount},
		{"Exports", reads, s.exports},
		{"Reload", reloads, s.reload},
		{"Wait", reads, s.wait},
		{"Statistics", reads, s.statistics},
		{"Trace", observes, s.trace},
		{"Watch", reads, s.watch},
	} {
		i.Methods[m.name] = r.method(i.Name, m.name, m.a, m.f)
	}
	return i
}

// guestServer serves the methods of org.transfused.Guest.
type guestServer struct{ g api.Guest }

func (s guestServer) status(_ context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	st := s.g.Status()
	st.Features = list(st.Features)
	return c.Reply(guestStatus{st})
}

func (s guestServer) mounts(_ context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	return c.Reply(mounts{wireMounts(s.g.Mounts())})
}

func (s guestServer) mount(ctx context.Context, c *varlink.Call) error {
	var in mountCall
	if err := c.Decode(&in); err != nil {
		return err
	}
	if in.At != nil {
		if *in.At < 0 || *in.At >= len(c.Files) {
			return api.Errorf(api.Invalid, "at is %d: %d descriptors came with the call", *in.At, len(c.Files))
		}
		in.MountSpec.At = c.Files[*in.At]
	}
	m, err := s.g.Mount(ctx, in.MountSpec)
	if err != nil {
		return err
	}
	return c.Reply(mount{wireMount(m)})
}

func (s guestServer) detached(ctx context.Context, c *varlink.Call) error {
	var in api.MountSpec
	if err := c.Decode(&in); err != nil {
		return err
	}
	f, m, err := s.g.Detached(ctx, in)
	if err != nil {
		return err
	}
	// The caller has a duplicate; where it is gone, this ends the mount.
	defer f.Close()
	return c.Reply(detached{Mount: wireMount(m)}, f)
}

func (s guestServer) unmount(ctx context.Context, c *varlink.Call) error {
	var in unmountCall
	if err := c.Decode(&in); err != nil {
		return err
	}
	return s.g.Unmount(ctx, in.ID, in.Unmounting)
}

func (s guestServer) remount(ctx context.Context, c *varlink.Call) error {
	var in struct {
		ID       string `json:"id"`
		ReadOnly *bool  `json:"readOnly"`
	}
	if err := c.Decode(&in); err != nil {
		return err
	}
	if in.ReadOnly == nil {
		return api.Errorf(api.Invalid, "readOnly is missing: true or false is wanted")
	}
	return s.g.Remount(ctx, in.ID, *in.ReadOnly)
}

func (s guestServer) exports(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	e, err := s.g.Exports(ctx)
	if err != nil {
		return err
	}
	return c.Reply(exports{list(e)})
}

func (s guestServer) reload(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	return s.g.Reload(ctx)
}

func (s guestServer) wait(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	return s.g.Wait(ctx)
}

func (s guestServer) statistics(_ context.Context, c *varlink.Call) error {
	var in statisticsCall
	if err := c.Decode(&in); err != nil {
		return err
	}
	st, err := s.g.Statistics(in.ID)
	if err != nil {
		return err
	}
	st.Operations = list(st.Operations)
	return c.Reply(statistics{st})
}

// Bounds of a trace: requests that wait to be sent, and those of one message, which stays far below varlink.MaxReply.
const (
	traceQueue = 4096
	traceBatch = 512
)

func (s guestServer) trace(ctx context.Context, c *varlink.Call) error {
	var in api.TraceFilter
	if err := c.Decode(&in); err != nil {
		return err
	}
	if !c.More {
		return c.Continue(nil) // says that more is wanted
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan api.Request, traceQueue)
	ended := make(chan error, 1)
	go func() {
		defer close(queue)
		ended <- s.g.Trace(ctx, in, func(r api.Request) {
			select {
			case queue <- r:
			default: // the caller reads too slowly
			}
		})
	}()
	var err error
	send := func(batch []api.Request) {
		if err = c.Continue(requests{batch}); err != nil {
			cancel()
		}
	}
	send([]api.Request{})
	batch := make([]api.Request, 0, traceBatch)
	for r := range queue {
		if err != nil {
			continue
		}
		batch = append(batch[:0], r)
	more:
		for len(batch) < traceBatch {
			select {
			case r, ok := <-queue:
				if !ok {
					break more
				}
				batch = append(batch, r)
			default:
				break more
			}
		}
		send(batch)
	}
	if e := <-ended; err == nil {
		err = e
	}
	return err
}

func (s guestServer) watch(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	if !c.More {
		return c.Continue(nil)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	now, changes := s.g.Watch(ctx)
	now = wireMounts(now)
	var err error
	send := func(w watched) {
		if err = c.Continue(w); err != nil {
			cancel()
		}
	}
	send(watched{Mounts: &now})
	for ch := range changes {
		if err != nil {
			continue
		}
		w := change{Kind: ch.Kind}
		if ch.Mount.ID != "" {
			m := wireMount(ch.Mount)
			w.Mount = &m
		}
		send(watched{Change: &w})
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("the watch has ended: %w", context.Canceled)
}

func wireMount(m api.Mount) api.Mount {
	m.Options = list(m.Options)
	return m
}

func wireMounts(ms []api.Mount) []api.Mount {
	out := make([]api.Mount, len(ms))
	for i, m := range ms {
		out[i] = wireMount(m)
	}
	return out
}
