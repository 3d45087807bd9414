// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/wire"
)

// What an administrator is shown is what is there.
func TestAdmin(t *testing.T) {
	code := exportDir(t, "code", "ro", "guests=any")
	h := startHost(t, Config{Exports: []Export{code}, Software: "transfuse-host 7", Version: "7"})
	ctx, cancel := context.WithCancel(t.Context())
	changes := h.s.Watch(ctx)
	// until waits for a change after which ok holds.
	until := func(what string, ok func([]api.Session) bool) {
		t.Helper()
		deadline := time.After(15 * time.Second)
		for !ok(h.s.Sessions()) {
			select {
			case <-changes:
			case <-deadline:
				t.Fatalf("no change until %s: %+v", what, h.s.Sessions())
			}
		}
	}
	if diff := cmp.Diff([]api.Export{{Tag: "code", ReadOnly: true, Directory: code.Dir, Guests: []string{"any"}}}, h.s.Exports()); diff != "" {
		t.Error(diff)
	}
	g := keeper(t, h.addr, 1).connect()
	f, id := g.mount("code")
	until("it is mounted", func(ss []api.Session) bool {
		return len(ss) == 1 && len(ss[0].Mounts) == 1 && ss[0].Mounts[0].Streams == 1
	})
	got := h.s.Sessions()
	if got[0].Since.IsZero() || got[0].Peer == "" || strings.ContainsAny(got[0].ID, "-. ") {
		t.Errorf("got %+v", got[0])
	}
	if w := got[0].Mounts[0].Watched; w != byFanotify && w != byInotify { // as this file system allows
		t.Errorf("watched %q", w)
	}
	want := []api.Session{{ID: "1", Guest: "test", Kernel: "none", Protocol: 2, Worker: h.workerPids()[0],
		Mounts: []api.GuestsMount{{Tag: "code", Directory: "/mnt/code", ReadOnly: true, Streams: 1}}}}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(api.Session{}, "Since", "Peer"), cmpopts.IgnoreFields(api.GuestsMount{}, "Watched")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(api.HostStatus{Version: "7", Listen: []string{h.addr.String()}, Exports: 1, Sessions: 1, Text: "exports: 1, sessions of guests: 1"}, h.s.Status()); diff != "" {
		t.Error(diff)
	}
	f.Close()
	until("its stream is lost", func(ss []api.Session) bool { return ss[0].Mounts[0].Streams == 0 })
	g.c.Close()
	until("its guest is lost", func(ss []api.Session) bool { return ss[0].Lost })
	g.connect()
	send(t, g.c, &wire.Unmounted{MountID: id})
	until("it is unmounted", func(ss []api.Session) bool { return !ss[0].Lost && len(ss[0].Mounts) == 0 })
	g.c.Close()
	until("it is gone", func(ss []api.Session) bool { return len(ss) == 0 })

	cancel()
	for deadline := time.After(15 * time.Second); ; {
		select {
		case _, ok := <-changes:
			if ok {
				continue
			}
		case <-deadline:
			t.Fatal("Watch does not end with its context")
		}
		return
	}
}

