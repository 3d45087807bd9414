// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// rawSocket makes a socket and hands it out as a parent process would: not in
// this runtime's poller.
func rawSocket(t *testing.T, domain, typ int, prepare func(fd int) error) *os.File {
	t.Helper()
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := prepare(fd); err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "transfused.socket")
}

func TestFromFileUnix(t *testing.T) {
	checkLeaks(t)
	path := tempDir(t) + "/s"
	f := rawSocket(t, unix.AF_UNIX, unix.SOCK_STREAM, func(fd int) error {
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			return err
		}
		return unix.Listen(fd, 1)
	})
	l, err := FromFile(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if f.Close() == nil {
		t.Error("FromFile left its file open")
	}
	diff(t, "Addr", Addr{Family: Unix, Path: path}, l.Addr())
	accepted := acceptOne(t, l)
	a, err := Dial(t.Context(), l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b := <-accepted
	defer b.Close()
	diff(t, "peer", Peer{Family: Unix, PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Local: l.Addr()}, b.Peer())
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("Close removed the file of another's socket: %v", err)
	}
}

func TestFromFileVsock(t *testing.T) {
	checkLeaks(t)
	var port uint32
	f := rawSocket(t, unix.AF_VSOCK, unix.SOCK_STREAM, func(fd int) error {
		if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: unix.VMADDR_PORT_ANY}); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		port = sa.(*unix.SockaddrVM).Port
		return unix.Listen(fd, 1)
	})
	l, err := FromFile(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if f.Close() == nil {
		t.Error("FromFile left its file open")
	}
	diff(t, "Addr", Addr{Family: Vsock, CID: CIDAny, Port: port}, l.Addr())
}

func TestHybridFromFile(t *testing.T) {
	checkLeaks(t)
	for name, want := range map[string]Addr{"v.sock_1524": {Family: Hybrid, Port: 1524}, "v.sock_": {}, "v.sock": {}, "_7x": {}} {
		dir := tempDir(t)
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/" + name})
		if err != nil {
			t.Fatal(err)
		}
		f, err := ln.File()
		ln.Close()
		if err != nil {
			t.Fatal(err)
		}
		l, err := HybridFromFile(f)
		if want.Family == 0 {
			if err == nil || !strings.Contains(err.Error(), "ListenStream=PATH_PORT") {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		want.Path = dir + "/v.sock"
		diff(t, "Addr", want, l.Addr())
		l.Close()
	}
}

func TestFromFileErrors(t *testing.T) {
	dir := tempDir(t)
	nothing := func(int) error { return nil }
	const notListening = "inherited socket transfused.socket: it is no listening stream socket; use ListenStream= and Accept=no"
	tests := []struct {
		name string
		file func(t *testing.T) *os.File
		want string
	}{
		{"no socket", func(t *testing.T) *os.File {
			f, err := os.Create(dir + "/file")
			if err != nil {
				t.Fatal(err)
			}
			return f
		}, "inherited socket " + dir + "/file: it is no socket; pass a listening stream socket"},
		{"internet", func(t *testing.T) *os.File {
			return rawSocket(t, unix.AF_INET, unix.SOCK_STREAM, nothing)
		}, "inherited socket transfused.socket: its address family is 2, neither vsock (40) nor Unix (1)"},
		{"datagrams", func(t *testing.T) *os.File {
			return rawSocket(t, unix.AF_UNIX, unix.SOCK_DGRAM, nothing)
		}, notListening},
		{"not listening", func(t *testing.T) *os.File {
			return rawSocket(t, unix.AF_UNIX, unix.SOCK_STREAM, nothing)
		}, notListening},
		{"vsock not listening", func(t *testing.T) *os.File {
			return rawSocket(t, unix.AF_VSOCK, unix.SOCK_STREAM, nothing)
		}, notListening},
		{"abstract", func(t *testing.T) *os.File {
			ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@transfused-test-" + dir})
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			f, err := ln.File()
			if err != nil {
				t.Fatal(err)
			}
			return f
		}, `path "@transfused-test-` + dir + `" must be absolute; begin it with /`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			f := tt.file(t)
			if tt.name == "abstract" {
				tt.want = "inherited socket " + f.Name() + ": " + tt.want
			}
			l, err := FromFile(f)
			if err == nil {
				l.Close()
				t.Fatal("no error")
			}
			diff(t, "error", tt.want, err.Error())
			if f.Close() == nil {
				t.Error("FromFile left its file open")
			}
		})
	}
}
