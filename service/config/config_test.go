// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/wire"
)

// write makes a file of text.
func write(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

type example struct {
	Debug bool `toml:"debug"`
	Mount map[string]struct {
		Dir string `toml:"dir"`
	} `toml:"mount"`
}

func TestRead(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"good", "debug = true\n[mount.a]\ndir = \"/a\"\n", ""},
		{"not TOML", "debug = true\n\nx", "f:3: "},
		{"wrong type", "debug = 7\n", "debug"},
		{"unknown", "debug = true\nfast = 1\n", "f:2: unknown key fast"},
		{"unknown in a table", "debug = true\n[mount.a]\ndir = \"/a\"\n\n[ mount.\"b\" ] # second\ndri = \"/\"\n", "f:6: unknown key mount.b.dri"},
		{"unknown table", "[mounts.a]\n", "f:1: unknown key mounts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var v example
			f, err := Read(write(t, tt.text, 0o644), &v)
			if tt.want == "" {
				if err != nil || !v.Debug || v.Mount["a"].Dir != "/a" {
					t.Errorf("%+v, %v", v, err)
				}
				for key, line := range map[string]string{"debug": ":1", "mount.a": ":2", "mount.a.dir": ":3", "mount.a.absent": ":2", "absent": ":1"} {
					if at := f.At(strings.Split(key, ".")...); !strings.HasSuffix(at, line) {
						t.Errorf("%s is at %s, want %s", key, at, line)
					}
				}
			} else if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if _, err := Read(t.TempDir(), &example{}); err == nil || !strings.Contains(err.Error(), "name a file") {
		t.Error(err)
	}
	if _, err := Read("/no/such", &example{}); err == nil || !strings.Contains(err.Error(), "correct the path") {
		t.Error(err)
	}
}

func TestToken(t *testing.T) {
	good := strings.Repeat("0123456789abcdef", 2)
	for _, tt := range []struct {
		name, text string
		mode       os.FileMode
		want       string
	}{
		{"good", good, 0o600, ""},
		{"with a line's end", good + "\r\n", 0o400, ""},
		{"for all to read", good, 0o644, "chmod 600"},
		{"empty", "", 0o600, "0 bytes"},
		{"short", "short\n", 0o600, "5 bytes"},
		{"longest", strings.Repeat("x", wire.MaxToken) + "\n", 0o600, ""},
		{"long", strings.Repeat("x", wire.MaxToken+1), 0o600, "it must have"},
		{"endless", strings.Repeat("x", 1<<20), 0o600, "it must have"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token, err := Token(write(t, tt.text, tt.mode))
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
			} else if diff := cmp.Diff(strings.TrimRight(tt.text, "\r\n"), string(token)); diff != "" || err != nil {
				t.Error(diff, err)
			}
		})
	}
	if _, err := Token("/no/such"); err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Error(err)
	}
}
