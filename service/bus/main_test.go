// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// patience bounds what a test waits for.
const patience = 20 * time.Second

// nobody is the uid of callers without rights.
const nobody = 65534

func TestMain(m *testing.M) {
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		fmt.Fprintln(os.Stderr, "these tests need dbus-daemon: sudo apt-get install dbus-daemon")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// packaged is a file of packaging/dbus.
func packaged(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../packaging/dbus", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testBus is a message bus with the packaged policies, and the rules of a system bus.
type testBus struct {
	t       *testing.T
	dir     string
	path    string // of its socket
	address string
	process *exec.Cmd
	said    *logs // by it
}

// newBus prepares a bus that is not running.
func newBus(t *testing.T) *testBus {
	dir, err := os.MkdirTemp("", "transfused-bus-")
	if err != nil {
		t.Fatal(err)
	}
	b := &testBus{t: t, dir: dir, path: filepath.Join(dir, "run", "bus"), address: "unix:path=" + filepath.Join(dir, "run", "bus")}
	t.Cleanup(func() {
		b.kill()
		os.RemoveAll(dir)
	})
	if err := os.Chmod(dir, 0o755); err != nil { // other users connect
		t.Fatal(err)
	}
	for _, name := range []string{GuestName, HostName} {
		// Who runs the tests is their root.
		conf := bytes.ReplaceAll(packaged(t, name+".conf"), []byte(`user="root"`), fmt.Appendf(nil, `user="%d"`, os.Geteuid()))
		if err := os.WriteFile(filepath.Join(dir, name+".conf"), conf, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
  <include>%[2]s/%[3]s.conf</include>
  <include>%[2]s/%[4]s.conf</include>
</busconfig>
`, b.address, dir, GuestName, HostName)
	if err := os.WriteFile(filepath.Join(dir, "bus.conf"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	return b
}

// start runs the bus, and returns when it listens.
func (b *testBus) start() {
	b.t.Helper()
	if err := os.MkdirAll(filepath.Dir(b.path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	b.process = exec.Command("dbus-daemon", "--config-file="+filepath.Join(b.dir, "bus.conf"), "--print-address=1", "--nofork", "--nopidfile")
	b.said = newLogs()
	b.process.Stderr = b.said
	out, err := b.process.StdoutPipe()
	if err == nil {
		err = b.process.Start()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, "unix:") {
		b.process.Process.Kill()
		b.process.Wait()
		b.t.Fatalf("dbus-daemon says %q, %v\n%s", line, err, b.said)
	}
}

// kill ends the bus as a crash would.
func (b *testBus) kill() {
	if b.process != nil {
		b.process.Process.Kill()
		b.process.Wait() // its error is that it was killed
		b.process = nil
	}
}

func runningBus(t *testing.T) *testBus {
	t.Helper()
	b := newBus(t)
	b.start()
	return b
}

// client returns a connection of who runs the tests.
func (b *testBus) client() *dbus.Conn {
	b.t.Helper()
	c, err := dbus.Connect(b.address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// user returns a connection of a user who is not root.
func (b *testBus) user() *dbus.Conn {
	b.t.Helper()
	if os.Geteuid() != 0 {
		return b.client()
	}
	type result struct {
		c   net.Conn
		err error
	}
	dialled := make(chan result)
	go func() {
		// A socket has the ids of the thread that connects it. This one ends with the goroutine.
		runtime.LockOSThread()
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); e != 0 {
			dialled <- result{err: e}
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: b.path})
		}
		if err != nil {
			dialled <- result{err: err}
			return
		}
		f := os.NewFile(uintptr(fd), b.path)
		defer f.Close()
		c, err := net.FileConn(f)
		dialled <- result{c, err}
	}()
	r := <-dialled
	if r.err != nil {
		b.t.Fatal(r.err)
	}
	c, err := dbus.DialUnix(r.c.(*net.UnixConn))
	if err == nil {
		b.t.Cleanup(func() { c.Close() })
		err = c.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(nobody))})
	}
	if err == nil {
		err = c.Hello()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// needsRoot leaves out a test of what only uid 0 may.
func needsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: the caller must be root")
	}
}

// logs keeps what is logged.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
	more chan struct{}
}

func newLogs() *logs { return &logs{more: make(chan struct{}, 1)} }

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.text.Write(p)
	l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logs) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// await returns when a line with what was logged n times.
func (l *logs) await(t *testing.T, what string, n int) {
	t.Helper()
	end := time.After(patience)
	for strings.Count(l.String(), what) < n {
		select {
		case <-l.more:
		case <-end:
			t.Fatalf("%q was not logged %d times:\n%s", what, n, l)
		}
	}
}

// serveGuest has d on b until the test ends.
func serveGuest(t *testing.T, b *testBus, d api.Guest, c Config) *logs {
	t.Helper()
	return serve(t, b, c, func(ctx context.Context, c Config) *Service { return StartGuest(ctx, d, c) })
}

func serveHost(t *testing.T, b *testBus, d api.Host, c Config) *logs {
	t.Helper()
	return serve(t, b, c, func(ctx context.Context, c Config) *Service { return StartHost(ctx, d, c) })
}

func serve(t *testing.T, b *testBus, c Config, start func(context.Context, Config) *Service) *logs {
	t.Helper()
	l := newLogs()
	c.Address, c.Log = b.address, l.logger()
	ctx, cancel := context.WithCancel(context.Background())
	s := start(ctx, c)
	t.Cleanup(func() {
		cancel()
		waitFor(t, s)
	})
	return l
}

func waitFor(t *testing.T, s *Service) {
	t.Helper()
	select {
	case <-s.done:
		s.Wait()
	case <-time.After(patience):
		t.Error("the service does not end")
	}
}

// do calls a method, and returns what it returned.
func do(t *testing.T, c *dbus.Conn, name string, path dbus.ObjectPath, method string, args ...any) []any {
	t.Helper()
	out, err := try(c, name, path, method, 0, args...)
	if err != nil {
		t.Fatalf("%s: %s: %v", path, method, err)
	}
	return out
}

func try(c *dbus.Conn, name string, path dbus.ObjectPath, method string, flags dbus.Flags, args ...any) ([]any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	i := strings.LastIndexByte(method, '.')
	// Not by Object.Call, which leaves FlagAllowInteractiveAuthorization out.
	msg := &dbus.Message{Type: dbus.TypeMethodCall, Flags: flags, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(name), dbus.FieldPath: dbus.MakeVariant(path),
		dbus.FieldInterface: dbus.MakeVariant(method[:i]), dbus.FieldMember: dbus.MakeVariant(method[i+1:])}}
	if len(args) > 0 {
		msg.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(args...))
	}
	call := <-c.SendWithContext(ctx, msg, make(chan *dbus.Call, 1)).Done
	return call.Body, call.Err
}

// wantError checks the name of an error, and that its text has all of says.
func wantError(t *testing.T, err error, name string, says ...string) {
	t.Helper()
	var e dbus.Error
	if !errors.As(err, &e) || e.Name != name {
		t.Errorf("the error is %#v, want %s", err, name)
		return
	}
	for _, s := range says {
		if !strings.Contains(e.Error(), s) {
			t.Errorf("%s says %q: nothing of %q", name, e.Error(), s)
		}
	}
}

// signals returns what name sends from now on.
func signals(t *testing.T, c *dbus.Conn, name string) <-chan *dbus.Signal {
	t.Helper()
	ch := make(chan *dbus.Signal, 1000)
	c.Signal(ch)
	if err := c.AddMatchSignal(dbus.WithMatchSender(name)); err != nil {
		t.Fatal(err)
	}
	return ch
}

// next returns the next signal that is not of the bus itself.
func next(t *testing.T, ch <-chan *dbus.Signal) *dbus.Signal {
	t.Helper()
	for {
		select {
		case s := <-ch:
			if s.Sender != "org.freedesktop.DBus" {
				return s
			}
		case <-time.After(patience):
			t.Fatal("no signal came")
		}
	}
}

// watchers are the channels of a fake daemon's Watch.
type watchers[T any] struct {
	mu  sync.Mutex
	all map[chan T]bool
}

func (w *watchers[T]) add(ctx context.Context) <-chan T {
	ch := make(chan T, 16)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all == nil {
		w.all = map[chan T]bool{}
	}
	w.all[ch] = true
	context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.all, ch)
		close(ch)
	})
	return ch
}

// tell waits for who doesn't read: a test sees so that somebody always does.
func (w *watchers[T]) tell(v T) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.all {
		ch <- v
	}
}

// fakeGuest is an api.Guest without mounts of the kernel.
type fakeGuest struct {
	watchers watchers[api.Change]

	mu        sync.Mutex
	status    api.GuestStatus
	mounts    map[string]api.Mount
	asked     []any // what Mount, Unmount and Reload were called with
	fail      error // of what is called
	onMount   func(ctx context.Context, spec api.MountSpec)
	panicking bool
}

var _ api.Guest = (*fakeGuest)(nil)

func newGuest(ms ...api.Mount) *fakeGuest {
	g := &fakeGuest{mounts: map[string]api.Mount{}, status: api.GuestStatus{Version: "1.2.3", Server: "vsock:2:1524", Connected: true, Protocol: 2,
		Features: []string{"events", "resume"}}}
	for _, m := range ms {
		g.mounts[m.ID] = m
	}
	return g
}

func aMount(id string) api.Mount {
	return api.Mount{ID: id, Tag: "src", Directory: "/srv/" + id, Source: "vsock:2:1524", State: api.Active, Since: time.UnixMicro(1700000000123456), Streams: 2}
}

// set makes m a mount, or changes it.
func (g *fakeGuest) set(m api.Mount) {
	g.mu.Lock()
	kind := api.Changed
	if _, ok := g.mounts[m.ID]; !ok {
		kind = api.Added
	}
	g.mounts[m.ID] = m
	g.mu.Unlock()
	g.watchers.tell(api.Change{Kind: kind, Mount: m})
}

func (g *fakeGuest) remove(id string) {
	g.mu.Lock()
	m := g.mounts[id]
	delete(g.mounts, id)
	g.mu.Unlock()
	g.watchers.tell(api.Change{Kind: api.Removed, Mount: m})
}

func (g *fakeGuest) setStatus(f func(*api.GuestStatus)) {
	g.mu.Lock()
	f(&g.status)
	g.mu.Unlock()
	g.watchers.tell(api.Change{Kind: api.StatusChanged})
}

func (g *fakeGuest) setFail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fail = err
}

// taken returns what the daemon was asked since the last time.
func (g *fakeGuest) taken() []any {
	g.mu.Lock()
	defer g.mu.Unlock()
	a := g.asked
	g.asked = nil
	return a
}

func (g *fakeGuest) note(v any) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, v)
	if g.panicking {
		panic("a mistake")
	}
	return g.fail
}

func (g *fakeGuest) Status() api.GuestStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.status
}

func (g *fakeGuest) Mounts() []api.Mount {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.SortedFunc(maps.Values(g.mounts), func(a, b api.Mount) int { return strings.Compare(a.ID, b.ID) })
}

// asked of Mount: a descriptor is compared while it is open.
type askedMount struct {
	Tag, Directory string
	Options        []string
	Inode          uint64 // of At; 0: there is none
	Flags          int
}

func (g *fakeGuest) Mount(ctx context.Context, spec api.MountSpec) (api.Mount, error) {
	a := askedMount{Tag: spec.Tag, Directory: spec.Directory, Options: spec.Options}
	if spec.At != nil {
		var st unix.Stat_t
		if err := unix.Fstat(int(spec.At.Fd()), &st); err != nil {
			return api.Mount{}, err
		}
		a.Inode = st.Ino
		a.Flags, _ = unix.FcntlInt(spec.At.Fd(), unix.F_GETFL, 0)
	}
	if g.onMount != nil {
		g.onMount(ctx, spec)
	}
	if err := g.note(a); err != nil {
		return api.Mount{}, err
	}
	if err := ctx.Err(); err != nil {
		return api.Mount{}, err
	}
	m := aMount("new" + strconv.Itoa(len(g.Mounts())))
	m.Directory = spec.Directory
	g.mu.Lock()
	g.mounts[m.ID] = m // nobody is told: the caller finds the object all the same
	g.mu.Unlock()
	return m, nil
}

type askedUnmount struct {
	ID  string
	How api.Unmounting
}

func (g *fakeGuest) Unmount(_ context.Context, id string, how api.Unmounting) error {
	if err := g.note(askedUnmount{id, how}); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.mounts, id)
	return nil
}

func (g *fakeGuest) Exports(context.Context) ([]api.Export, error) {
	return []api.Export{{Tag: "src", Text: "sources"}, {Tag: "iso", ReadOnly: true}}, g.note("exports")
}

func (g *fakeGuest) Reload(context.Context) error { return g.note("reload") }

func (g *fakeGuest) Statistics(id string) (api.Statistics, error) {
	return api.Statistics{Requests: 1, InFlight: 2, RequestBytes: 3, ReplyBytes: 4, Dropped: 5, Latency: api.Latency{P50: 6, P90: 7, P99: 8, Max: 9},
		Operations: []api.Operation{{Name: "READ", Requests: 10, Latency: api.Latency{P50: 11, P90: 12, P99: 13, Max: 14}}}}, g.note("statistics of " + id)
}

func (g *fakeGuest) Watch(ctx context.Context) ([]api.Mount, <-chan api.Change) {
	return g.Mounts(), g.watchers.add(ctx)
}

// What D-Bus doesn't have is not called.
func (g *fakeGuest) Detached(context.Context, api.MountSpec) (*os.File, api.Mount, error) {
	panic("not called")
}
func (g *fakeGuest) Remount(context.Context, string, bool) error { panic("not called") }
func (g *fakeGuest) Wait(context.Context) error                  { panic("not called") }
func (g *fakeGuest) Trace(context.Context, api.TraceFilter, func(api.Request)) error {
	panic("not called")
}

// fakeHost is an api.Host without guests.
type fakeHost struct {
	watchers watchers[struct{}]

	mu       sync.Mutex
	status   api.HostStatus
	sessions map[string]api.Session
	reloads  int
	fail     error
}

var _ api.Host = (*fakeHost)(nil)

func (h *fakeHost) change(f func(*fakeHost)) {
	h.mu.Lock()
	f(h)
	h.mu.Unlock()
	h.watchers.tell(struct{}{})
}

func (h *fakeHost) Status() api.HostStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.status
}

func (h *fakeHost) Exports() []api.Export {
	return []api.Export{{Tag: "src", ReadOnly: true, Text: "sources", Directory: "/srv/src", Guests: []string{"3", "unix:/run/a"}, Options: []string{"root=trust"}}}
}

func (h *fakeHost) Sessions() []api.Session {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Values(h.sessions))
}

func (h *fakeHost) Reload(context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reloads++
	return h.fail
}

func (h *fakeHost) Watch(ctx context.Context) <-chan struct{} { return h.watchers.add(ctx) }

// polkit is an authority on a bus.
type polkit struct {
	mu        sync.Mutex
	answer    polkitAnswer
	wait      chan struct{} // not nil: answers come after it is closed
	asked     []polkitQuestion
	cancelled chan string
}

type polkitSubject struct {
	Kind    string
	Details map[string]dbus.Variant
}

type polkitAnswer struct {
	Authorized, Challenge bool
	Details               map[string]string
}

type polkitQuestion struct {
	Name    string // of the subject
	Action  string
	Details map[string]string
	Flags   uint32
}

func (b *testBus) polkit() *polkit {
	b.t.Helper()
	c := b.client()
	p := &polkit{cancelled: make(chan string, 1)}
	if err := c.Export(p, "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority"); err != nil {
		b.t.Fatal(err)
	}
	if r, err := c.RequestName("org.freedesktop.PolicyKit1", dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		b.t.Fatal(r, err)
	}
	return p
}

func (p *polkit) CheckAuthorization(s polkitSubject, action string, details map[string]string, flags uint32, _ string) (polkitAnswer, *dbus.Error) {
	p.mu.Lock()
	name, _ := s.Details["name"].Value().(string)
	p.asked = append(p.asked, polkitQuestion{s.Kind + " " + name, action, details, flags})
	answer, wait := p.answer, p.wait
	p.mu.Unlock()
	if wait != nil {
		<-wait
	}
	if answer.Details == nil {
		answer.Details = map[string]string{}
	}
	return answer, nil
}

func (p *polkit) CancelCheckAuthorization(id string) *dbus.Error {
	p.cancelled <- id
	return nil
}

func (p *polkit) set(a polkitAnswer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = a
}

// taken are the questions since the last time.
func (p *polkit) taken() []polkitQuestion {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.asked
	p.asked = nil
	return a
}

// xmlNode and the rest read an introspection without the types that wrote it.
type xmlNode struct {
	Name       string     `xml:"name,attr"`
	Nodes      []xmlNode  `xml:"node"`
	Interfaces []xmlIface `xml:"interface"`
}

type xmlIface struct {
	Name       string      `xml:"name,attr"`
	Methods    []xmlMember `xml:"method"`
	Signals    []xmlMember `xml:"signal"`
	Properties []xmlMember `xml:"property"`
}

type xmlMember struct {
	Name   string `xml:"name,attr"`
	Type   string `xml:"type,attr"`
	Access string `xml:"access,attr"`
	Args   []struct {
		Name      string `xml:"name,attr"`
		Type      string `xml:"type,attr"`
		Direction string `xml:"direction,attr"`
	} `xml:"arg"`
	Annotations []struct {
		Name  string `xml:"name,attr"`
		Value string `xml:"value,attr"`
	} `xml:"annotation"`
}

func (m xmlMember) types(direction string) string {
	var s string
	for _, a := range m.Args {
		if a.Direction == direction {
			s += a.Type
		}
	}
	return s
}

func introspected(t *testing.T, c *dbus.Conn, name string, path dbus.ObjectPath) xmlNode {
	t.Helper()
	var n xmlNode
	s := do(t, c, name, path, introspectName+".Introspect")[0].(string)
	d := xml.NewDecoder(strings.NewReader(s))
	if err := d.Decode(&n); err != nil {
		t.Fatalf("%s: %v in\n%s", path, err, s)
	}
	return n
}

// tree introspects all nodes from path on.
func tree(t *testing.T, c *dbus.Conn, name string, path dbus.ObjectPath) map[dbus.ObjectPath]xmlNode {
	t.Helper()
	n := introspected(t, c, name, path)
	all := map[dbus.ObjectPath]xmlNode{path: n}
	for _, child := range n.Nodes {
		maps.Copy(all, tree(t, c, name, dbus.ObjectPath(strings.TrimSuffix(string(path), "/")+"/"+child.Name)))
	}
	return all
}

// stopped stops a bus until the returned function is called: it reads nothing.
func (b *testBus) stop() (goOn func()) {
	b.t.Helper()
	p := b.process.Process
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		b.t.Fatal(err)
	}
	return func() { p.Signal(syscall.SIGCONT) }
}
