// SPDX-License-Identifier: Apache-2.0

// Package systemd has the units, and tests that have systemd's own programs look at them as packages install them.
package systemd

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// install makes a root with what packages install, and returns the units in it.
func install(t *testing.T) (root string, units []string) {
	t.Helper()
	root = t.TempDir()
	cmd := exec.CommandContext(t.Context(), "make", "-C", "..", "install", "DESTDIR="+root, "BIN="+t.TempDir())
	// Not what the make has told that runs this test.
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	found, err := filepath.Glob(root + "/usr/lib/systemd/system/*")
	if err != nil || len(found) == 0 {
		t.Fatalf("%d units, %v", len(found), err)
	}
	for _, u := range found {
		units = append(units, strings.TrimPrefix(u, root))
	}
	return root, units
}

// run runs a program of systemd and returns all that it says.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Fatalf("%v: install systemd: .ci/deps systemd", err)
	}
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	return string(out), err
}

// systemd has nothing to say of the units: each setting is known, and the programs and manual pages are there. (Its exit code says less.)
func TestVerify(t *testing.T) {
	root, units := install(t)
	// Those that the units name.
	targets, err := filepath.Glob("/lib/systemd/system/*.target")
	if err != nil || len(targets) == 0 {
		t.Fatalf("%d targets in /lib/systemd/system, %v: install systemd: .ci/deps systemd", len(targets), err)
	}
	for _, target := range targets {
		b, err := os.ReadFile(target)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "usr/lib/systemd/system", filepath.Base(target)), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("MANPATH", root+"/usr/share/man")
	out, err := run(t, append([]string{"systemd-analyze", "--root=" + root, "verify"}, units...)...)
	if out != "" || err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// How much of the system a service could reach, as systemd counts it, is at most what we have decided.
func TestSecurity(t *testing.T) {
	// In tenths. What keeps them above 0 is in the units: the namespace that transfused must stay in, and what a file server does.
	for unit, most := range map[string]int{
		"transfused.service":           45,
		"transfused-clean-up.service":  45,
		"transfuse-host.service":       35,
		"transfuse-host@.service":      35,
		"transfuse-host-user@.service": 10,
		"transfused-wait-host.service": 15,
	} {
		t.Run(unit, func(t *testing.T) {
			out, err := run(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold="+strconv.Itoa(most), "./"+unit)
			if err != nil || !strings.Contains(out, "Overall exposure level") {
				t.Errorf("systemd-analyze security: %v\n%s", err, out)
			}
		})
	}
}

// settings are the lines of a unit's section Service that set something.
func settings(t *testing.T, unit string) (lines []string) {
	t.Helper()
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\n[Service]\n")
	text, _, _ = strings.Cut(text, "\n[Install]\n")
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		t.Fatalf("%s has no section Service", unit)
	}
	return lines
}

// The guest's daemon mounts for all, so no setting may give it a mount namespace of its own (systemd.exec(5)); nor may one of the host's hide
// what is to be exported.
func TestNamespaces(t *testing.T) {
	hides := `ProtectSystem|ProtectHome|PrivateTmp|TemporaryFileSystem|InaccessiblePaths|ReadOnlyPaths|NoExecPaths|ProtectKernelModules|DynamicUser|` +
		`RootDirectory|RootImage`
	makes := hides + `|PrivateDevices|PrivateMounts|PrivateNetwork|PrivateIPC|NetworkNamespacePath|IPCNamespacePath|MountFlags|MountAPIVFS|MountImages|` +
		`ExtensionImages|ExtensionDirectories|BindPaths|BindReadOnlyPaths|ReadWritePaths|ExecPaths|ProtectKernelTunables|ProtectKernelLogs|` +
		`ProtectControlGroups|ProtectProc|ProcSubset|LogNamespace|PrivateUsers|RuntimeDirectory|StateDirectory|CacheDirectory|LogsDirectory`
	for unit, never := range map[string]string{"transfused.service": makes, "transfused-clean-up.service": makes, "transfuse-host.service": hides} {
		never := regexp.MustCompile(`^(` + never + `)=`)
		for _, s := range settings(t, unit) {
			if never.MatchString(s) {
				t.Errorf("%s has %s", unit, s)
			}
		}
	}
}

// The server of one VM has the settings of the server of all.
func TestInstance(t *testing.T) {
	own := func(s string) bool {
		return regexp.MustCompile(`^(ExecStart|ExecReload|LoadCredential)=`).MatchString(s)
	}
	host := slices.DeleteFunc(settings(t, "transfuse-host.service"), own)
	instance := slices.DeleteFunc(settings(t, "transfuse-host@.service"), own)
	if diff := cmp.Diff(host, instance); diff != "" {
		t.Errorf("transfuse-host.service (-), transfuse-host@.service (+):\n%s", diff)
	}
}

// The catalog explains each event of package sd, and nothing else, as journald reads it.
func TestCatalog(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "../service/sd/event.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var events []string
	ast.Inspect(f, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
			if typ, ok := v.Type.(*ast.Ident); ok && typ.Name == "Event" {
				id, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				events = append(events, id)
			}
		}
		return true
	})
	if len(events) == 0 {
		t.Fatal("no events in ../service/sd/event.go")
	}
	slices.Sort(events)

	root := t.TempDir()
	if err := os.MkdirAll(root+"/usr/lib/systemd/catalog", 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("transfused.catalog")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/usr/lib/systemd/catalog/transfused.catalog", b, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, "journalctl", "--root="+root, "--update-catalog"); err != nil || out != "" {
		t.Fatalf("journalctl --update-catalog: %v\n%s", err, out)
	}
	var explained []string
	for _, id := range regexp.MustCompile(`(?m)^-- ([0-9a-f]{32})$`).FindAllStringSubmatch(string(b), -1) {
		explained = append(explained, id[1])
		out, err := run(t, "journalctl", "--root="+root, "--dump-catalog", id[1])
		subject, text, ok := strings.Cut(out, "Documentation: man:")
		if err != nil || !regexp.MustCompile(`\nSubject: .+\n`).MatchString(subject) || !ok || strings.Count(text, "\n") < 4 {
			t.Errorf("%s is not explained: %v\n%s", id[1], err, out)
		}
	}
	slices.Sort(explained)
	if diff := cmp.Diff(events, explained); diff != "" {
		t.Errorf("events of package sd (-), of the catalog (+):\n%s", diff)
	}
}

// The directories of control sockets and of VMMs are made.
func TestTmpfiles(t *testing.T) {
	root, _ := install(t)
	if out, err := run(t, "systemd-tmpfiles", "--root="+root, "--create"); err != nil || out != "" {
		t.Fatalf("systemd-tmpfiles: %v\n%s", err, out)
	}
	for _, dir := range []string{"/run/transfuse", "/run/transfuse-vm"} {
		if st, err := os.Stat(root + dir); err != nil || !st.IsDir() || st.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", dir, st, err)
		}
	}
}
