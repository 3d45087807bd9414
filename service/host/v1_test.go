// SPDX-License-Identifier: Apache-2.0

package host

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// guestV1 is a scripted guest of version 1: each step is bytes, as
// protocol-v1 of the seed has them.
type guestV1 struct {
	t    *testing.T
	addr transport.Addr      // of the host
	ln   net.Listener        // its own socket
	vmm  bool                // ln is a VMM's socket, with CONNECT and OK
	c    net.Conn            // control
	came map[string]net.Conn // by their first byte, while they are not wanted
}

// listenV1 makes the guest's own socket at path.
func listenV1(t *testing.T, path string) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	ln.(*net.UnixListener).SetDeadline(time.Now().Add(15 * time.Second))
	return ln
}

// dial connects to the host.
func (g *guestV1) dial() net.Conn {
	g.t.Helper()
	path := g.addr.Path
	if g.addr.Family == transport.Hybrid {
		path = fmt.Sprintf("%s_%d", path, g.addr.Port)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		g.t.Fatal(err)
	}
	return g.keep(c)
}

// want takes a connection of the host of a subprotocol.
func (g *guestV1) want(sub string) net.Conn {
	g.t.Helper()
	for g.came[sub] == nil {
		c := g.accept()
		var first [1]byte
		if _, err := io.ReadFull(c, first[:]); err != nil {
			g.t.Fatal(err)
		}
		if g.came == nil {
			g.came = map[string]net.Conn{}
		}
		g.came[string(first[:])] = c
	}
	c := g.came[sub]
	delete(g.came, sub)
	return c
}

func (g *guestV1) keep(c net.Conn) net.Conn {
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(15 * time.Second))
	return c
}

// accept takes a connection of the host, up to its first byte.
func (g *guestV1) accept() net.Conn {
	g.t.Helper()
	c, err := g.ln.Accept()
	if err != nil {
		g.t.Fatal(err)
	}
	g.keep(c)
	if g.vmm {
		g.expect(c, "CONNECT 1525\n")
		g.write(c, "OK 1073741824\n")
	}
	return c
}

// expect reads exactly want.
func (g *guestV1) expect(c net.Conn, want string) {
	g.t.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != want {
		g.t.Fatalf("got %q, %v; want %q", b[:n], err, want)
	}
}

func (g *guestV1) write(c net.Conn, s string) {
	g.t.Helper()
	if _, err := c.Write([]byte(s)); err != nil {
		g.t.Fatal(err)
	}
}

// connect opens the control channel.
func (g *guestV1) connect() {
	g.t.Helper()
	g.c = g.dial()
	g.write(g.c, "\x06\x00\x00\x00\x00\x00")
	g.expect(g.c, "\x06\x00\x00\x00\x00\x00")
}

// suit answers the question whether dir suits, with yes or with nothing.
func (g *guestV1) suit(dir string, yes bool) {
	g.t.Helper()
	// u32 length, u16 type 2, u16 id, then u16 n, n bytes, NUL.
	var head [8]byte
	if _, err := io.ReadFull(g.c, head[:]); err != nil {
		g.t.Fatal(err)
	}
	paths := string(binary.LittleEndian.AppendUint16(nil, uint16(len(dir)))) + dir + "\x00"
	id := string(head[6:])
	want := string(binary.LittleEndian.AppendUint32(nil, uint32(8+len(paths)))) + "\x02\x00" + id
	if string(head[:]) != want {
		g.t.Fatalf("got %q, want %q", head, want)
	}
	g.expect(g.c, paths)
	if !yes {
		paths = ""
	}
	g.write(g.c, string(binary.LittleEndian.AppendUint32(nil, uint32(8+len(paths))))+"\x04\x00"+id+paths)
}

// mounted serves an 'm' connection as the seed does: one read for the
// arguments, then FUSE.
func (g *guestV1) mounted(args string) *fuseConn {
	g.t.Helper()
	got, fc := g.mountedAny()
	if got != args {
		g.t.Fatalf("got %q; want %q", got, args)
	}
	return fc
}

// mountedAny is mounted, and returns the arguments.
func (g *guestV1) mountedAny() (args string, fc *fuseConn) {
	g.t.Helper()
	c := g.want("m")
	b := make([]byte, 4096)
	n, err := c.Read(b)
	if err != nil {
		g.t.Fatal(err)
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		g.t.Fatal(err)
	}
	conn := transport.NewConn(f, transport.Peer{})
	g.t.Cleanup(func() { conn.Close() })
	conn.SetReadDeadline(time.Now().Add(15 * time.Second))
	c.Close()
	fc = &fuseConn{t: g.t, Conn: conn}
	fc.start()
	return string(b[:n]), fc
}

// notify opens the notify channel of a mount.
func (g *guestV1) notify(dir string) net.Conn {
	g.t.Helper()
	c := g.dial()
	g.write(c, string(binary.LittleEndian.AppendUint32(nil, uint32(6+len(dir))))+"\x05\x00"+dir)
	return c
}

// ended waits for the end of a connection that brings nothing more.
func (g *guestV1) ended(c net.Conn) {
	g.t.Helper()
	if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) || len(b) > 0 {
		g.t.Fatalf("got %q, %v; want the end", b, err)
	}
}

