// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// opAccess says what this server may do. With default_permissions, which our guest always mounts with, the kernel
// decides itself and does not ask; a guest of another make that does learns at least what would fail here.
func opAccess(r *request) fuse.Errno {
	var in fuse.AccessIn
	if !decode(r, &in) || in.Mask&^(unix.R_OK|unix.W_OK|unix.X_OK) != 0 {
		return unix.EINVAL
	}
	_, fd, e := r.path()
	if e != 0 {
		return e
	}
	if in.Mask&unix.W_OK != 0 && r.fs.c.ReadOnly {
		return unix.EROFS
	}
	return errnoOf(unix.Faccessat2(fd, "", in.Mask, unix.AT_EMPTY_PATH|unix.AT_EACCESS))
}
