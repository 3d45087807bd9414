// SPDX-License-Identifier: Apache-2.0

package transport

import (
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
	// Control fails only for a closed file, which needs no buffers.
	_ = raw.Control(func(fd uintptr) { setBuffers(int(fd)) })
}

func setBuffers(fd int) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return
	}
	if domain == unix.AF_VSOCK {
		// The size is silently capped by the maximum, so that goes first.
		for _, opt := range []int{unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, unix.SO_VM_SOCKETS_BUFFER_SIZE} {
			_ = unix.SetsockoptUint64(fd, unix.AF_VSOCK, opt, bufferSize)
		}
		return
	}
	for _, opt := range [][2]int{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}} {
		// The first needs CAP_NET_ADMIN, the second is capped silently.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt[0], bufferSize) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt[1], bufferSize)
		}
	}
}
