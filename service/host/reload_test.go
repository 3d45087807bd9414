// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// reconfigure gives the server c, with the addresses that it has.
func (h *testHost) reconfigure(c Config) error {
	c.Listen = append(c.Listen, h.addr)
	return h.s.Reconfigure(c)
}

func (h *testHost) mustReconfigure(c Config) {
	h.t.Helper()
	if err := h.reconfigure(c); err != nil {
		h.t.Fatal(err)
	}
}

// next returns the host's next message but pings.
func (g *guest) nextMessage() wire.Message {
	g.t.Helper()
	for {
		if m := recv(g.t, g.c); m.Type() != wire.TypePing {
			return m
		}
	}
}

// unmounts answers an UnmountAsk for the mount, as a guest that does as it is told.
func (g *guest) unmounts(id uint32, reason wire.Reason) {
	g.t.Helper()
	u, ok := g.nextMessage().(*wire.UnmountAsk)
	if !ok || u.MountID != id || u.Reason != reason || u.Text == "" {
		g.t.Fatalf("got %+v, want mount %d to be unmounted for reason %d", u, id, reason)
	}
	send(g.t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked})
	send(g.t, g.c, &wire.UnmountReply{ID: u.ID})
}

func TestReloadExports(t *testing.T) {
	stays, goes, moves := exportDir(t, "stays"), exportDir(t, "goes"), exportDir(t, "moves")
	h := startHost(t, Config{Exports: []Export{stays, goes, moves}})
	g := keeper(t, h.addr, 1).connect()
	fStays, _ := g.mount("stays")
	fGoes, idGoes := g.mount("goes")
	fMoves, idMoves := g.mount("moves")

	added := exportDir(t, "added", "ro")
	stays.Guests = []GuestRule{{Any: true}} // the guest still may
	moved := exportDir(t, "moves")
	h.mustReconfigure(Config{Exports: []Export{moved, added, stays}})
	for range 2 {
		u := g.nextMessage().(*wire.UnmountAsk)
		if u.Reason != wire.ReasonExportGone || u.MountID != idGoes && u.MountID != idMoves {
			t.Fatalf("got %+v", u)
		}
		send(t, g.c, &wire.Unmounted{MountID: u.MountID, Reason: wire.ReasonAsked})
		send(t, g.c, &wire.UnmountReply{ID: u.ID})
	}
	gone(t, fGoes.Conn)
	gone(t, fMoves.Conn)
	if err := fStays.serves(); err != nil {
		t.Errorf("what was not touched: %v", err)
	}
	if r := g.request("goes"); r.Errno != unix.ENOENT || !strings.Contains(r.Text, "there are moves, added, stays") {
		t.Errorf("an export that is gone: %+v", r)
	}
	f, _ := g.mount("added") // by the worker that was there before
	if got := f.read("hello"); got != "hello from added" {
		t.Errorf("read %q", got)
	}
	if err := os.WriteFile(filepath.Join(moved.Dir, "hello"), []byte("moved"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, id := g.mount("moves")
	if got := f.read("hello"); got != "moved" {
		t.Errorf("read %q of an export that is elsewhere now", got)
	}

	// An option is changed; the guest does not answer, and has its mount taken.
	h.s.times.grace = 50 * time.Millisecond
	moved.ReadOnly = true
	h.mustReconfigure(Config{Exports: []Export{moved, added, stays}})
	if u := g.nextMessage().(*wire.UnmountAsk); u.MountID != id {
		t.Errorf("got %+v", u)
	}
	gone(t, f.Conn)

	// The guest may no longer.
	stays.Guests = []GuestRule{{CID: 77}}
	h.mustReconfigure(Config{Exports: []Export{moved, added, stays}})
	gone(t, fStays.Conn)
	if err := h.reconfigure(Config{Exports: []Export{moved, added, stays}}); err != nil { // the same again
		t.Error(err)
	}
}

// A mount about which nobody can be asked ends at once.
func TestReloadEndsKeptMount(t *testing.T) {
	code, other := exportDir(t, "code"), exportDir(t, "other")
	h := startHost(t, Config{Exports: []Export{code, other}})
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	g.c.Close()
	f.Close()
	h.logs.wait("mount waits for the guest to come back")
	h.mustReconfigure(Config{Exports: []Export{other}})
	h.logs.wait("mount ended", errExportGone.Error())
	h.logs.wait("session ended")
	refusedStream(t, g, id, unix.ENOENT)
}

func TestReloadRefuses(t *testing.T) {
	code := exportDir(t, "code")
	h := startHost(t, Config{Exports: []Export{code}})
	g := newGuest(t, h.addr, 1).connect()
	f, _ := g.mount("code")
	for _, c := range []struct {
		name string
		conf Config
		text string
	}{
		{"no export", Config{}, "--export"},
		{"no directory", Config{Exports: []Export{{Tag: "code", Dir: "/no/such"}}}, "/no/such"},
		{"another address", Config{Exports: []Export{code}, Listen: []transport.Addr{{Family: transport.Unix, Path: "/run/x"}}}, "restart"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := h.reconfigure(c.conf)
			if ce := (*ConfigError)(nil); !errors.As(err, &ce) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %q", err, c.text)
			}
			h.logs.wait("configuration refused", c.text)
		})
	}
	if err := h.s.Reconfigure(Config{Exports: []Export{code}}); err == nil || !strings.Contains(err.Error(), "no address") {
		t.Errorf("no address left: %v", err)
	}
	if err := f.serves(); err != nil {
		t.Error(err)
	}
	if r := g.request("code"); r.Errno != 0 {
		t.Error(r)
	}
}

