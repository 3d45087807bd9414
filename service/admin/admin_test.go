// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin/admintest"
	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/varlink"
)

// wait bounds what a test waits for.
const wait = 10 * time.Second

var since = time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC)

func newGuest() *admintest.Guest {
	return &admintest.Guest{
		State: api.GuestStatus{Version: "1.2", Server: "vsock:host:1524", Connected: true, Protocol: 2, Host: "transfuse-host 1.2",
			Features: []string{"exports"}, Text: "2 mounts"},
		Initial: []api.Mount{
			{ID: "a", Tag: "code", Directory: "/mnt/code", Source: "vsock:host:1524", Options: []string{"ro"}, ReadOnly: true, Configured: true,
				State: api.Active, Since: since, Streams: 3},
			{ID: "b", Tag: "data", Directory: "/mnt/data", State: api.Reconnecting, Error: "the host is gone", Since: since},
		},
		Offered: []api.Export{{Tag: "code", ReadOnly: true, Text: "sources"}, {Tag: "data"}},
		Counts: map[string]api.Statistics{"a": {Requests: 1 << 40, InFlight: 2, RequestBytes: 3, ReplyBytes: 4, Dropped: 5,
			Latency: api.Latency{P50: 6, P90: 7, P99: 8, Max: 9}, Operations: []api.Operation{{Name: "READ", Requests: 10, Latency: api.Latency{P50: 11}}}}},
		Requests: []api.Request{
			{Mount: "a", Time: since, Operation: "READ", Unique: 1 << 60, NodeID: 2, PID: 3, Length: 4, Reply: 5, Errno: 6, Duration: 7},
			{Mount: "b", Time: since, Operation: "WRITE"},
		},
	}
}

// log is what a server logged.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serveAt serves f's interface at a socket that everybody may open, until the test ends.
func serveAt(t *testing.T, f func(context.Context, *transport.Listener, *slog.Logger) error) (socket string, out *log) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ad")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "s")
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: socket})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, socket} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	out = new(log)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f(ctx, l, slog.New(slog.NewTextHandler(out, nil))) }()
	t.Cleanup(func() {
		defer os.RemoveAll(dir)
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("it ended with %v", err)
			}
		case <-time.After(wait):
			stacks := make([]byte, 1<<20)
			t.Errorf("it does not end:\n%s", stacks[:runtime.Stack(stacks, true)])
		}
	})
	return socket, out
}

func guest(t *testing.T, g api.Guest) (*GuestClient, *log) {
	t.Helper()
	socket, out := serveAt(t, func(ctx context.Context, l *transport.Listener, log *slog.Logger) error {
		return ServeGuest(ctx, l, g, "1.2", log)
	})
	return NewGuest(socket), out
}

// within is a context that ends with the test's patience.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	t.Cleanup(cancel)
	return ctx
}

// equal compares, and takes no list and an empty one for the same.
func equal(t *testing.T, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
}

