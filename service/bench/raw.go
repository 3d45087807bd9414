// SPDX-License-Identifier: Apache-2.0

package main

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls that are timed one by one go around the scheduler. It would take a goroutine that does nothing but system
// calls for one that runs too long, and look at it every 20 µs: on one CPU that costs more than the call.

// undisturbed runs fn on a thread that the scheduler's signal does not reach: it would interrupt the calls.
func undisturbed(fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set, old := unix.Sigset_t{}, unix.Sigset_t{}
	set.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old); err != nil {
		return err
	}
	// What is restored was valid.
	defer unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	return fn()
}

// cstrings are names as the kernel wants them, made before the time begins.
func cstrings(names []string) (all []*byte, err error) {
	for _, name := range names {
		p, err := unix.BytePtrFromString(name)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// atCWD is AT_FDCWD as an argument.
const atCWD = ^uintptr(-unix.AT_FDCWD - 1)

func errno(e unix.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

func rawOpen(name *byte, flags int, mode uint32) (int, error) {
	fd, _, e := unix.RawSyscall6(unix.SYS_OPENAT, atCWD, uintptr(unsafe.Pointer(name)), uintptr(flags), uintptr(mode), 0, 0)
	return int(fd), errno(e)
}

func rawClose(fd int) error {
	_, _, e := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return errno(e)
}

func rawUnlink(name *byte, flags int) error {
	_, _, e := unix.RawSyscall(unix.SYS_UNLINKAT, atCWD, uintptr(unsafe.Pointer(name)), uintptr(flags))
	return errno(e)
}

func rawMkdir(name *byte, mode uint32) error {
	_, _, e := unix.RawSyscall(unix.SYS_MKDIRAT, atCWD, uintptr(unsafe.Pointer(name)), uintptr(mode))
	return errno(e)
}

func rawFsync(fd int) error {
	_, _, e := unix.RawSyscall(unix.SYS_FSYNC, uintptr(fd), 0, 0)
	return errno(e)
}

func rawStatx(fd int, name *byte, flags int, st *unix.Statx_t) error {
	_, _, e := unix.RawSyscall6(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(name)), uintptr(flags), unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(st)), 0)
	return errno(e)
}

func rawPread(fd int, b []byte, offset int64) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(offset), 0, 0)
	return int(n), errno(e)
}

func rawPwrite(fd int, b []byte, offset int64) (int, error) {
	n, _, e := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(offset), 0, 0)
	return int(n), errno(e)
}
