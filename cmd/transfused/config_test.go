// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/transport"
)

// tree makes files below a root, which has the configuration of a test.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Join(root, "cred"))
	for path, text := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// The settings are what the files say now, with the flags that were typed.
func TestSettings(t *testing.T) {
	main, dropIn := "etc/transfuse/transfused.toml", "etc/transfuse/transfused.toml.d/1.toml"
	token := strings.Repeat("t", 32)
	root := tree(t, map[string]string{
		main:                    "server = \"unix:/run/h\"\ndebug = true\nlogfile = \"/log\"\nallow-suid = true\nspin = \"20us\"\n[mount.code]\ndir = \"/code\"\noptions = [\"ro\"]\n",
		"cred/transfused.toml":  "server = \"unix:/x\"\n[mount.data]\ndir = \"/data\"\n",
		"cred/transfused.token": token + "\n",
	})
	f := flags{root: root, server: guest.DefaultServer, socket: "none", spin: transport.DefaultSpin.String()}
	given := func(flag string) bool { return flag == "socket" || flag == "debug" }
	check := func(what string, specs []guest.MountSpec) {
		t.Helper()
		c, all, err := f.settings(given)
		if err != nil {
			t.Fatal(what, err)
		}
		if diff := cmp.Diff(specs, c.Mounts); diff != "" {
			t.Error(what, diff)
		}
		if c.Server.Path != "/run/h" || c.Socket.Family != 0 || !c.AllowSuid || c.Spin != transport.Spin(20*time.Microsecond) || all.logfile != "/log" || all.debug || string(c.Token) != token {
			t.Errorf("%s: %+v, %+v", what, c, all)
		}
	}
	code, data := guest.MountSpec{Tag: "code", Dir: "/code", Options: []string{"ro"}}, guest.MountSpec{Tag: "data", Dir: "/data"}
	check("at first", []guest.MountSpec{code, data})

	// Reloaded.
	text := "[mount.data]\ntag = \"d\"\noptions = [\"noexec\"]\n[mount.more]\ndir = \"/more\"\n"
	if err := os.Mkdir(filepath.Dir(filepath.Join(root, dropIn)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, dropIn), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	data.Tag, data.Options = "d", []string{"noexec"}
	check("with a drop-in", []guest.MountSpec{code, data, {Tag: "more", Dir: "/more"}})

	if err := os.Remove(filepath.Join(root, dropIn)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "cred/transfused.toml"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("without it and the credential", []guest.MountSpec{code})
}
