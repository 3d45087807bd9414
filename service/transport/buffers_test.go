// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func sockopt(t testing.TB, c *Conn, opt int) int {
	t.Helper()
	var (
		n   int
		err error
	)
	if cerr := c.raw.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, opt) }); cerr != nil {
		t.Fatal(cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// unprivileged runs f on a thread without capabilities, which ends with it.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		err := unix.Capset(&hdr, &none[0])
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestBuffersRaised(t *testing.T) {
	checkLeaks(t)
	if os.Getuid() != 0 {
		t.Fatal("needs root; run the tests as root")
	}
	check := func(t *testing.T, limit int) {
		a, b := pair(t)
		for _, c := range []*Conn{a, b} {
			for name, opt := range map[string]int{"SO_SNDBUF": unix.SO_SNDBUF, "SO_RCVBUF": unix.SO_RCVBUF} {
				// The kernel doubles what it is told, socket(7).
				if got, want := sockopt(t, c, opt), 2*min(bufferSize, limit); got < want {
					t.Errorf("%s = %d, want %d", name, got, want)
				}
			}
		}
	}
	t.Run("root", func(t *testing.T) { check(t, bufferSize) })
	t.Run("user", func(t *testing.T) {
		limit := bufferSize
		for _, name := range []string{"wmem_max", "rmem_max"} {
			b, err := os.ReadFile("/proc/sys/net/core/" + name)
			if err != nil {
				t.Fatal(err)
			}
			n, err := strconv.Atoi(strings.TrimSpace(string(b)))
			if err != nil {
				t.Fatal(err)
			}
			limit = min(limit, n)
		}
		unprivileged(t, func() { check(t, limit) })
	})
}

// BenchmarkWrite shows what raised buffers are worth to messages of 1 MiB.
func BenchmarkWrite(b *testing.B) {
	for _, size := range []int{4 << 10, 128 << 10, 1 << 20} {
		for _, raised := range []bool{false, true} {
			b.Run(fmt.Sprintf("size=%dK/raised=%v", size>>10, raised), func(b *testing.B) {
				fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					b.Fatal(err)
				}
				var c [2]*Conn
				for i, fd := range fds {
					f := os.NewFile(uintptr(fd), "pair")
					if raised {
						SetBuffers(f)
					}
					c[i] = NewConn(f, Peer{})
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					buf := make([]byte, size)
					for {
						if _, err := io.ReadFull(c[1], buf); err != nil {
							return
						}
					}
				}()
				msg := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if _, err := c[0].Write(msg); err != nil {
						b.Fatal(err)
					}
				}
				c[0].Close()
				<-done
				c[1].Close()
			})
		}
	}
}
