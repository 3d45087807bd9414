// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"io"
	"os"
	"os/exec"
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

// BenchmarkWrite shows what the size of the buffers is worth between two
// processes: to a message that is answered by 16 bytes, as a WRITE request is
// (or a READ, the other way round), and to messages in one go.
func BenchmarkWrite(b *testing.B) {
	for _, answered := range []bool{true, false} {
		for _, size := range []int{4 << 10, 128 << 10, 1 << 20} {
			for _, raised := range []bool{false, true} {
				b.Run(fmt.Sprintf("answered=%v/size=%dK/raised=%v", answered, size>>10, raised), func(b *testing.B) {
					benchmarkWrite(b, answered, size, raised)
				})
			}
		}
	}
}

func benchmarkWrite(b *testing.B, answered bool, size int, raised bool) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		b.Fatal(err)
	}
	f, g := os.NewFile(uintptr(fds[0]), "pair"), os.NewFile(uintptr(fds[1]), "pair")
	if raised {
		SetBuffers(f)
		SetBuffers(g)
	}
	sink := exec.Command("/proc/self/exe")
	sink.Env = append(os.Environ(), fmt.Sprintf("%s=%d %v", sinkEnv, size, answered))
	sink.ExtraFiles = []*os.File{g}
	sink.Stderr = os.Stderr
	if err := sink.Start(); err != nil {
		b.Fatal(err)
	}
	g.Close()
	c := NewConn(f, Peer{})
	msg, answer := make([]byte, size), make([]byte, 16)
	b.SetBytes(int64(size))
	for b.Loop() {
		if _, err := c.Write(msg); err != nil {
			b.Fatal(err)
		}
		if answered {
			if _, err := io.ReadFull(c, answer); err != nil {
				b.Fatal(err)
			}
		}
	}
	c.Close()
	if err := sink.Wait(); err != nil {
		b.Error(err)
	}
}

// sinkEnv makes this program the other process of BenchmarkWrite.
const sinkEnv = "TRANSPORT_TEST_SINK"

func TestMain(m *testing.M) {
	if args := os.Getenv(sinkEnv); args != "" {
		if err := sink(args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func sink(args string) error {
	var (
		size     int
		answered bool
	)
	if _, err := fmt.Sscan(args, &size, &answered); err != nil {
		return err
	}
	c := NewConn(os.NewFile(3, "pair"), Peer{})
	buf := make([]byte, size)
	for {
		if _, err := io.ReadFull(c, buf); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if answered {
			if _, err := c.Write(buf[:16]); err != nil {
				return err
			}
		}
	}
}
