// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/wire"
)

// A guest that mounts and unmounts, or comes and goes, as fast as it can does not keep this machine busy with that.
func TestChurnIsBounded(t *testing.T) {
	until := func(most int, try func() unix.Errno) {
		t.Helper()
		for n := range 2 * most {
			if errno := try(); errno == unix.EAGAIN {
				if n < most/2 {
					t.Errorf("only %d of %d", n, most)
				}
				return
			} else if errno != 0 {
				t.Fatal(errno)
			}
		}
		t.Errorf("%d without an end", 2*most)
	}
	t.Run("mounts", func(t *testing.T) {
		h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
		g := newGuest(t, h.addr, 1).connect()
		until(maxMounts, func() unix.Errno {
			r := g.request("code")
			if r.Errno == 0 {
				send(t, g.c, &wire.Unmounted{MountID: r.MountID, Reason: wire.ReasonAsked})
			}
			return r.Errno
		})
	})
	t.Run("workers", func(t *testing.T) {
		h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
		var id byte
		until(4*maxSessions, func() unix.Errno {
			id++
			g := newGuest(t, h.addr, id).connect()
			defer g.c.Close()
			if r := g.request("code"); r.Errno != 0 {
				return r.Errno
			}
			g.c.Close()
			h.logs.wait("session ended", "no mount")
			return 0
		})
	})
}
