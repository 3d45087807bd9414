// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// reason is an error that says why and what mends it, in place of the error
// that it unwraps to.
type reason struct {
	text string
	err  error
}

func (r *reason) Error() string { return r.text }
func (r *reason) Unwrap() error { return r.err }

type op int

const (
	opDial op = iota
	opListen
)

// explain gives err its reason and mend. Errors that explain themselves are
// returned as they are.
func explain(op op, a Addr, err error) error {
	if r := (*reason)(nil); errors.As(err, &r) {
		return r
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &reason{"no answer in time; is the other end running?", err}
	}
	errno := syscall.Errno(0)
	if !errors.As(err, &errno) {
		return err
	}
	text := listenText(a, errno)
	if op == opDial {
		text = dialText(a, errno)
	}
	if text == "" {
		text = errno.Error()
	}
	return &reason{text, err}
}

func dialText(a Addr, errno syscall.Errno) string {
	if a.Family == Vsock {
		switch errno {
		// A vsock peer refuses by a reset.
		case unix.ECONNREFUSED, unix.ECONNRESET:
			return "connection refused: nothing listens on that port; start it there or check the port"
		case unix.ENODEV:
			switch a.CID {
			case CIDLocal:
				return "no vsock loopback in this machine; load the module vsock_loopback"
			case CIDHost, unix.VMADDR_CID_HYPERVISOR:
				return "no vsock device in this machine (/dev/vsock); give the VM one, or load the module vmw_vsock_virtio_transport"
			}
			return "no machine with this CID can be reached; check the CID, start the VM, or load the module vhost_vsock"
		case unix.ETIMEDOUT:
			return "connection timed out; is that machine running, and its vsock device enabled?"
		}
		return vsockText(errno)
	}
	switch errno {
	case unix.ENOENT:
		return "no such socket; start what listens there or check the path"
	case unix.ECONNREFUSED:
		return "connection refused: nothing listens on this socket any more; start it again"
	case unix.ENOTSOCK, unix.EPROTOTYPE:
		return "no stream socket; check the path"
	case unix.EACCES, unix.EPERM:
		return "permission denied; run as the socket's owner or as root, or have the owner chmod it"
	case unix.EAGAIN:
		return "its queue of connections is full; try again"
	}
	return ""
}

func listenText(a Addr, errno syscall.Errno) string {
	if a.Family == Vsock {
		switch errno {
		case unix.EADDRINUSE:
			return "port already in use by a running process; stop it or choose another port"
		case unix.EADDRNOTAVAIL:
			return "this machine has no such CID; use vsock:any:PORT"
		case unix.EACCES, unix.EPERM:
			return "permission denied; ports below 1024 are root's, choose another"
		}
		return vsockText(errno)
	}
	switch errno {
	case unix.EADDRINUSE:
		return "address already in use by a running process; stop it or choose another path"
	case unix.ENOENT, unix.ENOTDIR:
		return "no such directory; make it or choose another path"
	case unix.EACCES, unix.EPERM:
		return "permission denied; run as the directory's owner or choose another path"
	case unix.EROFS:
		return "read-only file system; choose another path"
	}
	return ""
}

// vsockText is for a machine that has no vsock at all.
func vsockText(errno syscall.Errno) string {
	switch errno {
	case unix.EAFNOSUPPORT, unix.ENODEV, unix.ENOENT:
		return "no vsock in this machine (/dev/vsock); load the module vsock"
	case unix.EACCES, unix.EPERM:
		return "permission denied; run as root, or where sockets of family AF_VSOCK are allowed"
	}
	return ""
}
