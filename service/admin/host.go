// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	_ "embed"
	"fmt"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/varlink"
)

//go:embed host.varlink
var hostDescription string

// Parameters of replies, as host.varlink has them.
type (
	hostStatus struct {
		Status api.HostStatus `json:"status"`
	}
	sessions struct {
		Sessions []api.Session `json:"sessions"`
	}
)

// hostInterface is org.transfused.Host of h.
func hostInterface(h api.Host, r *refusals) varlink.Interface {
	s := hostServer{h}
	i := varlink.Interface{Name: api.HostInterface, Description: hostDescription, Methods: map[string]varlink.Method{}}
	for _, m := range []struct {
		name string
		a    access
		f    varlink.Method
	}{
		{"Status", reads, s.status},
		{"Exports", reads, s.exports},
		{"Sessions", observes, s.sessions},
		{"Reload", reloads, s.reload},
		{"Watch", reads, s.watch},
	} {
		i.Methods[m.name] = r.method(i.Name, m.name, m.a, m.f)
	}
	return i
}

// hostServer serves the methods of org.transfused.Host.
type hostServer struct{ h api.Host }

func (s hostServer) status(_ context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	st := s.h.Status()
	st.Listen = list(st.Listen)
	return c.Reply(hostStatus{st})
}

func (s hostServer) exports(_ context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	return c.Reply(exports{list(s.h.Exports())})
}

func (s hostServer) sessions(_ context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	out := []api.Session{}
	for _, se := range s.h.Sessions() {
		se.Mounts = list(se.Mounts)
		out = append(out, se)
	}
	return c.Reply(sessions{out})
}

func (s hostServer) reload(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	return s.h.Reload(ctx)
}

func (s hostServer) watch(ctx context.Context, c *varlink.Call) error {
	if err := none(c); err != nil {
		return err
	}
	if !c.More {
		return c.Continue(nil)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes := s.h.Watch(ctx)
	err := c.Continue(nil)
	for err == nil {
		if _, ok := <-changes; !ok {
			return fmt.Errorf("the watch has ended: %w", context.Canceled)
		}
		err = c.Continue(nil)
	}
	return err
}