func TestReloadToken(t *testing.T) {
	code := exportDir(t, "code")
	h := startHost(t, Config{Exports: []Export{code}, Token: []byte("0123456789abcdef")})
	g := newGuest(t, h.addr, 1)
	g.token = []byte("0123456789abcdef")
	g.connect()
	h.mustReconfigure(Config{Exports: []Export{code}, Token: []byte("fedcba9876543210")})
	send(t, g.c, &wire.Ping{ID: 1}) // what is there stays
	want[*wire.Alive](t, g.c)
	c := dial(t, h.addr)
	send(t, c, g.hello())
	if r := want[*wire.Refused](t, c); !strings.Contains(r.Text, "wrong token") {
		t.Errorf("the old token: %+v", r)
	}
	g.token = []byte("fedcba9876543210")
	g.connect()
}

// The mounts that the host asks for are those of the configuration as it is.
func TestReloadGuests(t *testing.T) {
	code, docs := exportDir(t, "code"), exportDir(t, "docs")
	sock := transport.Addr{Family: transport.Unix, Path: "/run/of/the/guest"}
	conf := func(ms ...GuestMount) Config {
		c := Config{Exports: []Export{code, docs}}
		if len(ms) > 0 {
			c.Guests = []Guest{{Addr: sock, Mounts: ms}}
		}
		return c
	}
	mnt := func(tag string) GuestMount { return GuestMount{Tag: tag, Dir: "/mnt/" + tag} }
	h := startHost(t, conf(mnt("code")), func(s *Server) { s.times.retryMin = 10 * time.Millisecond })
	g := newGuest(t, h.addr, 1)
	g.c = dial(t, h.addr)
	hello := g.hello()
	hello.Socket = sock.String()
	send(t, g.c, hello)
	want[*wire.Init](t, g.c)
	// mounts does what is asked, which must be tag.
	mounts := func(tag string) (*fuseConn, uint32) {
		t.Helper()
		ask, ok := g.nextMessage().(*wire.MountAsk)
		if !ok || ask.Tag != tag || ask.Dir != "/mnt/"+tag {
			t.Fatalf("got %+v, want %s to be mounted", ask, tag)
		}
		f, id := g.mount(tag)
		send(t, g.c, &wire.MountResult{ID: ask.ID, MountID: id})
		return f, id
	}
	fCode, idCode := mounts("code")

	h.mustReconfigure(conf(mnt("code"), mnt("docs")))
	fDocs, idDocs := mounts("docs")

	h.mustReconfigure(conf(mnt("docs")))
	g.unmounts(idCode, wire.ReasonAsked)
	gone(t, fCode.Conn)
	if err := fDocs.serves(); err != nil {
		t.Errorf("the mount that was not touched: %v", err)
	}

	// Its export is elsewhere: unmounted, and asked for again.
	docs = exportDir(t, "docs")
	h.mustReconfigure(conf(mnt("docs")))
	g.unmounts(idDocs, wire.ReasonExportGone)
	gone(t, fDocs.Conn)
	fDocs, idDocs = mounts("docs")

	// In use in the guest, which may keep it: it is still exported.
	h.mustReconfigure(conf())
	u := g.nextMessage().(*wire.UnmountAsk)
	if u.MountID != idDocs || u.Reason != wire.ReasonAsked {
		t.Errorf("got %+v", u)
	}
	send(t, g.c, &wire.UnmountReply{ID: u.ID, Errno: unix.EBUSY, Text: "in use"})
	h.logs.wait("no longer asked for stays", "in use")
	if err := fDocs.serves(); err != nil {
		t.Error(err)
	}
}

