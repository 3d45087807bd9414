// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/wire"
)

// v2host is a host of version 2 with the export "code", whose failures a test chooses.
type v2host struct {
	t      *testing.T
	dir    string
	mnt    string
	log    *syncBuffer
	cancel context.CancelFunc
	ran    chan error

	mu      sync.Mutex // guards the rest
	ln      net.Listener
	control net.Conn
	conns   []net.Conn
	streams []net.Conn
	asked   []string // options of the last mount
	wg      sync.WaitGroup

	got chan wire.Message // what came on the control channel, but for logs
	// channels gets the notify and event channels, if set; without it there are no events.
	channels chan net.Conn
	// refuse answers Init, if set.
	refuse *wire.Refused
	token  string
	busy   atomic.Int32 // so many mounts are answered by EAGAIN
	absent atomic.Int32 // so many of version 2's Inits are not answered, as while the host is starting
	silent bool         // but without the end of the connection
	keep   bool         // FeatureKeep
	most   uint16       // MaxStreams
	number uint16       // of streams that each mount is to have; 0: 1
	// stream serves a stream, if set; false: it is refused.
	stream func(o *wire.StreamOpen, c net.Conn) bool
}

func startV2(t *testing.T, change func(*Config, *v2host)) *v2host {
	t.Helper()
	needRoot(t)
	h := &v2host{t: t, dir: t.TempDir(), log: &syncBuffer{}, ran: make(chan error, 1), got: make(chan wire.Message, 100)}
	h.mnt = filepath.Join(h.dir, "mnt")
	c := Config{
		Server: address(t, "unix:"+filepath.Join(h.dir, "h")), StateDir: filepath.Join(h.dir, "state"),
		Mounts: []MountSpec{{Tag: "code", Dir: h.mnt}},
		Log:    slog.New(slog.NewTextHandler(h.log, nil)),
	}
	if change != nil {
		change(&c, h)
	}
	h.listen()
	ctx, cancel := context.WithCancel(t.Context())
	h.cancel = cancel
	go func() { h.ran <- Run(ctx, c) }()
	t.Cleanup(func() {
		h.end(nil)
		h.down()
		h.wg.Wait()
		if t.Failed() {
			t.Logf("log:\n%s", h.log)
		}
	})
	return h
}

// end ends the daemon, once; want is text of its error.
func (h *v2host) end(want error) {
	h.t.Helper()
	h.cancel()
	if h.ran == nil {
		return
	}
	select {
	case err := <-h.ran:
		if !errors.Is(err, want) {
			h.t.Errorf("Run: %v, want %v", err, want)
		}
	case <-time.After(wait):
		h.t.Errorf("the daemon does not end")
	}
	h.ran = nil
}

func (h *v2host) listen() {
	ln := listenUnix(h.t, filepath.Join(h.dir, "h"))
	h.mu.Lock()
	h.ln = ln
	h.mu.Unlock()
	h.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			h.mu.Lock()
			h.conns = append(h.conns, c)
			h.mu.Unlock()
			h.wg.Go(func() { h.serve(c); c.Close() })
		}
	})
}

// down is the host's sudden end.
func (h *v2host) down() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ln.Close()
	for _, c := range h.conns {
		c.Close()
	}
	h.conns, h.streams = nil, nil
}

