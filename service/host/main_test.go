// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/ipc"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// hookEnv has a worker of a test do more than serve.
const hookEnv = "TRANSFUSE_TEST_HOOK"

func TestMain(m *testing.M) {
	role, c, err := ipc.Child()
	switch {
	case err != nil:
		panic(err)
	case role == RoleWorker:
		w := newWorker(c)
		switch os.Getenv(hookEnv) {
		case "probe":
			w.confined = func(procFD *os.File) { probe(w, procFD) }
		case "panic":
			w.serve = servePanic
		}
		if err := w.run(); err != nil {
			fmt.Fprintln(os.Stderr, "worker:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv(stoppedEnv); dir != "" {
		serveToBeStopped(dir)
	}
	os.Setenv("GORACE", "atexit_sleep_ms=0") // for the workers: each would take a second to end
	os.Exit(m.Run())
}

// panicName is what a guest looks up to make its worker panic.
const panicName = "make-the-worker-panic"

// servePanic serves, and panics in a goroutine at the sight of panicName.
func servePanic(fs *passthrough.FS, c io.ReadWriteCloser) error {
	return fs.Serve(panicker{c})
}

type panicker struct{ io.ReadWriteCloser }

func (p panicker) Read(b []byte) (int, error) {
	n, err := p.ReadWriteCloser.Read(b)
	if bytes.Contains(b[:n], []byte(panicName)) {
		panic("as the test asked for")
	}
	return n, err
}

// logs collects log lines.
type logs struct {
	t  testing.TB
	mu sync.Mutex
	b  []string
	ch chan struct{} // closed and replaced at each line
}

func newLogs(t testing.TB) (*logs, *slog.Logger) {
	l := &logs{t: t, ch: make(chan struct{})}
	return l, slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, strings.TrimSpace(string(b)))
	close(l.ch)
	l.ch = make(chan struct{})
	return len(b), nil
}

// wait waits for a line that contains all of subs, and returns it.
func (l *logs) wait(subs ...string) string {
	l.t.Helper()
	deadline := time.After(15 * time.Second)
	seen := 0
	for {
		l.mu.Lock()
		lines, ch := l.b[seen:], l.ch
		seen = len(l.b)
		l.mu.Unlock()
	next:
		for _, line := range lines {
			for _, s := range subs {
				if !strings.Contains(line, s) {
					continue next
				}
			}
			return line
		}
		select {
		case <-ch:
		case <-deadline:
			l.t.Fatalf("no log line with %q in:\n%s", subs, strings.Join(l.all(), "\n"))
		}
	}
}

func (l *logs) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.b...)
}

// testHost is a running server.
type testHost struct {
	t    testing.TB
	s    *Server
	addr transport.Addr // of its Unix socket
	logs *logs
	stop func() // ends it, and waits
}

// startHost runs a server of c on a Unix socket, besides c.Listen, until the
// end of the test, which checks that nothing is left. change may alter the
// server before it starts.
func startHost(t *testing.T, c Config, change ...func(*Server)) *testHost {
	t.Helper()
	fstest.Leaks(t)
	h := &testHost{t: t, addr: transport.Addr{Family: transport.Unix, Path: filepath.Join(t.TempDir(), "h.sock")}}
	h.logs, c.Log = newLogs(t)
	c.Listen = append(c.Listen, h.addr)
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	h.s = newServer(c)
	if raceEnabled {
		h.s.limits.HardMemory = 0 // the detector's own memory is over it
	}
	for _, f := range change {
		f(h.s)
	}
	var ls []*transport.Listener
	for _, a := range c.Listen {
		l, err := transport.Listen(a)
		if err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.s.serve(ctx, ls)
	}()
	h.stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Errorf("the server does not end; its log:\n%s", strings.Join(h.logs.all(), "\n"))
		}
	}
	t.Cleanup(func() {
		h.stop()
		for _, a := range c.Listen {
			path := a.Path
			if a.Family == transport.Hybrid {
				path += fmt.Sprint("_", a.Port)
			}
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("socket file %s is left: %v", path, err)
			}
		}
		if t.Failed() {
			t.Logf("log of the host:\n%s", strings.Join(h.logs.all(), "\n"))
		}
	})
	return h
}

