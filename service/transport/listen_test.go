// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func listenOn(t *testing.T, s string) *Listener {
	t.Helper()
	l, err := Listen(parseAddr(t, s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// leaveStale leaves a socket at path as a killed process does.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

func acceptOne(t *testing.T, l *Listener) <-chan *Conn {
	accepted := make(chan *Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Errorf("Accept: %v", err)
		}
		accepted <- c
	}()
	return accepted
}

// TestDialListen goes end to end: listen, dial, accept, talk, and know each
// other.
func TestDialListen(t *testing.T) {
	me := Peer{Family: Unix, PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	tests := []struct{ name, listen, dial, file string }{
		{"unix", "unix:%s/s", "unix:%s/s", "%s/s"},
		// What a guest's connection to port 1524 looks like: the VMM
		// connects to the socket with the port in its name.
		{"hybrid", "hybrid:%s/v.sock:1524", "unix:%s/v.sock_1524", "%s/v.sock_1524"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			dir := tempDir(t)
			l := listenOn(t, fmt.Sprintf(tt.listen, dir))
			diff(t, "Addr", parseAddr(t, fmt.Sprintf(tt.listen, dir)), l.Addr())
			info, err := os.Lstat(fmt.Sprintf(tt.file, dir))
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "mode", fs.ModeSocket|0o600, info.Mode())

			accepted := acceptOne(t, l)
			dialled := parseAddr(t, fmt.Sprintf(tt.dial, dir))
			a, err := Dial(t.Context(), dialled)
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			b := <-accepted
			defer b.Close()

			want := me
			want.Local = dialled
			diff(t, "peer of the dialler", want, a.Peer())
			want.Family, want.Local = l.Addr().Family, l.Addr()
			diff(t, "peer of the listener", want, b.Peer())
			for name, c := range map[string]*Conn{"dialled": a, "accepted": b} {
				if got := sockopt(t, c, unix.SO_SNDBUF); got < 2*bufferSize {
					t.Errorf("SO_SNDBUF of the %s connection = %d", name, got)
				}
			}

			if _, err := a.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			q, err := io.ReadAll(b)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "question", "question", string(q))
			if _, err := b.Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			b.Close()
			r, err := io.ReadAll(a)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "answer", "answer", string(r))

			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(fmt.Sprintf(tt.file, dir)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the socket's file is still there: %v", err)
			}
		})
	}
}

func TestListenReplacesStale(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(tempDir(t), "s")
	leaveStale(t, path)
	l := listenOn(t, "unix:"+path)
	accepted := acceptOne(t, l)
	c, err := Dial(t.Context(), l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	(<-accepted).Close()
}

func TestListenErrors(t *testing.T) {
	dir := tempDir(t)
	live := listenOn(t, "unix:"+dir+"/live")
	listenOn(t, "hybrid:"+dir+"/v:7")
	if err := os.WriteFile(dir+"/file", []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("live", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	dgram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/dgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer dgram.Close()
	const inUse = "address already in use by a running process; stop it or choose another path"
	const noSocket = "a file that is no socket is in the way; remove it or choose another path"
	tests := []struct {
		name, addr, want string
		is               error
	}{
		{"live", "unix:" + dir + "/live", inUse, unix.EADDRINUSE},
		{"live hybrid", "hybrid:" + dir + "/v:7", inUse, unix.EADDRINUSE},
		{"live datagrams", "unix:" + dir + "/dgram", inUse, unix.EADDRINUSE},
		{"file", "unix:" + dir + "/file", noSocket, unix.EADDRINUSE},
		{"symlink", "unix:" + dir + "/link", noSocket, unix.EADDRINUSE},
		{"directory", "unix:" + dir, noSocket, unix.EADDRINUSE},
		{"no directory", "unix:" + dir + "/none/s", "no such directory; make it or choose another path", unix.ENOENT},
		{"in a file", "unix:" + dir + "/file/s", "no such directory; make it or choose another path", unix.ENOTDIR},
		{"hybrid path too long with its port", "hybrid:/" + strings.Repeat("x", maxPath-1) + ":1524", "path has 112 bytes, a socket's has at most 107; choose a shorter one", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			l, err := Listen(parseAddr(t, tt.addr))
			if err == nil {
				l.Close()
				t.Fatal("no error")
			}
			diff(t, "error", "listen "+tt.addr+": "+tt.want, err.Error())
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
		})
	}
	// What was in the way is still as it was.
	b, err := os.ReadFile(dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	diff(t, "file", "precious", string(b))
	conns := make(chan *Conn)
	go func() {
		for {
			c, err := live.Accept()
			if err != nil {
				close(conns)
				return
			}
			conns <- c
		}
	}()
	c, err := Dial(t.Context(), live.Addr())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	live.Close()
	for c := range conns {
		c.Close()
	}
}

// TestListenRace has many processes' worth of listeners take one stale path:
// one gets it and keeps it.
func TestListenRace(t *testing.T) {
	checkLeaks(t)
	for range 20 {
		path := filepath.Join(tempDir(t), "s")
		leaveStale(t, path)
		a := parseAddr(t, "unix:"+path)
		var (
			wg   sync.WaitGroup
			mu   sync.Mutex
			winn []*Listener
		)
		for range 8 {
			wg.Go(func() {
				l, err := Listen(a)
				if err != nil {
					if !errors.Is(err, unix.EADDRINUSE) {
						t.Errorf("Listen = %v", err)
					}
					return
				}
				mu.Lock()
				winn = append(winn, l)
				mu.Unlock()
			})
		}
		wg.Wait()
		if len(winn) != 1 {
			t.Errorf("%d listeners on one path", len(winn))
		}
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
		for _, l := range winn {
			l.Close()
		}
	}
}

// TestCloseLeavesOthers: the file at a listener's path may be another's by now.
func TestCloseLeavesOthers(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(tempDir(t), "s")
	first := listenOn(t, "unix:"+path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second := listenOn(t, "unix:"+path)
	first.Close()
	first.Close()
	accepted := acceptOne(t, second)
	c, err := Dial(t.Context(), second.Addr())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	(<-accepted).Close()
}

func TestCloseWakesAccept(t *testing.T) {
	for _, addr := range []string{"unix:" + tempDir(t) + "/s", "vsock:any:0"} {
		t.Run(addr, func(t *testing.T) {
			checkLeaks(t)
			l := listenOn(t, addr)
			got := make(chan error)
			go func() {
				_, err := l.Accept()
				got <- err
			}()
			l.Close()
			if err := <-got; !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept = %v, want net.ErrClosed", err)
			}
		})
	}
}
