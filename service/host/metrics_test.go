// SPDX-License-Identifier: Apache-2.0

package host

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/wire"
)

// scrape returns the metrics, each by its name and labels.
func (h *testHost) scrape() map[string]string {
	h.t.Helper()
	srv := httptest.NewServer(h.s.Metrics())
	defer srv.Close()
	req, err := http.NewRequestWithContext(h.t.Context(), "GET", srv.URL, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	resp, err := srv.Client().Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/openmetrics-text") || !strings.HasSuffix(string(b), "# EOF\n") {
		h.t.Fatalf("%s, %s, %v:\n%s", resp.Status, resp.Header.Get("Content-Type"), err, b)
	}
	values := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			values[strings.TrimPrefix(name, "transfuse_host_")] = value
		}
	}
	return values
}

func (h *testHost) wantMetrics(want map[string]string) {
	h.t.Helper()
	got := h.scrape()
	for name, value := range want {
		if got[name] != value {
			h.t.Errorf("%s is %q, want %q", name, got[name], value)
		}
	}
}

func TestMetrics(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code"), exportDir(t, "docs")}, Version: "7"})
	h.wantMetrics(map[string]string{
		`build_info{version="7"}`: "1.0", `exports`: "2.0", `sessions{state="connected"}`: "0.0", `requests_total{tag="code"}`: "0.0",
		`mounts{state="served",tag="code"}`: "0.0", `connections_refused_total`: "0.0", `worker_deaths_total`: "0.0",
	})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code") // INIT: 40 and 64 bytes, 16 and 64
	if _, errno, err := f.lookup("hello"); errno != 0 || err != nil {
		t.Fatal(errno, err)
	} // 40 and 6 bytes, 16 and 128
	g.mount("docs")
	h.wantMetrics(map[string]string{
		`sessions{state="connected"}`: "1.0", `mounts{state="served",tag="code"}`: "1.0", `mounts{state="waiting",tag="code"}`: "0.0",
		`requests_total{tag="code"}`: "2.0", `received_bytes_total{tag="code"}`: "150.0", `sent_bytes_total{tag="code"}`: "224.0",
		`requests_total{tag="docs"}`: "1.0", `received_bytes_total{tag="docs"}`: "104.0", `sent_bytes_total{tag="docs"}`: "80.0",
	})
	f.Close()
	h.logs.wait("mount waits for the guest to come back")
	h.wantMetrics(map[string]string{`mounts{state="served",tag="code"}`: "0.0", `mounts{state="waiting",tag="code"}`: "1.0", `streams{tag="code"}`: "0.0", `streams{tag="docs"}`: "1.0"})

	// What was served stays counted when a mount, and a session, has ended.
	f = g.open(id)
	f.unique = 1000
	if err := f.serves(); err != nil {
		t.Fatal(err)
	}
	send(t, g.c, &wire.Unmounted{MountID: id})
	gone(t, f.Conn)
	h.logs.wait("mount ended", "tag=code")
	h.wantMetrics(map[string]string{`requests_total{tag="code"}`: "3.0", `mounts{state="served",tag="code"}`: "0.0"})
	f, _ = g.mount("code")
	h.session().cancel(errGuestGone)
	gone(t, f.Conn)
	h.logs.wait("session ended")
	h.wantMetrics(map[string]string{`requests_total{tag="code"}`: "4.0", `sessions{state="connected"}`: "0.0"})

	g.connect().mount("code")
	if err := unix.Kill(h.workerPids()[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.logs.wait("session ended", "worker died")
	c := dial(t, h.addr)
	send(t, c, &wire.StreamOpen{SessionID: [16]byte{9}})
	gone(t, c)
	h.wantMetrics(map[string]string{`worker_deaths_total`: "1.0", `connections_refused_total`: "1.0"})
}

// A worker that does not answer delays the metrics no longer than their patience.
func TestMetricsOfAStoppedWorker(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	g.mount("code")
	pid := h.workerPids()[0]
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// It stops when its threads have.
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	for range 3 { // nor does each ask once more
		h.wantMetrics(map[string]string{`sessions{state="connected"}`: "1.0", `requests_total{tag="code"}`: "0.0"})
	}
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(15 * time.Second); h.scrape()[`requests_total{tag="code"}`] != "1.0"; {
		if time.Now().After(deadline) {
			t.Fatal("a worker that goes on is not counted")
		}
	}
}
