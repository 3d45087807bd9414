// SPDX-License-Identifier: Apache-2.0

package host

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_AARCH64
	lowWord   = 0 // of an argument: little-endian

	sysNewfstatat = unix.SYS_FSTATAT
)

// legacyCalls: there are none here.
var legacyCalls []uint32
