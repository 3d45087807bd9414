// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
)

// device is the fuse device of a mount, outside the runtime's poller. Who reads it waits in poll(2) on a thread of his
// own, which costs half of the way through the poller (doc.go) and can be woken, as a blocking read can't. And who only
// writes to it is not woken by the kernel for every request.
type device struct {
	fd int // non-blocking; for who reads and writes, and has ended before close

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
	return d, nil
}

// Write writes one message.
func (d *device) Write(b []byte) (int, error) { return unix.Write(d.fd, b) }

// waitWith waits for a request, with asks, and for what fds want, of which the first two are the device's and the waker's to be; for at most timeout
// milliseconds (-1: for ever). Without asks only the end of the file system counts here. woken: the waker was.
func (d *device) waitWith(w *waker, s *transport.Spinner, asks bool, fds []unix.PollFd, timeout int) (woken bool, err error) {
	fds[0], fds[1] = unix.PollFd{Fd: int32(d.fd)}, unix.PollFd{Fd: int32(w.fd), Events: unix.POLLIN}
	if asks {
		fds[0].Events = unix.POLLIN
	}
	for s.Begin(); s.Again(); {
		if n, err := pollNow(fds); n > 0 && err == nil {
			return fds[1].Revents != 0, nil
		}
	}
	for {
		_, err := unix.Poll(fds, timeout)
		s.Slept()
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, os.NewSyscallError("poll", err)
		}
		return fds[1].Revents != 0, nil
	}
}

// waitGone waits until the file system is unmounted or aborted (true), or the waker is woken (false). Requests don't end it.
func (d *device) waitGone(w *waker) bool {
	fds := [...]unix.PollFd{{Fd: int32(d.fd)}, {Fd: int32(w.fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds[:], -1)
		switch {
		case err == unix.EINTR:
		case fds[0].Revents != 0:
			return true
		case err != nil || fds[1].Revents != 0:
			return false
		}
	}
}

// waker ends a poll(2), now and for ever.
type waker struct {
	fd int // an eventfd

	mu     sync.Mutex
	closed bool
}

func newWaker() (*waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	return &waker{fd: fd}, nil
}

// wake may be called at any time, also after close.
func (w *waker) wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		// It can't fail: the counter is far from its limit.
		_, _ = unix.Write(w.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

func (w *waker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	unix.Close(w.fd)
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

// close closes the descriptor. Nobody may be reading, writing or waiting.
func (d *device) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	unix.Close(d.fd)
}

// readNow and writeNow are read(2) and write(2) of a non-blocking descriptor, which need not tell the scheduler.
func readNow(fd int, b []byte) (int, error) { return callNow(unix.SYS_READ, fd, b) }

func writeNow(fd int, b []byte) (int, error) { return callNow(unix.SYS_WRITE, fd, b) }

// pollNow is poll(2) that does not wait.
func pollNow(fds []unix.PollFd) (int, error) {
	var now unix.Timespec
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(unsafe.SliceData(fds))), uintptr(len(fds)), uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func callNow(call uintptr, fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
