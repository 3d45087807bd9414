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

	"transfused.org/transfused/service/api"
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
	want := []api.Session{{ID: "1", Guest: "test", Kernel: "none", Protocol: 2, Worker: h.workerPids()[0],
		Mounts: []api.GuestsMount{{Tag: "code", Directory: "/mnt/code", ReadOnly: true, Streams: 1}}}}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(api.Session{}, "Since", "Peer")); diff != "" {
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
	h := startHost(t, Config{Exports: []Export{code}, Reread: func() (Config, error) { return next, nextErr }})
	next = Config{Exports: []Export{code, docs}, Listen: h.s.conf.Listen}
	if err := h.s.Reload(t.Context()); err != nil || len(h.s.Exports()) != 2 {
		t.Errorf("%v, %+v", err, h.s.Exports())
	}
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
	h.s.conf.Reread = nil
	if err := h.s.Reload(t.Context()); !errors.As(err, &ae) || ae.Kind != api.Unsupported {
		t.Errorf("got %v", err)
	}
}

// The options that are shown are the options that were given.
func TestOptionsAsTheyAreShown(t *testing.T) {
	for _, options := range []string{
		"", "suid,dev,acl,root=trust,submounts=follow,xattr=off,max-open-files=10,max-inodes=20", "squash=1000:100,xattr=user",
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
