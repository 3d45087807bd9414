// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// stoppedEnv has the test's program serve in that directory, as a process of its own that can be stopped.
const stoppedEnv = "TRANSFUSE_TEST_STOPPED"

// deadTime is how long a guest of that process may be silent.
const deadTime = time.Second

// serveToBeStopped serves until it is killed.
func serveToBeStopped(dir string) {
	e, err := ParseExport("code=" + dir + ",guests=any")
	if err != nil {
		panic(err)
	}
	s := newServer(Config{Exports: []Export{e}})
	s.times.ping, s.times.dead = deadTime/20, deadTime
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: filepath.Join(dir, "h")})
	if err != nil {
		panic(err)
	}
	s.serve(context.Background(), []*transport.Listener{l})
}

// A host that was stopped asked nobody for a sign of life meanwhile, so no guest is taken for dead.
func TestStoppedHost(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), stoppedEnv+"="+dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	addr := transport.Addr{Family: transport.Unix, Path: filepath.Join(dir, "h")}
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := transport.Dial(t.Context(), addr)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	g := newGuest(t, addr, 1).connect()
	pings := func(n int) {
		t.Helper()
		for range n {
			send(t, g.c, &wire.Alive{ID: want[*wire.Ping](t, g.c).ID})
		}
	}
	pings(3)
	if err := cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * deadTime) // nothing happens meanwhile that could be waited for
	if err := cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	pings(10)
	// One that does not answer is dead all the same.
	for {
		typ, body, err := wire.NewReader(g.c, wire.MaxControl).Next()
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.ToGuest(typ, body)
		if r, ok := m.(*wire.Refused); ok && r.Errno != 0 {
			t.Log(r.Text)
			return
		}
		if _, ok := m.(*wire.Ping); !ok {
			t.Fatalf("%T, %v", m, err)
		}
	}
}
