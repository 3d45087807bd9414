// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
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
)

// eventFS answers the acting thread as a host does: its creations succeed, and touch nothing.
func eventFS(tid *int, mu *sync.Mutex) *tinyFS {
	s := &tinyFS{size: 5}
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		mu.Lock()
		acting := *tid != 0 && int(h.PID) == *tid
		mu.Unlock()
		name := strings.TrimRight(string(body), "\x00")
		switch {
		case h.Opcode == fuse.OpLookup && name == "link":
			// Symbolic links that the host plants.
			return message(h.Unique, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: 3, Attr: fuse.Attr{Ino: 3, Mode: unix.S_IFLNK | 0o777, Nlink: 1}}))
		case h.Opcode == fuse.OpLookup && name == "pipe":
			return message(h.Unique, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: 4, Attr: fuse.Attr{Ino: 4, Mode: unix.S_IFIFO | 0o666, Nlink: 1}}))
		case h.Opcode == fuse.OpReadlink:
			return message(h.Unique, 0, []byte("/etc"))
		case !acting:
			return nil
		}
		entry := func(mode uint32) []byte {
			return message(h.Unique, 0, fuse.Append(nil, &fuse.EntryOut{NodeID: 9, Attr: fuse.Attr{Ino: 9, Mode: mode, Nlink: 1}}))
		}
		switch h.Opcode {
		case fuse.OpMkdir:
			return entry(unix.S_IFDIR | 0o755)
		case fuse.OpMknod:
			return entry(unix.S_IFREG | 0o644)
		case fuse.OpSymlink:
			return entry(unix.S_IFLNK | 0o777)
		case fuse.OpUnlink, fuse.OpRmdir:
			return message(h.Unique, 0, nil)
		case fuse.OpSetattr:
			return message(h.Unique, 0, fuse.Append(nil, &fuse.AttrOut{Attr: s.attr(h.NodeID)}))
		}
		return nil
	}
	return s
}

func event1(path string, action byte) string {
	b := binary.LittleEndian.AppendUint32(nil, uint32(6+len(path)+1+1))
	b = binary.BigEndian.AppendUint16(b, uint16(len(path)+1))
	return string(b) + path + "\x00" + string([]byte{action})
}

// watch returns a function that waits for the next inotify event of dir.
func watch(t *testing.T, dir string) (next func() (uint32, string)) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	t.Cleanup(func() { f.Close() })
	const mask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	var have []byte
	return func() (uint32, string) {
		t.Helper()
		if len(have) == 0 {
			f.SetDeadline(time.Now().Add(wait))
			n, err := f.Read(buf)
			if err != nil {
				t.Fatalf("no inotify event: %v", err)
			}
			have = buf[:n]
		}
		mask, n := binary.LittleEndian.Uint32(have[4:]), int(binary.LittleEndian.Uint32(have[12:]))
		name := strings.TrimRight(string(have[16:16+n]), "\x00")
		have = have[16+n:]
		return mask, name
	}
}

// events opens the event channel.
func (h *v1host) events() (send func(string), tid int) {
	h.t.Helper()
	c := h.dial("e")
	buf := make([]byte, 16)
	n, err := c.Read(buf)
	if err != nil {
		h.t.Fatal(err)
	}
	tid, err = strconv.Atoi(string(buf[:n]))
	if err != nil || tid <= 0 {
		h.t.Fatalf("thread id %q", buf[:n])
	}
	return func(s string) { h.t.Helper(); h.write(c, s) }, tid
}

func TestV1Events(t *testing.T) {
	for _, tt := range []struct {
		name, options string
	}{{"writable", "allow_other"}, {"read-only", "ro,allow_other"}} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			h := startV1(t, nil)
			dir := filepath.Join(h.dir, "mnt")
			var (
				mu  sync.Mutex
				tid int
			)
			h.mount(dir, tt.options, eventFS(&tid, &mu))
			send, id := h.events()
			mu.Lock()
			tid = id
			mu.Unlock()
			next := watch(t, dir)
			for _, e := range []struct {
				action byte
				name   string
				mask   uint32
			}{
				{2, "d", unix.IN_CREATE | unix.IN_ISDIR},
				{3, "s", unix.IN_CREATE},
				{6, "f", unix.IN_CREATE},
				{5, "hello", unix.IN_ATTRIB},
				{4, "hello", unix.IN_MODIFY},
				{1, "hello", unix.IN_DELETE},
			} {
				send(event1(dir+"/"+e.name, e.action))
				for {
					mask, name := next()
					if mask == e.mask && name == e.name {
						break
					}
					if mask != unix.IN_ATTRIB { // a truncation may show as both
						t.Fatalf("action %d: inotify %#x %q, want %#x %q", e.action, mask, name, e.mask, e.name)
					}
				}
			}
			send(event1("", 128))
			h.message(3)
			if tt.name == "read-only" {
				if err := unix.Mkdir(filepath.Join(dir, "x"), 0o755); err != unix.EROFS {
					t.Errorf("mkdir on the public mount: %v", err)
				}
			}
		})
	}
}

// Events that point out of their mount are refused, logged, and do not end the channel.
func TestV1EventsPointOut(t *testing.T) {
	fstest.Leaks(t)
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o640); err != nil {
		t.Fatal(err)
	}
	h := startV1(t, nil)
	dir := filepath.Join(h.dir, "mnt")
	var (
		mu  sync.Mutex
		tid int
	)
	s := eventFS(&tid, &mu)
	planted := s.handle
	s.handle = func(hd fuse.InHeader, body []byte) []byte {
		if hd.Opcode == fuse.OpReadlink {
			return message(hd.Unique, 0, []byte(outside))
		}
		return planted(hd, body)
	}
	h.mount(dir, "allow_other", s)
	send, _ := h.events()
	for _, tt := range []struct {
		name, path string
		action     byte
	}{
		{"elsewhere", victim, 4},
		{"elsewhere, unlink", victim, 1},
		{"beside", dir + "x/victim", 4},
		{"dots", dir + "/../victim", 1},
		{"many dots", dir + "/" + strings.Repeat("../", 20) + strings.TrimPrefix(victim, "/"), 4},
		{"through a link", dir + "/link/victim", 4},
		{"through a link, unlink", dir + "/link/victim", 1},
		{"through a link, mkdir", dir + "/link/new", 2},
		{"truncate a link", dir + "/link", 4},
		{"chmod a link", dir + "/link", 5},
		{"truncate a pipe", dir + "/pipe", 4},
		{"the root", dir, 0},
		{"no such action", dir + "/hello", 77},
		{"rename of version 2", dir + "/hello", 7},
	} {
		send(event1(tt.path, tt.action))
		if got := h.message(1); !strings.HasPrefix(got, "Event ") || !strings.Contains(got, " error: ") {
			t.Errorf("%s: logged %q", tt.name, got)
		}
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
		t.Errorf("victim: %q, %v", b, err)
	}
	if n, _ := os.ReadDir(outside); len(n) != 1 {
		t.Errorf("outside: %v", n)
	}
	// What is not there is no failure to speak of.
	send(event1(dir+"/none", 1))
	send(event1(victim, 4))
	if got := h.message(1); !strings.Contains(got, victim) {
		t.Errorf("logged %q", got)
	}
	// The channel still works.
	send(event1("", 128))
	h.message(3)
	// A length that lies ends it, and nothing else.
	send("\x01\x00\x00\x00\x00\x00")
	h.logged(1, "event channel ended")
	if _, err := os.Stat(filepath.Join(dir, "hello")); err != nil {
		t.Error(err)
	}
}
