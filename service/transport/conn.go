// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a connected stream. It owns its descriptor, which is in the
// runtime's poller (until Block): Read and Write allocate nothing, deadlines
// and Close wake them, and concurrent Writes are each whole.
//
// Errors are *os.PathError with the peer as path; errors.Is knows io.EOF,
// os.ErrClosed, os.ErrDeadlineExceeded and the errnos.
type Conn struct {
	f    *os.File
	raw  syscall.RawConn // of f, made once: safe beside Close, as f.Fd is not
	peer Peer

	blocking bool // set before the Conn is shared
	yielder  Yielder

	// Of one that spins; for who reads.
	spinner Spinner
	look    func(fd uintptr) // nil: it does not
	into    []byte
	came    int
}

var _ io.ReadWriteCloser = (*Conn)(nil)

// NewConn makes a Conn of a connected stream socket, such as one that another
// process passed on. It takes ownership of f and sets O_NONBLOCK.
func NewConn(f *os.File, peer Peer) *Conn {
	if f.SetDeadline(time.Time{}) != nil {
		// f was blocking when its *os.File was made, so it is not in the
		// poller, and only a new *os.File of a new descriptor can be. Without
		// a descriptor to spare f is used as it is: slower, but it works.
		if g, err := dup(f, peer.String()); err == nil {
			f.Close()
			f = g
		}
	}
	// It fails only for a nil file, and that has no business here.
	raw, _ := f.SyscallConn()
	return &Conn{f: f, raw: raw, peer: peer}
}

// Read reads what is there, at most len(b) bytes, or waits for it.
func (c *Conn) Read(b []byte) (int, error) {
	if c.blocking {
		c.yielder.Yield()
	}
	if n := c.spin(b); n > 0 {
		return n, nil
	}
	n, err := c.f.Read(b)
	c.spinner.Slept()
	if err != nil && errors.Is(err, unix.ENOTCONN) {
		// A vsock socket that was shut down here and then closed by its
		// peer says this where others say end of file.
		return n, io.EOF
	}
	return n, err
}

// Readable waits until there is something to read, or the end of the stream. It is not for a Conn that blocks.
func (c *Conn) Readable() error {
	var b [1]byte
	return c.raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN && err != unix.EINTR
	})
}

// Write writes all of b, or fails. Other Writes wait, so that messages do not
// mix. After an error the stream may end in the middle of a message.
func (c *Conn) Write(b []byte) (int, error) { return c.f.Write(b) }

// SyscallConn is for system calls on the descriptor.
func (c *Conn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// Close closes the descriptor and wakes Read and Write, with os.ErrClosed or, of a blocking Conn, io.EOF.
func (c *Conn) Close() error {
	if c.blocking {
		_ = c.Shutdown() // what waits in a system call is not woken by close(2)
	}
	return c.f.Close()
}

// SetDeadline sets the time after which Read and Write fail with
// os.ErrDeadlineExceeded; the zero time means never.
func (c *Conn) SetDeadline(t time.Time) error { return c.f.SetDeadline(t) }

// SetReadDeadline is SetDeadline for Read.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.f.SetReadDeadline(t) }

// SetWriteDeadline is SetDeadline for Write.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.f.SetWriteDeadline(t) }

// CloseWrite tells the peer that nothing more will come: its Read ends with
// io.EOF once it has read what was written.
func (c *Conn) CloseWrite() error { return c.shutdown(unix.SHUT_WR) }

// Shutdown ends both directions, for every process that holds the socket, and
// wakes all their readers and writers. The descriptor stays until Close.
func (c *Conn) Shutdown() error { return c.shutdown(unix.SHUT_RDWR) }

func (c *Conn) shutdown(how int) error {
	return control(c.raw, func(fd int) error { return os.NewSyscallError("shutdown", unix.Shutdown(fd, how)) })
}

// Peer is the other end.
func (c *Conn) Peer() Peer { return c.peer }

// File returns a duplicate of the descriptor, for passing it on; the caller
// owns it. O_NONBLOCK is common to both and must stay set.
func (c *Conn) File() (*os.File, error) { return dupRaw(c.raw, c.peer.String()) }

// Pair returns two connected Conns of this process, buffers raised, neither
// of which has a name in the file system.
func Pair() (a, b *Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	var c [2]*Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		SetBuffers(f)
		peer, perr := peerOf(f, nil, Addr{})
		if perr != nil {
			err = perr
		}
		c[i] = NewConn(f, peer)
	}
	if err != nil {
		c[0].Close()
		c[1].Close()
		return nil, nil, err
	}
	return c[0], c[1], nil
}

// dup duplicates the descriptor of c into a file of its own in the poller.
func dup(c syscall.Conn, name string) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	return dupRaw(raw, name)
}

func dupRaw(raw syscall.RawConn, name string) (*os.File, error) {
	var n int
	if err := control(raw, func(fd int) (err error) {
		n, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewSyscallError("fcntl", err)
	}); err != nil {
		return nil, err
	}
	// It can't fail on a socket; if it did, the file would block and work.
	_ = unix.SetNonblock(n, true)
	return os.NewFile(uintptr(n), name), nil
}

// control calls f with the descriptor of raw, which stays open meanwhile.
func control(raw syscall.RawConn, f func(fd int) error) error {
	var err error
	if raw.Control(func(fd uintptr) { err = f(int(fd)) }) != nil {
		return os.ErrClosed // the one error that Control has
	}
	return err
}
