// SPDX-License-Identifier: Apache-2.0

package host

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

func TestGuestAsks(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code"), exportDir(t, "ro", "ro"), exportDir(t, "theirs", "guests=77")}})
	g := newGuest(t, h.addr, 1).connect()

	send(t, g.c, &wire.ExportsRequest{ID: 9})
	if diff := cmp.Diff(&wire.ExportsReply{ID: 9, Exports: []wire.ExportInfo{{Tag: "code"}, {Tag: "ro", ReadOnly: true}}},
		want[*wire.ExportsReply](t, g.c)); diff != "" {
		t.Error(diff)
	}
	for _, c := range []struct {
		name, tag string
		options   []string
		errno     unix.Errno
		text      string
	}{
		{"no such tag", "nothing", nil, unix.ENOENT, "there are code, ro"},
		{"another's", "theirs", nil, unix.ENOENT, "there are code, ro"},
		{"rw of a read-only one", "ro", []string{"rw"}, unix.EROFS, "leave out rw"},
		{"unknown option", "code", []string{"ro", "fast"}, unix.EINVAL, "fast"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if r := g.request(c.tag, c.options...); r.Errno != c.errno || !strings.Contains(r.Text, c.text) || r.MountID != 0 {
				t.Errorf("got %+v", r)
			}
		})
	}
	f, id := g.mount("code")
	if got := f.read("hello"); got != "hello from code" {
		t.Errorf("read %q", got)
	}
	r := g.request("ro")
	if want := (&wire.MountReply{ID: r.ID, MountID: r.MountID, ReadOnly: true, MaxWrite: 1 << 20, Streams: 1, Source: "ro", NoFlush: r.NoFlush}); !cmp.Equal(want, r) {
		t.Error(cmp.Diff(want, r))
	}
	if r.MountID == id {
		t.Error("two mounts of one id")
	}

	t.Run("stream is open already", func(t *testing.T) {
		refusedStream(t, g, id, unix.EBUSY)
	})
	t.Run("no such mount", func(t *testing.T) {
		refusedStream(t, g, 99, unix.ENOENT)
	})
	t.Run("channels", func(t *testing.T) {
		n := dial(t, h.addr)
		send(t, n, &wire.NotifyOpen2{SessionID: g.id, MountID: id})
		if r := want[*wire.OpenReply](t, n); r.Errno != 0 {
			t.Error(r)
		}
		h.logs.wait("msg=mounted", "tag=code")
		e := dial(t, h.addr)
		send(t, e, &wire.EventOpen{SessionID: g.id, ThreadID: 5})
		if r := want[*wire.OpenReply](t, e); r.Errno != 0 {
			t.Error(r)
		}
		again := dial(t, h.addr)
		send(t, again, &wire.EventOpen{SessionID: g.id, ThreadID: 6})
		want[*wire.OpenReply](t, again)
		gone(t, e)
		send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked, Text: "umount"})
		gone(t, n)
		gone(t, f.Conn)
	})
	h.logs.wait("mount ended", "umount")
	send(t, g.c, &wire.Ping{ID: 4})
	if a := want[*wire.Alive](t, g.c); a.ID != 4 {
		t.Error(a)
	}
}

func refusedStream(t *testing.T, g *guest, mount uint32, errno unix.Errno) {
	t.Helper()
	c := dial(t, g.addr)
	send(t, c, &wire.StreamOpen{SessionID: g.id, Token: g.token, MountID: mount})
	if r := want[*wire.OpenReply](t, c); r.Errno != errno {
		t.Errorf("got %v (%s), want %v", r.Errno, r.Text, errno)
	}
	gone(t, c)
}

// A session goes on without its control channel while it has a mount in use.
func TestControlChannelComesBack(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	f, id := g.mount("code")
	unused := g.request("code").MountID
	g.c.Close()
	h.logs.wait("mount ended", "control channel was lost")
	if err := f.serves(); err != nil {
		t.Fatalf("the mount ended with the control channel: %v", err)
	}
	g.connect()
	if r := g.request("code"); r.Errno != 0 || r.MountID <= unused || id == r.MountID {
		t.Errorf("a mount of the resumed session: %+v", r)
	}
	old := g.c
	g.connect() // before the host has noticed anything
	gone(t, old)
	if err := f.serves(); err != nil {
		t.Error(err)
	}
	send(t, g.c, &wire.Unmounted{MountID: id})
	gone(t, f.Conn)
	g.c.Close()
	h.logs.wait("session ended", "no mount")
	refusedStream(t, g, id, unix.ENOENT)
}

func TestStreamsEndEndsMount(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	f, id := g.mount("code")
	f.Close()
	h.logs.wait("mount ended")
	refusedStream(t, g, id, unix.ENOENT)
	if f, _ := g.mount("code"); f.read("hello") == "" {
		t.Error("no second mount")
	}
}

func TestStreamMustCome(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) { s.times.stream = 50 * time.Millisecond })
	g := newGuest(t, h.addr, 1).connect()
	id := g.request("code").MountID
	h.logs.wait("mount ended", "not all of its streams came")
	refusedStream(t, g, id, unix.ENOENT)
}

func TestHostEnds(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	f, _ := g.mount("code")
	h.stop()
	if r := want[*wire.Refused](t, g.c); r.Errno != unix.ESHUTDOWN {
		t.Error(r)
	}
	gone(t, g.c)
	gone(t, f.Conn)
}

