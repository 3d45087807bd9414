// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// bufferSize holds the largest message (1 MiB and headers) with room for the
// others beside it.
const bufferSize = 4 << 20

// SetBuffers raises the socket buffers of f to 4 MiB, or to what the kernel
// allows this process (net.core.wmem_max). It tries its best: a socket with
// smaller buffers works, slower.
func SetBuffers(f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = control(raw, setBuffers)
}

func setBuffers(fd int) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	if domain == unix.AF_VSOCK {
		// The size is silently capped by the maximum, so that goes first.
		return errors.Join(
			unix.SetsockoptUint64(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, bufferSize),
			unix.SetsockoptUint64(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_BUFFER_SIZE, bufferSize))
	}
	return errors.Join(
		force(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF),
		force(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF))
}

// force sets a size by the option for CAP_NET_ADMIN, or else by the one for
// all, which caps it silently.
func force(fd, admin, all int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, admin, bufferSize); err == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, all, bufferSize)
}
