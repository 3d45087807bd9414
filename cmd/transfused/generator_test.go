// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

// generated returns what is below dir: texts of files, and "-> TARGET" of links.
func generated(t *testing.T, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if e.Type() == fs.ModeSymlink {
			target, err := os.Readlink(path)
			got[name] = "-> " + target + "\n"
			return err
		}
		b, err := os.ReadFile(path)
		got[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// Each file of testdata/generator has a configuration, what is to be said of it, and the units that come of it.
func TestGenerator(t *testing.T) {
	files, err := filepath.Glob("testdata/generator/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			config, want := map[string]string{}, map[string]string{}
			for _, f := range archive.Files {
				if name, ok := strings.CutPrefix(f.Name, "units/"); ok {
					want[name] = string(f.Data)
				} else {
					config[f.Name] = string(f.Data)
				}
			}
			root, dir := tree(t, config), t.TempDir()
			said := ""
			if err := generate(root, dir); err != nil {
				said = err.Error() + "\n"
			}
			if diff := cmp.Diff(config["said"], strings.ReplaceAll(said, root, "")); diff != "" {
				t.Error(diff)
			}
			got := generated(t, dir)
			for name, text := range got {
				got[name] = strings.ReplaceAll(text, root, "")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What the generator makes is right in the eyes of systemd, whose names for the units are the same.
func TestGeneratedUnitsLoad(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze: not found: install systemd")
	}
	dirs := []string{"/mnt/code", "/mnt/a b", "/mnt/100%", "/mnt/été", "/mnt/-x_y.z", `/mnt/b\c`, "/.hidden/x", "/mnt/$HOME"}
	var text strings.Builder
	for i, dir := range dirs {
		fmt.Fprintf(&text, "[mount.m%d]\ndir = '%s'\noptions = [\"ro,fsname=50%%\", \"x-systemd.automount\", \"x-systemd.idle-timeout=1min\", \"x-systemd.mount-timeout=5s\", "+
			"\"x-systemd.requires-mounts-for=/srv\", \"x-systemd.before=/opt\"]\n", i, dir)
	}
	root, dir := tree(t, map[string]string{"etc/transfuse/transfused.toml": text.String()}), t.TempDir()
	if err := generate(root, dir); err != nil {
		t.Fatal(err)
	}
	var units []string
	for _, name := range slices.Sorted(maps.Keys(generated(t, dir))) {
		if !strings.Contains(name, "/") {
			units = append(units, filepath.Join(dir, name))
		}
	}
	if len(units) != 2*len(dirs) {
		t.Errorf("%d units for %d mounts: %q", len(units), len(dirs), units)
	}
	out, err := exec.CommandContext(t.Context(), analyze, append([]string{"verify", "--man=no"}, units...)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), dir) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, d := range dirs {
		out, err := exec.CommandContext(t.Context(), "systemd-escape", "--path", "--suffix=mount", d).Output()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, strings.TrimSpace(string(out)))); err != nil {
			t.Error(err)
		}
	}
}

// As systemd runs it, by its name.
func TestGeneratorProgram(t *testing.T) {
	root := tree(t, map[string]string{"etc/transfuse/transfused.toml": "[mount.code]\ndir = \"/mnt/code\"\n"})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		env  []string
		args int
		root string
		code int
		want []string
	}{
		{"for the system", nil, 3, root, 0, []string{"local-fs.target.wants/mnt-code.mount", "mnt-code.mount"}},
		{"tried", nil, 1, root, 0, []string{"local-fs.target.wants/mnt-code.mount", "mnt-code.mount"}},
		{"for a user", []string{"SYSTEMD_SCOPE=user"}, 3, root, 0, nil},
		{"in the initrd", []string{"SYSTEMD_IN_INITRD=1"}, 3, root, 0, nil},
		{"without configuration", nil, 3, t.TempDir(), 0, nil},
		{"bad configuration", nil, 3, tree(t, map[string]string{"etc/transfuse/transfused.toml": "[mount.a]\ndir = \"/a\"\n[mount.b]\n"}), 1, nil},
		{"without arguments", nil, 0, root, 2, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.CommandContext(t.Context(), self)
			cmd.Args = []string{"/usr/lib/systemd/system-generators/" + generatorName}
			for i, d := range []string{dir, t.TempDir(), t.TempDir()} {
				if i < tt.args {
					cmd.Args = append(cmd.Args, d)
				}
			}
			cmd.Env = append(os.Environ(), append(tt.env, generatorEnv+"="+tt.root, "CREDENTIALS_DIRECTORY=")...)
			out, err := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != tt.code || strings.Count(string(out), "\n") != min(tt.code, 1) {
				t.Errorf("%v, exit status %d, want %d:\n%s", err, code, tt.code, out)
			}
			if diff := cmp.Diff(tt.want, slices.Sorted(maps.Keys(generated(t, dir)))); diff != "" {
				t.Error(diff)
			}
		})
	}
}