// What a worker is shut in with does not grow: with a mount in use the guest has to come anew, without one it gets another worker.
func TestReloadBeyondTheWalls(t *testing.T) {
	code := exportDir(t, "code")
	h := startHost(t, Config{Exports: []Export{code}})
	g := newGuest(t, h.addr, 1).connect()
	f, id := g.mount("code")
	suid := exportDir(t, "suid", "suid")
	h.mustReconfigure(Config{Exports: []Export{code, suid}})
	if r := g.request("suid"); r.Errno != unix.EAGAIN || !strings.Contains(r.Text, "start its transfused again") {
		t.Errorf("got %+v", r)
	}
	if err := f.serves(); err != nil {
		t.Error(err)
	}
	send(t, g.c, &wire.Unmounted{MountID: id})
	gone(t, f.Conn)
	f, _ = g.mount("suid")
	if got := f.read("hello"); got != "hello from suid" {
		t.Errorf("read %q", got)
	}
	if pids := h.workerPids(); len(pids) != 1 {
		t.Errorf("workers: %d", pids)
	}
}

// The same for an ordinary user's worker, which Landlock keeps to the directories that it began with.
func TestReloadBeyondTheWallsOfAUser(t *testing.T) {
	if os.Getenv("TRANSFUSE_TEST_USER") == "" {
		asUser(t)
		return
	}
	code, docs := exportDir(t, "code"), exportDir(t, "docs")
	h := startHost(t, Config{Exports: []Export{code}})
	g := newGuest(t, h.addr, 1).connect()
	f, id := g.mount("code")
	h.mustReconfigure(Config{Exports: []Export{code, docs}})
	if r := g.request("docs"); r.Errno != unix.EAGAIN || !strings.Contains(r.Text, "docs") {
		t.Errorf("got %+v", r)
	}
	send(t, g.c, &wire.Unmounted{MountID: id})
	gone(t, f.Conn)
	f, _ = g.mount("docs")
	if got := f.read("hello"); got != "hello from docs" {
		t.Errorf("read %q", got)
	}
}

// A mount that is made while the configuration changes is either seen by the change, or sees it.
func TestReloadWhileMounting(t *testing.T) {
	code, other := exportDir(t, "code"), exportDir(t, "other")
	h := startHost(t, Config{Exports: []Export{code, other}})
	g := newGuest(t, h.addr, 1).connect()
	g.mount("other")
	ss := h.session()
	of := h.s.policy().export(ss.peer, "code")
	h.mustReconfigure(Config{Exports: []Export{other}})
	if _, err := ss.addMount(of, *of, "/mnt"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a mount by the policy of before: %v", err)
	}
	if n := len(ss.mounts); n != 1 {
		t.Errorf("%d mounts, want 1", n)
	}
}

// session returns the only one.
func (h *testHost) session() *session {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for ss := range h.s.sessions {
		return ss
	}
	h.t.Fatal("no session")
	return nil
}

// The bounds of an export are those that it has when it is mounted.
func TestReloadLimits(t *testing.T) {
	code := exportDir(t, "code", "max-open-files=1")
	h := startHost(t, Config{Exports: []Export{code}})
	g := newGuest(t, h.addr, 1).connect()
	opens := func(f *fuseConn) (n int) {
		e, errno, err := f.lookup("hello")
		if errno != 0 || err != nil {
			t.Fatal(errno, err)
		}
		for range 3 {
			_, errno, err := f.call(fuse.OpOpen, e.NodeID, fuse.Append(nil, &fuse.OpenIn{Flags: unix.O_RDONLY}))
			if err != nil || errno != 0 && errno != unix.ENFILE {
				t.Fatal(errno, err)
			}
			if errno == 0 {
				n++
			}
		}
		return n
	}
	f, id := g.mount("code")
	if n := opens(f); n != 1 {
		t.Errorf("%d files are open, want 1", n)
	}
	code.MaxOpenFiles = 2
	h.mustReconfigure(Config{Exports: []Export{code}})
	g.unmounts(id, wire.ReasonExportGone)
	gone(t, f.Conn)
	f, _ = g.mount("code")
	if n := opens(f); n != 2 {
		t.Errorf("%d files are open, want 2", n)
	}
}
