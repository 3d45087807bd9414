// SPDX-License-Identifier: Apache-2.0

package varlink

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/transport"
)

// errTooLong says that a message is over its bound.
var errTooLong = errors.New("the message is too long")

// stream is a connection as a sequence of messages. One goroutine may read while another writes.
type stream struct {
	conn *transport.Conn
	raw  syscall.RawConn
	max  int  // bytes of a message that is received
	take bool // descriptors that come; else the kernel drops them

	buf     []byte // what was received and not yet returned
	scanned int    // bytes at the start of buf that have no NUL
	files   []arrived
	oob     []byte
}

// arrived is a descriptor that came with buf[at] and perhaps bytes before it.
type arrived struct {
	at   int
	file *os.File
}

func newStream(c *transport.Conn, limit int, takeFiles bool) (*stream, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &stream{conn: c, raw: raw, max: limit, take: takeFiles}
	if takeFiles {
		s.oob = make([]byte, unix.CmsgSpace(4*MaxFiles))
	}
	return s, nil
}

// next waits for a message and returns it without its NUL, and what came beside it, which is the caller's to close. The error is io.EOF
// at the end between two messages. After an error the stream is of no more use.
func (s *stream) next() ([]byte, []*os.File, error) {
	for {
		if i := bytes.IndexByte(s.buf[s.scanned:], 0); i >= 0 {
			msg, files := s.cut(s.scanned + i)
			return msg, files, nil
		}
		s.scanned = len(s.buf)
		if len(s.buf) > s.max {
			return nil, nil, errTooLong
		}
		if err := s.receive(); err != nil {
			if err == io.EOF && len(s.buf) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, nil, err
		}
	}
}

// cut takes the message that ends before the NUL at end out of buf. A descriptor belongs to the message whose bytes are the last that
// recvmsg(2) gave with it: the kernel ends a read with the bytes that carry descriptors, but may put bytes without before them.
func (s *stream) cut(end int) (msg []byte, files []*os.File) {
	msg = bytes.Clone(s.buf[:end])
	s.buf = append(s.buf[:0], s.buf[end+1:]...)
	s.scanned = 0
	s.files = slices.DeleteFunc(s.files, func(a arrived) bool {
		if a.at <= end {
			files = append(files, a.file)
		}
		return a.at <= end
	})
	for i := range s.files {
		s.files[i].at -= end + 1
	}
	return msg, files
}

// receive appends to buf what is there, or waits for it.
func (s *stream) receive() error {
	room := min(max(4096, 2*len(s.buf)), s.max+1) - len(s.buf)
	s.buf = slices.Grow(s.buf, room)
	b := s.buf[len(s.buf) : len(s.buf)+room]
	var n, oobn, flags int
	var rerr error
	err := s.raw.Read(func(fd uintptr) bool {
		n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), b, s.oob, unix.MSG_CMSG_CLOEXEC)
		for rerr == unix.EINTR {
			n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), b, s.oob, unix.MSG_CMSG_CLOEXEC)
		}
		return rerr != unix.EAGAIN
	})
	switch {
	case err != nil:
		return waited(err)
	case rerr == unix.ECONNRESET:
		return io.EOF // the peer went with messages of ours unread
	case rerr != nil:
		return os.NewSyscallError("recvmsg", rerr)
	case n == 0:
		return io.EOF
	}
	s.buf = s.buf[:len(s.buf)+n]
	files, err := received(s.oob[:oobn])
	for _, f := range files {
		s.files = append(s.files, arrived{at: len(s.buf) - 1, file: f})
	}
	switch {
	case err != nil:
		return err
	case flags&unix.MSG_CTRUNC != 0 && s.take, len(s.files) > MaxFiles:
		return fmt.Errorf("there are more descriptors than can be taken: %d a message at most", MaxFiles)
	}
	return nil
}

// received takes the descriptors out of a control message.
func received(oob []byte) (files []*os.File, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // not SCM_RIGHTS: it holds no descriptor
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "descriptor from a peer"))
		}
	}
	return files, nil
}

// send writes v as a message of at most limit bytes, with duplicates of files beside it. The caller keeps its files.
func (s *stream) send(v any, limit int, files []*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %T: %w", v, err)
	}
	if len(b) > limit || len(files) > MaxFiles {
		return fmt.Errorf("%w: %d bytes and %d descriptors, the limit is %d and %d", errTooLong, len(b), len(files), limit, MaxFiles)
	}
	b = append(b, 0)
	fds := make([]int, len(files))
	for i, f := range files {
		// Not Fd: it would make the file blocking.
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return fmt.Errorf("pass %s: %w", f.Name(), err)
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		var n int
		var werr error
		err := s.raw.Write(func(fd uintptr) bool {
			n, werr = unix.SendmsgN(int(fd), b, oob, nil, unix.MSG_NOSIGNAL)
			for werr == unix.EINTR {
				n, werr = unix.SendmsgN(int(fd), b, oob, nil, unix.MSG_NOSIGNAL)
			}
			return werr != unix.EAGAIN
		})
		if err != nil {
			return waited(err)
		}
		if werr != nil {
			return os.NewSyscallError("sendmsg", werr)
		}
		b, oob = b[n:], nil
	}
	runtime.KeepAlive(files)
	return nil
}

// waited gives what a RawConn says a name: a deadline has passed, or else the connection is closed.
func waited(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return os.ErrClosed
}

// close closes the connection, which wakes next and send in other goroutines.
func (s *stream) close() error { return s.conn.Close() }

// drop closes the descriptors of messages that nobody will take. Nobody may be in next.
func (s *stream) drop() {
	for _, a := range s.files {
		a.file.Close()
	}
	s.files = nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
