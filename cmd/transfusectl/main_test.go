// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/admin/admintest"
	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/transport"
)

// wait bounds what a test waits for.
const wait = 20 * time.Second

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"transfusectl": main, "mount.transfuse": main, "mount.fuse.transfuse": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			// A socket's path must fit 108 bytes.
			dir, err := os.MkdirTemp("", "ctl")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			for k, v := range map[string]string{"S": dir, "G": dir + "/guest.sock", "H": dir + "/host.sock", "TZ": "UTC", "NO_COLOR": "", "TERM": "xterm", "LANG": "C.UTF-8"} {
				e.Setenv(k, v)
			}
			e.Values["guest"] = newGuest()
			self, err := exec.LookPath("mount.transfuse")
			if err != nil {
				return err
			}
			e.Setenv("HELPER", self)
			return os.Chmod(dir, 0o755)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"guest":     serveGuest,
			"host":      serveHost,
			"connect":   connect,
			"waits":     waits,
			"calls":     calls,
			"exitcode":  exitCode,
			"nobody":    nobody,
			"terminal":  terminal,
			"stall":     stall,
			"namespace": namespace,
		},
	})
}

var began = time.Date(2026, 3, 4, 5, 6, 7, 890000000, time.UTC)

func newGuest() *admintest.Guest {
	return &admintest.Guest{
		State: api.GuestStatus{Version: "1.2", Server: "vsock:host:1524", Connected: true, Protocol: 2, Host: "transfuse-host 1.1",
			Features: []string{"exports", "mounts"}, Text: "2 mounts, host connected, protocol 2"},
		Initial: []api.Mount{
			{ID: "a1", Tag: "code", Directory: "/mnt/code", Source: "vsock:host:1524", Options: []string{"ro", "noexec"}, ReadOnly: true,
				Configured: true, State: api.Active, Since: time.Now().Add(-3*time.Hour - 2*time.Minute), Streams: 3},
			{ID: "b2", Tag: "data", Directory: "/mnt/data", State: api.Reconnecting, Error: "the host\x1b[31m is gone", Since: time.Now().Add(-50 * time.Hour)},
		},
		Offered: []api.Export{{Tag: "code", ReadOnly: true, Text: "sources"}, {Tag: "data"}},
		InUse:   map[string]bool{"a1": true},
		Counts: map[string]api.Statistics{"a1": {Requests: 7, InFlight: 2, Latency: api.Latency{P50: 1500, P99: 2500000},
			Operations: []api.Operation{{Name: "LOOKUP", Requests: 3}, {Name: "READ", Requests: 4, Latency: api.Latency{P50: 999, P99: 1234567, Max: 3200000000}}}}},
		Requests: []api.Request{
			{Mount: "a1", Time: began, Operation: "READ", Unique: 8, NodeID: 2, PID: 33, Length: 80, Reply: 4112, Duration: 41 * time.Microsecond},
			{Mount: "b2", Time: began, Operation: "LOOKUP", Unique: 10, NodeID: 1, PID: 33, Length: 45, Reply: 16, Errno: -2, Duration: 1500 * time.Microsecond},
		},
	}
}

// serve runs f at a socket that everybody may open until the script ends.
func serve(ts *testscript.TestScript, socket string, f func(context.Context, *transport.Listener) error) {
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: socket})
	ts.Check(err)
	ts.Check(os.Chmod(socket, 0o666))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx, l) }()
	ts.Defer(func() {
		cancel()
		<-done
	})
}

func theGuest(ts *testscript.TestScript) *admintest.Guest {
	return ts.Value("guest").(*admintest.Guest)
}

// guest [lost|well|none|broken] [later]: a guest's daemon at $G that has lost its host, is well, or has no mounts; later it begins to listen in a moment.
func serveGuest(ts *testscript.TestScript, neg bool, args []string) {
	g := theGuest(ts)
	for _, arg := range args {
		switch arg {
		case "lost":
			g.State.Connected, g.State.Protocol = false, 0
		case "well":
			g.Initial[1].State, g.Initial[1].Error = api.Active, ""
		case "none":
			g.Initial = nil
		case "broken":
			err := api.Errorf(api.Invalid, "/etc/transfuse/transfused.toml:3: unknown key")
			g.Broken = map[string]error{"Reload": err, "Mount": syscall.EIO}
		default:
			ts.Fatalf("guest: %q", arg)
		}
	}
	serve(ts, ts.Getenv("G"), func(ctx context.Context, l *transport.Listener) error { return admin.ServeGuest(ctx, l, g, "1.2", nil) })
}

// host: a host's server at $H.
func serveHost(ts *testscript.TestScript, neg bool, args []string) {
	h := &admintest.Host{
		State: api.HostStatus{Version: "1.2", Listen: []string{"vsock:any:1524"}, Exports: 2, Sessions: 2, Text: "2 exports, 2 guests"},
		Offered: []api.Export{{Tag: "code", Directory: "/srv/code", Guests: []string{"3", "4"}, Options: []string{"suid"}, Text: "sources"},
			{Tag: "data", Directory: "/srv/data", ReadOnly: true, Guests: []string{"any"}}},
		Guests: []api.Session{
			{ID: "s1", Peer: "vsock:3:1023", Guest: "transfused 1.2", Kernel: "6.18.4", Protocol: 2, Since: time.Now().Add(-90*time.Minute - 10*time.Second), Worker: 77,
				Mounts: []api.GuestsMount{{Tag: "code", Directory: "/mnt/co\x1bde", Streams: 2, Watched: "by inotify"}}},
			{ID: "s2", Peer: "vsock:4:1023", Guest: "transfused 1.0", Kernel: "6.1", Protocol: 1, Since: time.Now().Add(-25 * time.Hour), Lost: true, Worker: 78},
		},
	}
	if len(args) > 0 {
		h.Broken = map[string]error{"Reload": api.Errorf(api.Invalid, "/etc/transfuse/host.toml:9: unknown key")}
	}
	serve(ts, ts.Getenv("H"), func(ctx context.Context, l *transport.Listener) error { return admin.ServeHost(ctx, l, h, "1.2", nil) })
}

