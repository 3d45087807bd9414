// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"

	"github.com/godbus/dbus/v5"

	"transfused.org/transfused/service/api"
)

// Where the host's server is on the bus.
const (
	HostName    = "org.transfused.Host1"
	hostRoot    = dbus.ObjectPath("/org/transfused/Host1")
	sessionRoot = string(hostRoot) + "/session/"
)

// StartHost keeps d on the bus, as StartGuest does a guest's daemon. It is for the plain service, not for instances.
func StartHost(ctx context.Context, d api.Host, c Config) *Service {
	return start(ctx, (&host{d: d}).served(), c)
}

type host struct {
	d       api.Host
	manager *iface
	session *iface
}

func (h *host) served() *served {
	h.manager = &iface{name: HostName + ".Manager", methods: []method{
		{name: "Exports", out: []arg{{"exports", "a(sbssasas)"}}, call: h.exports},
		{name: "Reload", call: h.reload},
	}, properties: []property{
		{name: "Version", typ: "s", constant: true},
		{name: "Listen", typ: "as"},
		{name: "State", typ: "s"},
	}}
	h.session = &iface{name: HostName + ".Session", properties: []property{
		{name: "Peer", typ: "s"}, // its port is another after each time that it connects again
		{name: "Guest", typ: "s"},
		{name: "Kernel", typ: "s"},
		{name: "Protocol", typ: "u"},
		{name: "Since", typ: "t", constant: true},
		{name: "Lost", typ: "b"},
		{name: "Mounts", typ: "a(ssbu)"},
	}}
	return &served{name: HostName, root: hostRoot, objects: h.objects, watch: h.d.Watch}
}

// guestsMount is one of a session's Mounts.
type guestsMount struct {
	Tag, Directory string
	ReadOnly       bool
	Streams        uint32
}

func (h *host) objects() map[dbus.ObjectPath]object {
	st := h.d.Status()
	sessions := h.d.Sessions()
	state := "idle"
	if len(sessions) > 0 {
		state = "serving"
	}
	all := map[dbus.ObjectPath]object{hostRoot: {h.manager, []any{text(st.Version), texts(st.Listen), state}}}
	for _, s := range sessions {
		mounts := make([]guestsMount, len(s.Mounts))
		for i, m := range s.Mounts {
			mounts[i] = guestsMount{text(m.Tag), text(m.Directory), m.ReadOnly, uint32(m.Streams)}
		}
		all[dbus.ObjectPath(sessionRoot+s.ID)] = object{h.session, []any{text(s.Peer), text(s.Guest), text(s.Kernel), uint32(s.Protocol),
			since(s.Since), s.Lost, mounts}}
	}
	return all
}

// hostExport is one of Exports.
type hostExport struct {
	Tag             string
	ReadOnly        bool
	Text, Directory string
	Guests, Options []string
}

func (h *host) exports(*call) ([]any, error) {
	es := h.d.Exports()
	out := make([]hostExport, len(es))
	for i, e := range es {
		out[i] = hostExport{text(e.Tag), e.ReadOnly, text(e.Text), text(e.Directory), texts(e.Guests), texts(e.Options)}
	}
	return []any{out}, nil
}

func (h *host) reload(c *call) ([]any, error) { return nil, c.reload(h.d.Reload) }
