// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// Nothing here connects: vsock loopback is not everywhere, and CID 2 may be
// anybody's. The tests in a VM do.

func TestBindReserved(t *testing.T) {
	checkLeaks(t)
	used := func(ports ...uint32) map[uint32]error {
		m := map[uint32]error{}
		for _, p := range ports {
			m[p] = unix.EADDRINUSE
		}
		return m
	}
	all := map[uint32]error{}
	for p := range uint32(1024) {
		all[p] = unix.EADDRINUSE
	}
	tests := []struct {
		name  string
		start uint32
		errs  map[uint32]error
		tried []uint32
		want  error
	}{
		{"first", 0, nil, []uint32{512}, nil},
		{"last", 511, nil, []uint32{1023}, nil},
		{"next where one is in use", 88, used(600, 601), []uint32{600, 601, 602}, nil},
		{"round the end", 511, used(1023), []uint32{1023, 512}, nil},
		{"may not: any port", 5, map[uint32]error{517: os.NewSyscallError("bind", unix.EACCES)}, []uint32{517}, nil},
		{"may not by a filter: any port", 5, map[uint32]error{517: unix.EPERM}, []uint32{517}, nil},
		{"may not after one in use", 5, map[uint32]error{517: unix.EADDRINUSE, 518: unix.EACCES}, []uint32{517, 518}, nil},
		{"another error", 5, map[uint32]error{517: unix.ENOMEM}, []uint32{517}, unix.ENOMEM},
		{"all in use", 0, all, nil, unix.EADDRINUSE},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var tried []uint32
			err := bindReserved(tt.start, func(port uint32) error {
				tried = append(tried, port)
				return tt.errs[port]
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if tt.tried == nil {
				diff(t, "ports tried", 512, len(tried))
				return
			}
			diff(t, "ports tried", tt.tried, tried)
		})
	}
}

// TestBindReservedForReal binds source ports in the kernel's own table.
func TestBindReservedForReal(t *testing.T) {
	checkLeaks(t)
	bind := func() uint32 {
		c, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := bindReserved(100, func(port uint32) error {
			return c.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
		}); err != nil {
			t.Fatal(err)
		}
		sa, err := c.Getsockname()
		if err != nil {
			t.Fatal(err)
		}
		return sa.(*unix.SockaddrVM).Port
	}
	first, second := bind(), bind()
	if first < 612 || second <= first || second > 1023 {
		t.Errorf("bound %d, then %d; want two ports from 612 on", first, second)
	}
	unprivileged(t, func() {
		if port := bind(); port != unix.VMADDR_PORT_ANY {
			t.Errorf("without capabilities bound %d, want none", port)
		}
	})
}

func TestListenVsock(t *testing.T) {
	checkLeaks(t)
	l := listenOn(t, "vsock:any:0")
	a := l.Addr()
	if a.Family != Vsock || a.CID != CIDAny || a.Port < 1024 {
		t.Errorf("Addr = %+v", a)
	}
	check := func(a Addr, want string, is error) {
		l, err := Listen(a)
		if err == nil {
			l.Close()
			t.Errorf("listened on %s", a)
			return
		}
		diff(t, "error", "listen "+a.String()+": "+want, err.Error())
		if !errors.Is(err, is) {
			t.Errorf("%v is not %v", err, is)
		}
	}
	check(a, "port already in use by a running process; stop it or choose another port", unix.EADDRINUSE)
	check(Addr{Family: Vsock, CID: 12345, Port: 1}, "this machine has no such CID; use vsock:any:PORT", unix.EADDRNOTAVAIL)
	unprivileged(t, func() {
		check(Addr{Family: Vsock, CID: CIDAny, Port: 700}, "permission denied; ports below 1024 are root's, choose another", unix.EACCES)
	})
}

func TestVsockBuffers(t *testing.T) {
	checkLeaks(t)
	f := rawSocket(t, unix.AF_VSOCK, unix.SOCK_STREAM, func(int) error { return nil })
	defer f.Close()
	SetBuffers(f)
	for name, opt := range map[string]uintptr{
		"SO_VM_SOCKETS_BUFFER_MAX_SIZE": unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE,
		"SO_VM_SOCKETS_BUFFER_SIZE":     unix.SO_VM_SOCKETS_BUFFER_SIZE,
	} {
		var got uint64
		size := uint32(unsafe.Sizeof(got))
		if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, f.Fd(), unix.AF_VSOCK, opt,
			uintptr(unsafe.Pointer(&got)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
			t.Fatal(errno)
		}
		diff(t, name, uint64(bufferSize), got)
	}
}

// TestVsockErrors checks the reasons and mends of errors that this machine
// can't be brought to give.
func TestVsockErrors(t *testing.T) {
	at := func(cid uint32) Addr { return Addr{Family: Vsock, CID: cid, Port: 1524} }
	tests := []struct {
		name string
		op   op
		addr Addr
		err  unix.Errno
		want string
	}{
		{"refused", opDial, at(7), unix.ECONNRESET, "connection refused: nothing listens on that port; start it there or check the port"},
		{"no device", opDial, at(CIDHost), unix.ENODEV, "no vsock device in this machine (/dev/vsock); give the VM one, or load the module vmw_vsock_virtio_transport"},
		{"no loopback", opDial, at(CIDLocal), unix.ENODEV, "no vsock loopback in this machine; load the module vsock_loopback"},
		{"no such machine", opDial, at(7), unix.ENODEV, "no machine with this CID can be reached; check the CID, start the VM, or load the module vhost_vsock"},
		{"timed out", opDial, at(7), unix.ETIMEDOUT, "connection timed out; is that machine running, and its vsock device enabled?"},
		{"no vsock", opDial, at(7), unix.EAFNOSUPPORT, "no vsock in this machine (/dev/vsock); load the module vsock"},
		{"no vsock to listen on", opListen, at(CIDAny), unix.EAFNOSUPPORT, "no vsock in this machine (/dev/vsock); load the module vsock"},
		{"forbidden", opDial, at(7), unix.EACCES, "permission denied; run as root, or where sockets of family AF_VSOCK are allowed"},
		{"another", opDial, at(7), unix.ENOMEM, "cannot allocate memory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := explain(tt.op, tt.addr, os.NewSyscallError("x", tt.err))
			diff(t, "text", tt.want, err.Error())
			if !errors.Is(err, tt.err) {
				t.Errorf("%v is not %v", err, tt.err)
			}
		})
	}
}
