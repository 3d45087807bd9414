// SPDX-License-Identifier: Apache-2.0

package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
)

// What a guest asks for may be less than what is exported, or cached otherwise, but must not lose data.
func TestExportWith(t *testing.T) {
	for _, c := range []struct{ export, options, want, err string }{
		{"x=/x", "cache=none", "cache=none", ""},
		{"x=/x,cache=none", "cache=coherent", "", ""},
		{"x=/x,cache=always,writeback", "", "cache=always,writeback", ""},
		{"x=/x,cache=always,writeback", "writeback=off", "cache=always", ""},
		{"x=/x,cache=always,writeback", "cache=coherent", "", ""},
		{"x=/x,cache=always,writeback", "cache=none writeback=on", "", "would lose"},
		{"x=/x,cache=always", "writeback=on", "", "has no writeback"},
		{"x=/x", "cache=long", "", "cache"},
		{"x=/x,ro", "rw", "", "read-only"},
		{"x=/x", "sync", "", "knows no mount option"},
	} {
		e, err := ParseExport(c.export)
		if err != nil {
			t.Fatal(err)
		}
		as, err := e.with(strings.Fields(c.options))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s with %s: got %v, want an error with %q", c.export, c.options, err, c.err)
			}
		} else if got := strings.Join(as.Options.strings(), ","); err != nil || got != c.want {
			t.Errorf("%s with %s: got %q, %v; want %q", c.export, c.options, got, err, c.want)
		}
	}
	if _, err := ParseExport("x=/x,writeback"); err == nil || !strings.Contains(err.Error(), "would lose") {
		t.Errorf("writeback alone: %v", err)
	}
}

