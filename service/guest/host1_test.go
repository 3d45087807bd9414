// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/transport"
)

const proofWanted = "22a532644d38c6d6039c6103031d363852485dc835047b0cf2f9c0adeb2a425e"

// wait bounds whatever these tests wait for.
const wait = 10 * time.Second

// v1host speaks version 1 by hand: its bytes are those of protocol version 1, and none of package wire's.
type v1host struct {
	t   *testing.T
	dir string
	ln  net.Listener
	log *syncBuffer

	control net.Conn
	cancel  context.CancelFunc
	ran     chan error
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func listenUnix(t *testing.T, path string) net.Listener {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func address(t *testing.T, s string) transport.Addr {
	t.Helper()
	a, err := transport.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// startV1 starts a daemon against a host of version 1 that knows no long Init: it closes on one.
func startV1(t *testing.T, change func(*Config)) *v1host {
	t.Helper()
	needRoot(t)
	h := &v1host{t: t, dir: t.TempDir(), log: &syncBuffer{}, ran: make(chan error, 1)}
	h.ln = listenUnix(t, filepath.Join(h.dir, "h"))
	c := Config{
		Server: address(t, "unix:"+filepath.Join(h.dir, "h")), Socket: address(t, "unix:"+filepath.Join(h.dir, "g")),
		StateDir: filepath.Join(h.dir, "state"), Pidfile: filepath.Join(h.dir, "pid"),
		Log: slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if change != nil {
		change(&c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	h.cancel = cancel
	go func() { h.ran <- Run(ctx, c) }()
	t.Cleanup(h.stop)

	first := h.accept()
	n := binary.LittleEndian.Uint32(h.read(first, 4))
	if n <= 6 {
		t.Fatalf("first Init has %d bytes", n)
	}
	first.Close() // as a host that dies of it

	h.control = h.accept()
	if got := h.read(h.control, 6); string(got) != "\x06\x00\x00\x00\x00\x00" {
		t.Fatalf("second Init: % x", got)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "pid")); err == nil {
		t.Error("the pidfile is there before the host answered")
	}
	h.write(h.control, "\x06\x00\x00\x00\x00\x00")
	again := h.accept()
	if n := binary.LittleEndian.Uint32(h.read(again, 4)); n <= 6 {
		t.Fatalf("the Init that makes sure has %d bytes", n)
	}
	again.Close()
	h.message(2) // that it is connected
	return h
}

func (h *v1host) stop() {
	h.cancel()
	select {
	case err := <-h.ran:
		if err != nil {
			h.t.Errorf("Run: %v", err)
		}
	case <-time.After(wait):
		h.t.Errorf("the daemon does not end; its log:\n%s", h.log)
	}
	h.ln.Close()
	if h.control != nil {
		h.control.Close()
	}
	if h.t.Failed() {
		h.t.Logf("log:\n%s", h.log)
	}
}

func (h *v1host) accept() net.Conn {
	h.t.Helper()
	h.ln.(*net.UnixListener).SetDeadline(time.Now().Add(wait))
	c, err := h.ln.Accept()
	if err != nil {
		h.t.Fatalf("accept: %v; the daemon's log:\n%s", err, h.log)
	}
	c.SetDeadline(time.Now().Add(wait))
	return c
}

func (h *v1host) read(c net.Conn, n int) []byte {
	h.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		h.t.Fatalf("read %d bytes: %v; the daemon's log:\n%s", n, err, h.log)
	}
	return b
}

func (h *v1host) write(c net.Conn, s string) {
	h.t.Helper()
	if _, err := c.Write([]byte(s)); err != nil {
		h.t.Fatal(err)
	}
}

// send sends a control message.
func (h *v1host) send(typ uint16, body string) {
	h.t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, uint32(6+len(body)))
	h.write(h.control, string(binary.LittleEndian.AppendUint16(b, typ))+body)
}

// message reads control messages until one of type typ, and returns its body. Log lines in between are skipped.
func (h *v1host) message(typ uint16) string {
	h.t.Helper()
	for {
		head := h.read(h.control, 6)
		body := h.read(h.control, int(binary.LittleEndian.Uint32(head))-6)
		got := binary.LittleEndian.Uint16(head[4:])
		if got == typ {
			return string(body)
		}
		if got != 1 && got != 2 {
			h.t.Fatalf("message of type %d, %q; want type %d", got, body, typ)
		}
	}
}

// logged waits for a log line to the host that holds text.
func (h *v1host) logged(typ uint16, text string) {
	h.t.Helper()
	for !strings.Contains(h.message(typ), text) {
	}
}

func (h *v1host) dial(first string) net.Conn {
	h.t.Helper()
	c, err := net.Dial("unix", filepath.Join(h.dir, "g"))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(wait))
	h.write(c, first)
	return c
}

// mount mounts s over dir with options, and returns the notify channel.
func (h *v1host) mount(dir, options string, s *tinyFS) (stream, notify net.Conn) {
	h.t.Helper()
	stream = h.dial("m-o\x00" + options + "\x00" + dir)
	stream.SetDeadline(time.Time{})
	go func() { s.serve(stream); stream.Close() }()
	notify = h.accept()
	h.t.Cleanup(func() { notify.Close() })
	want := binary.LittleEndian.AppendUint32(nil, uint32(6+len(dir)))
	want = append(append(want, 5, 0), dir...)
	if got := h.read(notify, len(want)); !bytes.Equal(got, want) {
		h.t.Fatalf("notify channel begins % x, want % x", got, want)
	}
	return stream, notify
}

func path16(paths ...string) string {
	b := ""
	for _, p := range paths {
		b += string(binary.LittleEndian.AppendUint16(nil, uint16(len(p)))) + p + "\x00"
	}
	return b
}

func TestV1Control(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	if b, err := os.ReadFile(filepath.Join(h.dir, "pid")); err != nil || string(b) != strconv.Itoa(os.Getpid())+"\n" {
		t.Errorf("pidfile: %q, %v", b, err)
	}
	missing, empty, full := filepath.Join(h.dir, "missing"), filepath.Join(h.dir, "empty"), h.dir
	if err := os.Mkdir(empty, 0o755); err != nil {
		t.Fatal(err)
	}
	h.send(1, "\x07\x01"+path16(missing, empty, full))
	if got, want := h.message(4), "\x07\x01"+path16(missing); got != want {
		t.Errorf("mount suitability: %q, want %q", got, want)
	}
	h.send(2, "\x08\x01"+path16(full, empty, missing))
	if got, want := h.message(4), "\x08\x01"+path16(empty, missing); got != want {
		t.Errorf("export suitability: %q, want %q", got, want)
	}
	h.send(3, "\x09\x00/nothing/here")
	if got := h.message(7); !strings.HasPrefix(got, "\x09\x00") || !strings.Contains(got, "/nothing/here") {
		t.Errorf("perfstat of nothing: %q", got)
	}
}

func TestV1MountAndPerfstat(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	dir := filepath.Join(h.dir, "deep", "mnt")
	s := &tinyFS{size: 5}
	h.mount(dir, "allow_other,fsname=x", s)
	h.send(3, "\x01\x00"+dir)
	if got := h.message(6); len(got) != 10 {
		t.Errorf("START_PERFSTAT: %d bytes", len(got))
	}
	if st, err := os.Stat(filepath.Join(dir, "hello")); err != nil || st.Size() != 5 {
		t.Errorf("stat: %v, %v", st, err)
	}
	h.send(4, "\x02\x00"+dir)
	got := h.message(6)
	if len(got) < 10+2*24 || (len(got)-10)%24 != 0 || got[:2] != "\x02\x00" {
		t.Fatalf("STOP_PERFSTAT: %d bytes", len(got))
	}
	for i := 10; i < len(got); i += 24 {
		e := []byte(got[i:])
		u, start, stop := binary.LittleEndian.Uint64(e), binary.LittleEndian.Uint64(e[8:]), binary.LittleEndian.Uint64(e[16:])
		if u == 0 || start == 0 || stop < start {
			t.Errorf("entry %d: unique %d, start %d, stop %d", i, u, start, stop)
		}
	}
	if st, err := os.Stat(filepath.Dir(dir)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("parent that was made: %v, %v", st.Mode(), err)
	}
	// A user of the guest unmounts: that is no failure.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	h.logged(2, "unmounted")
}

func TestV1NotifyAnswers(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	dir := filepath.Join(h.dir, "mnt")
	_, notify := h.mount(dir, "allow_other", &tinyFS{})
	os.Stat(filepath.Join(dir, "hello"))
	for _, tt := range []struct {
		name  string
		bytes []byte
		want  unix.Errno
	}{
		{"known inode", append(fuse.Append(nil, &fuse.OutHeader{Len: 40, Error: int32(fuse.NOTIFY_INVAL_INODE)}),
			fuse.Append(nil, &fuse.NotifyInvalInodeOut{Ino: fuse.RootID})...), 0},
		{"unknown inode", append(fuse.Append(nil, &fuse.OutHeader{Len: 40, Error: int32(fuse.NOTIFY_INVAL_INODE)}),
			fuse.Append(nil, &fuse.NotifyInvalInodeOut{Ino: 77})...), unix.ENOENT},
		{"a reply", fuse.Append(nil, &fuse.OutHeader{Len: 16, Unique: 4}), unix.EINVAL},
		{"resend", fuse.Append(nil, &fuse.OutHeader{Len: 16, Error: int32(fuse.NOTIFY_RESEND)}), unix.EINVAL},
		{"no such code", fuse.Append(nil, &fuse.OutHeader{Len: 16, Error: 99}), unix.EINVAL},
	} {
		h.write(notify, string(tt.bytes))
		if got := unix.Errno(binary.LittleEndian.Uint32(h.read(notify, 4))); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	// A length that lies ends the channel and nothing else.
	h.write(notify, "\x0f\x00\x00\x00............")
	if _, err := notify.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after a length of 15: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "hello")); err != nil {
		t.Error(err)
	}
}

// What the host does wrong is refused with a line that says why, and everything else goes on.
func TestV1BadMounts(t *testing.T) {
	fstest.Leaks(t)
	outside := t.TempDir()
	var root string
	h := startV1(t, func(c *Config) {
		root = filepath.Join(filepath.Dir(c.Pidfile), "root")
		c.MountRoots = []string{root}
	})
	full := filepath.Join(root, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, first, want string }{
		{"not empty", "m" + full, "directory not empty"},
		{"outside the roots", "m" + filepath.Join(outside, "m"), "--mount-root"},
		{"the root itself", "m" + root, "--mount-root"},
		{"dots", "m" + root + "/../m", ".. is not allowed"},
		{"through a link", "m" + root + "/link/m", "symbolic link"},
		{"over a link", "m" + root + "/link", "link is a symbolic link; name"},
		{"over a file", "m" + root + "/file", "file is a file; name"},
		{"suid", "m-o\x00suid\x00" + root + "/m", "suid is not allowed"},
		{"dev", "m-o\x00rw,dev\x00" + root + "/m", "dev is not allowed"},
		{"unknown option", "m-o\x00nonempty\x00" + root + "/m", "not known"},
		{"another flag", "m-u\x00" + root + "/m", "only -o"},
		{"relative", "mrelative", "no mount point"},
		{"too long", "m/" + strings.Repeat("x", 5000), "at most"},
		{"unknown subprotocol", "x", "not known"},
		{"garbage", "GET / HTTP/1.1\r\n\r\n", "not known"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := h.dial(tt.first)
			if n, err := c.Read(make([]byte, 1)); err == nil {
				t.Errorf("it answered %d bytes", n)
			}
			h.logged(1, tt.want)
		})
	}
	if n, _ := os.ReadDir(outside); len(n) > 0 {
		t.Errorf("made outside of the roots: %v", n)
	}
}

