// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type settings struct {
	Server string   `toml:"server"`
	Roots  []string `toml:"roots"`
	Guests []any    `toml:"guests"`
	Mount  map[string]struct {
		Dir     string   `toml:"dir"`
		Options []string `toml:"options"`
	} `toml:"mount"`
}

// tree makes files below a root: their texts by path, "-> TARGET" a link. cred/ is $CREDENTIALS_DIRECTORY.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Join(root, "cred"))
	for path, text := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const (
	etc    = "/etc/transfuse/transfused.toml"
	run    = "/run/transfuse/transfused.toml"
	usr    = "/usr/lib/transfuse/transfused.toml"
	cred   = "/cred/transfused.toml"
	system = "/run/credentials/@system/transfused.toml"
)

func TestPrecedence(t *testing.T) {
	server := func(s string) string { return "server = \"" + s + "\"\n" }
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // the server
	}{
		{"nothing", nil, ""},
		{"vendor", map[string]string{usr: server("usr")}, "usr"},
		{"credential over vendor", map[string]string{usr: server("usr"), system: server("system")}, "system"},
		{"the service's before the system's", map[string]string{cred: server("cred"), system: server("system")}, "cred"},
		{"credential over a vendor's drop-in", map[string]string{usr + ".d/9.toml": server("usr"), cred: server("cred")}, "cred"},
		{"run over credential", map[string]string{run: server("run"), cred: server("cred"), usr: server("usr")}, "run"},
		{"etc over run", map[string]string{etc: server("etc"), run: server("run"), cred: server("cred")}, "etc"},
		{"run's drop-in over credential", map[string]string{run + ".d/1.toml": server("run"), cred: server("cred")}, "run"},
		{"drop-in over main file", map[string]string{etc: server("etc"), usr + ".d/1.toml": server("drop-in")}, "drop-in"},
		{"drop-ins by name", map[string]string{etc + ".d/1.toml": server("etc"), usr + ".d/2.toml": server("usr")}, "usr"},
		{"same name, higher directory", map[string]string{etc + ".d/1.toml": server("etc"), run + ".d/1.toml": server("run"), usr + ".d/1.toml": server("usr")}, "etc"},
		{"main file is whole", map[string]string{etc: "roots = []\n", usr: server("usr")}, ""},
		{"main file does not hide the credential", map[string]string{etc: "roots = []\n", cred: server("cred")}, "cred"},
		{"masked main file", map[string]string{etc: "-> /dev/null", run: server("run"), usr: server("usr")}, ""},
		{"masked drop-in", map[string]string{usr: server("usr"), etc + ".d/1.toml": "-> /dev/null", usr + ".d/1.toml": server("drop-in")}, "usr"},
		{"drop-in masked by an empty file", map[string]string{usr: server("usr"), run + ".d/1.toml": "", usr + ".d/1.toml": server("drop-in")}, "usr"},
		{"a mask below is overridden", map[string]string{etc + ".d/1.toml": server("etc"), usr + ".d/1.toml": "-> /dev/null"}, "etc"},
		{"other names", map[string]string{usr: server("usr"), etc + ".d/1.conf": "x", etc + ".d/.1.toml": "x", "/etc/transfuse/host.toml": "x"}, "usr"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var v settings
			c, err := ReadAll(tree(t, tt.files), Guest, &v)
			if err != nil || v.Server != tt.want {
				t.Errorf("server %q, %v: want %q", v.Server, err, tt.want)
			}
			if tt.want != "" && !strings.Contains(c.Path("server"), tt.want) && tt.want != "drop-in" {
				t.Errorf("it is said to come from %s", c.Path("server"))
			}
		})
	}
}

// A credential of the guest's name is nothing to the host's server.
func TestHostHasNoCredential(t *testing.T) {
	var v settings
	if _, err := ReadAll(tree(t, map[string]string{"/cred/host.toml": "x", system: "x"}), Host, &v); err != nil {
		t.Error(err)
	}
}

var several = map[string]string{
	usr: `server = "usr"
roots = ["/a", "/b"]
guests = [7, "any"]

[mount.code]
dir = "/mnt/code"
options = ["ro"]

[mount.home]
dir = "/home"
`,
	cred: `[mount.code]
options = ["noexec"]

[mount.data]
dir = "/data"`,
	usr + ".d/10-a.toml": "[mount.code]\noptions = [\"dev\"]\n",
	etc + ".d/20-b.toml": `# What is ours.
roots = []
mount.code.dir = "/code"
[mount.home]
options = ["noauto"]
`,
}

