// SPDX-License-Identifier: Apache-2.0

//go:build race

package host

import (
	"os"
	"syscall"
)

// allThreads makes a system call on this thread alone: the race detector needs
// cgo, which keeps the runtime from calling on all. Such a build is for tests
// of everything but that.
func allThreads(name string, nr, a, b, c, d, e uintptr) error {
	if _, _, errno := syscall.RawSyscall6(nr, a, b, c, d, e, 0); errno != 0 {
		return os.NewSyscallError(name, errno)
	}
	return nil
}
