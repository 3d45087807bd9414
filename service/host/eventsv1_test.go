// SPDX-License-Identifier: Apache-2.0

package host

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// eventsGuest is a guest of version 1 that has code at /mnt/code and docs at /mnt/docs, and acts.
type eventsGuest struct {
	*guestV1
	h          *testHost
	export     string // code, at the host
	code, docs *fuseConn
	notified   net.Conn // the notify channel of code; docs has none
	e          net.Conn
	events     *wire.EventReader
	unanswered int // pings
	begun      int // times that acts was called
}

const eventsThread = 4711

func newEventsGuest(t *testing.T, change ...func(*Server)) *eventsGuest {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "g.sock")
	ln := listenV1(t, sock)
	code := exportDir(t, "code")
	h := startHost(t, Config{
		Exports: []Export{code, exportDir(t, "docs")},
		Guests: []Guest{{transport.Addr{Family: transport.Unix, Path: sock}, []GuestMount{
			{Tag: "code", Dir: "/mnt/code"}, {Tag: "docs", Dir: "/mnt/docs"},
		}}},
	}, append(change, func(s *Server) { s.times.retryMin, s.times.ping = 10*time.Millisecond, 50*time.Millisecond })...)
	g := &eventsGuest{guestV1: &guestV1{t: t, addr: h.addr, ln: ln}, h: h, export: code.Dir}
	g.connect()
	for range 2 {
		g.suitAny()
	}
	for range 2 {
		args, f := g.mountedAny()
		dir := args[strings.LastIndexByte(args, 0)+1:]
		if err := f.serves(); err != nil {
			t.Fatal(err)
		}
		if dir == "/mnt/docs" {
			g.docs = f
			continue
		}
		g.code, g.notified = f, g.notify(dir)
		go answerNotify(g.notified)
		h.logs.wait("msg=mounted", "dir="+dir)
	}
	g.opened("47", "11") // in pieces
	g.acts(eventsThread)
	return g
}

// suitAny answers a question whether a directory suits with yes.
func (g *eventsGuest) suitAny() {
	g.t.Helper()
	var head [8]byte
	if _, err := io.ReadFull(g.c, head[:]); err != nil {
		g.t.Fatal(err)
	}
	paths := make([]byte, binary.LittleEndian.Uint32(head[:])-8)
	if _, err := io.ReadFull(g.c, paths); err != nil {
		g.t.Fatal(err)
	}
	head[4] = 4
	g.write(g.c, string(head[:])+string(paths))
}

