// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/host"
	"transfused.org/transfused/service/transport"
)

// mainEnv makes the test binary transfuse-host.
const mainEnv = "TRANSFUSE_TEST_MAIN"

// rootEnv says where its configuration is: that of the machine that tests is none of the tests' business.
const rootEnv = "TRANSFUSE_TEST_ROOT"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		os.Exit(run(os.Getenv(rootEnv), os.Args[1:]))
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), mainEnv+"=1", rootEnv+"="+t.TempDir(), "GORACE=atexit_sleep_ms=0")
	return cmd
}

// write makes a file of text.
func write(t *testing.T, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// Each mistake is one line that names the thing, the reason and the mend.
func TestMistakes(t *testing.T) {
	dir := t.TempDir()
	sock := "unix:" + filepath.Join(dir, "h.sock")
	inUse := filepath.Join(dir, "used.sock")
	ln, err := net.Listen("unix", inUse)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	file := write(t, "file", "", 0o600)
	export := "--export=a=" + dir
	config := func(text string) string { return "--config=" + write(t, "c.toml", text, 0o600) }
	for _, c := range []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"nothing", nil, 2, []string{"--listen"}},
		{"no export", []string{"--listen", sock}, 2, []string{"--export"}},
		{"unknown flag", []string{"--fast"}, 2, []string{"unknown flag: --fast (transfuse-host --help)"}},
		{"argument", []string{"code"}, 2, []string{`argument "code": no arguments are taken`, "(transfuse-host --help)"}},
		{"address", []string{"--listen", "tcp:1", export}, 2, []string{"transfuse-host: --listen: ", "tcp:1", "vsock:CID:PORT"}},
		{"export form", []string{"--export", "code"}, 2, []string{"code", "TAG=DIR"}},
		{"flag's value", []string{"--debug=x"}, 2, []string{"--debug", "(transfuse-host --help)"}},
		{"export option", []string{"--export", "code=/,foo"}, 2, []string{`transfuse-host: --export: export "code=/,foo": unknown option`}},
		{"no directory", []string{"--listen", sock, "--export", "a=/no/such"}, 2, []string{"/no/such", "does not exist", "make it"}},
		{"a file", []string{"--listen", sock, "--export", "a=" + file}, 2, []string{file, "not a directory"}},
		{"tag twice", []string{"--listen", sock, export, export}, 2, []string{"tag a", "twice"}},
		{"mount without guest", []string{"--mount", "a=/mnt"}, 2, []string{"--guest"}},
		{"guest without mount", []string{"--listen", sock, export, "--guest", "vsock:7:1525"}, 2, []string{"vsock:7:1525", "--mount"}},
		{"mount of no export", []string{"--listen", sock, export, "--guest", "vsock:7:1525", "--mount", "b=/mnt"}, 2, []string{"tag b"}},
		{"in use", []string{"--listen", "unix:" + inUse, export}, 1, []string{inUse, "in use"}},
		{"no place for the socket", []string{"--listen", "unix:/no/such/dir/x", export}, 1, []string{"/no/such/dir/x", "make it"}},
		{"no token file", []string{"--listen", sock, export, "--token-file", "/no/such"}, 2, []string{"/no/such"}},
		{"token for all to read", []string{"--listen", sock, export, "--token-file", write(t, "t", "0123456789abcdef", 0o644)}, 2, []string{"chmod 600"}},
		{"short token", []string{"--listen", sock, export, "--token-file", write(t, "t", "short\n", 0o600)}, 2, []string{"5 bytes"}},
		{"empty token", []string{"--listen", sock, export, "--token-file", write(t, "t", "", 0o600)}, 2, []string{"0 bytes"}},
		{"control over vsock", []string{"--listen", sock, export, "--control", "vsock:any:1"}, 2, []string{"control: ", "unix:PATH"}},
		{"control in use", []string{"--listen", sock, export, "--control", "unix:" + inUse}, 1, []string{inUse, "in use"}},
		{"metrics nowhere", []string{"--listen", sock, export, "--metrics", "9124"}, 2, []string{"metrics: ", "HOST:PORT"}},
		{"metrics in use", []string{"--listen", sock, export, "--metrics", "unix:" + inUse}, 1, []string{"metrics: ", inUse, "in use"}},
		{"no configuration", []string{"--config", "/no/such.toml"}, 2, []string{"/no/such.toml"}},
		{"not TOML", []string{config("listen = [\n\nx")}, 2, []string{"c.toml:"}},
		{"unknown key", []string{config("debug = true\nfast = true\n")}, 2, []string{"c.toml:2", "fast"}},
		{"unknown option", []string{config("[export.a]\ndir = \"/\"\nfast = true\n")}, 2, []string{"c.toml:3", "fast"}},
		{"bad option", []string{config("[export.a]\ndir = \"/\"\n\nuidmap = [\"0:0\"]\n")}, 2, []string{"c.toml:4", "GUEST:HOST:COUNT"}},
		{"export without dir", []string{config("debug = true\n[export.a]\nro = true\n")}, 2, []string{"c.toml:2", "dir ="}},
		{"bad address", []string{config("debug = true\nlisten = [\"x\"]\n")}, 2, []string{"c.toml:2", "vsock:CID:PORT"}},
		{"wrong type", []string{config("debug = 7\n")}, 2, []string{"c.toml", "debug"}},
		{"guest without address", []string{config("[guest.vm]\nmounts = []\n")}, 2, []string{"c.toml:1", "address ="}},
		{"guest's bad mount", []string{config("[guest.vm]\naddress = \"vsock:7:1\"\nmounts = [\"x\"]\n")}, 2, []string{"c.toml:3", "GUESTDIR"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := program(t, c.args...).CombinedOutput()
			var ee *exec.ExitError
			if !errors.As(err, &ee) || ee.ExitCode() != c.code {
				t.Errorf("%v, want exit status %d", err, c.code)
			}
			lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
			last := lines[len(lines)-1]
			if !strings.HasPrefix(last, "transfuse-host: ") || c.code == 2 && len(lines) != 1 {
				t.Errorf("printed %q, want one line", out)
			}
			for _, w := range c.want {
				if !strings.Contains(last, w) {
					t.Errorf("%q does not say %q", last, w)
				}
			}
		})
	}
}

