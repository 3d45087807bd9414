// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/watchdog"
)

// listenEnv marks the child that takes what it was started with.
const listenEnv = "SD_TEST_LISTEN"

func TestMain(m *testing.M) {
	if os.Getenv(listenEnv) == "" {
		os.Exit(m.Run())
	}
	p, errs := Take()
	for _, err := range errs {
		fmt.Println("error:", err)
	}
	for _, s := range p.Stored {
		fmt.Println("stored", s.Name, len(s.Files))
	}
	if p.Control != nil {
		fmt.Println("control", p.Control.Addr())
	}
	for _, l := range p.Listeners {
		fmt.Println(l.Addr())
		c, err := l.Accept()
		if err != nil {
			fmt.Println("error:", err)
			continue
		}
		c.Write([]byte("served"))
		c.Close()
	}
	fmt.Printf("left: %q\n", os.Getenv("LISTEN_FDS")+os.Getenv("LISTEN_PID")+os.Getenv("LISTEN_FDNAMES"))
}

// activated starts this program with files, as a service manager does, and returns what it writes.
func activated(t *testing.T, names string, files ...*os.File) (out func() string) {
	t.Helper()
	// Only a shell knows the pid before the program runs.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), listenEnv+"=1", fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES="+names)
	cmd.ExtraFiles = files
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() string {
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child: %v", err)
		}
		return b.String()
	}
}

// listening is a Unix socket that listens, as a service manager has it.
func listening(t *testing.T) (path string, f *os.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	if f, err = ln.(*net.UnixListener).File(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return path, f
}

func TestTake(t *testing.T) {
	path, f := listening(t)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	out := activated(t, "guest:control:7.0:7.0:3.0", f, f, null, null, null)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "served" {
		t.Errorf("read %q, %v", b, err)
	}
	if diff := cmp.Diff("stored 7.0 2\nstored 3.0 1\ncontrol unix:"+path+"\nunix:"+path+"\nleft: \"\"\n", out()); diff != "" {
		t.Error(diff)
	}
}

func TestTakeRefuses(t *testing.T) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b := os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	defer a.Close()
	defer b.Close()
	path, f := listening(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	g, err := tcp.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	out := activated(t, "first:control:guest", a, g, f)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "served" {
		t.Errorf("the good one: read %q, %v", b, err)
	}
	text := out()
	for _, want := range []string{"error: inherited socket first: ", "error: inherited socket control: its address family is "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not say %q", text, want)
		}
	}
}

func TestTakeNothing(t *testing.T) {
	if p, errs := Take(); p.Listeners != nil || p.Control != nil || p.Stored != nil || errs != nil {
		t.Errorf("%v, %v", p, errs)
	}
}

func TestNotify(t *testing.T) {
	Ready() // to nobody
	path := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	next := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, string(buf[:n])); diff != "" {
			t.Error(diff)
		}
	}
	Ready()
	next("READY=1")
	Status("2 mounts,\nhost connected")
	next("STATUS=2 mounts, host connected")
	Failed(fmt.Errorf("listen:\n%w", syscall.EADDRINUSE))
	next("STATUS=listen: address already in use\nERRNO=98")
	t.Setenv("WATCHDOG_USEC", "80000")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); Watch(ctx, &watchdog.Watchdog{}, slog.New(slog.DiscardHandler)) }()
	next("WATCHDOG=1")
	next("WATCHDOG=1")
	cancel()
	<-done
	for c.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err == nil; { // what was told before the end
		_, err = c.Read(make([]byte, 16))
	}
	c.SetReadDeadline(time.Time{})
	Stopping()
	next("STOPPING=1")
}

func TestWatchdogTime(t *testing.T) {
	for _, tt := range []struct {
		usec, pid string
		want      time.Duration
		fails     bool
	}{
		{"", "", 0, false},
		{"60000000", "", time.Minute, false},
		{"60000000", fmt.Sprint(os.Getpid()), time.Minute, false},
		{"60000000", "1", 0, false},
		{"soon", "", 0, true},
		{"0", "", 0, true},
		{"-5", "", 0, true},
		{"9999999999999999999", "", 0, true},
	} {
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		got, err := watchdogTime()
		if got != tt.want || (err != nil) != tt.fails || err != nil && !strings.Contains(err.Error(), "WatchdogSec=") {
			t.Errorf("%q of %q: %v, %v", tt.usec, tt.pid, got, err)
		}
	}
}

type sent struct {
	text     string
	priority journal.Priority
	vars     map[string]string
}

func TestJournal(t *testing.T) {
	var got []sent
	h := &journalHandler{level: slog.LevelInfo, fallback: slog.DiscardHandler, send: func(m string, p journal.Priority, v map[string]string) error {
		delete(v, "CODE_LINE")
		v["CODE_FILE"] = filepath.Base(v["CODE_FILE"])
		got = append(got, sent{m, p, v})
		return nil
	}}
	log := slog.New(h).With("tag", "code")
	log.Debug("not this")
	log.Info("mounted", "dir", "/mnt/code", Mounted.Attr())
	log.Warn("refused", "peer-name", "a\nPRIORITY=0 \"b\"", "error", fmt.Errorf("dial: %w", syscall.ECONNREFUSED))
	const fn = "transfused.org/transfused/service/sd.TestJournal"
	want := []sent{
		{"mounted tag=code dir=/mnt/code", journal.PriInfo, map[string]string{
			"MESSAGE_ID":     string(Mounted),
			"TRANSFUSED_TAG": "code", "TRANSFUSED_DIR": "/mnt/code", "CODE_FILE": "sd_test.go", "CODE_FUNC": fn}},
		{`refused tag=code peer-name="a\nPRIORITY=0 \"b\"" error="dial: connection refused"`, journal.PriWarning, map[string]string{
			"TRANSFUSED_TAG": "code", "TRANSFUSED_PEER_NAME": "a\nPRIORITY=0 \"b\"", "TRANSFUSED_ERROR": "dial: connection refused",
			"ERRNO": "111", "CODE_FILE": "sd_test.go", "CODE_FUNC": fn}},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(sent{})); diff != "" {
		t.Error(diff)
	}
}

func TestJournalFallsBack(t *testing.T) {
	var b bytes.Buffer
	h := &journalHandler{level: slog.LevelInfo, fallback: slog.NewTextHandler(&b, nil),
		send: func(string, journal.Priority, map[string]string) error { return errors.New("no journal") }}
	slog.New(h).With("tag", "code").Info("mounted")
	slog.New(TextHandler(&b, slog.LevelInfo)).Info("again", Mounted.Attr())
	if strings.Contains(b.String(), string(Mounted)) {
		t.Errorf("a text has the id: %q", b.String())
	}
	if !strings.Contains(b.String(), "msg=mounted tag=code") {
		t.Errorf("wrote %q", b.String())
	}
	if _, ok := LogHandler(&b, slog.LevelInfo).(*slog.TextHandler); !ok {
		t.Error("where standard error is no journal, a text is written")
	}
}