// answerNotify answers 0 to each notification.
func answerNotify(n net.Conn) {
	for {
		var h [fuse.OutHeaderSize]byte
		if _, err := io.ReadFull(n, h[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, n, int64(binary.LittleEndian.Uint32(h[:]))-int64(len(h))); err != nil {
			return
		}
		if _, err := n.Write(make([]byte, 4)); err != nil {
			return
		}
	}
}

// opened takes an event channel, whose thread's id it tells in pieces.
func (g *eventsGuest) opened(id, more string) {
	g.t.Helper()
	g.e = g.want("e")
	g.events = wire.NewEventReader(g.e)
	g.write(g.e, id)
	g.ping() // the host wants to know that no more of it comes
	g.write(g.e, more)
	g.pongs()
}

// acts makes changes until the guest is asked to act one.
func (g *eventsGuest) acts(thread uint32) {
	g.t.Helper()
	// What happens before its worker has the channels is not told. There is a ping every now and then, if nothing else.
	for begun := false; !begun; {
		if err := os.Chmod(filepath.Join(g.export, "hello"), 0o600); err != nil {
			g.t.Fatal(err)
		}
		e, err := g.events.Next()
		if err != nil {
			g.t.Fatal(err)
		}
		if begun = e.Action != wire.ActionPing; begun {
			g.done()
		} else {
			g.unanswered++
			g.pongs()
		}
	}
	g.begun++
	name := fmt.Sprint("begun", g.begun)
	if err := os.Mkdir(filepath.Join(g.export, name), 0o755); err != nil {
		g.t.Fatal(err)
	}
	for want := (wire.EventV1{Path: "/mnt/code/" + name, Action: wire.ActionMkdir}); g.event(g.code, thread) != want; {
		g.done() // what a test has made before
	}
	if errno := g.mkdir(g.code, thread, name); errno != 0 {
		g.t.Errorf("the call of thread %d: %v", thread, errno)
	}
	g.done()
}

// ping takes a ping, and does not answer it.
func (g *eventsGuest) ping() {
	g.t.Helper()
	e, err := g.events.Next()
	if err != nil || e.Action != wire.ActionPing {
		g.t.Fatalf("got %+v, %v; want a ping", e, err)
	}
	g.unanswered++
}

// pongs answers all pings that came.
func (g *eventsGuest) pongs() {
	for ; g.unanswered > 0; g.unanswered-- {
		g.write(g.c, "\x06\x00\x00\x00\x03\x00")
	}
}

// event takes an event, and answers no ping. Its path is looked for before.
func (g *eventsGuest) event(f *fuseConn, thread uint32) wire.EventV1 {
	g.t.Helper()
	for {
		e, err := g.events.Next()
		if err != nil {
			g.t.Fatal(err)
		}
		switch {
		case e.Action == wire.ActionPing:
			g.unanswered++
		case e.Action == wire.ActionUnlink && strings.HasPrefix(filepath.Base(e.Path), passthrough.ProbeName):
			f.pid = thread
			if _, errno, err := f.lookup(filepath.Base(e.Path)); errno != unix.ENOENT || err != nil {
				g.t.Fatalf("LOOKUP of %s: %v, %v", e.Path, errno, err)
			}
			f.pid = 0
			// Of such a line the host says nothing.
			text := "Event unlink " + e.Path + " error: No such file or directory"
			g.write(g.c, string(binary.LittleEndian.AppendUint32(nil, uint32(6+len(text))))+"\x01\x00"+text)
			g.done()
		default:
			return e
		}
	}
}

// done tells that the event is done that came last.
func (g *eventsGuest) done() {
	g.t.Helper()
	g.ping()
	g.pongs()
}

// mkdir asks for a directory as a thread does.
func (g *eventsGuest) mkdir(f *fuseConn, thread uint32, name string) unix.Errno {
	g.t.Helper()
	f.pid = thread
	_, errno, err := f.call(fuse.OpMkdir, 1, append(fuse.Append(nil, &fuse.MkdirIn{Mode: 0o755}), name+"\x00"...))
	f.pid = 0
	if err != nil {
		g.t.Fatal(err)
	}
	return errno
}

// refused waits until a thread's mkdir of a directory that is there is not taken for an event's any more.
func (g *eventsGuest) refused(f *fuseConn, thread uint32, name string) (errno unix.Errno) {
	g.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if errno = g.mkdir(f, thread, name); errno != 0 {
			return errno
		}
	}
	g.t.Fatal("what that thread does is still taken for an event's")
	return 0
}

func (g *eventsGuest) begin(name string) {
	g.t.Helper()
	if err := os.Mkdir(filepath.Join(g.export, name), 0o755); err != nil {
		g.t.Fatal(err)
	}
	if e, want := g.event(g.code, eventsThread), (wire.EventV1{Path: "/mnt/code/" + name, Action: wire.ActionMkdir}); e != want {
		g.t.Fatalf("got %+v, want %+v", e, want)
	}
}

func TestVersion1Events(t *testing.T) {
	g := newEventsGuest(t)
	g.begin("dir")
	if errno := g.mkdir(g.code, eventsThread, "dir"); errno != 0 {
		t.Errorf("the event's call: %v", errno)
	}
	if errno := g.mkdir(g.code, 1, "dir"); errno != unix.EEXIST {
		t.Errorf("the same by another thread: %v", errno)
	}
	if errno := g.mkdir(g.docs, eventsThread, "dir"); errno != 0 {
		t.Errorf("the same of another mount: %v", errno)
	}
	g.done()
	if errno := g.refused(g.code, eventsThread, "dir"); errno != unix.EEXIST {
		t.Errorf("the same after the event: %v", errno)
	}
	if errno := g.mkdir(g.code, eventsThread, "own"); errno != 0 {
		t.Errorf("mkdir of the thread's own: %v", errno)
	}
	if _, err := os.Stat(filepath.Join(g.export, "own")); err != nil {
		t.Errorf("what the thread made for itself: %v", err)
	}
	if lines := strings.Join(g.h.logs.all(), "\n"); strings.Contains(lines, passthrough.ProbeName) {
		t.Errorf("the host's log tells of what is not there on purpose:\n%s", lines)
	}
}

// An answer to a sign of life is none to an event.
func TestVersion1EventsCountPongs(t *testing.T) {
	g := newEventsGuest(t)
	for i := range 20 {
		name := fmt.Sprint("dir", i)
		g.begin(name)
		alive := g.unanswered
		g.pongs()
		if alive > 0 {
			g.write(g.c, "\x0c\x00\x00\x00\x02\x00notice")
			g.h.logs.wait("from the guest", "notice") // the answers have been taken
			for range 100 {
				if errno := g.mkdir(g.code, eventsThread, name); errno != 0 {
					t.Fatalf("the event is taken to be done by the answer to another ping: %v", errno)
				}
			}
		}
		if errno := g.mkdir(g.code, eventsThread, name); errno != 0 {
			t.Errorf("the event's call: %v", errno)
		}
		g.done()
		if alive > 0 {
			return
		}
		g.ping() // a sign of life, which is not answered before the next event
	}
	t.Error("there was never a ping under way")
}

