// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"
)

// tempDir is a directory with a path short enough for sockets.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func parseAddr(t *testing.T, s string) Addr {
	t.Helper()
	a, err := Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// fakeVMM listens as a VMM does for connections into its guest, reads the
// CONNECT line of each and gives the rest to serve.
func fakeVMM(t *testing.T, serve func(c net.Conn, line string)) (path string) {
	t.Helper()
	path = filepath.Join(tempDir(t), "v.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				line, err := bufio.NewReaderSize(c, 16).ReadString('\n')
				if err != nil {
					t.Errorf("read CONNECT: %v", err)
				}
				serve(c, line)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return path
}

func TestDialHybrid(t *testing.T) {
	checkLeaks(t)
	want := "bytes right behind the line\nOK 7\n"
	tests := []struct {
		name  string
		serve func(c net.Conn)
	}{
		{"at once", func(c net.Conn) { io.WriteString(c, "OK 1073741824\n"+want) }},
		{"largest port", func(c net.Conn) { io.WriteString(c, "OK 4294967295\n"+want) }},
		{"byte by byte", func(c net.Conn) {
			for _, b := range []byte("OK 12\n" + want) {
				c.Write([]byte{b})
				time.Sleep(time.Millisecond) // the slowness is the case
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			lines := make(chan string, 1)
			path := fakeVMM(t, func(c net.Conn, line string) { lines <- line; tt.serve(c) })
			a := parseAddr(t, "hybrid:"+path+":1525")
			c, err := Dial(t.Context(), a)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			diff(t, "line", "CONNECT 1525\n", <-lines)
			got, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			diff(t, "stream", want, string(got))
			diff(t, "peer", Peer{Family: Hybrid, PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Local: a}, c.Peer())
		})
	}
}

func TestDialHybridErrors(t *testing.T) {
	tests := []struct {
		name, answer string // answer, then hang up
		want         string
		is           error
	}{
		{"refused", "", "the VMM hung up: nothing in the guest listens on port 1525; start it there or check the port", unix.ECONNREFUSED},
		{"cut off", "OK 12", "the VMM hung up: nothing in the guest listens on port 1525; start it there or check the port", unix.ECONNREFUSED},
		{"garbage", "HTTP/1.1 400 Bad Request\r\n\r\n", `answered "HTTP/1.1 400 Bad Request\r\n" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
		{"no number", "OK \n", `answered "OK \n" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
		{"no port", "OK 4294967296\n", `answered "OK 4294967296\n" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
		{"empty line", "\n", `answered "\n" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
		{"over-long", "OK " + strings.Repeat("1", 1<<16), `answered "OK 11111111111111111111111111111" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
		{"NULs", "\x00\x00\x00\n", `answered "\x00\x00\x00\n" to CONNECT, not "OK PORT": give the VMM's vsock socket`, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			path := fakeVMM(t, func(c net.Conn, _ string) { io.WriteString(c, tt.answer) })
			a := parseAddr(t, "hybrid:"+path+":1525")
			c, err := Dial(t.Context(), a)
			if err == nil {
				c.Close()
				t.Fatal("no error")
			}
			diff(t, "error", fmt.Sprintf("dial %s: %s", a, tt.want), err.Error())
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
		})
	}
}

func TestDialHybridSilent(t *testing.T) {
	tests := []struct {
		name string
		end  func(context.Context, context.CancelFunc) (context.Context, context.CancelFunc)
		want error
	}{
		{"cancelled", func(ctx context.Context, cancel context.CancelFunc) (context.Context, context.CancelFunc) {
			return ctx, cancel
		}, context.Canceled},
		{"in time", func(ctx context.Context, _ context.CancelFunc) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			_ = cancel // by the parent
			return ctx, func() {}
		}, context.DeadlineExceeded},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			parent, cancelParent := context.WithCancel(t.Context())
			defer cancelParent()
			ctx, end := tt.end(parent, cancelParent)
			path := fakeVMM(t, func(c net.Conn, _ string) {
				end() // the line is there, so that the dialler waits
				c.Read(make([]byte, 1))
			})
			c, err := Dial(ctx, parseAddr(t, "hybrid:"+path+":1525"))
			if err == nil {
				c.Close()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("Dial = %v, want %v", err, tt.want)
			}
		})
	}
}