func TestGuestsLog(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	send(t, g.c, &wire.LogError{Text: "bad\nlevel=INFO msg=\"forged\" \x1b[31m"})
	line := h.logs.wait("from the guest", "level=WARN")
	if strings.Contains(line, "\x1b") || strings.Contains(line, "\nlevel") || !strings.Contains(line, "peer=") || !strings.Contains(line, string(sd.GuestSays)) {
		t.Errorf("log line %q", line)
	}
	for range 1000 {
		send(t, g.c, &wire.LogNotice{Text: "flood"})
	}
	send(t, g.c, &wire.Ping{})
	want[*wire.Alive](t, g.c)
	n := 0
	for _, l := range h.logs.all() {
		if strings.Contains(l, "flood") {
			n++
		}
	}
	if n == 0 || n > 150 {
		t.Errorf("%d lines of a flood of 1000 were logged", n)
	}
}

func TestDeadGuestIsNoticed(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) {
		s.times.ping, s.times.silent, s.times.dead = 10*time.Millisecond, 50*time.Millisecond, time.Second // a worker starts meanwhile
	})
	g := newGuest(t, h.addr, 1).connect()
	f, _ := g.mount("code")
	if p := want[*wire.Ping](t, g.c); p.ID == 0 {
		t.Error(p)
	}
	h.logs.wait("guest gives no sign of life")
	h.logs.wait("session ended", "no sign of life")
	gone(t, f.Conn)
}

func TestManySessions(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	for i := range maxSessions {
		newGuest(t, h.addr, byte(i+1)).connect()
	}
	c := dial(t, h.addr)
	send(t, c, newGuest(t, h.addr, 200).hello())
	if r := want[*wire.Refused](t, c); r.Errno != unix.EAGAIN {
		t.Error(r)
	}
}

func TestHostAsks(t *testing.T) {
	sock := transport.Addr{Family: transport.Unix, Path: "/run/of/the/guest"}
	h := startHost(t, Config{
		Exports: []Export{exportDir(t, "code")},
		Guests:  []Guest{{Addr: sock, Mounts: []GuestMount{{Tag: "code", Dir: "/mnt/code", Options: []string{"ro"}}}}},
	}, func(s *Server) { s.times.retryMin = 10 * time.Millisecond })

	other := newGuest(t, h.addr, 2).connect() // listens elsewhere, so it is not asked

	g := newGuest(t, h.addr, 1)
	g.c = dial(t, h.addr)
	hello := g.hello()
	hello.Socket = sock.String()
	send(t, g.c, hello)
	want[*wire.Init](t, g.c)
	ask := want[*wire.MountAsk](t, g.c)
	if diff := cmp.Diff(&wire.MountAsk{ID: ask.ID, Tag: "code", Dir: "/mnt/code", Options: []string{"ro"}}, ask); diff != "" {
		t.Error(diff)
	}
	send(t, g.c, &wire.MountResult{ID: ask.ID, Errno: unix.ENOTEMPTY, Text: "/mnt/code: directory not empty"})
	if line := h.logs.wait("no mount at the guest", "not empty"); strings.Count(line, "not empty") != 1 {
		t.Errorf("the cause is told twice: %s", line)
	}
	mount := func() (*fuseConn, uint32) {
		ask := want[*wire.MountAsk](t, g.c)
		send(t, g.c, &wire.MountRequest{ID: 7, Tag: ask.Tag, Dir: ask.Dir})
		r := want[*wire.MountReply](t, g.c)
		f := g.open(r.MountID)
		f.start()
		n := dial(t, h.addr)
		send(t, n, &wire.NotifyOpen2{SessionID: g.id, MountID: r.MountID})
		want[*wire.OpenReply](t, n)
		send(t, g.c, &wire.MountResult{ID: ask.ID, MountID: r.MountID})
		return f, r.MountID
	}
	f, id := mount()
	if got := f.read("hello"); got != "hello from code" {
		t.Errorf("read %q", got)
	}
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonStreamLost, Text: "the stream was lost"})
	f, id = mount() // asked for again
	send(t, g.c, &wire.Ping{ID: 1})
	want[*wire.Alive](t, g.c)
	go h.stop()
	u := want[*wire.UnmountAsk](t, g.c)
	if u.MountID != id || u.Reason != wire.ReasonShutdown {
		t.Errorf("got %+v", u)
	}
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked})
	send(t, g.c, &wire.UnmountReply{ID: u.ID})
	gone(t, f.Conn)
	if r := want[*wire.Refused](t, other.c); r.Errno != unix.ESHUTDOWN {
		t.Error(r)
	}
}

// What a guest sends while its session ends begins nothing that the end has not waited for.
func TestNothingBeginsAtTheEnd(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	newGuest(t, h.addr, 1).connect()
	h.s.mu.Lock()
	var ss *session
	for ss = range h.s.sessions {
	}
	h.s.mu.Unlock()
	ss.cancel(errGuestGone)
	h.logs.wait("session ended")
	if err := ss.message2(nil, &wire.MountRequest{ID: 1, Tag: "nothing"}); err != nil {
		t.Error(err)
	}
	ss.work.Wait()
}
