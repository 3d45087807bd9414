// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
)

func newHost() *fakeHost {
	return &fakeHost{status: api.HostStatus{Version: "1.2.3", Listen: []string{"vsock:any:1524"}}, sessions: map[string]api.Session{}}
}

func aSession(id string) api.Session {
	return api.Session{ID: id, Peer: "vsock:3:1023", Guest: "transfused 1.2.3", Kernel: "6.18", Protocol: 2, Since: time.UnixMicro(1700000000123456),
		Mounts: []api.GuestsMount{{Tag: "src", Directory: "/srv/\xff", ReadOnly: true, Streams: 2}}}
}

func sessionValues() map[string]any {
	return map[string]any{"Peer": "vsock:3:1023", "Guest": "transfused 1.2.3", "Kernel": "6.18", "Protocol": uint32(2), "Since": uint64(1700000000123456),
		"Lost": false, "Mounts": [][]any{{"src", "/srv/\uFFFD", true, uint32(2)}}}
}

func TestHost(t *testing.T) {
	b := runningBus(t)
	h := newHost()
	serveHost(t, b, h, Config{})
	c := b.user()
	if d := cmp.Diff(map[string]any{"Version": "1.2.3", "Listen": []string{"vsock:any:1524"}, "State": "idle"},
		values(t, c, HostName, hostRoot, HostName+".Manager")); d != "" {
		t.Error(d)
	}
	var es []hostExport
	if err := dbus.Store(do(t, c, HostName, hostRoot, HostName+".Manager.Exports"), &es); err != nil {
		t.Fatal(err)
	}
	want := []hostExport{{"src", true, "sources", "/srv/src", []string{"3", "unix:/run/a"}, []string{"root=trust"}}}
	if d := cmp.Diff(want, es); d != "" {
		t.Error(d)
	}

	ch := signals(t, c, HostName)
	path := dbus.ObjectPath(sessionRoot + "s1")
	h.change(func(h *fakeHost) { h.sessions["s1"] = aSession("s1") })
	wantChange(t, next(t, ch), hostRoot, HostName+".Manager", map[string]any{"State": "serving"})
	s := next(t, ch)
	if s.Name != managerName+".InterfacesAdded" || s.Path != hostRoot || s.Body[0] != path {
		t.Errorf("%v", s)
	}
	if d := cmp.Diff(sessionValues(), plain(s.Body[1].(map[string]map[string]dbus.Variant)[HostName+".Session"])); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(sessionValues(), values(t, c, HostName, path, HostName+".Session")); d != "" {
		t.Error(d)
	}
	h.change(func(h *fakeHost) {
		s := aSession("s1")
		s.Lost, s.Mounts, s.Peer, s.Guest, s.Kernel, s.Protocol = true, nil, "vsock:3:1022", "g", "k", 3
		s.Since = time.UnixMicro(1) // constant: not told
		h.sessions["s1"] = s
	})
	wantChange(t, next(t, ch), path, HostName+".Session", map[string]any{"Lost": true, "Mounts": [][]any{}, "Peer": "vsock:3:1022", "Guest": "g", "Kernel": "k", "Protocol": uint32(3)})
	h.change(func(h *fakeHost) {
		delete(h.sessions, "s1")
		h.status.Listen = nil
	})
	if s := next(t, ch); s.Name != managerName+".InterfacesRemoved" || s.Body[0] != path {
		t.Errorf("%v", s)
	}
	wantChange(t, next(t, ch), hostRoot, HostName+".Manager", map[string]any{"State": "idle", "Listen": []string{}})
}

func TestHostReload(t *testing.T) {
	b := runningBus(t)
	p := b.polkit()
	h := newHost()
	serveHost(t, b, h, Config{})
	c := b.user()
	reload := func() error {
		_, err := try(c, HostName, hostRoot, HostName+".Manager.Reload", 0)
		return err
	}
	wantError(t, reload(), "org.transfused.Host1.Error.Denied", "org.transfused.Host1.reload")
	p.set(polkitAnswer{Authorized: true})
	if err := reload(); err != nil {
		t.Error(err)
	}
	h.mu.Lock()
	h.fail = api.Errorf(api.Invalid, "/etc/transfuse/host.toml:3: no")
	h.mu.Unlock()
	wantError(t, reload(), "org.transfused.Host1.Error.Invalid", "host.toml:3")
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.reloads != 2 {
		t.Errorf("%d reloads", h.reloads)
	}
}