func TestReload(t *testing.T) {
	code, docs := exportDir(t, "code"), exportDir(t, "docs")
	var next Config
	var nextErr error
	states := make(chan string, 10)
	tell := func(state string) func() { return func() { states <- state } }
	h := startHost(t, Config{Exports: []Export{code}, Ready: tell("ready"), Reloading: tell("reloading"), Reread: func() (Config, error) {
		states <- "read"
		return next, nextErr
	}})
	if s := <-states; s != "ready" {
		t.Errorf("at first it is %s", s)
	}
	next = Config{Exports: []Export{code, docs}, Listen: h.s.conf.Listen, Taken: tell("taken")}
	if err := h.s.Reload(t.Context()); err != nil || len(h.s.Exports()) != 2 {
		t.Errorf("%v, %+v", err, h.s.Exports())
	}
	for _, want := range []string{"reloading", "read", "taken", "ready"} {
		if s := <-states; s != want {
			t.Errorf("%s, want %s", s, want)
		}
	}
	next.Taken = tell("a bad one is taken")
	nextErr = errors.New("host.toml:3: unknown key")
	var ae *api.Error
	if err := h.s.Reload(t.Context()); !errors.As(err, &ae) || ae.Kind != api.Invalid || ae.Text != nextErr.Error() {
		t.Errorf("got %v", err)
	}
	h.logs.wait("configuration refused", "host.toml:3")
	if err := os.RemoveAll(docs.Dir); err != nil {
		t.Fatal(err)
	}
	nextErr = nil
	if err := h.s.Reload(t.Context()); !errors.As(err, &ae) || ae.Kind != api.Invalid || !strings.Contains(ae.Text, docs.Dir) {
		t.Errorf("got %v", err)
	}
	if got := h.s.Exports(); len(got) != 2 {
		t.Errorf("a bad configuration was taken: %+v", got)
	}
	for range 2 {
		for _, want := range []string{"reloading", "read", "ready"} {
			if s := <-states; s != want {
				t.Errorf("%s, want %s", s, want)
			}
		}
	}
	h.s.conf.Reread = nil
	if err := h.s.Reload(t.Context()); !errors.As(err, &ae) || ae.Kind != api.Unsupported {
		t.Errorf("got %v", err)
	}
}

// The options that are shown are the options that were given.
func TestOptionsAsTheyAreShown(t *testing.T) {
	for _, options := range []string{
		"", "suid,dev,acl,root=trust,submounts=follow,xattr=off,max-open-files=10,max-inodes=20,max-streams=3", "squash=1000:100,xattr=user",
		"uidmap=0:100000:1000,uidmap=1000:1000:1,gidmap=0:100000:1000,xattrmap=trusted.:user.t.",
	} {
		text := "a=/a"
		if options != "" {
			text += "," + options
		}
		e, err := ParseExport(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(e.Options.strings(), ","); got != options {
			t.Errorf("%q is shown as %q", options, got)
		}
	}
}

// What the journal has a text for is known by its id.
func TestEvents(t *testing.T) {
	code := exportDir(t, "code")
	h := startHost(t, Config{Exports: []Export{code}})
	g := keeper(t, h.addr, 1).connect()
	h.logs.wait("guest connected", string(sd.SessionBegan), "peer=")
	mounted := func() (*fuseConn, uint32) {
		f, id := g.mount("code")
		n := dial(t, h.addr)
		send(t, n, &wire.NotifyOpen2{SessionID: g.id, MountID: id})
		want[*wire.OpenReply](t, n)
		return f, id
	}
	_, id := mounted()
	h.logs.wait("mounted", string(sd.Mounted), "tag=code", "peer=")
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonAsked, Text: "umount"})
	h.logs.wait("mount ended", string(sd.Unmounted), "level=INFO")
	_, id = mounted()
	send(t, g.c, &wire.Unmounted{MountID: id, Reason: wire.ReasonProtocol, Text: "no FUSE"})
	h.logs.wait("mount ended", string(sd.MountLost), "level=WARN", "no FUSE")
	h.mustReconfigure(Config{Exports: []Export{code}})
	h.logs.wait("configuration read again", string(sd.Reloaded))
	if h.reconfigure(Config{}) == nil {
		t.Error("an empty configuration was taken")
	}
	h.logs.wait("configuration refused", string(sd.ConfigRefused))
	refusedStream(t, g, 99, unix.ENOENT)
	h.logs.wait("connection refused", string(sd.ConnectionRefused), "peer=")
	g.mount("code")
	if err := unix.Kill(h.workerPids()[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.logs.wait("worker died", string(sd.WorkerDied))
	h.logs.wait("session ended", string(sd.SessionEnded))
}
