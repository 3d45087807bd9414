// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/host"
)

func readme(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// others are flags of other programs that README names: systemctl's and transfusectl's.
var others = map[string]bool{"--now": true, "--operation": true}

// Each flag that README names is one of the two programs.
func TestReadmeFlags(t *testing.T) {
	guest := filepath.Join(t.TempDir(), "transfused")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", guest, "../transfused").CombinedOutput(); err != nil {
		t.Fatalf("go build ../transfused: %v\n%s", err, out)
	}
	flag := regexp.MustCompile(`--[a-z][a-z-]*`)
	known := map[string]bool{}
	for _, cmd := range []*exec.Cmd{program(t, "--help"), exec.CommandContext(t.Context(), guest, "--help")} {
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", cmd, err)
		}
		for _, f := range flag.FindAllString(string(out), -1) {
			known[f] = true
		}
	}
	for _, f := range flag.FindAllString(readme(t), -1) {
		if !known[f] && !others[f] {
			t.Errorf("README.md names %s, which neither program has", f)
		}
	}
}

// The commands of README that start this program parse.
func TestReadmeCommands(t *testing.T) {
	found := 0
	for line := range strings.Lines(readme(t)) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), " #")
		args := strings.Fields(strings.TrimSuffix(line, "&"))
		if len(args) < 2 || filepath.Base(args[0]) != "transfuse-host" {
			continue
		}
		found++
		if err := command("", nil).ParseFlags(args[1:]); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
	if found == 0 {
		t.Error("README.md has no command that starts transfuse-host")
	}
}

// exportOptions are the names that ParseExport takes, in its own words.
func exportOptions(t *testing.T) []string {
	t.Helper()
	_, err := host.ParseExport("x=/x,nonsense")
	if err == nil {
		t.Fatal("option nonsense is taken")
	}
	_, list, ok := strings.Cut(err.Error(), "there are ")
	if !ok {
		t.Fatalf("the error names no options: %v", err)
	}
	return strings.Split(list, ", ")
}

// README's table of export options has all that there are and no others, and its forms are taken. The help has all of them.
func TestReadmeExports(t *testing.T) {
	_, section, ok := strings.Cut(readme(t), "\n## Exports\n")
	if !ok {
		t.Fatal("README.md has no section Exports")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	form := regexp.MustCompile("`([^`]+)`")
	names := map[string]bool{}
	for line := range strings.Lines(section) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		for _, m := range form.FindAllStringSubmatch(strings.Split(line, "|")[1], -1) {
			name, _, _ := strings.Cut(m[1], "=")
			names[name] = true
			option := m[1]
			switch name {
			case "xattrmap":
				option = "xattrmap=user.a.:user.b."
			case "writeback":
				option = "cache=always,writeback"
			}
			option = strings.NewReplacer("GUEST:HOST:COUNT", "0:1000:10", "UID:GID", "1000:1000", "CID", "7", "=PATH", "=/run/vm/v.sock", "=N", "=5").Replace(option)
			if _, err := host.ParseExport("x=/x," + option); err != nil {
				t.Errorf("README.md has %s: %v", m[1], err)
			}
		}
	}
	want := exportOptions(t)
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(names))); diff != "" {
		t.Errorf("options of ParseExport (-), of README.md (+):\n%s", diff)
	}
	help := command("", nil).Long
	for _, name := range want {
		if !regexp.MustCompile(`\b` + regexp.QuoteMeta(name) + `\b`).MatchString(help) {
			t.Errorf("--help does not tell of export option %s", name)
		}
	}
}

// The example configuration parses as it is and with its optional lines taken in, and has every key and export option.
func TestExampleConfig(t *testing.T) {
	b, err := os.ReadFile("../../packaging/host.toml")
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := (&flags{file: "../../packaging/host.toml"}).readConfig()
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Listen) == 0 || len(c.Exports) == 0 {
		t.Errorf("it listens on %v and exports %v: it should do both", c.Listen, c.Exports)
	}

	all := takeIn(string(b))
	c, _, err = (&flags{file: write(t, "all.toml", all, 0o600)}).readConfig()
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Guests) != 1 || len(c.Guests[0].Mounts) == 0 {
		t.Errorf("guests with the optional lines: %v", c.Guests)
	}
	keys := exportOptions(t)
	for f := range reflect.TypeFor[configFile]().Fields() {
		keys = append(keys, f.Tag.Get("toml"))
	}
	for _, key := range keys {
		if !regexp.MustCompile(`(?m)^(\[` + key + `\.|` + key + ` = )`).MatchString(all) {
			t.Errorf("the example does not show %s", key)
		}
	}
}

// takeIn uncomments the optional lines; of a key that is there twice in a table, the last stays.
func takeIn(text string) string {
	var lines []string
	at := map[string]int{}
	table := ""
	for line := range strings.Lines(regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAllString(text, "$1")) {
		if strings.HasPrefix(line, "[") {
			table = line
		} else if key, _, ok := strings.Cut(line, " = "); ok && !strings.HasPrefix(line, "#") {
			if i, twice := at[table+key]; twice {
				lines[i] = ""
			}
			at[table+key] = len(lines)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "")
}