func TestDialCancelledBefore(t *testing.T) {
	checkLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l := listenOn(t, "unix:"+tempDir(t)+"/s")
	if _, err := Dial(ctx, l.Addr()); !errors.Is(err, context.Canceled) {
		t.Errorf("Dial = %v, want %v", err, context.Canceled)
	}
}

func TestDialErrors(t *testing.T) {
	dir := tempDir(t)
	dead := filepath.Join(dir, "dead")
	leaveStale(t, dead)
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dgram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/dgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer dgram.Close()
	tests := []struct {
		name, addr, want string
		is               error
	}{
		{"missing", "unix:" + dir + "/none", "no such socket; start what listens there or check the path", unix.ENOENT},
		{"missing VMM", "hybrid:" + dir + "/none:5", "no such socket; start what listens there or check the path", unix.ENOENT},
		{"dead", "unix:" + dead, "connection refused: nothing listens on this socket any more; start it again", unix.ECONNREFUSED},
		{"file", "unix:" + dir + "/file", "connection refused: nothing listens on this socket any more; start it again", unix.ECONNREFUSED},
		{"datagrams", "unix:" + dir + "/dgram", "no stream socket; check the path", unix.EPROTOTYPE},
		{"any CID", "vsock:any:1524", "any is an address to listen on; name the CID", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			c, err := Dial(t.Context(), parseAddr(t, tt.addr))
			if err == nil {
				c.Close()
				t.Fatal("no error")
			}
			diff(t, "error", "dial "+tt.addr+": "+tt.want, err.Error())
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
		})
	}
	if _, err := Dial(t.Context(), Addr{}); err == nil || err.Error() != "dial : no address" {
		t.Errorf("Dial of no address = %v", err)
	}
}

func TestDialWithoutPermission(t *testing.T) {
	checkLeaks(t)
	dir := tempDir(t)
	l := listenOn(t, "unix:"+dir+"/s")
	if err := os.Chmod(dir+"/s", 0); err != nil {
		t.Fatal(err)
	}
	unprivileged(t, func() {
		_, err := Dial(t.Context(), l.Addr())
		if !errors.Is(err, unix.EACCES) || !strings.HasSuffix(err.Error(), ": permission denied; run as the socket's owner or as root, or have the owner chmod it") {
			t.Errorf("Dial = %v, want EACCES explained", err)
		}
	})
}

// stream is a ReadWriter of what a VMM answers.
type stream struct {
	io.Reader
	sent strings.Builder
}

func (s *stream) Write(b []byte) (int, error) { return s.sent.Write(b) }

func FuzzConnectLine(f *testing.F) {
	for _, s := range []string{"OK 1\n", "OK 1073741824\nrest", "OK", "", "\n", "ok 1\n", "OK -1\n", "OK  1\n", "OK 99999999999999999999999999999999\n", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, answer string) {
		in := strings.NewReader(answer)
		s := &stream{Reader: iotest.OneByteReader(in)}
		err := connectLine(s, 1525)
		diff(t, "sent", "CONNECT 1525\n", s.sent.String())
		read := answer[:len(answer)-in.Len()]
		if len(read) > maxLine {
			t.Errorf("read %d bytes", len(read))
		}
		line, _, found := strings.Cut(answer, "\n")
		if err == nil && (!found || read != line+"\n") {
			t.Errorf("read %q of %q", read, answer)
		}
		if err == nil {
			var port uint32
			if n, serr := fmt.Sscanf(line, "OK %d", &port); n != 1 || serr != nil {
				t.Errorf("took %q for OK", line)
			}
		}
	})
}
