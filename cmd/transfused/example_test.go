// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/transport"
)

const example = "../../packaging/transfused.toml"

// The example configuration is one that the daemon takes, and so it is with its optional lines taken in. It shows every key.
func TestExampleConfig(t *testing.T) {
	none := func(string) bool { return false }
	f := flags{config: example, server: guest.DefaultServer, socket: guest.DefaultSocket, spin: transport.DefaultSpin.String()}
	c, _, err := f.settings(none)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Mounts) != 1 {
		t.Errorf("it mounts %v: one mount is wanted", c.Mounts)
	}

	b, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^#([a-z])`).ReplaceAllString(string(b), "$1")
	name := filepath.Join(t.TempDir(), "all.toml")
	if err := os.WriteFile(name, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	f = flags{config: name}
	if c.Mounts, err = f.readConfig(none); err != nil {
		t.Fatal(err)
	}
	if c.Server, err = transport.Parse(f.server); err != nil {
		t.Error(err)
	}
	if c.Socket, err = transport.Parse(f.socket); err != nil {
		t.Error(err)
	}
	if err := c.Check(); err != nil {
		t.Error(err)
	}
	if f.server != guest.DefaultServer || f.socket != guest.DefaultSocket || f.spin != "50us" {
		t.Errorf("it says that the defaults are %s, %s and %s", f.server, f.socket, f.spin)
	}
	for _, typ := range []reflect.Type{reflect.TypeFor[file](), reflect.TypeFor[mountFile]()} {
		for field := range typ.Fields() {
			if key := field.Tag.Get("toml"); !regexp.MustCompile(`(?m)^(\[` + key + `\.|` + key + ` = )`).MatchString(all) {
				t.Errorf("the example does not show %s", key)
			}
		}
	}
}

// The commands of README that start this program parse.
func TestReadmeCommands(t *testing.T) {
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), " #")
		args := strings.Fields(strings.TrimSuffix(line, "&"))
		if len(args) < 2 || filepath.Base(args[0]) != "transfused" {
			continue
		}
		found++
		cmd := newCommand(t.TempDir())
		if err := cmd.ParseFlags(args[1:]); err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		mounts, err := cmd.Flags().GetStringArray("mount")
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mounts {
			if _, err := guest.ParseMountSpec(m); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
		for _, flag := range []string{"server", "socket"} {
			if _, err := transport.Parse(cmd.Flag(flag).Value.String()); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
	}
	if found == 0 {
		t.Error("README.md has no command that starts transfused")
	}
}
