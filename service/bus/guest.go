// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"strings"

	"github.com/godbus/dbus/v5"

	"transfused.org/transfused/service/api"
)

// Where the guest's daemon is on the bus.
const (
	GuestName = "org.transfused1"
	guestRoot = dbus.ObjectPath("/org/transfused1")
	mountRoot = string(guestRoot) + "/mount/"
)

// Flags of Unmount.
const (
	unmountForce = 1
	unmountLazy  = 2
)

// StartGuest keeps d on the bus until ctx ends, and for as long as there is one. It returns when the name is taken, or was not to be
// had at once: after that a service is ready. It never fails; what is wrong is logged.
func StartGuest(ctx context.Context, d api.Guest, c Config) *Service {
	return start(ctx, (&guest{d: d}).served(), c)
}

type guest struct {
	d       api.Guest
	manager *iface
	mount   *iface
}

func (g *guest) served() *served {
	g.manager = &iface{name: GuestName + ".Manager", methods: []method{
		{name: "Mount", in: []arg{{"tag", "s"}, {"directory", "s"}, {"options", "as"}}, out: []arg{{"mount", "o"}}, call: g.mountExport},
		{name: "Unmount", in: []arg{{"mount", "o"}, {"flags", "u"}}, call: g.unmountPath},
		{name: "Exports", out: []arg{{"exports", "a(sbs)"}}, call: g.exports},
		{name: "Reload", call: g.reload},
	}, properties: []property{
		{name: "Version", typ: "s", constant: true},
		{name: "Server", typ: "s"},
		{name: "State", typ: "s"},
		{name: "Protocol", typ: "u"},
		{name: "Features", typ: "as"},
	}}
	g.mount = &iface{name: GuestName + ".Mount", methods: []method{
		{name: "GetStatistics", out: []arg{{"statistics", "a{sv}"}}, call: g.statistics},
		{name: "Unmount", in: []arg{{"flags", "u"}}, call: g.unmountThis},
	}, properties: []property{
		{name: "MountPoint", typ: "s", constant: true},
		{name: "Tag", typ: "s", constant: true},
		{name: "Source", typ: "s", constant: true},
		{name: "ReadOnly", typ: "b"}, // a mount can be made read-only, and writable, while it stands
		{name: "State", typ: "s"},
		{name: "Error", typ: "s"},
		{name: "Since", typ: "t"},
		{name: "Streams", typ: "u"},
	}}
	return &served{name: GuestName, root: guestRoot, objects: g.objects, watch: g.watch}
}

func (g *guest) objects() map[dbus.ObjectPath]object {
	st := g.d.Status()
	state := "disconnected"
	if st.Connected {
		state = "connected"
	}
	all := map[dbus.ObjectPath]object{
		guestRoot: {g.manager, []any{text(st.Version), text(st.Server), state, uint32(st.Protocol), texts(st.Features)}},
	}
	for _, m := range g.d.Mounts() {
		all[mountPath(m.ID)] = object{g.mount, []any{text(m.Directory), text(m.Tag), text(m.Source), m.ReadOnly,
			string(m.State), text(m.Error), since(m.Since), uint32(m.Streams)}}
	}
	return all
}

// watch reads the daemon's changes whether or not the bus takes them.
func (g *guest) watch(ctx context.Context) <-chan struct{} {
	_, changes := g.d.Watch(ctx)
	some := make(chan struct{}, 1)
	go func() {
		defer close(some)
		for range changes {
			select {
			case some <- struct{}{}:
			default: // one is waiting
			}
		}
	}()
	return some
}

func mountPath(id string) dbus.ObjectPath { return dbus.ObjectPath(mountRoot + id) }

// find returns the mount at path.
func (g *guest) find(path dbus.ObjectPath) (api.Mount, error) {
	for _, m := range g.d.Mounts() {
		if mountPath(m.ID) == path {
			return m, nil
		}
	}
	return api.Mount{}, api.Errorf(api.NotFound, "%s is no mount: GetManagedObjects of %s has those that there are", path, guestRoot)
}