func TestMerge(t *testing.T) {
	root := tree(t, several)
	var v settings
	c, err := ReadAll(root, Guest, &v)
	if err != nil {
		t.Fatal(err)
	}
	text, err := c.Effective()
	if err != nil {
		t.Fatal(err)
	}
	want := `roots = []
server = "usr"
guests = [7, "any"]

[mount]
[mount.code]
dir = "/code"
options = ["noexec"]
[mount.data]
dir = "/data"
[mount.home]
dir = "/home"
options = ["noauto"]
`
	var got, wanted settings
	if _, err := Read(write(t, string(text), 0o600), &got); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(write(t, want, 0o600), &wanted); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wanted, v); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("the effective configuration says something else:\n%s%s", diff, text)
	}
	for key, at := range map[string]string{
		"server":              usr + ":1",
		"roots":               etc + ".d/20-b.toml:2",
		"mount.code.dir":      etc + ".d/20-b.toml:3",
		"mount.code.options":  cred + ":2",
		"mount.code.tag":      etc + ".d/20-b.toml:3",
		"mount.data.tag":      cred + ":4",
		"mount.home.dir":      usr + ":10",
		"mount.home.options":  etc + ".d/20-b.toml:5",
		"mount.other.options": etc + ".d/20-b.toml:3",
	} {
		if got := c.At(strings.Split(key, ".")...); got != root+at {
			t.Errorf("%s is at %s, want %s", key, got, root+at)
		}
	}
}

func TestCat(t *testing.T) {
	root := tree(t, several)
	got, err := Cat(root, Guest)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i, path := range []string{usr, cred, usr + ".d/10-a.toml", etc + ".d/20-b.toml"} {
		if i > 0 {
			want.WriteByte('\n')
		}
		want.WriteString("# " + root + path + "\n" + strings.TrimSuffix(several[path], "\n") + "\n")
	}
	if diff := cmp.Diff(want.String(), string(got)); diff != "" {
		t.Error(diff)
	}
	// Also what is wrong is shown.
	if got, err := Cat(tree(t, map[string]string{etc: "server ="}), Guest); err != nil || !strings.HasSuffix(string(got), "\nserver =\n") {
		t.Errorf("%q, %v", got, err)
	}
}

// A mistake is found where it is, also where it is overridden.
func TestMistakes(t *testing.T) {
	over := "server = \"x\"\n[mount.a]\ndir = \"/a\"\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"type, overridden", map[string]string{usr: "roots = []\nserver = 7\n", etc + ".d/1.toml": over}, usr + ":2: key server: "},
		{"type in a table", map[string]string{usr: over, etc + ".d/1.toml": "[mount.a]\n\ndir = []\n"}, etc + ".d/1.toml:3: key mount.a.dir: "},
		{"unknown key", map[string]string{usr: over, run + ".d/1.toml": "\n[mount.a]\ndri = \"/\"\n"}, run + ".d/1.toml:3: unknown key mount.a.dri"},
		{"not TOML", map[string]string{usr: over, cred: "\nx"}, cred + ":2: "},
		{"dangling link", map[string]string{etc: "-> /no/such"}, etc + ": no such file or directory: correct the path"},
		{"dangling drop-in", map[string]string{etc + ".d/1.toml": "-> /no/such"}, etc + ".d/1.toml: no such file or directory: correct the path"},
		{"a directory", map[string]string{etc + ".d/1.toml/x": "x"}, "is a directory: name a file"},
		{"no directory", map[string]string{etc + ".d": "x"}, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := tree(t, tt.files)
			if _, err := ReadAll(root, Guest, &settings{}); err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestCredentialToken(t *testing.T) {
	good := strings.Repeat("0123456789abcdef", 2)
	for _, tt := range []struct {
		name        string
		files       map[string]string
		want, wrong string
	}{
		{"none", nil, "", ""},
		{"the service's", map[string]string{"/cred/transfused.token": good + "\n", "/run/credentials/@system/transfused.token": "x"}, good, ""},
		{"the system's", map[string]string{"/run/credentials/@system/transfused.token": good}, good, ""},
		{"short", map[string]string{"/cred/transfused.token": "x"}, "", "/cred/transfused.token: the token has 1 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token, err := CredentialToken(tree(t, tt.files), "transfused")
			if string(token) != tt.want || (err != nil) != (tt.wrong != "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
				t.Errorf("%q, %v", token, err)
			}
		})
	}
}

// A credential of one line, as the kernel's command line has it.
func TestOneLine(t *testing.T) {
	var v settings
	root := tree(t, map[string]string{system: "mount.code.dir='/a'", etc + ".d/1.toml": "mount = {code = {options = ['ro']}, b = {dir = '/b'}}"})
	c, err := ReadAll(root, Guest, &v)
	if err != nil || v.Mount["code"].Dir != "/a" || len(v.Mount["code"].Options) != 1 || v.Mount["b"].Dir != "/b" {
		t.Errorf("%+v, %v", v, err)
	}
	if at := c.At("mount", "code", "dir"); at != root+system+":1" {
		t.Error(at)
	}
}
