// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// device is the fuse device of a mount, outside the runtime's poller. Who reads it waits in poll(2) on a thread of his
// own, which costs half of the way through the poller (doc.go) and can be woken, as a blocking read can't. And who only
// writes to it is not woken by the kernel for every request.
type device struct {
	fd   int // non-blocking; for who reads and writes, and has ended before close
	wake int // an eventfd that ends wait

	mu     sync.Mutex
	closed bool
}

// newDevice takes over f, also when it fails.
func newDevice(f *os.File) (*device, error) {
	defer f.Close() // takes it out of the poller
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &device{}
	var dupErr error
	// Not Fd(): it would make the descriptor a blocking one.
	if err := raw.Control(func(fd uintptr) { d.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, os.NewSyscallError("fcntl", dupErr)
	}
	if d.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(d.fd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	return d, nil
}

// Write writes one message.
func (d *device) Write(b []byte) (int, error) { return unix.Write(d.fd, b) }

// waitWith waits for something to read, or for events on sock, for at most timeout milliseconds (-1: for ever). The error
// is os.ErrClosed after end. Both false and 0: the time has passed.
func (d *device) waitWith(sock int, events int16, timeout int) (ready bool, of int16, err error) {
	fds := [...]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}, {Fd: int32(d.wake), Events: unix.POLLIN}, {Fd: int32(sock), Events: events}}
	for {
		_, err := unix.Poll(fds[:], timeout)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, 0, os.NewSyscallError("poll", err)
		case fds[1].Revents != 0:
			return false, 0, os.ErrClosed
		}
		return fds[0].Revents != 0, fds[2].Revents, nil
	}
}

// end wakes waitWith, now and for ever.
func (d *device) end() {
	// It can't fail: the counter is far from its limit.
	_, _ = unix.Write(d.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// dup returns a duplicate, for passing it on. It may be called at any time.
func (d *device) dup() (*os.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, os.ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// close closes the descriptors. Nobody may be reading, writing or waiting.
func (d *device) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	unix.Close(d.fd)
	unix.Close(d.wake)
}

// readNow and writeNow are read(2) and write(2) of a non-blocking descriptor, which need not tell the scheduler.
func readNow(fd int, b []byte) (int, error) { return callNow(unix.SYS_READ, fd, b) }

func writeNow(fd int, b []byte) (int, error) { return callNow(unix.SYS_WRITE, fd, b) }

func callNow(call uintptr, fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
