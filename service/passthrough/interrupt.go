// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// uniqueResend is set in the unique of a request that the kernel sends again (FUSE_UNIQUE_RESEND).
const uniqueResend = 1 << 63

// opInterrupt ends the wait for a lock. Other requests go on: to answer EINTR to a mkdir that was done, or is about to be, would
// be a lie. It has no reply: EAGAIN, by which a server can have it sent again, would only let the two go
// round while a long request runs.
func opInterrupt(r *request) fuse.Errno {
	var in fuse.InterruptIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	r.fs.second.waits.interrupt(in.Unique &^ uniqueResend)
	return 0
}
