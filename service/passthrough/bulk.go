// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"io"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// bulk is a stream's way for large data, where the stream hands on pages: the data of a WRITE, and of a READ's reply, go
// through a pipe and are not copied here. What a message will be is not known before it is read, so that a WRITE is tried
// where the one before was large.
type bulk struct {
	sock  int               // a duplicate of the stream's descriptor; -1: the data are copied
	pipes chan *splice.Pipe // that are free
	made  atomic.Int64      // pipes

	writes bool // for who has the turn: the last request was a large WRITE
}

// maxPipes is how many pipes a stream has, for so many requests at once, and sessionPipes how many all streams of a session: a user's pipes may have
// 64 MiB (/proc/sys/fs/pipe-user-pages-soft). They are closed when the stream is quiet.
const (
	maxPipes     = 2
	sessionPipes = 8
)

func (s *stream) beginBulk() {
	b := &s.bulk
	b.sock, b.pipes = -1, make(chan *splice.Pipe, maxPipes)
	c, ok := s.c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if !splice.Saves(int(fd)) || s.fs.takeFD() != 0 {
			return
		}
		d, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			s.fs.giveFD()
			return
		}
		b.sock = d
	})
}

// endBulk is called when no request is under way any more.
func (s *stream) endBulk() {
	if s.bulk.sock < 0 {
		return
	}
	unix.Close(s.bulk.sock)
	s.fs.giveFD()
	s.closeFreePipes()
}

// closeFreePipes closes the pipes that no request uses.
func (s *stream) closeFreePipes() {
	for {
		select {
		case p := <-s.bulk.pipes:
			s.closePipe(p)
		default:
			return
		}
	}
}

func (s *stream) makePipe() *splice.Pipe {
	if !take(&s.bulk.made, maxPipes) {
		return nil
	}
	if !take(&s.fs.limits.pipes, sessionPipes) {
		s.bulk.made.Add(-1)
		return nil
	}
	if s.fs.takeFD() == 0 {
		if s.fs.takeFD() == 0 {
			if p, err := splice.New(); err == nil {
				return p
			}
			s.fs.giveFD()
		}
		s.fs.giveFD()
	}
	s.fs.limits.pipes.Add(-1)
	s.bulk.made.Add(-1)
	return nil
}

func (s *stream) closePipe(p *splice.Pipe) {
	p.Close()
	s.fs.giveFD()
	s.fs.giveFD()
	s.fs.limits.pipes.Add(-1)
	s.bulk.made.Add(-1)
}

// takePipe takes a pipe for the request, if it may have one, until it ends.
func (r *request) takePipe() bool {
	if r.s.bulk.sock < 0 {
		return false
	}
	select {
	case r.pipe = <-r.s.bulk.pipes:
	default:
		r.pipe = r.s.makePipe()
	}
	return r.pipe != nil
}

// givePipe gives the request's pipe back, if it has one. What is left in it is lost.
func (r *request) givePipe() {
	switch {
	case r.pipe == nil:
	case r.piped > 0:
		r.s.closePipe(r.pipe)
	default:
		r.s.bulk.pipes <- r.pipe
	}
	r.pipe, r.piped, r.sends = nil, 0, false
}

// goesPiped tells whether the data of the request whose header was read, n bytes behind it, go through a pipe: it is a large WRITE, and
// so was the one before, so that nothing of the data was read. The caller has the turn.
func (s *stream) goesPiped(r *request, n int) bool {
	tried := s.bulk.writes && s.w-s.r == fuse.WriteHead-fuse.InHeaderSize
	s.bulk.writes = s.bulk.sock >= 0 && r.hdr.Opcode == fuse.OpWrite && n >= splice.MinData && r.hdr.TotalExtlen == 0
	return tried && s.bulk.writes && r.takePipe()
}

// readPiped reads the rest of a WRITE, n bytes of which the data go into the request's pipe.
func (s *stream) readPiped(r *request, n int) error {
	head := copy(r.inSmall[:], s.buf[s.r:s.w])
	s.r = s.w
	r.body = r.inSmall[:head]
	for data := n - head; r.piped < data; {
		m, err := r.pipe.Take(s.bulk.sock, nil, data-r.piped)
		switch {
		case err == unix.EAGAIN && r.pipe.Full():
			// It comes in small pieces, and each takes the room of a page.
			s.bulk.writes = false
			have := head + r.piped
			e := r.unpipe(n)
			if e == 0 {
				_, err = io.ReadFull(s.c, r.body[have:])
				return err
			}
			return e
		case err == unix.EAGAIN:
			err = waitFor(s.bulk.sock, unix.POLLIN)
		case err == nil && m == 0:
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		r.piped += m
	}
	return nil
}

// unpipe copies what is in the request's pipe out of it, behind the rest of the body, which has room for n bytes then.
func (r *request) unpipe(n int) fuse.Errno {
	r.inBuf = r.fs.limits.getBuffer(n, r.outBuf != nil)
	have := copy(r.inBuf.b, r.body)
	r.body = r.inBuf.b[:n]
	if err := r.pipe.Read(r.body[have : have+r.piped]); err != nil {
		return unix.EIO
	}
	r.piped = 0
	r.givePipe()
	return 0
}

// writePiped writes the data in the request's pipe to a file, all of it or as much as can be, of which the rest stays in the pipe. EINVAL: the
// file takes none that way.
func (r *request) writePiped(fd int, off int64) (n int, e fuse.Errno) {
	for r.piped > 0 {
		m, err := r.pipe.Give(fd, &off, r.piped)
		if m == 0 && err == nil {
			err = unix.EIO
		}
		if err != nil {
			if n > 0 {
				return n, 0
			}
			return 0, errnoOf(err)
		}
		n += m
		r.piped -= m
	}
	return n, 0
}

// readIntoPipe reads up to n bytes of a file into a pipe, for the reply. False: they are to be read otherwise. A page that goes to a socket is
// looked at again there, and one that is not good any more breaks the stream: network file systems and FUSE take a page back whose writing failed.
func (r *request) readIntoPipe(fd int, off int64, n int) bool {
	if n < splice.MinData || n > splice.MaxData || r.s.bulk.sock < 0 || !local(fd) || !r.takePipe() {
		return false
	}
	r.sends = true
	for r.piped < n {
		m, err := r.pipe.Take(fd, &off, n-r.piped)
		if err != nil {
			// The file has no such way, or its error will be seen again.
			r.givePipe()
			return false
		}
		if m == 0 {
			break
		}
		r.piped += m
	}
	return true
}

// sendPiped sends the data in the request's pipe behind the reply's beginning. The caller has outMu.
func (r *request) sendPiped() error {
	for r.piped > 0 {
		n, err := r.pipe.Give(r.s.bulk.sock, nil, r.piped)
		switch {
		case err == unix.EAGAIN:
			err = waitFor(r.s.bulk.sock, unix.POLLOUT)
		case err == nil && n == 0:
			err = unix.ENODATA // a page that was taken from its file and is not good any more
		}
		if err != nil {
			return err
		}
		r.piped -= n
	}
	return nil
}

// waitFor waits until a socket is ready, or ends.
func waitFor(sock int, events int16) error {
	fds := [...]unix.PollFd{{Fd: int32(sock), Events: events}}
	_, err := unix.Poll(fds[:], -1)
	if err == unix.EINTR {
		return nil
	}
	return err
}
