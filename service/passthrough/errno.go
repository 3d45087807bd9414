// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"errors"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// errnoOf is the errno in err, 0 for nil. What is no errno is EIO.
func errnoOf(err error) fuse.Errno {
	if err == nil {
		return 0
	}
	if errno, ok := err.(fuse.Errno); ok { // every wrapper of x/sys/unix: no reflection on the way of each request
		return errno
	}
	var errno fuse.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return unix.EIO
}
