// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/wire"
)

// A notify or event channel that is lost comes back, and the mount stands meanwhile.
func TestV2ChannelsComeBack(t *testing.T) {
	fstest.Leaks(t)
	h := startV2(t, func(_ *Config, h *v2host) { h.channels = make(chan net.Conn, 10) })
	opened := map[bool]int{} // by: is it the event channel
	next := func() {
		switch m := h.message().(type) {
		case *wire.NotifyOpen2:
			if m.MountID != 7 {
				t.Errorf("%+v", m)
			}
			opened[false]++
		case *wire.EventOpen:
			if m.ThreadID == 0 {
				t.Errorf("%+v", m)
			}
			opened[true]++
		default:
			t.Errorf("%+v", m)
		}
	}
	next()
	next()
	for range 2 {
		for range 2 {
			(<-h.channels).Close()
			next()
		}
	}
	if opened[false] < 2 || opened[true] < 2 || opened[false]+opened[true] != 6 {
		t.Errorf("notify channels: %d, event channels: %d", opened[false], opened[true])
	}
	if _, err := os.Stat(filepath.Join(h.mnt, "hello")); err != nil {
		t.Error(err)
	}
	h.end(nil)
	if log := h.log.String(); strings.Count(log, "msg=mounted") != 1 || strings.Contains(log, "level=ERROR") {
		t.Errorf("log:\n%s", log)
	}
}
