// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
)

// An event channel has a thread of the helper, which ends without threads, and then everything does.
func TestEventChannelsAreBounded(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	for range maxActors {
		h.events()
	}
	c := h.dial("e")
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one more: %v", err)
	}
	h.logged(1, "event channels already")
}

func TestMountsAreBounded(t *testing.T) {
	d := &Daemon{entries: map[uint64]*entry{}}
	d.ctx = t.Context()
	for i := range maxMounts {
		if _, err := d.want(MountSpec{Tag: "x", Dir: fmt.Sprintf("/mnt/%d", i)}, false, false); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.want(MountSpec{Tag: "x", Dir: "/mnt/x"}, false, false); !errors.Is(err, unix.EMFILE) {
		t.Error(err)
	}
	if _, err := d.want(MountSpec{Tag: "x", Dir: "/mnt/7/"}, false, false); !errors.Is(err, unix.EBUSY) {
		t.Error(err)
	}
}

// What any process can cause is not a line each time.
func TestRefusedAreNotAllLogged(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	begin := time.Now()
	var last net.Conn
	for range maxPending + 50 {
		c, err := net.Dial("unix", filepath.Join(h.dir, "g"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		last = c
	}
	last.SetReadDeadline(time.Now().Add(wait))
	last.Read(make([]byte, 1)) // until it is refused
	if n, most := strings.Count(h.log.String(), "connection refused"), 1+int(time.Since(begin)/refusedTime); n == 0 || n > most {
		t.Errorf("%d lines, at most %d", n, most)
	}
}

// A host that keeps a notify channel keeps nothing of a mount that has ended.
func TestNotifyChannelEndsWithItsMount(t *testing.T) {
	fstest.Leaks(t)
	h := startV1(t, nil)
	dir := filepath.Join(h.dir, "mnt")
	stream, notify := h.mount(dir, "allow_other", &tinyFS{})
	if _, err := os.Stat(filepath.Join(dir, "hello")); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	notify.SetReadDeadline(time.Now().Add(wait))
	if _, err := notify.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the notify channel: %v", err)
	}
}
