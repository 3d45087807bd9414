// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// values are the properties of an interface, with their types left out.
func values(t *testing.T, c *dbus.Conn, name string, path dbus.ObjectPath, iface string) map[string]any {
	t.Helper()
	return plain(do(t, c, name, path, propertiesName+".GetAll", iface)[0].(map[string]dbus.Variant))
}

func plain(m map[string]dbus.Variant) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v.Value()
	}
	return out
}

func managerValues() map[string]any {
	return map[string]any{"Version": "1.2.3", "Server": "vsock:2:1524", "State": "connected", "Protocol": uint32(2), "Features": []string{"events", "resume"}}
}

func mountValues(id string) map[string]any {
	return map[string]any{"MountPoint": "/srv/" + id, "Tag": "src", "Source": "vsock:2:1524", "ReadOnly": false, "State": "active", "Error": "",
		"Since": uint64(1700000000123456), "Streams": uint32(2)}
}

func TestGuestProperties(t *testing.T) {
	b := runningBus(t)
	odd := aMount("odd")
	odd.Directory, odd.Error, odd.Since = "/srv/\xff\x00", "line\nbreak", time.Time{}
	serveGuest(t, b, newGuest(aMount("a1"), odd), Config{})
	c := b.user()
	if d := cmp.Diff(managerValues(), values(t, c, GuestName, guestRoot, GuestName+".Manager")); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(mountValues("a1"), values(t, c, GuestName, mountPath("a1"), GuestName+".Mount")); d != "" {
		t.Error(d)
	}
	want := mountValues("odd")
	want["MountPoint"], want["Error"], want["Since"] = "/srv/\uFFFD", "line\nbreak", uint64(0)
	if d := cmp.Diff(want, values(t, c, GuestName, mountPath("odd"), "")); d != "" {
		t.Error(d)
	}
	if got := do(t, c, GuestName, mountPath("a1"), propertiesName+".Get", GuestName+".Mount", "Tag")[0].(dbus.Variant).Value(); got != "src" {
		t.Error(got)
	}
	if got := values(t, c, GuestName, mountPath("a1"), peerName); len(got) > 0 {
		t.Error(got)
	}
}

func TestGuestChanges(t *testing.T) {
	b := runningBus(t)
	g := newGuest(aMount("a1"))
	serveGuest(t, b, g, Config{})
	c := b.user()
	ch := signals(t, c, GuestName)

	g.set(aMount("a2"))
	s := next(t, ch)
	if s.Name != managerName+".InterfacesAdded" || s.Path != guestRoot || s.Body[0] != mountPath("a2") {
		t.Errorf("%v", s)
	}
	added := s.Body[1].(map[string]map[string]dbus.Variant)
	if d := cmp.Diff(mountValues("a2"), plain(added[GuestName+".Mount"])); d != "" || len(added) != 1 {
		t.Error(added, d)
	}

	m := aMount("a1")
	m.State, m.Error, m.Since, m.Streams, m.ReadOnly = api.Reconnecting, "the host is away", time.UnixMicro(7), 0, true
	m.Tag = "constant" // never told
	g.set(m)
	wantChange(t, next(t, ch), mountPath("a1"), GuestName+".Mount",
		map[string]any{"State": "reconnecting", "Error": "the host is away", "Since": uint64(7), "Streams": uint32(0), "ReadOnly": true})

	g.set(m) // nothing differs: nothing is told
	g.setStatus(func(s *api.GuestStatus) {
		s.Connected, s.Protocol, s.Features, s.Server = false, 0, nil, "vsock:2:1600"
	})
	wantChange(t, next(t, ch), guestRoot, GuestName+".Manager",
		map[string]any{"State": "disconnected", "Protocol": uint32(0), "Features": []string{}, "Server": "vsock:2:1600"})

	g.remove("a2")
	s = next(t, ch)
	if s.Name != managerName+".InterfacesRemoved" || s.Path != guestRoot || s.Body[0] != mountPath("a2") || !slices.Equal(s.Body[1].([]string), []string{GuestName + ".Mount"}) {
		t.Errorf("%v", s)
	}
	_, err := try(c, GuestName, mountPath("a2"), propertiesName+".GetAll", 0, GuestName+".Mount")
	wantError(t, err, "org.freedesktop.DBus.Error.UnknownObject")
}

