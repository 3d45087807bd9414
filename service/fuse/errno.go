// SPDX-License-Identifier: Apache-2.0

package fuse

import "syscall"

// Errno is the system's error number, positive, as file systems use it inside; 0 is success. On the wire (OutHeader.Error) it is negative.
type Errno = syscall.Errno

// MaxErrno is the greatest error number that the kernel takes in a reply; what is not in -MaxErrno to 0 is refused
// with EINVAL and logged (dev.c, fuse_dev_do_write: "oh.error <= -512"): 511.
const MaxErrno = 511
