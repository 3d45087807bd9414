// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// oldPort is a port that the other tests do not use: a guest remembers which hosts are of version 1.
const oldPort = 1534

// oldHost is a host as there were in 2016: it speaks version 1 alone and hangs up on anything else.
type oldHost struct {
	ln      *transport.Listener
	control chan *transport.Conn // after its six bytes were exchanged
	notify  chan string          // mount points of notify channels
	failed  chan error
	conns   chan *transport.Conn // notify channels, in the order of notify
}

func newOldHost(t *testing.T, l *lab) *oldHost {
	ln, err := transport.Listen(transport.Addr{Family: transport.Hybrid, Path: l.vm.Socket(), Port: oldPort})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	h := &oldHost{ln: ln, control: make(chan *transport.Conn, 1), notify: make(chan string, 4), conns: make(chan *transport.Conn, 4), failed: make(chan error, 1)}
	go h.accept()
	return h
}

// accept ends with the listener, and by its first failure.
func (h *oldHost) accept() {
	for {
		c, err := h.ln.Accept()
		if err != nil {
			return
		}
		if err := h.first(c); err != nil {
			c.Close()
			h.failed <- err
			return
		}
	}
}

// first serves the first message of a connection.
func (h *oldHost) first(c *transport.Conn) error {
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	typ, body, err := wire.NewReader(c, wire.MaxFirst).Next()
	if err != nil {
		return fmt.Errorf("first message: %w", err)
	}
	c.SetReadDeadline(time.Time{})
	m, err := wire.ToHost(typ, body)
	if err != nil {
		return err
	}
	switch m := m.(type) {
	case *wire.Init:
		if m.Version >= wire.Version2 {
			return c.Close() // a long Init is the end of it
		}
		if err := wire.Write(c, &wire.Init{Version: wire.Version1}); err != nil {
			return err
		}
		h.control <- c
	case *wire.NotifyOpen:
		h.conns <- c
		h.notify <- m.Dir
	default:
		return fmt.Errorf("first message is a %T", m)
	}
	return nil
}

// receive waits for what a version 1 guest sends of its own accord.
func receive[T any](t *testing.T, h *oldHost, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case err := <-h.failed:
		t.Fatal(err)
	case <-time.After(scriptTime):
		t.Fatalf("the guest did not send what was waited for, a %T", v)
	}
	return v
}

// next returns the next message of the control channel that is not a log line.
func next(t *testing.T, c *transport.Conn) wire.Message {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(scriptTime))
	for {
		typ, body, err := wire.NewReader(c, wire.MaxControl).Next()
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.ToHost(typ, body)
		if err != nil {
			t.Fatal(err)
		}
		switch m := m.(type) {
		case *wire.LogNotice:
			t.Logf("the guest's notice: %s", m.Text)
		case *wire.LogError:
			t.Logf("the guest's error: %s", m.Text)
		default:
			return m
		}
	}
}