func TestVersion1(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "g.sock")
	ln := listenV1(t, sock)
	h := startHost(t, Config{
		Exports: []Export{exportDir(t, "code"), exportDir(t, "docs", "ro")},
		Guests: []Guest{{transport.Addr{Family: transport.Unix, Path: sock}, []GuestMount{
			{Tag: "code", Dir: "/mnt/code", Options: []string{"nosuid"}},
		}}},
	}, func(s *Server) { s.times.retryMin = 10 * time.Millisecond })
	g := &guestV1{t: t, addr: h.addr, ln: ln}
	const args = "-o\x00default_permissions,allow_other,fsname=code,nosuid\x00/mnt/code"

	g.connect()
	g.suit("/mnt/code", false)
	h.logs.wait("no mount at the guest", "does not suit")
	g.suit("/mnt/code", true) // it asks again
	f := g.mounted(args)
	if got := f.read("hello"); got != "hello from code" {
		t.Errorf("read %q", got)
	}
	n := g.notify("/mnt/code")
	h.logs.wait("msg=mounted", "tag=code")

	// Its log, and what cannot be understood of version 2.
	g.write(g.c, "\x0b\x00\x00\x00\x01\x00error")
	h.logs.wait("level=WARN", "from the guest", "error")
	g.write(g.c, "\x0c\x00\x00\x00\x02\x00notice")
	h.logs.wait("level=INFO", "from the guest", "notice")

	// The control channel comes back, the mount goes on, and is not asked
	// for again.
	g.c.Close()
	h.logs.wait("control channel closed")
	g.connect()
	if err := f.serves(); err != nil {
		t.Errorf("the mount ended with the control channel: %v", err)
	}

	// The guest unmounts: the host does not insist.
	f.Close()
	g.ended(n)
	h.logs.wait("unmounted by the guest")

	// It goes and comes back: the host asks anew.
	g.c.Close()
	h.logs.wait("session ended")
	g.connect()
	g.suit("/mnt/code", true)
	f = g.mounted(args)
	if err := f.serves(); err != nil {
		t.Error(err)
	}
	h.stop()
	g.ended(g.c)
	gone(t, f.Conn)
}

func TestVersion1BreaksTheProtocol(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	for _, b := range []string{"\x00\x00\x00\x00", "\x06\x00\x00\x00\x41\x00", "\xff\xff\xff\xff\x01\x00"} {
		g := &guestV1{t: t, addr: h.addr}
		g.connect()
		g.write(g.c, b)
		g.ended(g.c)
		h.logs.wait("broke the protocol")
	}
}

func TestVersion1Ping(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "g.sock")
	ln := listenV1(t, sock)
	h := startHost(t, Config{
		Exports: []Export{exportDir(t, "code")},
		Guests:  []Guest{{transport.Addr{Family: transport.Unix, Path: sock}, []GuestMount{{Tag: "code", Dir: "/mnt/code"}}}},
	}, func(s *Server) {
		s.times.ping, s.times.silent, s.times.dead = 10*time.Millisecond, 100*time.Millisecond, 400*time.Millisecond
	})
	g := &guestV1{t: t, addr: h.addr, ln: ln}
	g.connect()
	var head [8]byte // the question whether /mnt/code suits stays without an answer
	if _, err := io.ReadFull(g.c, head[:]); err != nil {
		t.Fatal(err)
	}
	e := g.want("e")
	g.write(e, "4242")
	for range 3 {
		g.expect(e, "\x08\x00\x00\x00\x00\x01\x00\x80") // n is big-endian
		g.write(g.c, "\x06\x00\x00\x00\x03\x00")
	}
	h.logs.wait("guest gives no sign of life")
	h.logs.wait("session ended", "no sign of life")
}

// Over hybrid vsock any process of the guest may listen: the host wants a
// proof before it says anything else.
func TestVersion1Proof(t *testing.T) {
	token := []byte("a token of some length")
	for _, c := range []struct {
		name   string
		answer func(nonce []byte) []byte
		log    string // empty: good
	}{
		{"right", func(n []byte) []byte { p := wire.Proof(token, n); return p[:] }, ""},
		{"wrong", func(n []byte) []byte { p := wire.Proof([]byte("another token"), n); return p[:] }, "another token"},
		{"echo", func(n []byte) []byte { return n }, "another token"},
		{"none", func([]byte) []byte { return nil }, "did not prove"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			ln := listenV1(t, filepath.Join(dir, "v.sock"))
			server := transport.Addr{Family: transport.Hybrid, Path: filepath.Join(dir, "v.sock"), Port: 1524}
			socket := transport.Addr{Family: transport.Hybrid, Path: filepath.Join(dir, "v.sock"), Port: 1525}
			h := startHost(t, Config{
				Exports: []Export{exportDir(t, "code", "ro")}, Listen: []transport.Addr{server}, Token: token, AllowUnprivileged: true,
				Guests: []Guest{{socket, []GuestMount{{Tag: "code", Dir: "/mnt/code"}}}},
			})
			g := &guestV1{t: t, addr: server, ln: ln, vmm: true}
			g.connect()
			g.suit("/mnt/code", true)
			conn := g.accept()
			var hello [1 + wire.NonceLen]byte
			if _, err := io.ReadFull(conn, hello[:]); err != nil || hello[0] != wire.SubProof || bytes.Count(hello[1:], []byte{0}) == wire.NonceLen {
				t.Fatalf("got %q, %v", hello, err)
			}
			g.write(conn, string(c.answer(hello[1:])))
			if c.log != "" {
				conn.(*net.UnixConn).CloseWrite()
				g.ended(conn)
				h.logs.wait("no mount at the guest", c.log)
				return
			}
			g.expect(conn, "m")
			g.expect(conn, "-o\x00default_permissions,allow_other,fsname=code,ro\x00/mnt/code")
		})
	}
}
