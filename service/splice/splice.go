// SPDX-License-Identifier: Apache-2.0

// Package splice moves large data between descriptors without copying them: what is in a file, or in a FUSE request,
// goes through a pipe as references to its pages (splice(2)).
//
// Between /dev/fuse, a Unix socket and a file that leaves one copy of each byte, where read(2) and write(2) make four. What
// was handed on so is read later than the call returns: a page that is changed in between arrives changed, as it does for
// whoever reads it beside the change.
package splice

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// Size is what a Pipe holds, in bytes of whole pages: the most that a process may ask for without
	// CAP_SYS_RESOURCE (/proc/sys/fs/pipe-max-size).
	Size = 1 << 20
	// MaxData is the most data of one message, in bytes, that goes through a Pipe whatever pages it lies in, with the header.
	MaxData = Size / 2
	// MinData is how many bytes are worth the system calls of a Pipe instead of a copy.
	MinData = 64 << 10
)

// Pipe is a pipe(2) through which one message at a time goes from one descriptor to another without a copy: pages of a file or of
// a FUSE request are handed on as they are. It is for one goroutine, and no call waits for anything but a disk, or a socket that blocks.
type Pipe struct{ r, w int }

// New makes a Pipe. It fails where the user's pipes have too many pages already (/proc/sys/fs/pipe-user-pages-soft), and where splice(2)
// is not allowed.
func New() (*Pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	p := &Pipe{fds[0], fds[1]}
	if _, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, Size); err != nil {
		p.Close()
		return nil, os.NewSyscallError("fcntl(F_SETPIPE_SZ)", err)
	}
	if _, err := splice(p.r, nil, p.w, nil, 0); err != nil { // of nothing: it tells whether a filter lets us
		p.Close()
		return nil, os.NewSyscallError("splice", err)
	}
	return p, nil
}

// Close closes both ends; what is in the pipe is lost.
func (p *Pipe) Close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// Take moves up to n bytes of fd, from *off on if that is not nil, into the pipe. EAGAIN: fd has nothing, or the pipe is full.
func (p *Pipe) Take(fd int, off *int64, n int) (int, error) { return splice(fd, off, p.w, nil, n) }

// Give moves up to n bytes out of the pipe to fd, at *off if that is not nil.
func (p *Pipe) Give(fd int, off *int64, n int) (int, error) { return splice(p.r, nil, fd, off, n) }

// Full tells whether the pipe can take no more. It may have few bytes by then, of as many pieces.
func (p *Pipe) Full() bool {
	fds := [...]unix.PollFd{{Fd: int32(p.w), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds[:], 0)
	return n == 0 && err == nil
}

// Read copies the next len(b) bytes out of the pipe, in which they must be.
func (p *Pipe) Read(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(p.r, b)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("read of a pipe", err)
		}
		b = b[max(n, 0):]
	}
	return nil
}

// Write copies b, a page at most, into the pipe, which must have room.
func (p *Pipe) Write(b []byte) error {
	_, err := unix.Write(p.w, b)
	return os.NewSyscallError("write to a pipe", err)
}

func splice(from int, fromOff *int64, to int, toOff *int64, n int) (int, error) {
	for {
		m, err := unix.Splice(from, fromOff, to, toOff, n, unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return max(int(m), 0), err
		}
	}
}

// Saves tells whether data spare a copy by going to and from a socket through a Pipe: Unix sockets hand on pages, vsock copies. Before
// Linux 6.5 (MSG_SPLICE_PAGES) they do so under a lock that the peer may hold for ever.
func Saves(sock int) bool {
	domain, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_UNIX && newEnough()
}

var newEnough = sync.OnceValue(func() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 5)
})
