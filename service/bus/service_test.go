// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
)

// The name is there when StartGuest returns.
func TestNameAtStart(t *testing.T) {
	b := runningBus(t)
	c := b.client()
	serveGuest(t, b, newGuest(), Config{})
	if _, err := try(c, GuestName, guestRoot, peerName+".Ping", dbus.FlagNoAutoStart); err != nil {
		t.Error(err)
	}
}

// A bus may appear, end and come back, with its directory.
func TestBusComesAndGoes(t *testing.T) {
	b := newBus(t)
	g := newGuest(aMount("a1"))
	began := time.Now()
	l := serveGuest(t, b, g, Config{})
	if d := time.Since(began); d > firstTime/2 {
		t.Errorf("without a bus it took %v", d)
	}
	l.await(t, "D-Bus is not running", 1)
	for i := range 3 {
		b.start()
		l.await(t, `msg="on D-Bus"`, i+1)
		c := b.user()
		if d := cmp.Diff(mountValues("a1"), values(t, c, GuestName, mountPath("a1"), GuestName+".Mount")); d != "" {
			t.Error(d)
		}
		ch := signals(t, c, GuestName)
		g.set(aMount("a2"))
		if s := next(t, ch); s.Name != managerName+".InterfacesAdded" {
			t.Errorf("%v", s)
		}
		b.kill()
		l.await(t, "D-Bus is lost", i+1)
		if i == 1 {
			if err := os.RemoveAll(filepath.Dir(b.path)); err != nil {
				t.Fatal(err)
			}
		}
		g.remove("a2") // nobody waits without a bus
	}
	if n := strings.Count(l.String(), "\n"); n > 12 {
		t.Errorf("%d lines were logged:\n%s", n, l)
	}
}