func wantChange(t *testing.T, s *dbus.Signal, path dbus.ObjectPath, iface string, want map[string]any) {
	t.Helper()
	if s.Name != propertiesName+".PropertiesChanged" || s.Path != path || s.Body[0] != iface || len(s.Body[2].([]string)) != 0 {
		t.Fatalf("%v", s)
	}
	if d := cmp.Diff(want, plain(s.Body[1].(map[string]dbus.Variant))); d != "" {
		t.Error(d)
	}
}

func TestManagedObjects(t *testing.T) {
	b := runningBus(t)
	serveGuest(t, b, newGuest(aMount("a1"), aMount("a2")), Config{})
	got := do(t, b.user(), GuestName, guestRoot, managerName+".GetManagedObjects")[0].(map[dbus.ObjectPath]map[string]map[string]dbus.Variant)
	if len(got) != 2 {
		t.Error(got)
	}
	for _, id := range []string{"a1", "a2"} {
		if d := cmp.Diff(mountValues(id), plain(got[mountPath(id)][GuestName+".Mount"])); d != "" {
			t.Error(d)
		}
	}
}

// What GetManagedObjects says and the signals after it make the whole picture, whenever it is asked.
func TestManagedObjectsAndSignals(t *testing.T) {
	b := runningBus(t)
	var many []api.Mount // so that a reply takes its time
	for i := range 300 {
		many = append(many, aMount(fmt.Sprint("m", i)))
	}
	g := newGuest(many...)
	serveGuest(t, b, g, Config{})
	c := b.user()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				g.set(aMount("a"))
				g.remove("a")
			}
		}
	}()
	defer func() {
		close(stop)
		<-done
	}()
	for range 30 {
		// All signals of the daemon until the reply; the sequence says what came first.
		ch := make(chan *dbus.Signal, 10000)
		c.Signal(ch)
		if err := c.AddMatchSignal(dbus.WithMatchSender(GuestName)); err != nil {
			t.Fatal(err)
		}
		call := c.Object(GuestName, guestRoot).Call(managerName+".GetManagedObjects", 0)
		var objects map[dbus.ObjectPath]map[string]map[string]dbus.Variant
		if err := call.Store(&objects); err != nil {
			t.Fatal(err)
		}
		_, has := objects[mountPath("a")]
		_, err := try(c, GuestName, guestRoot, peerName+".Ping", 0) // what came before this is in ch
		if err != nil {
			t.Fatal(err)
		}
		c.RemoveSignal(ch)
		if err := c.RemoveMatchSignal(dbus.WithMatchSender(GuestName)); err != nil {
			t.Fatal(err)
		}
		var before, after string // the last signal about a before the reply, the first after it
		for more := true; more; {
			select {
			case s := <-ch:
				if len(s.Body) == 0 || s.Body[0] != mountPath("a") {
					continue
				}
				if s.Sequence < call.ResponseSequence {
					before = s.Name
				} else if after == "" {
					after = s.Name
				}
			default:
				more = false
			}
		}
		if before != "" && has != strings.HasSuffix(before, "Added") || after != "" && has != strings.HasSuffix(after, "Removed") {
			t.Errorf("the object is there: %v; before the reply %s, after it %s", has, before, after)
		}
	}
}