func TestParseExport(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     Export
		err      string
	}{
		{"plain", "code=/srv/code", Export{Tag: "code", Dir: "/srv/code"}, ""},
		{"cleaned", "code=/srv//code/", Export{Tag: "code", Dir: "/srv/code"}, ""},
		{"escapes", `a=/srv/a\,b\\c\d,ro`, Export{Tag: "a", Dir: `/srv/a,b\c\d`, Options: Options{ReadOnly: true}}, ""},
		{"equals in the directory", "a=/srv/a=b", Export{Tag: "a", Dir: "/srv/a=b"}, ""},
		{"guests", "a=/a,guests=7,guests=/run/v.sock,guests=any",
			Export{Tag: "a", Dir: "/a", Guests: []GuestRule{{CID: 7}, {Path: "/run/v.sock"}, {Any: true}}}, ""},
		{"flags", "a=/a,suid,dev=yes,acl=on,ro=no", Export{Tag: "a", Dir: "/a", Options: Options{Suid: true, Dev: true, ACL: true}}, ""},
		{"choices", "a=/a,root=trust,submounts=follow,xattr=user", Export{Tag: "a", Dir: "/a", Options: Options{
			Root: passthrough.RootTrust, Submounts: passthrough.SubmountsFollow, Xattr: passthrough.XattrUser}}, ""},
		{"maps", "a=/a,uidmap=0:100000:1000,uidmap=1000:1000:1,gidmap=0:100000:1000,xattrmap=trusted.:user.t.",
			Export{Tag: "a", Dir: "/a", Options: Options{
				UIDs:     passthrough.IDMap{{Guest: 0, Host: 100000, Count: 1000}, {Guest: 1000, Host: 1000, Count: 1}},
				GIDs:     passthrough.IDMap{{Guest: 0, Host: 100000, Count: 1000}},
				XattrMap: []passthrough.XattrRule{{Guest: "trusted.", Host: "user.t."}}}}, ""},
		{"squash", "a=/a,squash=1000:100", Export{Tag: "a", Dir: "/a", Options: Options{Squash: &passthrough.Cred{UID: 1000, GID: 100}}}, ""},
		{"limits", "a=/a,max-open-files=10,max-inodes=20,max-streams=3", Export{Tag: "a", Dir: "/a", Options: Options{MaxOpenFiles: 10, MaxInodes: 20, MaxStreams: 3}}, ""},
		{"too many streams", "a=/a,max-streams=5", Export{}, "over 4"},

		{"empty", "", Export{}, "give TAG=DIR"},
		{"no tag", "=/a", Export{}, "tag"},
		{"tag with a slash", "a/b=/a", Export{}, "tag"},
		{"tag with a newline", "a\nb=/a", Export{}, "tag"},
		{"tag too long", strings.Repeat("x", 256) + "=/a", Export{}, "1 to 255"},
		{"relative", "a=srv", Export{}, "absolute"},
		{"unknown option", "a=/a,fast", Export{}, "there are acl, cache"},
		{"option without value", "a=/a,guests", Export{}, "write guests=VALUE"},
		{"option with an empty value", "a=/a,root=", Export{}, "write root=VALUE"},
		{"guest of no kind", "a=/a,guests=vm1", Export{}, "CID"},
		{"guest of any CID", "a=/a,guests=4294967295", Export{}, "CID"},
		{"neither yes nor no", "a=/a,ro=perhaps", Export{}, "neither"},
		{"no such choice", "a=/a,root=me", Export{}, "owner, trust"},
		{"map of no count", "a=/a,uidmap=0:0:0", Export{}, "count"},
		{"maps that meet", "a=/a,uidmap=0:0:10,uidmap=5:100:10", Export{}, "overlaps"},
		{"map and squash", "a=/a,uidmap=0:1:1,squash=1:1", Export{}, "exclude"},
		{"squash to nobody at all", "a=/a,squash=4294967295:0", Export{}, "UID:GID"},
		{"limit of nothing", "a=/a,max-open-files=0", Export{}, "above 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseExport(c.in)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %+v, error %v; want one line with %q", got, err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzParseExport(f *testing.F) {
	for _, s := range []string{"code=/srv/code", `a=/a\,b,ro,guests=any`, "a=/a,uidmap=0:1:2,squash=1:2,xattrmap=a:b", "=,=,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := ParseExport(s)
		if err == nil && (e.Tag == "" || !filepath.IsAbs(e.Dir)) {
			t.Errorf("%q: %+v", s, e)
		}
	})
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := func() Config {
		return Config{
			Exports: []Export{{Tag: "a", Dir: dir}},
			Listen:  []transport.Addr{{Family: transport.Unix, Path: "/run/x"}},
			Guests:  []Guest{{transport.Addr{Family: transport.Vsock, CID: 7, Port: 1525}, []GuestMount{{Tag: "a", Dir: "/mnt"}}}},
		}
	}
	for _, c := range []struct {
		name   string
		change func(*Config)
		err    string
	}{
		{"good", func(*Config) {}, ""},
		{"no address", func(c *Config) { c.Listen = nil }, "--listen"},
		{"address twice", func(c *Config) { c.Listen = append(c.Listen, c.Listen[0]) }, "twice"},
		{"no export", func(c *Config) { c.Exports = nil }, "--export"},
		{"tag twice", func(c *Config) { c.Exports = append(c.Exports, c.Exports[0]) }, "tag a: given twice"},
		{"no directory", func(c *Config) { c.Exports[0].Dir = dir + "/none" }, "does not exist"},
		{"a file", func(c *Config) { c.Exports[0].Dir = file }, "is not a directory"},
		{"below a file", func(c *Config) { c.Exports[0].Dir = file + "/x" }, "not a directory"},
		{"guest without mounts", func(c *Config) { c.Guests[0].Mounts = nil }, "--mount"},
		{"guest twice", func(c *Config) { c.Guests = append(c.Guests, c.Guests[0]) }, "twice"},
		{"mount of no export", func(c *Config) { c.Guests[0].Mounts[0].Tag = "b" }, "no export has the tag b"},
		{"mounts at one place", func(c *Config) { c.Guests[0].Mounts = append(c.Guests[0].Mounts, c.Guests[0].Mounts[0]) }, "two mounts"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conf := good()
			c.change(&conf)
			err := conf.Check()
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %v, want %q", err, c.err)
			}
		})
	}
}