// exportDir makes a directory with the file hello, exported as tag.
func exportDir(t testing.TB, tag string, options ...string) Export {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("hello from "+tag), 0o644); err != nil {
		t.Fatal(err)
	}
	e, err := ParseExport(strings.Join(append([]string{tag + "=" + dir}, options...), ","))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// guest is a guest daemon of version 2, as small as can be.
type guest struct {
	t     testing.TB
	addr  transport.Addr
	id    [16]byte
	token []byte
	keep  bool            // offers FeatureKeep
	boot  byte            // of its kernel
	most  uint16          // MaxStreams, if not 0
	c     *transport.Conn // control
	r     *wire.Reader
	init  *wire.Init // the host's
	next  uint32
}

func dial(t testing.TB, a transport.Addr) *transport.Conn {
	t.Helper()
	if a.Family == transport.Hybrid { // as the VMM does for its guest
		a = transport.Addr{Family: transport.Unix, Path: fmt.Sprintf("%s_%d", a.Path, a.Port)}
	}
	c, err := transport.Dial(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(15 * time.Second))
	return c
}

func send(t testing.TB, w io.Writer, m wire.Message) {
	t.Helper()
	if err := wire.Write(w, m); err != nil {
		t.Fatalf("send %T: %v", m, err)
	}
}

// recv returns the host's next message.
func recv(t testing.TB, r io.Reader) wire.Message {
	t.Helper()
	typ, body, err := wire.NewReader(r, wire.MaxControl).Next()
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	m, err := wire.ToGuest(typ, body)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return m
}

// want returns the host's next message, which must be an M.
func want[M wire.Message](t testing.TB, r io.Reader) M {
	t.Helper()
	m := recv(t, r)
	v, ok := m.(M)
	if !ok {
		t.Fatalf("got %T %+v, want %T", m, m, v)
	}
	return v
}

func newGuest(t testing.TB, a transport.Addr, id byte) *guest {
	return &guest{t: t, addr: a, id: [16]byte{id}}
}

// connect opens the control channel.
func (g *guest) connect() *guest {
	g.t.Helper()
	g.c = dial(g.t, g.addr)
	send(g.t, g.c, g.hello())
	g.init = want[*wire.Init](g.t, g.c)
	if g.init.SessionID != g.id || g.init.Version != wire.Version2 || g.init.Features != g.hello().Features {
		g.t.Fatalf("the host's Init: %+v", g.init)
	}
	return g
}

func (g *guest) hello() *wire.Init {
	m := &wire.Init{
		Version: 2, MinVersion: 1, MaxMessage: wire.MaxControl, MaxWrite: 1 << 20, FuseMinor: fuse.Minor,
		MaxStreams: max(1, g.most), BootID: [16]byte{g.boot}, SessionID: g.id, Token: g.token, Software: "test", Kernel: "none",
	}
	if g.keep {
		m.Features = wire.FeatureKeep
	}
	return m
}

// request asks for a mount.
func (g *guest) request(tag string, options ...string) *wire.MountReply {
	g.t.Helper()
	g.next++
	send(g.t, g.c, &wire.MountRequest{ID: g.next, Tag: tag, Dir: "/mnt/" + tag, Options: options})
	for {
		switch m := recv(g.t, g.c).(type) {
		case *wire.Ping:
		case *wire.MountReply:
			if m.ID != g.next {
				g.t.Fatalf("answer to %d, want %d", m.ID, g.next)
			}
			return m
		default:
			g.t.Fatalf("got %T %+v, want a MountReply", m, m)
		}
	}
}

// open opens the first stream of a mount.
func (g *guest) open(mountID uint32) *fuseConn { return g.openIndex(mountID, 0) }

func (g *guest) openIndex(mountID uint32, index uint16) *fuseConn {
	g.t.Helper()
	c := dial(g.t, g.addr)
	send(g.t, c, &wire.StreamOpen{SessionID: g.id, Token: g.token, MountID: mountID, Index: index})
	if r := want[*wire.OpenReply](g.t, c); r.Errno != 0 {
		g.t.Fatalf("open stream: %v: %s", r.Errno, r.Text)
	}
	return &fuseConn{t: g.t, Conn: c}
}