func TestMount(t *testing.T) {
	b := runningBus(t)
	p := b.polkit()
	p.set(polkitAnswer{Authorized: true})
	g := newGuest()
	serveGuest(t, b, g, Config{})
	c := b.user()
	dir := realDir(t)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	path := do(t, c, GuestName, guestRoot, GuestName+".Manager.Mount", "src", dir, []string{"ro", "cache=none"})[0].(dbus.ObjectPath)
	want := []any{askedMount{"src", dir, []string{"ro", "cache=none"}, st.Ino, unix.O_PATH | unix.O_DIRECTORY}}
	if d := cmp.Diff(want, g.taken()); d != "" {
		t.Error(d)
	}
	if got := values(t, c, GuestName, path, GuestName+".Mount"); got["MountPoint"] != dir {
		t.Errorf("the object that Mount returned has %v", got)
	}
	// A directory that is not there is the daemon's to make.
	missing := filepath.Join(dir, "missing")
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Mount", "src", missing, []string{})
	if d := cmp.Diff([]any{askedMount{"src", missing, []string{}, 0, 0}}, g.taken()); d != "" {
		t.Error(d)
	}
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "file")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct {
		name, tag, dir string
		says           []string
	}{
		{"link", "src", link, []string{link, "symbolic link"}},
		{"link on the way", "src", link + "/tmp", []string{link, "symbolic link"}},
		{"file", "src", file, []string{file, "not a directory"}},
		{"relative", "src", "srv", []string{`"srv"`, "absolute"}},
		{"empty", "src", "", []string{"absolute"}},
		{"long", "src", "/" + strings.Repeat("a", 4096), []string{"absolute"}},
		{"no tag", "", dir, []string{"tag"}},
	} {
		t.Run(bad.name, func(t *testing.T) {
			_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Mount", 0, bad.tag, bad.dir, []string{})
			wantError(t, err, "org.transfused1.Error.Invalid", bad.says...)
			if a := g.taken(); len(a) > 0 {
				t.Errorf("the daemon was asked for %v", a)
			}
		})
	}
}

// realDir is a directory with no link on the way.
func realDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// A file system that doesn't answer, as one of the daemon's own without its host, is not waited for.
func TestOpenDirectoryDoesNotWait(t *testing.T) {
	needsRoot(t)
	dir := realDir(t)
	device, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("test", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device)); err != nil {
		t.Fatal(err)
	}
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result, 1)
	go func() {
		f, err := openDirectory(filepath.Join(dir, "sub"))
		done <- result{f, err}
	}()
	select {
	case r := <-done:
		if r.f != nil || r.err != nil {
			t.Error(r)
		}
	case <-time.After(patience):
		t.Error("it waits for the file system")
	}
	unix.Close(device) // who waits gets an error
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Error(err)
	}
}

func TestUnmount(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	g := newGuest()
	serveGuest(t, b, g, Config{})
	c := b.user()
	for flags, how := range map[uint32]api.Unmounting{0: {}, 1: {Force: true}, 2: {Lazy: true}, 3: {Force: true, Lazy: true}} {
		for _, byManager := range []bool{true, false} {
			g.set(aMount("a1"))
			var err error
			// The object may come after the call.
			for end := time.Now().Add(patience); ; {
				if byManager {
					_, err = try(c, GuestName, guestRoot, GuestName+".Manager.Unmount", 0, mountPath("a1"), flags)
				} else {
					_, err = try(c, GuestName, mountPath("a1"), GuestName+".Mount.Unmount", 0, flags)
				}
				if err == nil || !strings.Contains(err.Error(), "there is no object") || time.Now().After(end) {
					break
				}
			}
			if err != nil {
				t.Error(err)
			}
			if d := cmp.Diff([]any{askedUnmount{"a1", how}}, g.taken()); d != "" {
				t.Error(d)
			}
			// Nobody told of it, and it is gone.
			_, err = try(c, GuestName, mountPath("a1"), peerName+".Ping", 0)
			if err != nil {
				t.Error(err) // a peer is there whatever the path
			}
			_, err = try(c, GuestName, mountPath("a1"), GuestName+".Mount.GetStatistics", 0)
			wantError(t, err, "org.freedesktop.DBus.Error.UnknownObject")
		}
	}
	for _, path := range []dbus.ObjectPath{mountPath("a1"), guestRoot, "/", "/org/transfused1/mount"} {
		_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Unmount", 0, path, uint32(0))
		wantError(t, err, "org.transfused1.Error.NotFound", string(path))
	}
	g.set(aMount("a2"))
	_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Unmount", 0, mountPath("a2"), uint32(4))
	wantError(t, err, "org.transfused1.Error.Invalid", "0x4")
	if a := g.taken(); len(a) > 0 {
		t.Errorf("the daemon was asked for %v", a)
	}
}

