// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Whatever happens to the worker of one guest, the other is served.
func TestWorkersEndIsItsSessionsAlone(t *testing.T) {
	for _, c := range []struct {
		name, hook string
		harm       func(t *testing.T, f *fuseConn, pid int)
		reason     string
	}{
		{"killed", "", func(t *testing.T, _ *fuseConn, pid int) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}, "signal: killed"},
		{"panic", "panic", func(t *testing.T, f *fuseConn, _ int) {
			if _, _, err := f.lookup(panicName); err == nil {
				t.Error("the request that makes the worker panic was answered")
			}
		}, "exit status 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(hookEnv, c.hook)
			h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
			victim := newGuest(t, h.addr, 1).connect()
			fv, _ := victim.mount("code")
			pid := h.workerPids()[0]
			other := newGuest(t, h.addr, 2).connect()
			fo, _ := other.mount("code")

			c.harm(t, fv, pid)
			gone(t, fv.Conn)
			gone(t, victim.c)
			h.logs.wait("worker died", c.reason)
			if err := fo.serves(); err != nil {
				t.Errorf("the other guest: %v", err)
			}
			if r := other.request("code"); r.Errno != 0 {
				t.Errorf("the other guest's next mount: %+v", r)
			}
			// The victim comes back, and gets a new worker.
			h.logs.wait("session ended", "worker died")
			f, _ := victim.connect().mount("code")
			if got := f.read("hello"); got != "hello from code" {
				t.Errorf("read %q", got)
			}
		})
	}
}