func TestGuest(t *testing.T) {
	g := newGuest()
	c, _ := guest(t, g)
	ctx := within(t)

	equal(t, g.Status(), c.Status())
	equal(t, g.Mounts(), c.Mounts())
	offered, err := c.Exports(ctx)
	equal(t, error(nil), err)
	equal(t, g.Offered, offered)
	if err := c.Wait(ctx); err != nil {
		t.Error(err)
	}
	st, err := c.Statistics("a")
	equal(t, error(nil), err)
	equal(t, g.Counts["a"], st)

	dir := t.TempDir()
	at, err := os.OpenFile(dir, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Mount(ctx, api.MountSpec{Tag: "code", Directory: dir, Options: []string{"ro", "noexec"}, At: at})
	equal(t, error(nil), err)
	at.Close()
	equal(t, api.Mount{ID: "new1", Tag: "code", Directory: dir, Source: "vsock:host:1524", Options: []string{"ro", "noexec"}, ReadOnly: true,
		State: api.Active, Streams: 1}, m)
	if _, err := c.Mount(ctx, api.MountSpec{Tag: "data", Directory: "/x"}); err != nil {
		t.Error(err)
	}
	for _, err := range []error{
		c.Remount(ctx, "new1", false), c.Unmount(ctx, "new1", api.Unmounting{Force: true}), c.Unmount(ctx, "new2", api.Unmounting{Lazy: true}), c.Reload(ctx),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	equal(t, []string{
		"Wait", "Mount code " + dir + " ro,noexec at " + dir, "Mount data /x ", "Remount new1 readOnly=false",
		"Unmount new1 force=true lazy=false", "Unmount new2 force=false lazy=true", "Reload",
	}, g.Calls())
}

// The descriptor of a detached mount arrives, and it is that mount.
func TestDetached(t *testing.T) {
	g := newGuest()
	c, _ := guest(t, g)
	f, m, err := c.Detached(within(t), api.MountSpec{Tag: "data", Directory: "/nowhere", Options: []string{"noatime"}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	equal(t, "/nowhere", m.Directory)
	equal(t, []string{"Detached data /nowhere noatime"}, g.Calls())
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Errorf("the descriptor is of a file system of type %#x, %v", st.Type, err)
	}
}

func TestTrace(t *testing.T) {
	g := newGuest()
	c, _ := guest(t, g)
	for _, tt := range []struct {
		filter api.TraceFilter
		want   []api.Request
	}{
		{api.TraceFilter{}, g.Requests},
		{api.TraceFilter{Mount: "a"}, g.Requests[:1]},
		{api.TraceFilter{Operation: "write"}, g.Requests[1:]},
	} {
		ctx, cancel := context.WithCancel(within(t))
		var got []api.Request
		err := c.Trace(ctx, tt.filter, func(r api.Request) {
			if got = append(got, r); len(got) == len(tt.want) {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
		equal(t, tt.want, got)
	}
	var e *api.Error
	if err := c.Trace(within(t), api.TraceFilter{Mount: "absent"}, nil); !errors.As(err, &e) || e.Kind != api.NotFound {
		t.Errorf("a trace of a mount that is not there: %v", err)
	}
}

// Many requests come in their order, in messages of bounded size.
func TestTraceMany(t *testing.T) {
	g := newGuest()
	g.Requests = nil
	for i := range traceQueue {
		g.Requests = append(g.Requests, api.Request{Mount: "a", Time: since, Operation: "READ", Unique: uint64(i)})
	}
	c, _ := guest(t, g)
	ctx, cancel := context.WithCancel(within(t))
	next := uint64(0)
	err := c.Trace(ctx, api.TraceFilter{}, func(r api.Request) {
		if r.Unique != next {
			t.Errorf("request %d came where %d was due", r.Unique, next)
			cancel()
		}
		if next++; next == traceQueue {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) || next != traceQueue {
		t.Errorf("it ended after %d: %v", next, err)
	}
}

func TestWatch(t *testing.T) {
	g := newGuest()
	c, _ := guest(t, g)
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	now, changes := c.Watch(ctx)
	equal(t, g.Initial, now)
	m, err := c.Mount(ctx, api.MountSpec{Tag: "code", Directory: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, api.Change{Kind: api.Added, Mount: m}, <-changes)
	g.Connect(false)
	equal(t, api.Change{Kind: api.StatusChanged}, <-changes)
	if err := c.Unmount(ctx, m.ID, api.Unmounting{}); err != nil {
		t.Fatal(err)
	}
	equal(t, api.Change{Kind: api.Removed, Mount: m}, <-changes)
	cancel()
	if _, ok := <-changes; ok {
		t.Error("there is a change after the end")
	}
	if err := g.AwaitWaiting(within(t), 0); err != nil {
		t.Errorf("the daemon watches on: %v", err)
	}
}

// A call that waits in the daemon ends when its client does.
func TestClientGoesAway(t *testing.T) {
	g := newGuest()
	g.State.Connected = false
	c, out := guest(t, g)
	for name, call := range map[string]func(context.Context) error{
		"Trace": func(ctx context.Context) error { return c.Trace(ctx, api.TraceFilter{}, func(api.Request) {}) },
		"Wait":  c.Wait,
		"Mount": func(ctx context.Context) error {
			_, err := c.Mount(ctx, api.MountSpec{Tag: "code", Directory: "/x"})
			return err
		},
		"Detached": func(ctx context.Context) error {
			_, _, err := c.Detached(ctx, api.MountSpec{Tag: "code", Directory: "/x"})
			return err
		},
		"Watch": func(ctx context.Context) error {
			_, changes := c.Watch(ctx)
			for range changes {
			}
			return ctx.Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(within(t))
			ended := make(chan error, 1)
			go func() { ended <- call(ctx) }()
			if err := g.AwaitWaiting(within(t), 1); err != nil {
				t.Fatal(err)
			}
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the client's error is %v", err)
			}
			if err := g.AwaitWaiting(within(t), 0); err != nil {
				t.Errorf("the daemon goes on: %v", err)
			}
		})
	}
	if out.String() != "" {
		t.Errorf("it was logged: %s", out)
	}
}

func TestErrors(t *testing.T) {
	g := newGuest()
	g.InUse = map[string]bool{"a": true}
	g.Broken = map[string]error{"Reload": fmt.Errorf("read /etc/x: %w", syscall.EIO)}
	c, out := guest(t, g)
	ctx := within(t)
	_, noExport := c.Mount(ctx, api.MountSpec{Tag: "absent", Directory: "/x"})
	_, there := c.Mount(ctx, api.MountSpec{Tag: "code", Directory: "/mnt/code"})
	_, noMount := c.Statistics("absent")
	v, err := varlink.Dial(ctx, c.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	_, badIndex := v.Call(ctx, api.GuestInterface+".Mount", map[string]any{"tag": "code", "directory": "/x", "at": 0}, nil)
	_, misspelt := v.Call(ctx, api.GuestInterface+".Unmount", map[string]any{"id": "b", "forse": true}, nil)
	_, missing := v.Call(ctx, api.GuestInterface+".Remount", map[string]any{"id": "b"}, nil)
	_, absent := v.Call(ctx, api.GuestInterface+".Absent", nil, nil)
	for _, tt := range []struct {
		err  error
		want api.Error
	}{
		{noExport, api.Error{Kind: api.Refused, Errno: syscall.ENOENT, Text: "mount absent: the host has no export of that name: no such file or directory"}},
		{there, api.Error{Kind: api.Exists, Errno: syscall.EBUSY, Text: "mount code: something is mounted at /mnt/code already: device or resource busy"}},
		{noMount, api.Error{Kind: api.NotFound, Text: `there is no mount "absent"`}},
		{c.Unmount(ctx, "a", api.Unmounting{}), api.Error{Kind: api.Busy, Errno: syscall.EBUSY, Text: "unmount /mnt/code: it is in use: device or resource busy"}},
		{c.Reload(ctx), api.Error{Kind: api.Internal, Errno: syscall.EIO, Text: "read /etc/x: input/output error"}},
		{c.fromWire(badIndex), api.Error{Kind: api.Invalid, Text: "at is 0: 0 descriptors came with the call"}},
		{c.fromWire(misspelt), api.Error{Kind: api.Invalid, Text: `parameter "forse" is not known`}},
		{c.fromWire(missing), api.Error{Kind: api.Invalid, Text: "readOnly is missing: true or false is wanted"}},
		{c.fromWire(absent), api.Error{Kind: api.Unsupported,
			Text: "the program at " + c.socket + ` does not know this: there is no method "org.transfused.Guest.Absent"; are both of the same version?`}},
	} {
		var e *api.Error
		if !errors.As(tt.err, &e) {
			t.Errorf("%v is no api.Error", tt.err)
			continue
		}
		equal(t, tt.want, *e)
	}
	for _, want := range []string{"method=Mount", "method=Unmount"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log has no %s:\n%s", want, out)
		}
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	left, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: filepath.Join(dir, "x")})
	if err != nil {
		t.Fatal(err)
	}
	// A socket that nobody listens on any more.
	if err := os.Rename(filepath.Join(dir, "x"), filepath.Join(dir, "left")); err != nil {
		t.Fatal(err)
	}
	left.Close()
	for _, name := range []string{"absent", "left"} {
		c := NewGuest(filepath.Join(dir, name))
		if _, err := c.GetStatus(t.Context()); !NotRunning(err) {
			t.Errorf("%s: %v", name, err)
		}
		if s := c.Status(); s.Text == "" {
			t.Errorf("%s: the status has no text", name)
		}
		if ms, changes := c.Watch(t.Context()); ms != nil {
			t.Errorf("%s: there are mounts: %v", name, ms)
		} else if _, ok := <-changes; ok {
			t.Errorf("%s: there is a change", name)
		}
	}
	g := newGuest()
	g.Broken = map[string]error{"Reload": syscall.ENOENT}
	c, _ := guest(t, g)
	if err := c.Reload(t.Context()); err == nil || NotRunning(err) {
		t.Errorf("an ENOENT of the daemon's is taken for its absence: %v", err)
	}
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

// asNobody calls f as another user.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("only root can become another user: run this test as root")
	}
	var errno unix.Errno
	onThread(func() {
		if _, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno == 0 {
			f()
		}
	})
	if errno != 0 {
		t.Fatal(errno)
	}
}

// Other users read and do nothing else; what they try is logged, a few times.
func TestOtherUsers(t *testing.T) {
	g := newGuest()
	c, out := guest(t, g)
	h := newHost()
	hostSocket, _ := serveAt(t, func(ctx context.Context, l *transport.Listener, log *slog.Logger) error {
		return ServeHost(ctx, l, h, "1.2", log)
	})
	ctx := within(t)
	v, err := varlink.Dial(ctx, c.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	call := func(socket, iface, method string) error {
		v, err := varlink.Dial(ctx, socket)
		if err != nil {
			return err
		}
		defer v.Close()
		in := map[string]map[string]any{"Statistics": {"id": "a"}}[method]
		if in == nil {
			in = map[string]any{}
		}
		more, cancel := context.WithCancel(ctx)
		defer cancel()
		switch method {
		case "Watch", "Trace":
			err := v.More(more, iface+"."+method, in, func(json.RawMessage) error { cancel(); return nil })
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return client{socket, iface}.fromWire(err)
		}
		_, err = v.Call(ctx, iface+"."+method, in, nil)
		return client{socket, iface}.fromWire(err)
	}
	asNobody(t, func() {
		for _, tt := range []struct {
			socket string
			i      varlink.Interface
			reads  []string
		}{
			{c.socket, guestInterface(g, newRefusals(nil)), []string{"Status", "Mounts", "Exports", "Statistics", "Wait", "Watch"}},
			{hostSocket, hostInterface(h, newRefusals(nil)), []string{"Status", "Exports", "Watch"}},
		} {
			for method := range tt.i.Methods {
				err := call(tt.socket, tt.i.Name, method)
				if slices.Contains(tt.reads, method) {
					if err != nil {
						t.Errorf("%s: %v", method, err)
					}
					continue
				}
				var e *api.Error
				if !errors.As(err, &e) || e.Kind != api.Denied || e.Errno != syscall.EPERM || e.Text != "uid 65534 may not call "+method+": root may" {
					t.Errorf("%s: %v", method, err)
				}
			}
		}
		for range 20 {
			call(c.socket, api.GuestInterface, "Reload")
		}
	})
	if calls := g.Calls(); slices.ContainsFunc(calls, func(c string) bool { return c != "Wait" && c != "Watch" }) || h.Reloads() != 0 {
		t.Errorf("the daemons were asked %q, %d reloads", calls, h.Reloads())
	}
	// Of the 26 that were refused within the second, or perhaps two or three of them.
	if n := strings.Count(out.String(), "refused at the control socket"); n < 1 || n > 3*refusalsPerSecond {
		t.Errorf("%d refusals were logged:\n%s", n, out)
	}
}

func newHost() *admintest.Host {
	return &admintest.Host{
		State:   api.HostStatus{Version: "1.2", Listen: []string{"vsock:any:1524"}, Exports: 2, Sessions: 1, Text: "2 exports, 1 guest"},
		Offered: []api.Export{{Tag: "code", Directory: "/srv/code", Guests: []string{"3"}, Options: []string{"suid"}}, {Tag: "data", ReadOnly: true}},
		Guests: []api.Session{{ID: "s1", Peer: "vsock:3:1023", Guest: "transfused 1.2", Kernel: "6.18", Protocol: 2, Since: since, Lost: true, Worker: 7,
			Mounts: []api.GuestsMount{{Tag: "code", Directory: "/mnt", ReadOnly: true, Streams: 2, Watched: "by fanotify"}}}, {ID: "s2", Since: since}},
	}
}

func TestHost(t *testing.T) {
	h := newHost()
	h.Broken = map[string]error{"Reload": api.Errorf(api.Invalid, "host.toml:3: unknown key")}
	socket, out := serveAt(t, func(ctx context.Context, l *transport.Listener, log *slog.Logger) error {
		return ServeHost(ctx, l, h, "1.2", log)
	})
	c := NewHost(socket)
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	equal(t, h.State, c.Status())
	equal(t, h.Offered, c.Exports())
	equal(t, h.Guests, c.Sessions())
	changes := c.Watch(ctx)
	var e *api.Error
	if err := c.Reload(ctx); !errors.As(err, &e) || e.Kind != api.Invalid || e.Text != "host.toml:3: unknown key" {
		t.Errorf("Reload: %v", err)
	} else if strings.Contains(out.String(), "host.toml:3") {
		t.Errorf("what the server logs is logged again:\n%s", out)
	}
	if _, ok := <-changes; !ok || h.Reloads() != 1 {
		t.Errorf("a change is told: %v, %d reloads", ok, h.Reloads())
	}
	cancel()
	if _, ok := <-changes; ok {
		t.Error("there is a change after the end")
	}
	for deadline := time.Now().Add(wait); h.Watchers() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server watches on")
		}
	}
}

// fields are the members of a type, parameters or a reply in a description.
func fields(t *testing.T, text string) (names []string) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(\w+):`).FindAllStringSubmatch(text, -1) {
		names = append(names, m[1])
	}
	slices.Sort(names)
	return names
}

// members are the JSON names of a struct.
func members(typ reflect.Type) (names []string) {
	for f := range typ.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			names = append(names, members(f.Type)...)
		case name != "-" && name != "":
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// The descriptions have the methods, types and errors that are in the code, and no others.
func TestDescriptions(t *testing.T) {
	kinds := []api.Kind{api.Invalid, api.NotFound, api.Exists, api.Busy, api.Refused, api.Denied, api.Unreachable, api.Unsupported, api.Internal}
	for _, tt := range []struct {
		i       varlink.Interface
		types   []any
		methods map[string][2]any // parameters and reply, where there are any
	}{
		{guestInterface(newGuest(), newRefusals(nil)),
			[]any{api.Mount{}, api.GuestStatus{}, api.Export{}, api.Latency{}, api.Operation{}, api.Statistics{}, api.Request{}},
			map[string][2]any{
				"Status": {nil, guestStatus{}}, "Mounts": {nil, mounts{}}, "Mount": {mountCall{}, mount{}}, "Detached": {api.MountSpec{}, detached{}},
				"Unmount": {unmountCall{}}, "Remount": {remountCall{}}, "Exports": {nil, exports{}}, "Statistics": {statisticsCall{}, statistics{}},
				"Trace": {api.TraceFilter{}, requests{}}, "Watch": {nil, watched{}},
			}},
		{hostInterface(newHost(), newRefusals(nil)),
			[]any{api.HostStatus{}, api.Export{}, api.GuestsMount{}, api.Session{}},
			map[string][2]any{"Status": {nil, hostStatus{}}, "Exports": {nil, exports{}}, "Sessions": {nil, sessions{}}}},
	} {
		text := regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(tt.i.Description, "")
		if !strings.HasPrefix(text, "interface "+tt.i.Name+"\n") {
			t.Errorf("%s is described as another interface", tt.i.Name)
		}
		// Types, methods and errors share one space of names: systemd refuses an interface that has one twice.
		symbols := map[string]bool{}
		for _, m := range regexp.MustCompile(`(?m)^(?:type|method|error) (\w+)`).FindAllStringSubmatch(text, -1) {
			if symbols[m[1]] {
				t.Errorf("%s: %s is described twice", tt.i.Name, m[1])
			}
			symbols[m[1]] = true
		}
		for _, m := range regexp.MustCompile(`: \??(?:\[\])?([A-Z]\w*)`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(text, "\ntype "+m[1]+" (") {
				t.Errorf("%s: there is no type %s", tt.i.Name, m[1])
			}
		}
		for _, v := range tt.types {
			typ := reflect.TypeOf(v)
			name := typ.Name()
			// Those of methods are other names.
			if other, ok := map[string]string{"Mount": "MountInfo", "Statistics": "MountStatistics"}[name]; ok {
				name = other
			}
			m := regexp.MustCompile(`(?s)\ntype ` + name + ` \((.*?)\)\n`).FindStringSubmatch(text)
			if m == nil {
				t.Errorf("%s: no type %s", tt.i.Name, typ.Name())
				continue
			}
			equal(t, members(typ), fields(t, m[1]))
		}
		var described []string
		for _, m := range regexp.MustCompile(`(?m)^method (\w+)\((.*)\) -> \((.*)\)$`).FindAllStringSubmatch(text, -1) {
			described = append(described, m[1])
			for i, v := range tt.methods[m[1]] {
				var want []string
				if v != nil {
					want = members(reflect.TypeOf(v))
				}
				equal(t, want, fields(t, m[2+i]))
			}
		}
		var have []string
		for name := range tt.i.Methods {
			have = append(have, name)
		}
		slices.Sort(have)
		slices.Sort(described)
		equal(t, have, described)
		var errs []api.Kind
		for _, m := range regexp.MustCompile(`(?m)^error (\w+) \(text: string, errno: int\)$`).FindAllStringSubmatch(text, -1) {
			errs = append(errs, api.Kind(m[1]))
		}
		equal(t, kinds, errs)
	}
}
