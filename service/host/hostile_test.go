// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

func frame(t testing.TB, m wire.Message) []byte {
	t.Helper()
	b, err := wire.Append(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever a connection begins with, it alone ends, and the guest that is
// there is served on.
func TestGarbage(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) {
		s.times.first = 200 * time.Millisecond
		s.refused = newRefusals(0, 1000, 1000)
	})
	g := newGuest(t, h.addr, 1).connect()
	f, mount := g.mount("code")

	random := make([]byte, 4096)
	rand.NewChaCha8([32]byte{1}).Read(random)
	length := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
	noSession := [16]byte{42}
	for _, c := range []struct {
		name string
		b    []byte
		log  string
	}{
		{"nothing", nil, "no first message"},
		{"half a length", []byte{6, 0}, "no first message"},
		{"half a message", frame(t, newGuest(t, h.addr, 9).hello())[:20], "no first message"},
		{"http", []byte("GET / HTTP/1.0\r\n\r\n"), "transfuse"},
		{"random", random, ""},
		{"length 0", append(length(0), random...), "0 bytes"},
		{"length 5", append(length(5), 0), "5 bytes"},
		{"length of 4 GiB", append(length(1<<32-1), random...), "4294967295"},
		{"length over the first message's", append(length(wire.MaxFirst+1), random...), "8193"},
		{"unknown type", append(length(6), 0xff, 0xff), "type 65535"},
		{"a message of the host", frame(t, &wire.MountAsk{ID: 1, Tag: "code", Dir: "/"}), "type"},
		{"a log line before Init", frame(t, &wire.LogError{Text: "x"}), "does not begin with"},
		{"a mount before Init", frame(t, &wire.MountRequest{ID: 1, Tag: "code"}), "does not begin with"},
		{"Init that ends early", append(append(length(40), 0, 0), random[:34]...), ""},
		{"session id of zero", frame(t, newGuest(t, h.addr, 0).hello()), "zero"},
		{"Init of a version to come alone", frame(t, &wire.Init{Version: 9, MinVersion: 3, MaxMessage: wire.MaxControl, MaxStreams: 1, SessionID: noSession}), "upgrade the host"},
		{"stream of no session", frame(t, &wire.StreamOpen{SessionID: noSession, MountID: mount}), "no session"},
		{"stream of index 1", frame(t, &wire.StreamOpen{SessionID: g.id, MountID: mount, Index: 1}), "no stream 1"},
		{"notify of no session", frame(t, &wire.NotifyOpen2{SessionID: noSession, MountID: mount}), "no session"},
		{"notify of no mount", frame(t, &wire.NotifyOpen2{SessionID: g.id, MountID: 77}), "mount 77"},
		{"events of no session", frame(t, &wire.EventOpen{SessionID: noSession}), "no session"},
		{"notify of version 1 for nothing", frame(t, &wire.NotifyOpen{Dir: "/mnt/code"}), "mounted nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dial(t, h.addr)
			if _, err := conn.Write(c.b); err != nil && !errors.Is(err, unix.EPIPE) {
				t.Fatal(err)
			}
			gone(t, conn)
			h.logs.wait("connection refused", c.log)
		})
	}
	t.Run("events that say nothing", func(t *testing.T) {
		e := dial(t, h.addr)
		send(t, e, &wire.EventOpen{SessionID: g.id, ThreadID: 1})
		want[*wire.OpenReply](t, e)
		e.Write(random)
		gone(t, e)
	})
	t.Run("answers that nobody asked for", func(t *testing.T) {
		n := dial(t, h.addr)
		send(t, n, &wire.NotifyOpen2{SessionID: g.id, MountID: mount})
		want[*wire.OpenReply](t, n)
		n.Write(random)
		n.Close()
		send(t, g.c, &wire.MountResult{ID: 5, MountID: 1})
		send(t, g.c, &wire.UnmountReply{ID: 6})
		send(t, g.c, &wire.Unmounted{MountID: 1000})
		send(t, g.c, &wire.SuitabilityReply{ID: 7})
	})
	if err := f.serves(); err != nil {
		t.Errorf("the guest that behaves: %v", err)
	}
	send(t, g.c, &wire.Ping{ID: 1})
	want[*wire.Alive](t, g.c)

	t.Run("control channel", func(t *testing.T) {
		for _, b := range [][]byte{random, append(length(6), 0xff, 0xff), frame(t, &wire.StreamOpen{SessionID: g.id})} {
			bad := newGuest(t, h.addr, 3).connect()
			bad.c.Write(b)
			if r := want[*wire.Refused](t, bad.c); r.Errno != unix.EPROTO {
				t.Error(r)
			}
			gone(t, bad.c)
		}
		if err := f.serves(); err != nil {
			t.Errorf("the other guest: %v", err)
		}
	})
	t.Run("stream", func(t *testing.T) {
		bad := newGuest(t, h.addr, 4).connect()
		fb, _ := bad.mount("code")
		fb.Write(bytes.Repeat([]byte{0xff}, 4096))
		gone(t, fb.Conn)
		if fb, _ := bad.mount("code"); fb.serves() != nil {
			t.Error("the session did not outlive its stream's garbage")
		}
		if err := f.serves(); err != nil {
			t.Errorf("the other guest: %v", err)
		}
	})
}