// Whatever arrives on the control channel ends that channel at most.
func TestV1HostileControl(t *testing.T) {
	for _, tt := range []struct{ name, bytes string }{
		{"length 0", "\x00\x00\x00\x00\x00\x00"},
		{"length 3", "\x03\x00\x00\x00\x00\x00"},
		{"length 4 GiB", "\xff\xff\xff\xff\x01\x00"},
		{"path longer than the message", "\x0c\x00\x00\x00\x01\x00\x01\x00\xff\xff/\x00"},
		{"unknown type", "\x06\x00\x00\x00\x3f\x00"},
		{"version 2 in version 1", "\x0a\x00\x00\x00\x41\x00\x01\x00\x00\x00"},
		{"garbage", "HTTP/1.1 400 Bad Request\r\n\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			h := startV1(t, nil)
			dir := filepath.Join(h.dir, "mnt")
			h.mount(dir, "allow_other", &tinyFS{})
			h.write(h.control, tt.bytes)
			io.Copy(io.Discard, h.control)
			h.control.Close()
			// It dials again, and this time with six bytes at once.
			h.control = h.accept()
			if got := h.read(h.control, 6); string(got) != "\x06\x00\x00\x00\x00\x00" {
				t.Errorf("Init: % x", got)
			}
			h.write(h.control, "\x06\x00\x00\x00\x00\x00")
			if _, err := os.Stat(filepath.Join(dir, "hello")); err != nil {
				t.Errorf("the mount: %v", err)
			}
		})
	}
}

