// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
)

// output collects what a program writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// running starts cmd, which must end in order with the test.
func running(t *testing.T, cmd *exec.Cmd) *output {
	t.Helper()
	out := &output{}
	cmd.Stdout, cmd.Stderr = out, out
	// The test's context ends before its cleanup.
	cmd.Cancel = func() error {
		cmd.Process.Signal(syscall.SIGTERM)
		return os.ErrProcessDone // Wait returns how it ended
	}
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil {
			t.Errorf("it ended with %v", err)
		}
		if t.Failed() {
			t.Log(out)
		}
	})
	return out
}

// within waits until f returns nil.
func within(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for err := f(); err != nil; err = f() {
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// The configuration is read again, and shown, by the control socket; a bad one is refused with its line.
func TestControl(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "host.toml")
	put := func(more string) {
		t.Helper()
		text := fmt.Sprintf("listen = [\"unix:%s/h.sock\"]\ncontrol = \"unix:%[1]s/c.sock\"\n%s[export.code]\ndir = \"/usr\"\n", dir, more)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("")
	out := running(t, program(t, "--config", conf))
	c := admin.NewHost(filepath.Join(dir, "c.sock"))
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var st api.HostStatus
	within(t, func() (err error) {
		st, err = c.GetStatus(ctx)
		return err
	})
	if st.Version != version || st.Exports != 1 || len(st.Listen) != 1 {
		t.Errorf("got %+v", st)
	}
	within(t, func() error {
		if !strings.Contains(out.String(), "listening") {
			return errors.New("it does not listen")
		}
		return nil
	})
	put("debug = true\n[export.docs]\ndir = \"/etc\"\n")
	if err := c.Reload(ctx); err != nil {
		t.Fatal(err)
	}
	es, err := c.GetExports(ctx)
	if err != nil || len(es) != 2 || es[0].Tag != "code" || es[1].Tag != "docs" || es[1].Directory != "/etc" {
		t.Errorf("got %+v, %v", es, err)
	}
	for _, bad := range []struct{ text, want string }{
		{"fast = true\n", conf + ":3"},
		{"metrics = \"unix:" + dir + "/m.sock\"\n", "restart"},
	} {
		put(bad.text)
		var ae *api.Error
		if err := c.Reload(ctx); !errors.As(err, &ae) || ae.Kind != api.Invalid || !strings.Contains(ae.Text, bad.want) {
			t.Errorf("%q: got %v", bad.text, err)
		}
		within(t, func() error { // the log comes through a pipe
			if !strings.Contains(out.String(), "configuration refused") || !strings.Contains(out.String(), bad.want) {
				return fmt.Errorf("the log does not tell %q:\n%s", bad.want, out)
			}
			return nil
		})
	}
	if es, err := c.GetExports(ctx); err != nil || len(es) != 2 {
		t.Errorf("after bad ones: %+v, %v", es, err)
	}
}

// A service manager passes the control socket by its name; what it passes besides and can't be used is told, and the rest is served.
func TestPassedSockets(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	for _, name := range []string{"c.sock", "h.sock"} {
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name)})
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		f, err := ln.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	// Only a shell knows the pid before the program runs.
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "--export", "code=/usr",
		"--listen", "unix:"+filepath.Join(dir, "h.sock")) // which is passed: it is not listened on again
	cmd.Env = append(os.Environ(), mainEnv+"=1", "LISTEN_FDS=3", "LISTEN_FDNAMES=control:host:wrong")
	cmd.ExtraFiles = append(files, null)
	out := running(t, cmd)
	c := admin.NewHost(filepath.Join(dir, "c.sock"))
	within(t, func() error {
		st, err := c.GetStatus(t.Context())
		if err == nil && (len(st.Listen) != 1 || st.Listen[0] != "unix:"+filepath.Join(dir, "h.sock")) {
			t.Fatalf("got %+v", st)
		}
		return err
	})
	if !strings.Contains(out.String(), "a socket that was passed is not used") {
		t.Errorf("the log does not tell of the wrong one:\n%s", out)
	}
	if err := c.Reload(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp := free.Addr().String()
	free.Close()
	unix := filepath.Join(dir, "m.sock")
	for name, c := range map[string]struct{ metrics, network, addr string }{
		"tcp": {tcp, "tcp", tcp}, "unix": {"unix:" + unix, "unix", unix},
	} {
		t.Run(name, func(t *testing.T) {
			running(t, program(t, "--listen", "unix:"+filepath.Join(dir, name+".sock"), "--export", "code=/usr", "--metrics", c.metrics))
			client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, c.network, c.addr)
			}}}
			defer client.CloseIdleConnections()
			var body string
			within(t, func() error {
				resp, err := client.Get("http://transfuse-host/metrics")
				if err != nil {
					return err
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				body = string(b)
				return err
			})
			if !strings.Contains(body, "transfuse_host_exports 1\n") {
				t.Errorf("got:\n%s", body)
			}
		})
	}
}
