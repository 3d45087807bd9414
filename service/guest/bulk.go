// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// bulk is a lane's way for large data, over a stream that hands on pages: the data of a WRITE, and of a READ's reply, go
// through a pipe and are not copied here. What a message will be is not known before it is read, so that it is tried where the one
// before was large.
type bulk struct {
	out *splice.Pipe // from the device to the stream; nil: not yet
	in  *splice.Pipe // from the stream to the device; nil: not yet

	reads  bool // the last reply was large
	toCome int  // bytes of a reply, whose beginning is in the pipe in, that have not come yet
}

// may tells whether a message goes by a pipe, and makes that. The kernel loses a request whose pages are more than its reader's pipe
// holds. The largest reply tells how many they may be: an earlier pump may have agreed to more than this one would.
func (p *Pump) may(pipe **splice.Pipe) bool {
	if !p.saves || p.maxWrite.Load() == 0 || p.maxReply-fuse.OutHeaderSize-headRoom > splice.Size-2*pageSize {
		return false
	}
	if *pipe == nil {
		made, err := splice.New()
		if err != nil {
			p.saves = false // the user has too many already; it works without
			return false
		}
		*pipe = made
	}
	return true
}

// hasPipes tells whether there are any.
func (p *Pump) hasPipes() bool {
	for i := range p.lanes {
		if b := &p.lanes[i].bulk; b.out != nil || b.in != nil {
			return true
		}
	}
	return false
}

// closePipes closes the pipes, but for those with a part of a message, if that is still to be had.
func (p *Pump) closePipes(all bool) {
	for i := range p.lanes {
		l := &p.lanes[i]
		if b := &l.bulk; b.out != nil && (all || l.piped == 0) {
			b.out.Close()
			b.out = nil
		}
		if b := &l.bulk; b.in != nil && (all || b.toCome == 0) {
			b.in.Close()
			b.in = nil
		}
		if i == 0 {
			continue
		}
		// Nor does it need the memory.
		if !l.sends() {
			l.spare = nil
		}
		if l.end == 0 {
			l.in = nil
		}
	}
}

// read reads a request into buf, but for the data of a large WRITE that follows another one: so many bytes of it are in the pipe of the lane to, which is
// for it. Without one all of it is read.
func (p *Pump) read(to *lane, buf []byte) (n, piped int, err error) {
	if !p.writes || to == nil || !p.may(&to.bulk.out) {
		n, err = readNow(p.dev.fd, buf)
		p.writes = err == nil && n >= fuse.WriteHead+splice.MinData && isWrite(buf)
		return n, 0, err
	}
	out := to.bulk.out
	size, err := out.Take(p.dev.fd, nil, len(buf))
	if err != nil {
		return 0, 0, err
	}
	n = min(size, fuse.WriteHead)
	if err := out.Read(buf[:n]); err != nil {
		return 0, 0, err
	}
	if p.writes = size >= fuse.WriteHead+splice.MinData && isWrite(buf); p.writes {
		return n, size - n, nil
	}
	return size, 0, out.Read(buf[n:size])
}

func isWrite(msg []byte) bool {
	return fuse.Opcode(binary.LittleEndian.Uint32(msg[4:])) == fuse.OpWrite
}

// goesPiped tells whether the reply whose header is the first that was not written yet goes through the pipe: it is large, and so was
// the one before, so that nothing of it was read but the header.
func (p *Pump) goesPiped(l *lane, size int) bool {
	b := &l.bulk
	var h fuse.OutHeader
	fuse.Decode(&h, l.in[l.start:l.end])
	tried := b.reads && l.end-l.start == fuse.OutHeaderSize
	b.reads = size >= fuse.OutHeaderSize+splice.MinData && h.Error == 0 && h.Unique != 0 && p.may(&b.in)
	if tried && b.reads {
		b.toCome = size - fuse.OutHeaderSize
	}
	return b.toCome > 0
}

// receivePiped goes on with a large reply, whose header is in l.in and, with what has come of it, in the pipe. When it is all there it is
// written to the device. copied: it had to leave the pipe, and goes on in l.in.
func (p *Pump) receivePiped(l *lane) (copied bool, err error) {
	b := &l.bulk
	size := int(binary.LittleEndian.Uint32(l.in))
	for b.toCome > 0 {
		n, err := b.in.Take(l.sock, nil, b.toCome)
		switch {
		case err == unix.EAGAIN && b.in.Full():
			// It comes in small pieces, and each takes the room of a page.
			l.end = size - b.toCome
			b.toCome, b.reads = 0, false
			return true, b.in.Read(l.in[:l.end])
		case err == unix.EAGAIN:
			return false, nil
		case err == nil && n == 0:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil:
			return false, fmt.Errorf("%w: read: %w", ErrStream, err)
		}
		b.toCome -= n
	}
	head := l.in[:l.end]
	l.end = 0
	l.atHost--
	p.shortcuts.replied(head)
	return false, p.deliver(head, func() error {
		_, err := b.in.Give(p.dev.fd, nil, size)
		return err
	})
}
