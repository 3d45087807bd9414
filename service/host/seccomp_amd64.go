// SPDX-License-Identifier: Apache-2.0

package host

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_X86_64
	lowWord   = 0 // of an argument: little-endian

	sysNewfstatat = unix.SYS_NEWFSTATAT
)

// legacyCalls exist on amd64 alone; the runtime, or the C library beside the
// race detector, uses them there. (The numbers of the x32 ABI are others, and
// so refused.)
var legacyCalls = []uint32{unix.SYS_ARCH_PRCTL, unix.SYS_EPOLL_WAIT, unix.SYS_POLL, unix.SYS_TIME}
