// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// device is the fuse device of a mount, outside the runtime's poller: who reads it waits in poll(2) on a thread of
// his own, which costs half of the way through the poller (doc.go), and unlike a blocking read can be woken.
type device struct {
	f    *os.File // owns fd
	fd   int      // non-blocking
	wake int      // an eventfd that ends wait
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
	// NewFile keeps what blocks out of the poller. That it blocks for a moment hurts nobody: nothing reads it yet.
	err = unix.SetNonblock(d.fd, false)
	d.f = os.NewFile(uintptr(d.fd), "/dev/fuse")
	err = errors.Join(err, unix.SetNonblock(d.fd, true))
	if err == nil {
		d.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		d.f.Close()
		return nil, fmt.Errorf("prepare /dev/fuse: %w", err)
	}
	return d, nil
}

// wait waits for something to read, for at most timeout milliseconds (-1: for ever). The error is os.ErrClosed after end.
func (d *device) wait(timeout int) (ready bool, err error) {
	fds := [...]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}, {Fd: int32(d.wake), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds[:], timeout)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, err
		case fds[1].Revents != 0:
			return false, os.ErrClosed
		}
		return fds[0].Revents != 0, nil
	}
}

// end wakes wait, now and for ever.
func (d *device) end() {
	// It can't fail: the counter is far from its limit.
	_, _ = unix.Write(d.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// close closes the descriptors. Nobody may be reading, writing or waiting.
func (d *device) close() {
	d.f.Close()
	unix.Close(d.wake)
}
