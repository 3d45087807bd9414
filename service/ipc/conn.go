// SPDX-License-Identifier: Apache-2.0

package ipc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// MaxMessage is the largest encoded message, in bytes.
	MaxMessage = 64 << 10
	// MaxFiles is the largest number of descriptors beside one message. The
	// kernel's own limit is SCM_MAX_FD, 253 (net/scm.h).
	MaxFiles = 16
)

// Conn is one end of the pair. Send and Recv may be called from any
// goroutine; Recvs take turns.
type Conn struct {
	f  *os.File
	rc syscall.RawConn

	recvMu sync.Mutex // serializes Recv and guards buf and oob
	buf    []byte
	oob    []byte
}

// New makes a Conn of a connected SOCK_SEQPACKET socket. It owns f from then
// on, also when it fails.
func New(f *os.File) (*Conn, error) {
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		f.Close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	// Only a descriptor that is non-blocking when NewFile sees it joins the
	// runtime's poller, so that Close wakes a Recv.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	nf := os.NewFile(uintptr(fd), "ipc")
	rc, err := nf.SyscallConn()
	if err != nil {
		nf.Close()
		return nil, err
	}
	return &Conn{
		f: nf, rc: rc,
		buf: make([]byte, MaxMessage),
		oob: make([]byte, unix.CmsgSpace(4*MaxFiles)),
	}, nil
}

// Send sends v and duplicates of files. The caller keeps its files and closes
// them. A message over MaxMessage or MaxFiles is refused before anything is
// sent; where the peer is gone, the error is EPIPE.
func (c *Conn) Send(v any, files ...*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("ipc: encode %T: %w", v, err)
	}
	if len(b) > MaxMessage || len(files) > MaxFiles {
		return fmt.Errorf("ipc: %T is %d bytes and %d descriptors, over the limit of %d and %d",
			v, len(b), len(files), MaxMessage, MaxFiles)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// Not Fd(): it would put a descriptor of the runtime's poller
			// back into blocking mode.
			rc, err := f.SyscallConn()
			if err != nil {
				return fmt.Errorf("ipc: send %s: %w", f.Name(), err)
			}
			if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return fmt.Errorf("ipc: send %s: %w", f.Name(), err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	var serr error
	err = c.rc.Write(func(fd uintptr) bool {
		serr = ignoringEINTR(func() error {
			return unix.Sendmsg(int(fd), b, oob, nil, unix.MSG_NOSIGNAL)
		})
		return serr != unix.EAGAIN
	})
	runtime.KeepAlive(files)
	if err != nil {
		return os.ErrClosed // the only error of RawConn here: no deadline is ever set
	}
	return os.NewSyscallError("sendmsg", serr)
}

// ErrNoRoom says that a message was received without its files: this process
// has no descriptor left for them.
var ErrNoRoom = fmt.Errorf("ipc: the files of a message: %w", unix.EMFILE)

// Recv waits for the next message and decodes it into v. The files that came
// with it are the caller's, close-on-exec. It returns io.EOF when the peer
// has ended, ErrNoRoom when v alone could be received, and an error with no
// files when a message is cut or is no JSON for v: then the connection is of
// no further use.
func (c *Conn) Recv(v any) ([]*os.File, error) {
	c.recvMu.Lock()
	defer c.recvMu.Unlock()
	var n, oobn, flags int
	var rerr error
	err := c.rc.Read(func(fd uintptr) bool {
		rerr = ignoringEINTR(func() (err error) {
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), c.buf, c.oob, unix.MSG_CMSG_CLOEXEC)
			return err
		})
		return rerr != unix.EAGAIN
	})
	if err != nil {
		return nil, os.ErrClosed // as in Send
	}
	if rerr == unix.ECONNRESET {
		return nil, io.EOF // the peer went with messages of ours unread
	}
	if rerr != nil {
		return nil, os.NewSyscallError("recvmsg", rerr)
	}
	files, err := received(c.oob[:oobn])
	if err == nil && flags&unix.MSG_TRUNC != 0 {
		err = errors.New("ipc: message cut: it is over the limit")
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err == nil {
		err = json.Unmarshal(c.buf[:n], v)
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = ErrNoRoom
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	return files, nil
}

// Close ends the connection; the peer's Recv returns io.EOF, and a Recv that
// waits here returns os.ErrClosed.
func (c *Conn) Close() error { return c.f.Close() }

// received takes the descriptors out of a control message.
func received(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ipc: control message: %w", err)
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // not SCM_RIGHTS: nothing of ours, and it holds no descriptor
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "ipc descriptor"))
		}
	}
	return files, nil
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
