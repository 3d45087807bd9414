// SPDX-License-Identifier: Apache-2.0

package host

import (
	"strings"
	"testing"

	"transfused.org/transfused/service/transport"
)

func TestWarnings(t *testing.T) {
	vsock := transport.Addr{Family: transport.Vsock, CID: transport.CIDAny, Port: 1524}
	hybrid := transport.Addr{Family: transport.Hybrid, Path: "/run/v.sock", Port: 1524}
	users := transport.Addr{Family: transport.Unix, Path: "/run/h.sock"}
	token := []byte("0123456789abcdef")
	listen := func(as ...transport.Addr) []transport.Addr { return as }
	export := func(rs ...GuestRule) []Export { return []Export{{Tag: "x", Guests: rs}} }
	mounts := []GuestMount{{Tag: "x", Dir: "/mnt"}}
	for _, c := range []struct {
		name string
		c    Config
		want string // of the one warning; empty: none
	}{
		{"users", Config{Listen: listen(users), Exports: export()}, ""},
		{"users beside vsock", Config{Listen: listen(vsock, users), Exports: export()}, ""},
		{"vsock without a rule", Config{Listen: listen(vsock), Exports: export()}, "export x: nobody may mount it"},
		{"vsock with a rule", Config{Listen: listen(vsock), Exports: export(GuestRule{CID: 7})}, ""},
		{"any", Config{Listen: listen(vsock), Exports: export(GuestRule{Any: true})}, ""},
		{"mounted by the host", Config{Listen: listen(vsock), Exports: export(), Guests: []Guest{{transport.Addr{Family: transport.Vsock, CID: 7, Port: 1525}, mounts}}}, ""},
		{"mounted at a Unix guest", Config{Listen: listen(vsock), Exports: export(), Guests: []Guest{{users, mounts}}}, "nobody may mount it"},
		{"a path that is not listened on", Config{Listen: listen(users), Exports: export(GuestRule{Path: "/run/other.sock"})}, "guests=/run/other.sock: no guest"},
		{"a path that is", Config{Listen: listen(users), Exports: export(GuestRule{Path: "/run/h.sock"})}, ""},
		{"a CID without vsock", Config{Listen: listen(users), Exports: export(GuestRule{CID: 7})}, "guests=7: no guest"},
		{"hybrid without a token", Config{Listen: listen(hybrid), Exports: export(GuestRule{Path: hybrid.Path})}, "--token-file"},
		{"hybrid with a token", Config{Listen: listen(hybrid), Token: token, Exports: export(GuestRule{Path: hybrid.Path})}, ""},
		{"hybrid for all", Config{Listen: listen(hybrid), AllowUnprivileged: true, Exports: export(GuestRule{Any: true})}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := strings.Join(c.c.warnings(), "\n")
			if c.want == "" && got != "" || !strings.Contains(got, c.want) || strings.Contains(got, "\n") {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}