// testOldHost has a guest serve a host of version 1, in every channel of it.
func testOldHost(t *testing.T, l *lab) {
	h := newOldHost(t, l)
	guest := l.startInGuest(t, "", "transfused", "--server", fmt.Sprintf("vsock:host:%d", oldPort), "--socket", "vsock:any:1525")
	control := receive(t, h, h.control)
	defer control.Close()

	l.guest(t, "mkdir -p /mnt/full/x /mnt/empty")
	if err := wire.Write(control, &wire.SuitabilityRequest{ID: 7, Export: true, Paths: []string{"/mnt/v1", "/mnt/full", "/mnt/empty"}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wire.Message(&wire.SuitabilityReply{ID: 7, Paths: []string{"/mnt/v1", "/mnt/empty"}}), next(t, control)); diff != "" {
		t.Error(diff)
	}

	dir := t.TempDir()
	dial := func(first string) *transport.Conn {
		t.Helper()
		c, err := l.vm.Dial(t.Context(), 1525)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, first); err != nil {
			t.Fatal(err)
		}
		return c
	}
	mount := func() (c *transport.Conn, served chan error) {
		t.Helper()
		args, err := wire.AppendMountArgs([]byte{wire.SubMount}, wire.MountArgs([]string{"allow_other", "fsname=old"}, "/mnt/v1"))
		if err != nil {
			t.Fatal(err)
		}
		root, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		fs, err := passthrough.New(passthrough.Config{Root: root, Name: "old", RootAs: passthrough.RootTrust})
		if err != nil {
			t.Fatal(err)
		}
		c = dial(string(args))
		served = make(chan error, 1)
		go func() {
			err := fs.Serve(c)
			fs.Close()
			served <- err
		}()
		if diff := cmp.Diff("/mnt/v1", receive(t, h, h.notify)); diff != "" {
			t.Error(diff)
		}
		return c, served
	}

	stream, served := mount()
	notify := <-h.conns
	defer notify.Close()
	l.guest(t, "mounted /mnt/v1; echo old >/mnt/v1/file; mkdir /mnt/v1/dir; test $(cat /mnt/v1/file) = old")
	if text, err := os.ReadFile(filepath.Join(dir, "file")); string(text) != "old\n" {
		t.Errorf("the host has %q, %v", text, err)
	}

	t.Run("notification", func(t *testing.T) {
		body := fuse.Append(nil, &fuse.NotifyInvalInodeOut{Ino: 1}) // the attributes of the root
		b := fuse.Append(nil, &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize + len(body)), Error: int32(fuse.NOTIFY_INVAL_INODE)})
		b = append(b, body...)
		if _, err := notify.Write(b); err != nil {
			t.Fatal(err)
		}
		notify.SetReadDeadline(time.Now().Add(scriptTime))
		var errno [4]byte
		if _, err := io.ReadFull(notify, errno[:]); err != nil || errno != [4]byte{} {
			t.Errorf("errno % x, %v", errno, err)
		}
	})
	t.Run("events", func(t *testing.T) {
		watch := l.startInGuest(t, "", "inotifywait", "-m", "/mnt/v1")
		watch.await(t, "Watches established.")
		c := dial(string(rune(wire.SubEvents)))
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(scriptTime))
		id := make([]byte, 32)
		n, err := c.Read(id)
		if err != nil {
			t.Fatal(err)
		}
		thread := string(id[:n])
		if _, err := strconv.Atoi(thread); err != nil {
			t.Errorf("thread id %q", thread)
		}
		// This file system fakes nothing, so they change the file too.
		var b []byte
		for _, e := range []wire.EventV1{{Path: "/mnt/v1/file", Action: wire.ActionChmod}, {Path: "/mnt/v1/made", Action: wire.ActionMknod},
			{Path: "/etc/hostname", Action: wire.ActionUnlink}, {Path: "/mnt/v1/file", Action: wire.ActionPing}} {
			if b, err = wire.AppendEventV1(b, e); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(wire.Message(&wire.Pong{}), next(t, control)); diff != "" {
			t.Error(diff)
		}
		watch.await(t, "ATTRIB file")
		watch.await(t, "CREATE made")
		l.guest(t, "test -f /etc/hostname")
	})
	t.Run("unmount by the host", func(t *testing.T) {
		stream.Shutdown()
		if err := <-served; err != nil {
			t.Error(err)
		}
		l.guest(t, "await unmounted /mnt/v1")
	})
	t.Run("unmount by the guest", func(t *testing.T) {
		_, served := mount()
		defer (<-h.conns).Close()
		out := l.guest(t, "cat /mnt/v1/file; umount /mnt/v1")
		if diff := cmp.Diff("old", strings.TrimSpace(out)); diff != "" {
			t.Error(diff)
		}
		select {
		case err := <-served:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(scriptTime):
			t.Error("the stream is still open")
		}
	})
	guest.stop(t)
	l.noMounts(t)
}

// testOldProtocol has the two programs speak version 1 to each other: what stands between them
// hangs up on a long Init, and passes on everything else.
func testOldProtocol(t *testing.T, l *lab) {
	ln, err := transport.Listen(transport.Addr{Family: transport.Hybrid, Path: l.vm.Socket(), Port: oldPort})
	if err != nil {
		t.Fatal(err)
	}
	behind := transport.Addr{Family: transport.Hybrid, Path: l.vm.Socket(), Port: oldPort + 1}
	var relays sync.WaitGroup
	relays.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			relays.Go(func() { relayOld(c, fmt.Sprintf("%s_%d", behind.Path, behind.Port)) })
		}
	})
	t.Cleanup(relays.Wait) // the programs have ended by then
	t.Cleanup(func() { ln.Close() })

	dir := t.TempDir()
	host := l.startHere(t, "transfuse-host", "--listen", behind.String(), "--allow-unprivileged-guests",
		"--export", "code="+dir+",root=trust,guests="+l.vm.Socket(),
		"--guest", fmt.Sprintf("hybrid:%s:1525", l.vm.Socket()), "--mount", "code=/mnt/asked1")
	guest := l.startInGuest(t, "", "transfused", "--server", fmt.Sprintf("vsock:host:%d", oldPort), "--socket", "vsock:any:1525")
	l.guest(t, "await mounted /mnt/asked1; echo from the guest >/mnt/asked1/file")
	if text, err := os.ReadFile(filepath.Join(dir, "file")); string(text) != "from the guest\n" {
		t.Errorf("the host has %q, %v", text, err)
	}
	host.stop(t)
	l.guest(t, "await unmounted /mnt/asked1")
	guest.stop(t)
	l.noMounts(t)
}

// relayOld passes a connection on to a Unix socket, unless it begins with a long Init.
func relayOld(c *transport.Conn, to string) {
	defer c.Close()
	head := make([]byte, 6)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	if typ := binary.LittleEndian.Uint16(head[4:]); typ == 0 && binary.LittleEndian.Uint32(head) != 6 {
		return
	}
	d, err := net.Dial("unix", to)
	if err != nil {
		return // the guest dials again
	}
	defer d.Close()
	if _, err := d.Write(head); err != nil {
		return
	}
	go func() {
		io.Copy(d, c) // its end is the end of either side
		d.(*net.UnixConn).CloseWrite()
	}()
	io.Copy(c, d)
}