func TestGuestMethods(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	g := newGuest(aMount("a1"))
	serveGuest(t, b, g, Config{})
	c := b.user()
	var es []export
	if err := dbus.Store(do(t, c, GuestName, guestRoot, GuestName+".Manager.Exports"), &es); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]export{{"src", false, "sources"}, {"iso", true, ""}}, es); d != "" {
		t.Error(d)
	}
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Reload")
	stats := do(t, c, GuestName, mountPath("a1"), GuestName+".Mount.GetStatistics")[0].(map[string]dbus.Variant)
	want := map[string]any{"Requests": uint64(1), "InFlight": uint64(2), "RequestBytes": uint64(3), "ReplyBytes": uint64(4), "Dropped": uint64(5),
		"LatencyP50NSec": uint64(6), "LatencyP90NSec": uint64(7), "LatencyP99NSec": uint64(8), "LatencyMaxNSec": uint64(9),
		"Operations": [][]any{{"READ", uint64(10), uint64(11), uint64(12), uint64(13), uint64(14)}}}
	if d := cmp.Diff(want, plain(stats)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]any{"exports", "reload", "statistics of a1"}, g.taken()); d != "" {
		t.Error(d)
	}
}

func TestErrors(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	g := newGuest(aMount("a1"))
	serveGuest(t, b, g, Config{})
	c := b.user()
	for _, kind := range []api.Kind{api.Invalid, api.NotFound, api.Exists, api.Busy, api.Refused, api.Denied, api.Unreachable, api.Unsupported, api.Internal} {
		g.setFail(api.Errorf(kind, "tag %q\xff: no", "src"))
		for _, m := range []struct {
			path   dbus.ObjectPath
			method string
			args   []any
		}{
			{guestRoot, "Manager.Mount", []any{"src", "/srv", []string{}}},
			{guestRoot, "Manager.Unmount", []any{mountPath("a1"), uint32(0)}},
			{guestRoot, "Manager.Exports", nil},
			{guestRoot, "Manager.Reload", nil},
			{mountPath("a1"), "Mount.Unmount", []any{uint32(0)}},
			{mountPath("a1"), "Mount.GetStatistics", nil},
		} {
			_, err := try(c, GuestName, m.path, GuestName+"."+m.method, 0, m.args...)
			wantError(t, err, "org.transfused1.Error."+string(kind), "tag \"src\"\uFFFD: no")
		}
	}
	g.setFail(os.ErrClosed)
	_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Reload", 0)
	wantError(t, err, "org.transfused1.Error.Internal", os.ErrClosed.Error())
}

func TestStandardErrors(t *testing.T) {
	b := runningBus(t)
	serveGuest(t, b, newGuest(aMount("a1")), Config{})
	c := b.client() // the policy lets users call known interfaces only
	const prefix = "org.freedesktop.DBus.Error."
	manager := GuestName + ".Manager"
	for _, x := range []struct {
		path   dbus.ObjectPath
		method string
		args   []any
		want   string
	}{
		{"/nowhere", manager + ".Reload", nil, "UnknownObject"},
		{mountPath("nix"), introspectName + ".Introspect", nil, "UnknownObject"},
		{guestRoot, GuestName + ".Mount.GetStatistics", nil, "UnknownInterface"},
		{mountPath("a1"), managerName + ".GetManagedObjects", nil, "UnknownInterface"},
		{"/org", managerName + ".GetManagedObjects", nil, "UnknownInterface"},
		{guestRoot, manager + ".Explode", nil, "UnknownMethod"},
		{guestRoot, peerName + ".Reload", nil, "UnknownMethod"},
		{guestRoot, manager + ".Mount", []any{"src", "/srv"}, "InvalidArgs"},
		{guestRoot, manager + ".Mount", []any{"src", "/srv", "ro"}, "InvalidArgs"},
		{guestRoot, manager + ".Reload", []any{"now"}, "InvalidArgs"},
		{guestRoot, propertiesName + ".Get", []any{manager, "Nix"}, "UnknownProperty"},
		{guestRoot, propertiesName + ".Get", []any{"a.b", "Version"}, "UnknownInterface"},
		{guestRoot, propertiesName + ".GetAll", []any{"a.b"}, "UnknownInterface"},
		{guestRoot, propertiesName + ".Set", []any{manager, "Version", dbus.MakeVariant("2")}, "PropertyReadOnly"},
		{guestRoot, propertiesName + ".Set", []any{manager, "Nix", dbus.MakeVariant("2")}, "UnknownProperty"},
		{guestRoot, propertiesName + ".Set", []any{"a.b", "Version", dbus.MakeVariant("2")}, "UnknownInterface"},
	} {
		_, err := try(c, GuestName, x.path, x.method, 0, x.args...)
		t.Log(x.path, x.method, err)
		wantError(t, err, prefix+x.want)
	}
	// Without an interface the member decides.
	msg := &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(GuestName), dbus.FieldPath: dbus.MakeVariant(guestRoot), dbus.FieldMember: dbus.MakeVariant("Exports")}}
	if call := <-c.Send(msg, make(chan *dbus.Call, 1)).Done; call.Err != nil || len(call.Body) != 1 {
		t.Error(call.Err, call.Body)
	}
}