// What waits for a socket is woken by its making, and not by what else is made there.
func TestWatcher(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "run", "bus")
	for _, name := range []string{"run", "run/bus"} {
		w := watchFor(path)
		if err := os.WriteFile(filepath.Join(dir, filepath.Dir(name), "other"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if w.wait(t.Context(), 50*time.Millisecond) {
			t.Error("another file woke it")
		}
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if !w.wait(t.Context(), patience) {
			t.Errorf("%s did not wake it", name)
		}
		w.close()
	}
}

func TestNameIsTaken(t *testing.T) {
	b := runningBus(t)
	other := b.client()
	if r, err := other.RequestName(GuestName, dbus.NameFlagAllowReplacement); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
	l := serveGuest(t, b, newGuest(), Config{})
	l.await(t, fmt.Sprintf("%s, process %d", other.Names()[0], os.Getpid()), 1)
	l.await(t, fmt.Sprintf("uid %d", os.Geteuid()), 1)
	var owner string
	if err := other.BusObject().Call("org.freedesktop.DBus.GetNameOwner", 0, GuestName).Store(&owner); err != nil || owner != other.Names()[0] {
		t.Errorf("the owner is %s, %v: it was replaced", owner, err)
	}
	other.Close()
	l.await(t, `msg="on D-Bus"`, 1)
	do(t, b.user(), GuestName, guestRoot, GuestName+".Manager.Exports")
}

// The policy lets root alone have the names, and everybody call.
func TestNameIsRoots(t *testing.T) {
	needsRoot(t)
	b := runningBus(t)
	for _, name := range []string{GuestName, HostName} {
		_, err := b.user().RequestName(name, 0)
		wantError(t, err, "org.freedesktop.DBus.Error.AccessDenied")
	}
}

func TestNameIsRefused(t *testing.T) {
	b := newBus(t)
	for _, name := range []string{GuestName, HostName} {
		if err := os.WriteFile(filepath.Join(b.dir, name+".conf"), []byte("<busconfig/>"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.start()
	l := serveGuest(t, b, newGuest(), Config{})
	l.await(t, "org.transfused1.conf", 1)
	if n := strings.Count(l.String(), "\n"); n != 1 {
		t.Errorf("%d lines:\n%s", n, l)
	}
}

func TestBadAddress(t *testing.T) {
	l := newLogs()
	s := StartGuest(t.Context(), newGuest(), Config{Address: "tcp:host=localhost", Log: l.logger()})
	waitFor(t, s)
	if !strings.Contains(l.String(), "tcp:host=localhost") || !strings.Contains(l.String(), "unix:path=") {
		t.Error(l)
	}
}

func TestSocketPath(t *testing.T) {
	for _, x := range []struct{ address, env, want string }{
		{"", "", "/run/dbus/system_bus_socket"},
		{"", "unix:path=/a", "/a"},
		{"unix:path=/a%20b,guid=0", "unix:path=/c", "/a b"},
		{"tcp:host=a;unix:guid=0,path=/b", "", "/b"},
	} {
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", x.env)
		if got, err := socketPath(x.address); got != x.want || err != nil {
			t.Errorf("%+v: %q, %v", x, got, err)
		}
	}
}

// A bus that listens and says nothing holds up neither the start nor the end: the bus may be waiting for the service.
func TestSilentBus(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "bus")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithCancel(t.Context())
	began := time.Now()
	s := StartGuest(ctx, newGuest(), Config{Address: "unix:path=" + path})
	if d := time.Since(began); d < firstTime || d > patience {
		t.Errorf("the start took %v", d)
	}
	cancel()
	waitFor(t, s)
}

// A bus that does not read holds up no change of the daemon, and gets the last state when it reads again.
func TestStoppedBus(t *testing.T) {
	b := runningBus(t)
	g := newGuest()
	serveGuest(t, b, g, Config{})
	c := b.user()
	ch := signals(t, c, GuestName)
	goOn := b.stop()
	defer goOn()
	m := aMount("a1")
	m.Error = strings.Repeat("x", 10_000) // so that the socket is full soon
	began := time.Now()
	for i := range 500 {
		m.Streams = i
		m.Error = m.Error[1:] + "y"
		g.set(m) // it waits for who doesn't read
	}
	if d := time.Since(began); d > writeTime/2 {
		t.Errorf("500 changes took %v", d)
	}
	goOn()
	for {
		s := next(t, ch)
		if s.Path == mountPath("a1") {
			if v, ok := s.Body[1].(map[string]dbus.Variant)["Streams"]; ok && v.Value() == uint32(499) {
				return
			}
		} else if s.Body[1].(map[string]map[string]dbus.Variant)[GuestName+".Mount"]["Streams"].Value() == uint32(499) {
			return
		}
	}
}

// Nor does it hold up the end.
func TestEndWithStoppedBus(t *testing.T) {
	b := runningBus(t)
	g := newGuest()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := StartGuest(ctx, g, Config{Address: b.address})
	defer b.stop()()
	m := aMount("a1")
	for i := range 500 {
		m.Error = strings.Repeat("x", 10_000+i)
		g.set(m)
	}
	began := time.Now()
	cancel()
	waitFor(t, s)
	if d := time.Since(began); d > writeTime/2 {
		t.Errorf("the end took %v", d)
	}
}

// The end is waited for by calls that are being served, and ends them.
func TestEndWithCalls(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	g := newGuest()
	began, release := make(chan struct{}), make(chan struct{})
	g.onMount = func(ctx context.Context, _ api.MountSpec) {
		close(began)
		<-ctx.Done()
		<-release
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := StartGuest(ctx, g, Config{Address: b.address})
	b.user().Object(GuestName, guestRoot).Go(GuestName+".Manager.Mount", 0, nil, "src", "/srv", []string{})
	<-began
	cancel()
	select {
	case <-s.done:
		t.Error("the service ended before its call did")
	case <-time.After(200 * time.Millisecond): // nothing tells that it goes on waiting
	}
	close(release)
	waitFor(t, s)
}

// What any user may send ends neither the connection nor the process.
func TestHostileMessages(t *testing.T) {
	b := runningBus(t)
	l := serveGuest(t, b, newGuest(), Config{})
	c := b.user()
	// Longer than any that is meant for us: it is not answered.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	long := c.Object(GuestName, guestRoot).CallWithContext(ctx, GuestName+".Manager.Mount", 0, strings.Repeat("x", maxMessage), "/srv", []string{})
	if long.Err != context.DeadlineExceeded {
		t.Error(long.Err)
	}
	// Descriptors are refused by the bus.
	_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Mount", 0, dbus.UnixFD(0))
	wantError(t, err, "org.freedesktop.DBus.Error.NotSupported")
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Exports")
	if n := strings.Count(l.String(), "on D-Bus"); n != 1 {
		t.Errorf("it was connected %d times", n)
	}
}

// socketOf is a net.Conn that reads from a buffer.
type socketOf struct {
	net.Conn
	*bytes.Reader
}

func (s socketOf) Read(p []byte) (int, error) { return s.Reader.Read(p) }

func TestWire(t *testing.T) {
	message := func(member string, body ...any) []byte {
		m := &dbus.Message{Type: dbus.TypeSignal, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/")),
			dbus.FieldInterface: dbus.MakeVariant("a.b"), dbus.FieldMember: dbus.MakeVariant(member)}, Body: body}
		if len(body) > 0 {
			m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
		}
		var b bytes.Buffer
		if err := m.EncodeTo(&b, binary.LittleEndian); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	deep := dbus.MakeVariant("bottom")
	for range 60 {
		deep = dbus.MakeVariant(deep)
	}
	unknownField := message("Odd")
	unknownField[16] = 99 // the first field's code
	badBody := message("Bad", "text")
	badBody[len(badBody)-len("text")-5] = 0xff // the length of its string
	var in bytes.Buffer
	for _, m := range [][]byte{message("First"), badBody, unknownField, message("Long", make([]byte, maxMessage)), message("Deep", deep), message("Last", "x")} {
		in.Write(m)
	}
	w := newWire(socketOf{Reader: bytes.NewReader(in.Bytes())}, newLogs().logger())
	w.framed = true
	var got []string
	for {
		m, err := dbus.DecodeMessage(w)
		if err != nil {
			break
		}
		got = append(got, m.Headers[dbus.FieldMember].Value().(string))
	}
	if d := cmp.Diff([]string{"First", "Deep", "Last"}, got); d != "" {
		t.Error(d)
	}
}