func (g *guest) mountExport(c *call) ([]any, error) {
	spec := api.MountSpec{Tag: c.args[0].(string), Directory: c.args[1].(string), Options: c.args[2].([]string)}
	if spec.Tag == "" {
		return nil, api.Errorf(api.Invalid, "the tag is empty: name an export, as Exports lists them")
	}
	if err := checkDirectory(spec.Directory); err != nil {
		return nil, err
	}
	if err := c.authorize("mount", map[string]string{"tag": spec.Tag, "directory": spec.Directory, "options": strings.Join(spec.Options, ",")}); err != nil {
		return nil, err
	}
	// Not before: what is found says something of directories that the caller may not see.
	at, err := openDirectory(spec.Directory)
	if err != nil {
		return nil, err
	}
	if at != nil {
		defer at.Close()
		spec.At = at
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.conn.c.callTime)
	defer cancel()
	m, err := g.d.Mount(ctx, spec)
	if err != nil {
		return nil, err
	}
	c.conn.update() // so that the caller finds the object
	return []any{mountPath(m.ID)}, nil
}

func (g *guest) unmountPath(c *call) ([]any, error) {
	return nil, g.unmount(c, c.args[0].(dbus.ObjectPath), c.args[1].(uint32))
}

func (g *guest) unmountThis(c *call) ([]any, error) {
	return nil, g.unmount(c, c.path, c.args[0].(uint32))
}

func (g *guest) unmount(c *call, path dbus.ObjectPath, flags uint32) error {
	if flags&^(unmountForce|unmountLazy) != 0 {
		return api.Errorf(api.Invalid, "flags %#x: 1 (force) and 2 (lazy) are known", flags)
	}
	m, err := g.find(path)
	if err != nil {
		return err
	}
	if err := c.authorize("unmount", map[string]string{"tag": text(m.Tag), "directory": text(m.Directory)}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.conn.c.callTime)
	defer cancel()
	if err := g.d.Unmount(ctx, m.ID, api.Unmounting{Force: flags&unmountForce != 0, Lazy: flags&unmountLazy != 0}); err != nil {
		return err
	}
	c.conn.update() // so that the caller does not find it
	return nil
}

// export is one of Exports.
type export struct {
	Tag      string
	ReadOnly bool
	Text     string
}

func (g *guest) exports(c *call) ([]any, error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.conn.c.callTime)
	defer cancel()
	es, err := g.d.Exports(ctx)
	out := make([]export, len(es))
	for i, e := range es {
		out[i] = export{text(e.Tag), e.ReadOnly, text(e.Text)}
	}
	return []any{out}, err
}

func (g *guest) reload(c *call) ([]any, error) { return nil, c.reload(g.d.Reload) }

// reload asks whether the caller may have the configuration read again, and does it.
func (c *call) reload(f func(context.Context) error) error {
	if err := c.authorize("reload", nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.conn.c.callTime)
	defer cancel()
	if err := f(ctx); err != nil {
		return err
	}
	c.conn.update()
	return nil
}

// operation is one of the statistics' Operations.
type operation struct {
	Name               string
	Requests           uint64
	P50, P90, P99, Max uint64
}

func (g *guest) statistics(c *call) ([]any, error) {
	m, err := g.find(c.path)
	if err != nil {
		return nil, err
	}
	s, err := g.d.Statistics(m.ID)
	if err != nil {
		return nil, err
	}
	ops := make([]operation, len(s.Operations))
	for i, o := range s.Operations {
		ops[i] = operation{text(o.Name), o.Requests, o.Latency.P50, o.Latency.P90, o.Latency.P99, o.Latency.Max}
	}
	out := map[string]dbus.Variant{}
	for name, v := range map[string]any{
		"Requests": s.Requests, "InFlight": s.InFlight, "RequestBytes": s.RequestBytes, "ReplyBytes": s.ReplyBytes, "Dropped": s.Dropped,
		"LatencyP50NSec": s.Latency.P50, "LatencyP90NSec": s.Latency.P90, "LatencyP99NSec": s.Latency.P99, "LatencyMaxNSec": s.Latency.Max,
		"Operations": ops,
	} {
		out[name] = dbus.MakeVariant(v)
	}
	return []any{out}, nil
}
