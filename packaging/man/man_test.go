// SPDX-License-Identifier: Apache-2.0

// Package man has the manual pages, and tests that compare them with the programs and the example configurations.
package man

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// flagInHelp is a flag in a program's help; flagInPage one where a page explains it.
var (
	flagInHelp  = regexp.MustCompile(`(?m)^ +(?:(-[a-zA-Z]), )?(--[a-z-]+)`)
	termInPage  = regexp.MustCompile(`(?m)^(\*\*\\?-.*)\n: `)
	flagInTerm  = regexp.MustCompile(`\*\*(-[a-zA-Z]|\\-\\-[a-z-]+)\*\*`)
	keyInPage   = regexp.MustCompile(`\*\*([a-z-]+)\*\*`)
	keyInConfig = regexp.MustCompile(`(?m)^#?([a-z-]+) = `)
)

// help runs a program and returns the flags that its help tells, those of all commands left out, and its commands.
func help(t *testing.T, program string, args ...string) (flags, commands []string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, append(args, "--help")...).Output()
	if err != nil {
		t.Fatalf("%s %v --help: %v", program, args, err)
	}
	_, text, ok := strings.Cut(string(out), "\nUsage:\n")
	if !ok {
		t.Fatalf("%s %v --help has no usage", program, args)
	}
	text, _, _ = strings.Cut(text, "\nGlobal Flags:\n")
	rest, text, _ := strings.Cut(text, "\nFlags:\n")
	for _, m := range flagInHelp.FindAllStringSubmatch(text, -1) {
		flags = append(flags, m[2])
		if m[1] != "" {
			flags = append(flags, m[1])
		}
	}
	if _, list, ok := strings.Cut(rest, "\nAvailable Commands:\n"); ok {
		list, _, _ = strings.Cut(list, "\n\n")
		for line := range strings.Lines(list) {
			if name := strings.Fields(line); len(name) > 0 && name[0] != "help" {
				commands = append(commands, name[0])
			}
		}
	}
	slices.Sort(flags)
	return flags, commands
}

// page returns the parts of a page by their headings.
func page(t *testing.T, name string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(name + ".md")
	if err != nil {
		t.Fatal(err)
	}
	parts := map[string]string{}
	heading := ""
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "#") {
			heading = strings.TrimSpace(strings.TrimLeft(line, "#"))
			continue
		}
		parts[heading] += line
	}
	return parts
}

// explained are the flags that a part of a page explains.
func explained(part string) (flags []string) {
	for _, term := range termInPage.FindAllStringSubmatch(part, -1) {
		for _, m := range flagInTerm.FindAllStringSubmatch(term[1], -1) {
			flags = append(flags, strings.ReplaceAll(m[1], `\`, ""))
		}
	}
	slices.Sort(flags)
	return flags
}

// The pages have each flag of the programs' help, and no other.
func TestFlags(t *testing.T) {
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../../cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for program, section := range map[string]string{"transfused": "8", "transfuse-host": "8", "transfusectl": "1"} {
		t.Run(program, func(t *testing.T) {
			parts := page(t, program+"."+section)
			flags, commands := help(t, filepath.Join(bin, program))
			if len(flags) == 0 {
				t.Fatal("--help tells no flags")
			}
			if diff := cmp.Diff(flags, explained(parts["OPTIONS"])); diff != "" {
				t.Errorf("flags of --help (-), of the page (+):\n%s", diff)
			}
			var inPage []string
			for heading := range parts {
				if name, _, _ := strings.Cut(heading, " "); name != "" && name == strings.ToLower(name) {
					inPage = append(inPage, name)
				}
			}
			slices.Sort(commands)
			slices.Sort(inPage)
			if diff := cmp.Diff(commands, inPage); diff != "" {
				t.Errorf("commands of --help (-), of the page (+):\n%s", diff)
			}
			for heading, part := range parts {
				name, _, _ := strings.Cut(heading, " ")
				if !slices.Contains(commands, name) || name == "completion" { // whose own commands and flags are cobra's
					continue
				}
				flags, _ := help(t, filepath.Join(bin, program), name)
				flags = slices.DeleteFunc(flags, func(f string) bool { return f == "-h" || f == "--help" })
				if diff := cmp.Diff(flags, explained(part), cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("flags of %s --help (-), of the page (+):\n%s", name, diff)
				}
			}
		})
	}
}

// The pages of the configurations have each key of the example files, which tests of the programs compare with what they read.
func TestKeys(t *testing.T) {
	for name, example := range map[string]string{"transfused.toml.5": "../transfused.toml", "transfuse-host.toml.5": "../host.toml"} {
		t.Run(name, func(t *testing.T) {
			inPage := map[string]bool{}
			for heading, part := range page(t, name) {
				if heading != "KEYS" && heading != "MOUNTS" && heading != "EXPORTS" && heading != "GUESTS" {
					continue
				}
				for line := range strings.Lines(part) {
					if term, _, ok := strings.Cut(line, " = "); ok && strings.HasPrefix(line, "**") {
						for _, m := range keyInPage.FindAllStringSubmatch(term, -1) {
							inPage[m[1]] = true
						}
					}
				}
			}
			b, err := os.ReadFile(example)
			if err != nil {
				t.Fatal(err)
			}
			keys := map[string]bool{}
			for _, m := range keyInConfig.FindAllStringSubmatch(string(b), -1) {
				keys[m[1]] = true
			}
			if diff := cmp.Diff(slices.Sorted(maps.Keys(keys)), slices.Sorted(maps.Keys(inPage))); diff != "" {
				t.Errorf("keys of %s (-), of the page (+):\n%s", example, diff)
			}
		})
	}
}