// mount asks for a mount and opens it, up to FUSE's INIT.
func (g *guest) mount(tag string, options ...string) (*fuseConn, uint32) {
	g.t.Helper()
	r := g.request(tag, options...)
	if r.Errno != 0 {
		g.t.Fatalf("mount %s: %v: %s", tag, r.Errno, r.Text)
	}
	f := g.open(r.MountID)
	f.start()
	return f, r.MountID
}

// fuseConn is a kernel, as small as can be.
type fuseConn struct {
	t testing.TB
	*transport.Conn
	unique uint64
	pid    uint32 // of the caller
}

// call makes a request and returns the body of its reply.
func (f *fuseConn) call(op fuse.Opcode, node uint64, body []byte) ([]byte, unix.Errno, error) {
	f.unique += 2
	h := fuse.InHeader{Len: uint32(fuse.InHeaderSize + len(body)), Opcode: op, Unique: f.unique, NodeID: node, PID: f.pid}
	if _, err := f.Write(append(fuse.Append(nil, &h), body...)); err != nil {
		return nil, 0, err
	}
	var out fuse.OutHeader
	b := make([]byte, fuse.OutHeaderSize)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, 0, err
	}
	fuse.Decode(&out, b)
	if out.Unique == 0 && out.Error == fuse.AheadCode { // goes before its reply
		ahead := make([]byte, fuse.AheadOutSize+fuse.OutHeaderSize)
		if _, err := io.ReadFull(f, ahead); err != nil {
			return nil, 0, err
		}
		b = ahead[fuse.AheadOutSize:]
		fuse.Decode(&out, b)
	}
	if out.Unique != f.unique || int(out.Len) < fuse.OutHeaderSize || out.Len > 2<<20 {
		return nil, 0, fmt.Errorf("reply header %+v to request %d", out, f.unique)
	}
	b = make([]byte, int(out.Len)-fuse.OutHeaderSize)
	_, err := io.ReadFull(f, b)
	return b, unix.Errno(-out.Error), err
}

func (f *fuseConn) start() {
	f.t.Helper()
	in := fuse.InitIn{Major: 7, Minor: fuse.Minor, MaxReadahead: 1 << 17, Flags: uint32(fuse.INIT_EXT)}
	if _, errno, err := f.call(fuse.OpInit, 0, fuse.Append(nil, &in)); errno != 0 || err != nil {
		f.t.Fatalf("INIT: %v, %v", errno, err)
	}
}

func (f *fuseConn) lookup(name string) (fuse.EntryOut, unix.Errno, error) {
	var e fuse.EntryOut
	b, errno, err := f.call(fuse.OpLookup, 1, append([]byte(name), 0))
	if errno == 0 && err == nil {
		if _, ok := fuse.Decode(&e, b); !ok {
			err = fmt.Errorf("short LOOKUP reply of %d bytes", len(b))
		}
	}
	return e, errno, err
}

// read returns the content of a file of the root.
func (f *fuseConn) read(name string) string {
	f.t.Helper()
	e, errno, err := f.lookup(name)
	if errno != 0 || err != nil {
		f.t.Fatalf("LOOKUP %s: %v, %v", name, errno, err)
	}
	b, errno, err := f.call(fuse.OpOpen, e.NodeID, fuse.Append(nil, &fuse.OpenIn{Flags: unix.O_RDONLY}))
	var o fuse.OpenOut
	if _, ok := fuse.Decode(&o, b); errno != 0 || err != nil || !ok {
		f.t.Fatalf("OPEN %s: %v, %v", name, errno, err)
	}
	b, errno, err = f.call(fuse.OpRead, e.NodeID, fuse.Append(nil, &fuse.ReadIn{Fh: o.Fh, Size: 4096}))
	if errno != 0 || err != nil {
		f.t.Fatalf("READ %s: %v, %v", name, errno, err)
	}
	return string(b)
}

// serves says whether the mount still answers.
func (f *fuseConn) serves() error {
	_, errno, err := f.lookup("hello")
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}

// gone waits for the end of the connection.
func gone(t testing.TB, c *transport.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(15 * time.Second))
	if n, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection is still open (%d bytes came)", n)
	}
}
