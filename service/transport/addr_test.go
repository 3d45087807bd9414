// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	long := "/" + strings.Repeat("x", maxPath-1)
	tests := []struct {
		name, in string
		want     Addr
		str      string // "": as in
	}{
		{name: "vsock", in: "vsock:7:1524", want: Addr{Family: Vsock, CID: 7, Port: 1524}},
		{name: "vsock host", in: "vsock:host:1524", want: Addr{Family: Vsock, CID: CIDHost, Port: 1524}},
		{name: "vsock host by number", in: "vsock:2:1524", want: Addr{Family: Vsock, CID: CIDHost, Port: 1524}, str: "vsock:host:1524"},
		{name: "vsock any", in: "vsock:any:0", want: Addr{Family: Vsock, CID: CIDAny}},
		{name: "vsock any by number", in: "vsock:4294967295:1", want: Addr{Family: Vsock, CID: CIDAny, Port: 1}, str: "vsock:any:1"},
		{name: "vsock local", in: "vsock:local:9", want: Addr{Family: Vsock, CID: CIDLocal, Port: 9}},
		{name: "vsock port beyond 16 bits", in: "vsock:7:70000", want: Addr{Family: Vsock, CID: 7, Port: 70000}},
		{name: "version 1", in: "v:2:1524", want: Addr{Family: Vsock, CID: CIDHost, Port: 1524}, str: "vsock:host:1524"},
		{name: "version 1 any", in: "v:_:1525", want: Addr{Family: Vsock, CID: CIDAny, Port: 1525}, str: "vsock:any:1525"},
		{name: "hybrid", in: "hybrid:/run/v.sock:1524", want: Addr{Family: Hybrid, Path: "/run/v.sock", Port: 1524}},
		{name: "hybrid with colons", in: "hybrid:/run/a:b:2:3", want: Addr{Family: Hybrid, Path: "/run/a:b:2", Port: 3}},
		{name: "unix", in: "unix:/run/t.sock", want: Addr{Family: Unix, Path: "/run/t.sock"}},
		{name: "unix with colons", in: "unix:/run/t:1", want: Addr{Family: Unix, Path: "/run/t:1"}},
		{name: "longest path", in: "unix:" + long, want: Addr{Family: Unix, Path: long}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "address", tt.want, got)
			if tt.str == "" {
				tt.str = tt.in
			}
			diff(t, "String", tt.str, got.String())
		})
	}
}

func TestParseErrors(t *testing.T) {
	const forms = `unknown form; write vsock:CID:PORT, hybrid:/path/to/v.sock:PORT or unix:/path`
	tests := []struct{ name, in, want string }{
		{"empty", "", `address "": ` + forms},
		{"unknown form", "tcp:localhost:80", `address "tcp:localhost:80": ` + forms},
		{"bare path", "/run/x.sock", `address "/run/x.sock": ` + forms},
		{"no port", "vsock:2", `address "vsock:2": no port; write vsock:CID:PORT`},
		{"port too large", "vsock:7:4294967296", `address "vsock:7:4294967296": port "4294967296" must be 0 to 4294967295`},
		{"port negative", "vsock:7:-1", `address "vsock:7:-1": port "-1" must be 0 to 4294967295`},
		{"port with more behind", "vsock:7:1:2", `address "vsock:7:1:2": port "1:2" must be 0 to 4294967295`},
		{"CID a word", "vsock:guest:1", `address "vsock:guest:1": CID "guest" must be 0 to 4294967295, host, any or local`},
		{"CID of version 1", "vsock:_:1", `address "vsock:_:1": CID "_" must be 0 to 4294967295, host, any or local`},
		{"CID a word in version 1", "v:host:1", `address "v:host:1": CID "host" must be 0 to 4294967295, or _ for any`},
		{"hybrid without port", "hybrid:/run/v.sock", `address "hybrid:/run/v.sock": no port; write hybrid:/path/to/v.sock:PORT`},
		{"hybrid without path", "hybrid::1", `address "hybrid::1": path "" must be absolute; begin it with /`},
		{"unix without path", "unix:", `address "unix:": path "" must be absolute; begin it with /`},
		{"abstract", "unix:@x", `address "unix:@x": path "@x" must be absolute; begin it with /`},
		{"relative", "unix:x.sock", `address "unix:x.sock": path "x.sock" must be absolute; begin it with /`},
		{"NUL", "unix:/a\x00b", `address "unix:/a\x00b": path must be UTF-8 without control characters`},
		{"not UTF-8", "unix:/a\xff", `address "unix:/a\xff": path must be UTF-8 without control characters`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := Parse(tt.in)
			if err == nil {
				t.Fatalf("parsed as %+v", a)
			}
			diff(t, "error", tt.want, err.Error())
			diff(t, "address", Addr{}, a)
		})
	}
	_, err := Parse("unix:/" + strings.Repeat("x", maxPath))
	if err == nil || !strings.Contains(err.Error(), "path has 108 bytes, a socket's has at most 107; choose a shorter one") {
		t.Errorf("path too long: %v", err)
	}
}

func TestPeerJSON(t *testing.T) {
	for _, want := range []Peer{
		{Family: Vsock, CID: 7, Port: 1023, Local: Addr{Family: Vsock, CID: CIDAny, Port: 1524}},
		{Family: Unix, PID: 1, UID: 2, GID: 3, Local: Addr{Family: Unix, Path: "/run/t.sock"}},
		{Family: Unix, PID: 1},
	} {
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got Peer
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		diff(t, string(b), want, got)
	}
}

func TestPeerString(t *testing.T) {
	tests := []struct {
		want string
		peer Peer
	}{
		{"vsock:7:1023", Peer{Family: Vsock, CID: 7, Port: 1023}},
		{"hybrid:/v.sock:1524 (VMM with pid 5, uid 6)", Peer{Family: Hybrid, PID: 5, UID: 6, Local: Addr{Family: Hybrid, Path: "/v.sock", Port: 1524}}},
		{"process with pid 5, uid 6", Peer{Family: Unix, PID: 5, UID: 6}},
		{"unknown peer", Peer{}},
	}
	for _, tt := range tests {
		diff(t, "String", tt.want, tt.peer.String())
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"vsock:7:1524", "vsock:host:1", "vsock:any:0", "vsock:local:4294967295", "v:2:1524", "v:_:1525",
		"hybrid:/run/v.sock:1524", "hybrid:/a:b:2", "unix:/run/t.sock", "unix:", "vsock::", "hybrid:", "unix:/\x00", "v:007:01",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := Parse(s)
		if err != nil {
			return
		}
		b, err := Parse(a.String())
		if err != nil || a != b {
			t.Errorf("%q is %+v, its String %q is %+v, %v", s, a, a, b, err)
		}
		var c Addr
		text, _ := a.MarshalText()
		if err := c.UnmarshalText(text); err != nil || a != c {
			t.Errorf("%q as text %q is %+v, %v", s, text, c, err)
		}
	})
}
