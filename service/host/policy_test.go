// SPDX-License-Identifier: Apache-2.0

package host

import (
	"strings"
	"testing"

	"transfused.org/transfused/service/transport"
)

func TestAdmit(t *testing.T) {
	const me = 1000
	token := []byte("0123456789abcdef")
	vsock := func(cid, port uint32) transport.Peer {
		return transport.Peer{Family: transport.Vsock, CID: cid, Port: port, Local: transport.Addr{Family: transport.Vsock, CID: transport.CIDAny, Port: 1524}}
	}
	hybrid := transport.Peer{Family: transport.Hybrid, UID: 33, Local: transport.Addr{Family: transport.Hybrid, Path: "/run/v.sock", Port: 1524}}
	unixUser := func(uid uint32) transport.Peer {
		return transport.Peer{Family: transport.Unix, UID: uid, PID: 1, Local: transport.Addr{Family: transport.Unix, Path: "/run/h.sock"}}
	}
	rules := func(rs ...GuestRule) policy {
		return policy{exports: []*Export{{Tag: "x", Guests: rs}}, uid: me}
	}
	with := func(p policy, f func(*policy)) policy { f(&p); return p }
	everyone := rules(GuestRule{Any: true})
	anyToken := with(everyone, func(p *policy) { p.token = token })
	open := func(p *policy) { p.allowUnprivileged = true }
	asks := func(a transport.Addr) policy {
		p := rules()
		p.guests = []Guest{{a, []GuestMount{{Tag: "x", Dir: "/mnt"}}}}
		return p
	}
	for _, c := range []struct {
		name  string
		p     policy
		peer  transport.Peer
		token string
		err   string // empty: admitted
	}{
		{"named CID", rules(GuestRule{CID: 7}), vsock(7, 1023), "", ""},
		{"another CID", rules(GuestRule{CID: 7}), vsock(8, 1023), "", "guests=8"},
		{"any", everyone, vsock(8, 1), "", ""},
		{"no rules", rules(), vsock(8, 1), "", "guests=8"},
		{"unprivileged port", everyone, vsock(8, 1024), "", "--allow-unprivileged-guests"},
		{"unprivileged port allowed", with(everyone, open), vsock(8, 50000), "", ""},
		{"CID 0 by any", everyone, vsock(0, 1), "", "guests=0"},
		{"CID 1 by any", everyone, vsock(transport.CIDLocal, 1), "", "guests=1"},
		{"CID 2 by any", with(everyone, open), vsock(transport.CIDHost, 1), "", "guests=2"},
		{"CID 1 named", rules(GuestRule{CID: 1}), vsock(1, 1), "", ""},
		{"CID 0 named", rules(GuestRule{CID: 0}), vsock(0, 1), "", ""},
		{"CID that the host asks", asks(transport.Addr{Family: transport.Vsock, CID: 7, Port: 1525}), vsock(7, 1), "", ""},
		{"CID that the host does not ask", asks(transport.Addr{Family: transport.Vsock, CID: 7, Port: 1525}), vsock(8, 1), "", "guests=8"},
		{"wrong token over vsock", anyToken, vsock(7, 1), "wrong", "wrong token"},
		{"no token over vsock", anyToken, vsock(7, 1), "", ""},

		{"hybrid, no token anywhere", everyone, hybrid, "", "--token-file"},
		{"hybrid, no token, open", with(everyone, open), hybrid, "", ""},
		{"hybrid, right token", anyToken, hybrid, string(token), ""},
		{"hybrid, wrong token", anyToken, hybrid, "0123456789abcdeX", "wrong token"},
		{"hybrid, beginning of the token", anyToken, hybrid, string(token[:15]), "wrong token"},
		{"hybrid, no token given", anyToken, hybrid, "", "no token"},
		{"hybrid, wrong token, open", with(anyToken, open), hybrid, "x", "wrong token"},
		{"hybrid, a token that nobody asked for", everyone, hybrid, string(token), "--token-file"},
		{"hybrid by path", with(rules(GuestRule{Path: "/run/v.sock"}), open), hybrid, "", ""},
		{"hybrid by another path", with(rules(GuestRule{Path: "/run/w.sock"}), open), hybrid, "", "guests=/run/v.sock"},
		{"hybrid without rules", with(rules(), open), hybrid, "", "guests=/run/v.sock"},
		{"hybrid that the host asks", with(asks(transport.Addr{Family: transport.Hybrid, Path: "/run/v.sock", Port: 1525}), open), hybrid, "", ""},

		{"own uid", rules(), unixUser(me), "", ""},
		{"root", rules(), unixUser(0), "", ""},
		{"another uid", rules(), unixUser(1001), "", "guests=/run/h.sock"},
		{"another uid, asked by the host", asks(transport.Addr{Family: transport.Unix, Path: "/run/g.sock"}), unixUser(1001), "", "guests=/run/h.sock"},
		{"another uid by path", rules(GuestRule{Path: "/run/h.sock"}), unixUser(1001), "", ""},
		{"own uid, but others are named", rules(GuestRule{CID: 7}), unixUser(me), "", "guests=/run/h.sock"},
		{"nobody", everyone, transport.Peer{}, "", "unknown peer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.p.admit(c.peer, []byte(c.token))
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %v, want %q", err, c.err)
			}
		})
	}
}

func TestVisible(t *testing.T) {
	p := policy{uid: 5, exports: []*Export{
		{Tag: "mine"}, {Tag: "vm7", Guests: []GuestRule{{CID: 7}}}, {Tag: "all", Guests: []GuestRule{{Any: true}}},
	}}
	for _, c := range []struct {
		peer transport.Peer
		want string
	}{
		{transport.Peer{Family: transport.Unix, UID: 5}, "mine all"},
		{transport.Peer{Family: transport.Unix, UID: 6}, "all"},
		{transport.Peer{Family: transport.Vsock, CID: 7}, "vm7 all"},
		{transport.Peer{Family: transport.Vsock, CID: 1}, ""},
	} {
		var tags []string
		for _, e := range p.visible(c.peer) {
			tags = append(tags, e.Tag)
		}
		if got := strings.Join(tags, " "); got != c.want {
			t.Errorf("%v sees %q, want %q", c.peer, got, c.want)
		}
	}
	if p.export(transport.Peer{Family: transport.Vsock, CID: 8}, "vm7") != nil {
		t.Error("an export of another guest")
	}
}