// Nothing is acted while the guest is busy with what was given up, and its channel stays: the seed would end with it.
func TestVersion1EventsLate(t *testing.T) {
	g := newEventsGuest(t, func(s *Server) { s.times.act = 500 * time.Millisecond })
	g.begin("dir")
	g.h.logs.wait("shows no changes on the host, until")
	if errno := g.refused(g.code, eventsThread, "dir"); errno != unix.EIO {
		t.Errorf("the event's call, too late: %v", errno)
	}
	if err := os.Mkdir(filepath.Join(g.export, "more"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		g.ping() // and nothing else
	}
	g.pongs()
	g.acts(eventsThread)
}

// A guest that has lost a channel may be another process, and its thread's id another's.
func TestVersion1EventsEnd(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(g *eventsGuest)
	}{
		{"control", func(g *eventsGuest) { g.c.Close() }},
		{"stream of another mount", func(g *eventsGuest) { g.docs.Close() }},
		{"events", func(g *eventsGuest) { g.e.Close() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newEventsGuest(t)
			g.begin("dir")
			c.end(g)
			if errno := g.refused(g.code, eventsThread, "dir"); errno != unix.EIO {
				t.Errorf("the event's call, after its channel: %v", errno)
			}
			if errno := g.mkdir(g.code, eventsThread, "own"); errno != 0 {
				t.Errorf("mkdir of who has the id now: %v", errno)
			}
			if _, err := os.Stat(filepath.Join(g.export, "own")); err != nil {
				t.Errorf("what it made: %v", err)
			}
			if c.name == "stream of another mount" { // it goes on with another thread, once the first one is done
				g.done()
				g.opened("4712", "")
				g.acts(4712)
			}
		})
	}
	// That of a notify channel is seen with what is to be told next.
	t.Run("notify", func(t *testing.T) {
		g := newEventsGuest(t)
		g.begin("dir")
		if errno := g.mkdir(g.code, eventsThread, "dir"); errno != 0 {
			t.Errorf("the event's call: %v", errno)
		}
		g.notified.Close()
		g.done()
		if err := os.Mkdir(filepath.Join(g.export, "more"), 0o755); err != nil {
			t.Fatal(err)
		}
		for {
			e, err := g.events.Next()
			if err != nil {
				break
			}
			if e.Action != wire.ActionPing {
				t.Fatalf("it is still to act %+v", e)
			}
		}
	})
}

// The guest is sent nothing that would lead out of the mount, or be too long for it.
func TestVersion1EventPaths(t *testing.T) {
	dir := "/" + strings.Repeat("d", 99)
	e := &eventsV1{ss: &session{mounts: map[uint32]*mount{1: {dir: dir}}}}
	long := strings.Repeat("p", 4088-len(dir)-1)
	for _, c := range []struct {
		name string
		ev   wire.Event
		path string // empty: refused
	}{
		{"good", wire.Event{MountID: 1, Path: "a/b"}, dir + "/a/b"},
		{"the root", wire.Event{MountID: 1, Action: wire.ActionChmod}, dir},
		{"removal of the root", wire.Event{MountID: 1, Action: wire.ActionRmdir}, ""},
		{"longest", wire.Event{MountID: 1, Path: long}, dir + "/" + long},
		{"too long", wire.Event{MountID: 1, Path: long + "p"}, ""},
		{"dots", wire.Event{MountID: 1, Path: "../b"}, ""},
		{"dots within", wire.Event{MountID: 1, Path: "a/../../b"}, ""},
		{"dots that stay", wire.Event{MountID: 1, Path: "a/../b"}, ""},
		{"absolute", wire.Event{MountID: 1, Path: "/b"}, ""},
		{"NUL", wire.Event{MountID: 1, Path: "a\x00b"}, ""},
		{"another mount", wire.Event{MountID: 2, Path: "a"}, ""},
		{"rename", wire.Event{MountID: 1, Path: "a", NewPath: "b", Action: wire.ActionRename}, ""},
		{"ping", wire.Event{MountID: 1, Path: "a", Action: wire.ActionPing}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := e.event(&c.ev)
			if c.path == "" {
				if err == nil {
					t.Errorf("sent %q", b)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := wire.NewEventReader(strings.NewReader(string(b))).Next()
			if want := (wire.EventV1{Path: c.path, Action: c.ev.Action}); err != nil || got != want || len(b) > wire.MaxEvent {
				t.Errorf("sent %+v, %v; want %+v", got, err, want)
			}
		})
	}
}