// One mount's broken stream touches no other mount.
func TestV1TwoMountsOneDies(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	a, b := filepath.Join(h.dir, "a"), filepath.Join(h.dir, "b")
	stream, _ := h.mount(a, "allow_other", &tinyFS{})
	h.mount(b, "allow_other", &tinyFS{})
	os.Stat(filepath.Join(a, "hello"))
	h.write(stream, strings.Repeat("garbage ", 100))
	h.logged(1, "the mount ended")
	if _, err := os.Stat(filepath.Join(a, "hello")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("the broken mount is still there: %v", err)
	}
	if _, err := os.Stat(filepath.Join(b, "hello")); err != nil {
		t.Errorf("the other mount: %v", err)
	}
}

// The host's end of the stream is the end of the mount.
func TestV1StreamLost(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	dir := filepath.Join(h.dir, "mnt")
	stream, _ := h.mount(dir, "allow_other", &tinyFS{})
	stream.Close()
	h.logged(1, "the stream to the host ended")
	if err := unix.Rmdir(dir); err != nil {
		t.Errorf("the mount point is not free: %v", err)
	}
}

func TestAllowed(t *testing.T) {
	vs := address(t, "vsock:host:1524")
	un := address(t, "unix:/h")
	local := address(t, "vsock:local:1524")
	for _, tt := range []struct {
		name   string
		peer   transport.Peer
		server transport.Addr
		ok     bool
	}{
		{"the host", transport.Peer{Family: transport.Vsock, CID: 2, Port: 700}, vs, true},
		{"the host, as an ordinary user", transport.Peer{Family: transport.Vsock, CID: 2, Port: 70000}, vs, true},
		{"another guest", transport.Peer{Family: transport.Vsock, CID: 7, Port: 700}, vs, false},
		{"this machine", transport.Peer{Family: transport.Vsock, CID: 1, Port: 700}, vs, false},
		{"loopback, root", transport.Peer{Family: transport.Vsock, CID: 1, Port: 700}, local, true},
		{"loopback, anybody", transport.Peer{Family: transport.Vsock, CID: 1, Port: 1024}, local, false},
		{"vsock where the host is at a unix socket", transport.Peer{Family: transport.Vsock, CID: 2, Port: 700}, un, false},
		{"root", transport.Peer{Family: transport.Unix, UID: 0}, un, true},
		{"our user", transport.Peer{Family: transport.Unix, UID: 1000}, un, true},
		{"another user", transport.Peer{Family: transport.Unix, UID: 1001}, un, false},
		{"hybrid", transport.Peer{Family: transport.Hybrid}, vs, false},
		{"nobody knows", transport.Peer{}, un, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := allowed(tt.peer, tt.server, 1000); (err == nil) != tt.ok {
				t.Errorf("allowed: %v, want %v", err, tt.ok)
			}
		})
	}
}

func TestProof(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, func(c *Config) { c.Token = []byte("0123456789abcdef") })
	nonce := strings.Repeat("n", 32)
	c := h.dial("t" + nonce + "e")
	proof := h.read(c, 32)
	// HMAC-SHA256(token, "transfuse guest\0" + nonce), by openssl.
	if got := fmt.Sprintf("%x", proof); got != proofWanted {
		t.Errorf("proof %s, want %s", got, proofWanted)
	}
	buf := make([]byte, 16)
	if n, err := c.Read(buf); err != nil || n == 0 {
		t.Errorf("no thread id after the proof: %v", err)
	}
}