func TestPeer(t *testing.T) {
	b := runningBus(t)
	serveGuest(t, b, newGuest(), Config{})
	c := b.user()
	do(t, c, GuestName, "/any/where", peerName+".Ping")
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		_, err := try(c, GuestName, guestRoot, peerName+".GetMachineId", 0)
		wantError(t, err, "org.transfused1.Error.Internal", "/etc/machine-id")
		return
	}
	if got := do(t, c, GuestName, guestRoot, peerName+".GetMachineId")[0]; got != strings.TrimSpace(string(id)) {
		t.Errorf("%q, want %q", got, id)
	}
}

// A mistake in a method is an error of that call.
func TestPanic(t *testing.T) {
	b := runningBus(t)
	g := newGuest()
	l := serveGuest(t, b, g, Config{})
	c := b.user()
	g.mu.Lock()
	g.panicking = true
	g.mu.Unlock()
	_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Exports", 0)
	wantError(t, err, "org.transfused1.Error.Internal", "Exports")
	l.await(t, "a mistake", 1)
	g.mu.Lock()
	g.panicking = false
	g.mu.Unlock()
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Exports")
}

// A call that waits for the host ends before its caller gives up, and a caller can't have many of them.
func TestCallsAreBounded(t *testing.T) {
	b := runningBus(t)
	b.polkit().set(polkitAnswer{Authorized: true})
	g := newGuest()
	began := make(chan struct{}, maxCalls)
	g.onMount = func(ctx context.Context, _ api.MountSpec) {
		began <- struct{}{}
		<-ctx.Done()
	}
	serveGuest(t, b, g, Config{callTime: 3 * time.Second})
	c := b.user()
	done := make(chan *dbus.Call, maxCalls)
	for range maxCalls {
		c.Object(GuestName, guestRoot).Go(GuestName+".Manager.Mount", 0, done, "src", "/srv", []string{})
	}
	for range maxCalls {
		<-began
	}
	_, err := try(c, GuestName, guestRoot, GuestName+".Manager.Exports", 0)
	wantError(t, err, "org.freedesktop.DBus.Error.LimitsExceeded", "16 calls")
	values(t, c, GuestName, guestRoot, GuestName+".Manager")            // what never waits is not counted
	do(t, b.user(), GuestName, guestRoot, GuestName+".Manager.Exports") // others are served
	for range maxCalls {
		wantError(t, (<-done).Err, "org.transfused1.Error.Unreachable", "no answer for 3s")
	}
	do(t, c, GuestName, guestRoot, GuestName+".Manager.Exports")
}

// Who wants no reply gets none, not even an error: the bus would log that it was not asked for.
func TestNoReply(t *testing.T) {
	b := runningBus(t)
	g := newGuest()
	serveGuest(t, b, g, Config{})
	c := b.client()
	for _, m := range []string{"Exports", "Nix"} {
		if err := c.Object(GuestName, guestRoot).Call(GuestName+".Manager."+m, dbus.FlagNoReplyExpected).Err; err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(patience); len(g.taken()) == 0; {
		if time.Now().After(end) {
			t.Fatal("it is not called")
		}
		do(t, c, GuestName, guestRoot, peerName+".Ping")
	}
	do(t, c, GuestName, guestRoot, peerName+".Ping")
	if said := b.said.String(); strings.Contains(said, "Rejected") {
		t.Error(said)
	}
}