func (h *v2host) serve(c net.Conn) {
	r := wire.NewReader(c, wire.MaxControl)
	for {
		t, body, err := r.Next()
		if err != nil {
			return
		}
		m, err := wire.ToHost(t, body)
		if err != nil {
			h.t.Errorf("from the guest: %v", err)
			return
		}
		switch m := m.(type) {
		case *wire.Init:
			if m.Version < wire.Version2 {
				wire.Write(c, &wire.Init{Version: wire.Version1})
				continue
			}
			if h.absent.Add(-1) >= 0 {
				if h.silent {
					continue
				}
				return
			}
			if h.refuse != nil {
				wire.Write(c, h.refuse)
				return
			}
			if string(m.Token) != h.token {
				wire.Write(c, &wire.Refused{Errno: unix.EACCES, Text: "wrong token"})
				return
			}
			h.mu.Lock()
			h.control = c
			h.mu.Unlock()
			init := &wire.Init{Version: 2, MinVersion: 1, MaxMessage: wire.MaxControl, SessionID: m.SessionID, MaxStreams: h.most}
			if h.keep {
				init.Features = m.Features
			}
			wire.Write(c, init)
		case *wire.MountRequest:
			h.mu.Lock()
			h.asked = m.Options
			h.mu.Unlock()
			switch {
			case h.busy.Add(-1) >= 0:
				wire.Write(c, &wire.MountReply{ID: m.ID, Errno: unix.EAGAIN, Text: "later"})
			case m.Tag == "code":
				wire.Write(c, &wire.MountReply{ID: m.ID, MountID: 7, Streams: max(1, h.number), MaxWrite: 1 << 17, Source: "code"})
			default:
				wire.Write(c, &wire.MountReply{ID: m.ID, Errno: unix.ENOENT, Text: "no export " + m.Tag + ": " + unix.ENOENT.Error()})
			}
		case *wire.StreamOpen:
			if h.stream != nil {
				if !h.stream(m, c) {
					wire.Write(c, &wire.OpenReply{Errno: unix.EMFILE, Text: "no such stream"})
				}
				return
			}
			wire.Write(c, &wire.OpenReply{})
			h.mu.Lock()
			h.streams = append(h.streams, c)
			h.mu.Unlock()
			(&tinyFS{size: 5}).serve(c)
			return
		case *wire.NotifyOpen2:
			wire.Write(c, &wire.OpenReply{})
			h.got <- m
			if h.channels != nil {
				h.channels <- c
			}
		case *wire.EventOpen:
			if h.channels != nil {
				wire.Write(c, &wire.OpenReply{})
				h.got <- m
				h.channels <- c
				continue
			}
			wire.Write(c, &wire.OpenReply{Errno: unix.ENOSYS, Text: "no events"})
			return
		case *wire.LogNotice, *wire.LogError:
		default:
			h.got <- m
		}
	}
}

func (h *v2host) send(m wire.Message) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := wire.Write(h.control, m); err != nil {
		h.t.Fatal(err)
	}
}

func (h *v2host) message() wire.Message {
	h.t.Helper()
	select {
	case m := <-h.got:
		return m
	case <-time.After(wait):
		h.t.Fatalf("no message; the daemon's log:\n%s", h.log)
		return nil
	}
}

// expect waits for a message of m's type.
func expect[T wire.Message](h *v2host) T {
	h.t.Helper()
	for {
		if m, ok := h.message().(T); ok {
			return m
		}
	}
}

func TestV2MountAndEnd(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, nil)
	expect[*wire.NotifyOpen2](h)
	if st, err := os.Stat(filepath.Join(h.mnt, "hello")); err != nil || st.Size() != 5 {
		t.Errorf("stat: %v, %v", st, err)
	}
	h.send(&wire.Ping{ID: 3})
	if m := expect[*wire.Alive](h); m.ID != 3 {
		t.Errorf("Alive %d", m.ID)
	}
	h.end(nil)
	if m := expect[*wire.Unmounted](h); m.MountID != 7 || m.Reason != wire.ReasonShutdown {
		t.Errorf("%+v", m)
	}
}

func TestV2UnmountFromEachSide(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, nil)
	expect[*wire.NotifyOpen2](h)
	h.send(&wire.UnmountAsk{ID: 1, MountID: 99})
	if m := expect[*wire.UnmountReply](h); m.Errno != unix.ENOENT {
		t.Errorf("unmount of nothing: %+v", m)
	}
	h.send(&wire.UnmountAsk{ID: 2, MountID: 7, Reason: wire.ReasonAsked})
	if m := expect[*wire.Unmounted](h); m.MountID != 7 || m.Reason != wire.ReasonAsked {
		t.Errorf("%+v", m)
	}
	if m := expect[*wire.UnmountReply](h); m.ID != 2 || m.Errno != 0 {
		t.Errorf("%+v", m)
	}
	// And what the host asks for, a user of the guest unmounts.
	h.send(&wire.MountAsk{ID: 3, Tag: "code", Dir: h.mnt, Options: []string{"ro"}})
	if m := expect[*wire.MountResult](h); m.ID != 3 || m.Errno != 0 || m.MountID != 7 {
		t.Errorf("%+v", m)
	}
	if err := unix.Mkdir(filepath.Join(h.mnt, "x"), 0o755); err != unix.EROFS {
		t.Errorf("mkdir on a read-only mount: %v", err)
	}
	if err := unix.Unmount(h.mnt, 0); err != nil {
		t.Error(err)
	}
	if m := expect[*wire.Unmounted](h); m.Reason != wire.ReasonAsked {
		t.Errorf("%+v", m)
	}
}