// waits: a call waits for the host.
func waits(ts *testscript.TestScript, neg bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	ts.Check(theGuest(ts).AwaitWaiting(ctx, 1))
}

// connect: the host is there as soon as a call waits for it.
func connect(ts *testscript.TestScript, neg bool, args []string) {
	waits(ts, neg, args)
	theGuest(ts).Connect(true)
}

// calls [CALL…]: the daemon must have been told these.
func calls(ts *testscript.TestScript, neg bool, args []string) {
	if got := theGuest(ts).Calls(); !slices.Equal(got, args) {
		ts.Fatalf("the daemon was told\n%q, not\n%q", got, args)
	}
}

// namespace NAME: make a mount namespace that is there until the script ends, and put its path into NAME.
func namespace(ts *testscript.TestScript, neg bool, args []string) {
	made, end := make(chan error), make(chan bool)
	var path string
	go onThread(func() {
		err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		path = fmt.Sprintf("/proc/%d/task/%d/ns/mnt", os.Getpid(), unix.Gettid())
		made <- err
		<-end
	})
	ts.Check(<-made)
	ts.Defer(func() { close(end) })
	ts.Setenv(args[0], path)
}

// onThread calls f on a thread that ends with it, and is not the main one, whose state /proc/self shows.
func onThread(f func()) {
	done := make(chan bool)
	go func() {
		defer close(done)
		runtime.LockOSThread() // and not unlocked: what f did to the thread ends with this goroutine
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		onThread(f) // this goroutine has the main thread meanwhile
		runtime.UnlockOSThread()
	}()
	<-done
}

// stall PATH: a socket at which nobody answers.
func stall(ts *testscript.TestScript, neg bool, args []string) {
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: args[0]})
	ts.Check(err)
	ts.Defer(func() { l.Close() })
}

// exitcode N program [argument…]: the program must end with N.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got := strconv.Itoa(code); got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// program is a copy of this program, under that name, that everybody may execute.
func program(ts *testscript.TestScript, name string) string {
	to := filepath.Join(ts.Getenv("S"), name)
	if _, err := os.Stat(to); err == nil {
		return to
	}
	self, err := os.Executable()
	ts.Check(err)
	// By another process: a child that is started meanwhile would inherit a descriptor for writing, and keep this one
	// from being executed (ETXTBSY).
	ts.Check(exec.Command("cp", self, to).Run())
	ts.Check(os.Chmod(to, 0o755))
	return to
}

// nobody N program [argument…]: run it as an ordinary user; it must end with N.
func nobody(ts *testscript.TestScript, neg bool, args []string) {
	if os.Geteuid() != 0 {
		ts.Fatalf("nobody: only root can become another user: run this test as root")
	}
	cmd := exec.Command(program(ts, args[1]), args[2:]...)
	cmd.Dir = ts.Getenv("S")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, _ := cmd.CombinedOutput() // its code is looked at
	fmt.Fprintf(ts.Stdout(), "%s", out)
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[0] {
		ts.Fatalf("exit code %s, want %s:\n%s", got, args[0], out)
	}
}

// terminal COLUMNS ROWS UNTIL KEYS program [argument…]: run it at a terminal of that size, and press KEYS when UNTIL has been written to it. What was
// written is the script's output.
func terminal(ts *testscript.TestScript, neg bool, args []string) {
	columns, err := strconv.ParseUint(args[0], 10, 16)
	ts.Check(err)
	rows, err := strconv.ParseUint(args[1], 10, 16)
	ts.Check(err)
	until := args[2]
	keys, err := strconv.Unquote(`"` + args[3] + `"`)
	ts.Check(err)

	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	ts.Check(err)
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	ts.Check(err)
	ts.Check(unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	ts.Check(unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(columns), Row: uint16(rows)}))
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	ts.Check(err)
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	ts.Check(err)

	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(ts, args[4]), args[5:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	for _, name := range []string{"TERM", "NO_COLOR", "PATH", "TZ", "PAGER", "SYSTEMD_PAGER"} {
		if v := ts.Getenv(name); v != "" || name == "SYSTEMD_PAGER" && ts.Getenv("NOPAGER") != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	ts.Check(cmd.Start())
	var out bytes.Buffer
	read := make(chan bool)
	go func() {
		defer close(read)
		b, pressed := make([]byte, 4096), keys == ""
		for {
			n, err := master.Read(b)
			out.Write(b[:n])
			if !pressed && strings.Contains(out.String(), until) {
				pressed = true
				io.WriteString(master, keys)
			}
			if err != nil {
				return // EIO when the last one has closed the terminal
			}
		}
	}()
	err = cmd.Wait()
	after, terr := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	tty.Close()
	<-read
	fmt.Fprintf(ts.Stdout(), "%s", out.Bytes())
	ts.Check(terr)
	if (err != nil) != neg {
		ts.Fatalf("it ended with %v:\n%q", err, out.String())
	}
	if *before != *after {
		ts.Fatalf("the terminal is left as\n%+v, it was\n%+v", after, before)
	}
}
