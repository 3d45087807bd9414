// SPDX-License-Identifier: Apache-2.0

//go:build !race

package host

import (
	"errors"
	"os"
	"syscall"
)

// allThreads makes a system call on every thread of this process, those of
// the Go runtime too.
func allThreads(name string, nr, a, b, c, d, e uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(nr, a, b, c, d, e, 0)
	switch errno {
	case 0:
		return nil
	case syscall.ENOTSUP:
		// The runtime does not know the threads that C may have made.
		return errors.New("this program was built with cgo, so that a worker cannot be confined: build it with CGO_ENABLED=0")
	}
	return os.NewSyscallError(name, errno)
}