func TestConfigAndFlags(t *testing.T) {
	token := write(t, "token", "0123456789abcdef\n", 0o600)
	path := write(t, "c.toml", `
listen = ["unix:/run/a", "vsock:any:1524"]
token-file = "`+token+`"
allow-unprivileged-guests = true
spin = "20us"
[export.code]
dir = "/usr"
ro = true
guests = [7, "/run/v.sock"]
max-open-files = 100
[export.docs]
tag = "papers"
dir = "/etc"
[guest.vm]
address = "vsock:7:1525"
mounts = ["code=/mnt/code,nosuid"]
`, 0o600)
	vm := host.Guest{
		Addr:   transport.Addr{Family: transport.Vsock, CID: 7, Port: 1525},
		Mounts: []host.GuestMount{{Tag: "code", Dir: "/mnt/code", Options: []string{"nosuid"}}},
	}
	papers := host.Export{Tag: "papers", Dir: "/etc"}
	for _, c := range []struct {
		name string
		args []string
		want host.Config
	}{
		{"file", nil, host.Config{
			Listen: []transport.Addr{{Family: transport.Unix, Path: "/run/a"}, {Family: transport.Vsock, CID: transport.CIDAny, Port: 1524}},
			Exports: []host.Export{
				{Tag: "code", Dir: "/usr", Guests: []host.GuestRule{{CID: 7}, {Path: "/run/v.sock"}}, Options: host.Options{ReadOnly: true, MaxOpenFiles: 100}},
				papers,
			},
			Guests: []host.Guest{vm}, Token: []byte("0123456789abcdef"), AllowUnprivileged: true, Spin: transport.Spin(20 * time.Microsecond),
		}},
		{"flags win", []string{"--listen", "unix:/run/b", "--export", "code=/bin", "--token-file", "", "--allow-unprivileged-guests=false",
			"--spin", "0", "--guest", "vsock:7:1525", "--mount", "code=/a", "--mount", "papers=/b", "--guest", "unix:/run/g", "--mount", "code=/c"}, host.Config{
			Listen:  []transport.Addr{{Family: transport.Unix, Path: "/run/b"}},
			Exports: []host.Export{papers, {Tag: "code", Dir: "/bin"}},
			Guests: []host.Guest{
				{Addr: vm.Addr, Mounts: []host.GuestMount{{Tag: "code", Dir: "/a", Options: []string{}}, {Tag: "papers", Dir: "/b", Options: []string{}}}},
				{Addr: transport.Addr{Family: transport.Unix, Path: "/run/g"}, Mounts: []host.GuestMount{{Tag: "code", Dir: "/c", Options: []string{}}}},
			},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &flags{root: t.TempDir()}
			cmd := command("", nil)
			cmd.ResetFlags()
			f.define(cmd.Flags())
			if err := cmd.ParseFlags(append([]string{"--config", path}, c.args...)); err != nil {
				t.Fatal(err)
			}
			got, err := f.config(cmd.Flags(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got.Config); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Without --config the system's files are read, and each time as they are then.
func TestSystemConfig(t *testing.T) {
	root := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", root)
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("usr/lib/transfuse/host.toml", "listen = [\"unix:/run/a\"]\n[export.code]\ndir = \"/usr\"\nguests = [7, 8]\n")
	put("transfuse-host.token", "0123456789abcdef\n")
	f := &flags{root: root}
	cmd := command("", nil)
	cmd.ResetFlags()
	f.define(cmd.Flags())
	if err := cmd.ParseFlags([]string{"--listen", "unix:/run/b"}); err != nil {
		t.Fatal(err)
	}
	want := host.Config{
		Listen:  []transport.Addr{{Family: transport.Unix, Path: "/run/b"}},
		Exports: []host.Export{{Tag: "code", Dir: "/usr", Guests: []host.GuestRule{{CID: 7}, {CID: 8}}}},
		Token:   []byte("0123456789abcdef"),
		Spin:    transport.DefaultSpin,
	}
	check := func() {
		t.Helper()
		got, err := f.config(cmd.Flags(), nil)
		if diff := cmp.Diff(want, got.Config); diff != "" || err != nil {
			t.Error(err, diff)
		}
	}
	check()

	put("etc/transfuse/host.toml.d/1.toml", "[export.code]\nguests = [9]\nro = true\n[export.docs]\ndir = \"/etc\"\n")
	want.Exports[0].Guests, want.Exports[0].ReadOnly = []host.GuestRule{{CID: 9}}, true
	want.Exports = append(want.Exports, host.Export{Tag: "docs", Dir: "/etc"})
	check()

	put("etc/transfuse/host.toml.d/2.toml", "\n[export.code]\nsquash = \"x\"\n")
	_, err := f.config(cmd.Flags(), nil)
	if err == nil || !strings.Contains(err.Error(), "/etc/transfuse/host.toml.d/2.toml:3: export code: option squash: ") {
		t.Error(err)
	}
}

// A signal ends the server in order, with its socket.
func TestSignal(t *testing.T) {
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		path := filepath.Join(t.TempDir(), "h.sock")
		cmd := program(t, "--listen", "unix:"+path, "--export", "a="+t.TempDir())
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer timer.Stop()
		var log bytes.Buffer
		for s := bufio.NewScanner(stderr); s.Scan(); {
			log.WriteString(s.Text() + "\n")
			if strings.Contains(s.Text(), "listening") {
				cmd.Process.Signal(sig)
			}
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("after %v: %v\n%s", sig, err, log.String())
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after %v: the socket is left: %v", sig, err)
		}
	}
}

func TestVersionAndHelp(t *testing.T) {
	for _, c := range [][2]string{{"--version", "transfuse-host unknown"}, {"--help", "Exit codes: 0"}} {
		if out, err := program(t, c[0]).CombinedOutput(); err != nil || !strings.Contains(string(out), c[1]) {
			t.Errorf("%s: %v\n%s", c[0], err, out)
		}
	}
}