// Connections that say nothing neither keep others out nor stay.
func TestSlowloris(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) {
		s.times.first = 500 * time.Millisecond
		s.gate = newGate(8, 8)
	})
	var slow []*transport.Conn
	for range 20 {
		slow = append(slow, dial(t, h.addr))
	}
	h.logs.wait("too many connections")
	for i, c := range slow {
		c.Write([]byte{byte(i)}) // they go on one byte at a time
	}
	for _, c := range slow {
		gone(t, c)
	}
	g := newGuest(t, h.addr, 1).connect()
	if f, _ := g.mount("code"); f.read("hello") == "" {
		t.Error("not served")
	}
}

func TestGate(t *testing.T) {
	a, b, c := identity{cid: 1}, identity{cid: 2}, identity{cid: 3}
	g := newGate(3, 2)
	for i, step := range []struct {
		id    identity
		leave bool
		want  bool
	}{
		{a, false, true}, {a, false, true}, {a, false, false}, // his own bound
		{b, false, true}, {c, false, false}, // everybody's
		{a, true, true}, {c, false, true}, {a, false, false},
		{c, true, true}, {b, true, true}, {a, false, true}, {a, false, false},
	} {
		if step.leave {
			g.leave(step.id)
		} else if got := g.enter(step.id); got != step.want {
			t.Errorf("step %d: %v", i, got)
		}
	}
}

// A stream has to come from the peer of its session, with the token.
func TestStreamOfAnother(t *testing.T) {
	dir := t.TempDir()
	token := []byte("a token of some length")
	hybrid := func(name string) transport.Addr {
		return transport.Addr{Family: transport.Hybrid, Path: filepath.Join(dir, name), Port: 1524}
	}
	startHost(t, Config{
		Exports: []Export{exportDir(t, "code", "guests="+filepath.Join(dir, "a"), "guests="+filepath.Join(dir, "b"))},
		Listen:  []transport.Addr{hybrid("a"), hybrid("b")}, Token: token,
	})
	g := newGuest(t, hybrid("a"), 1)
	g.token = token
	g.connect()
	id := g.request("code").MountID

	refused := func(name string, a transport.Addr, m wire.Message) {
		t.Helper()
		c := dial(t, a)
		send(t, c, m)
		if r, ok := recv(t, c).(*wire.OpenReply); !ok || r.Errno != unix.EPERM && r.Errno != unix.ENOENT {
			t.Errorf("%s: %+v", name, r)
		}
		gone(t, c)
	}
	refused("no token", hybrid("a"), &wire.StreamOpen{SessionID: g.id, MountID: id})
	refused("wrong token", hybrid("a"), &wire.StreamOpen{SessionID: g.id, MountID: id, Token: []byte("another token")})
	refused("another VM", hybrid("b"), &wire.StreamOpen{SessionID: g.id, MountID: id, Token: token})
	refused("notify, no token", hybrid("a"), &wire.NotifyOpen2{SessionID: g.id, MountID: id})
	refused("notify, another VM", hybrid("b"), &wire.NotifyOpen2{SessionID: g.id, MountID: id, Token: token})
	refused("events, no token", hybrid("a"), &wire.EventOpen{SessionID: g.id})
	refused("events, another VM", hybrid("b"), &wire.EventOpen{SessionID: g.id, Token: token})

	thief := newGuest(t, hybrid("b"), 1)
	thief.token = token
	thief.connect() // has a session of its own, as a clone of the VM would, and nothing of the other's
	refused("another VM with the same id", hybrid("b"), &wire.StreamOpen{SessionID: g.id, MountID: id, Token: token})
	clone, cloneID := thief.mount("code")
	if err := clone.serves(); err != nil {
		t.Error(err)
	}
	send(t, thief.c, &wire.Unmounted{MountID: cloneID})
	gone(t, clone.Conn)
	liar := newGuest(t, hybrid("a"), 2)
	liar.token = []byte("a guess")
	c := dial(t, liar.addr)
	send(t, c, liar.hello())
	if r := want[*wire.Refused](t, c); r.Errno != unix.EPERM || !strings.Contains(r.Text, "wrong token") {
		t.Errorf("a wrong token: %+v", r)
	}
	c = dial(t, hybrid("a"))
	send(t, c, &wire.Init{Version: 1})
	gone(t, c) // version 1 has no token to give

	f := g.open(id)
	f.start()
	if err := f.serves(); err != nil {
		t.Error(err)
	}
	send(t, g.c, &wire.Ping{ID: 7})
	if r := want[*wire.Alive](t, g.c); r.ID != 7 {
		t.Errorf("%+v", r)
	}
}

// Another user of this machine gets nothing over a Unix socket that he can
// open.
func TestAnotherUser(t *testing.T) {
	if path := os.Getenv("TRANSFUSE_TEST_SOCKET"); path != "" {
		c := dial(t, transport.Addr{Family: transport.Unix, Path: path})
		send(t, c, newGuest(t, transport.Addr{}, 1).hello())
		if r := want[*wire.Refused](t, c); r.Errno != unix.EPERM || !strings.Contains(r.Text, "no export is for this guest") {
			t.Errorf("got %+v", r)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("run the tests as root: sudo -E go test ./...")
	}
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	for _, p := range []string{filepath.Dir(filepath.Dir(h.addr.Path)), filepath.Dir(h.addr.Path), h.addr.Path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/proc/self/fd/3", "-test.run", "^TestAnotherUser$", "-test.v")
	cmd.ExtraFiles = []*os.File{exe}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TRANSFUSE_TEST_SOCKET="+h.addr.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestAnotherUser") {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
	h.logs.wait("connection refused", "uid 65534")
}