func TestV2MountAskRefused(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, nil)
	expect[*wire.NotifyOpen2](h)
	full := filepath.Join(h.dir, "full", "x")
	if err := os.MkdirAll(full, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, tag, dir, option string
		want                   unix.Errno
	}{
		{"not empty", "code", filepath.Dir(full), "ro", unix.ENOTEMPTY},
		{"no such tag", "nothing", filepath.Join(h.dir, "m"), "ro", unix.ENOENT},
		{"mounted already", "code", h.mnt, "ro", unix.EBUSY},
		{"suid", "code", filepath.Join(h.dir, "m"), "suid", unix.EPERM},
	} {
		h.send(&wire.MountAsk{ID: 1, Tag: tt.tag, Dir: tt.dir, Options: []string{tt.option}})
		if m := expect[*wire.MountResult](h); m.Errno != tt.want || m.Text == "" || strings.Count(m.Text, tt.want.Error()) > 1 {
			t.Errorf("%s: %v (%s), want %v", tt.name, m.Errno, m.Text, tt.want)
		}
	}
}

// A host that has too much to do at first is asked again.
func TestV2BusyHost(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, func(_ *Config, h *v2host) { h.busy.Store(1) })
	expect[*wire.NotifyOpen2](h)
}

// A host that goes takes the mount with it; when it is back, so is the mount.
func TestV2HostComesBack(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, nil)
	expect[*wire.NotifyOpen2](h)
	h.down()
	h.listen()
	expect[*wire.NotifyOpen2](h)
	if _, err := os.Stat(filepath.Join(h.mnt, "hello")); err != nil {
		t.Errorf("after the host came back: %v", err)
	}
	if n := strings.Count(h.log.String(), "the mount ended"); n != 1 {
		t.Errorf("the loss was logged %d times", n)
	}
}

// A host that was just starting or ending is not taken for one of version 1, though six bytes are answered by the next process.
func TestV2HostStarts(t *testing.T) {
	fstest.Leaks(t)
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent=%t", silent), func(t *testing.T) {
			t.Parallel() // to notice silence takes some seconds
			h := startV2(t, func(_ *Config, h *v2host) { h.absent.Store(1); h.silent = silent })
			h.message() // its notify channel: it is mounted
			if left, err := os.ReadDir(filepath.Join(h.dir, "state")); err == nil && len(left) > 0 {
				t.Errorf("it remembers %v", left)
			}
		})
	}
}

// What can't be mounted ends a daemon that has nothing else to do.
func TestV2NothingToMount(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config, *v2host)
		want   error
	}{
		{"no such tag", func(c *Config, _ *v2host) { c.Mounts[0].Tag = "nothing" }, unix.ENOENT},
		{"not empty", func(c *Config, h *v2host) { c.Mounts[0].Dir = h.dir }, unix.ENOTEMPTY},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			h := startV2(t, tt.change)
			select {
			case err := <-h.ran:
				if !errors.Is(err, tt.want) {
					t.Errorf("Run: %v, want %v", err, tt.want)
				}
				h.ran = nil
			case <-time.After(wait):
				t.Error("Run goes on")
			}
		})
	}
}

// The host's word for a refusal is what is logged.
func TestV2Refused(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, func(c *Config, h *v2host) { c.Token = []byte("wrong"); h.token = "right" })
	for deadline := time.Now().Add(wait); !strings.Contains(h.log.String(), "wrong token"); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the refusal is not logged")
		}
	}
}
