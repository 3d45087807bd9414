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

// bulk is a pump's way for large data, over a stream that hands on pages: the data of a WRITE, and of a READ's reply, go
// through a pipe and are not copied here. What a message will be is not known before it is read, so that it is tried where the one
// before was large.
type bulk struct {
	saves bool         // the stream does
	out   *splice.Pipe // from the device to the stream; nil: not yet
	in    *splice.Pipe // from the stream to the device; nil: not yet

	writes bool // the last request was a large WRITE
	reads  bool // the last reply was large
	toCome int  // bytes of a reply, whose beginning is in the pipe in, that have not come yet
}

// may tells whether a message goes by a pipe, and makes that. The kernel loses a request whose pages are more than its reader's pipe
// holds. The largest reply tells how many they may be: an earlier pump may have agreed to more than this one would.
func (p *Pump) may(pipe **splice.Pipe) bool {
	b := &p.bulk
	if !b.saves || p.maxWrite.Load() == 0 || p.maxReply-fuse.OutHeaderSize-headRoom > splice.Size-2*pageSize {
		return false
	}
	if *pipe == nil {
		made, err := splice.New()
		if err != nil {
			b.saves = false // the user has too many already; it works without
			return false
		}
		*pipe = made
	}
	return true
}

// close closes the pipes, but for one that has the beginning of a reply, if that is still to be had.
func (b *bulk) close(all bool) {
	if b.out != nil {
		b.out.Close()
		b.out = nil
	}
	if b.in != nil && (all || b.toCome == 0) {
		b.in.Close()
		b.in = nil
	}
}

// read reads a request into buf, but for the data of a large WRITE that follows another one: so many bytes of it are in the pipe.
func (p *Pump) read(buf []byte) (n, piped int, err error) {
	b := &p.bulk
	if !b.writes || !p.may(&b.out) {
		n, err = readNow(p.dev.fd, buf)
		b.writes = err == nil && n >= fuse.WriteHead+splice.MinData && isWrite(buf)
		return n, 0, err
	}
	size, err := b.out.Take(p.dev.fd, nil, len(buf))
	if err != nil {
		return 0, 0, err
	}
	n = min(size, fuse.WriteHead)
	if err := b.out.Read(buf[:n]); err != nil {
		return 0, 0, err
	}
	if b.writes = size >= fuse.WriteHead+splice.MinData && isWrite(buf); b.writes {
		return n, size - n, nil
	}
	return size, 0, b.out.Read(buf[n:size])
}

func isWrite(msg []byte) bool {
	return fuse.Opcode(binary.LittleEndian.Uint32(msg[4:])) == fuse.OpWrite
}

// goesPiped tells whether the reply whose header is the first that was not written yet goes through the pipe: it is large, and so was
// the one before, so that nothing of it was read but the header.
func (p *Pump) goesPiped(size int) bool {
	b := &p.bulk
	var h fuse.OutHeader
	fuse.Decode(&h, p.in[p.start:p.end])
	tried := b.reads && p.end-p.start == fuse.OutHeaderSize
	b.reads = size >= fuse.OutHeaderSize+splice.MinData && h.Error == 0 && h.Unique != 0 && p.may(&b.in)
	if tried && b.reads {
		b.toCome = size - fuse.OutHeaderSize
	}
	return b.toCome > 0
}

// receivePiped goes on with a large reply, whose header is in p.in and, with what has come of it, in the pipe. When it is all there it is
// written to the device. copied: it had to leave the pipe, and goes on in p.in.
func (p *Pump) receivePiped() (copied bool, err error) {
	b := &p.bulk
	size := int(binary.LittleEndian.Uint32(p.in))
	for b.toCome > 0 {
		n, err := b.in.Take(p.sock, nil, b.toCome)
		switch {
		case err == unix.EAGAIN && b.in.Full():
			// It comes in small pieces, and each takes the room of a page.
			p.end = size - b.toCome
			b.toCome, b.reads = 0, false
			return true, b.in.Read(p.in[:p.end])
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
	head := p.in[:p.end]
	p.end = 0
	p.shortcuts.replied(head)
	return false, p.deliver(head, func() error {
		_, err := b.in.Give(p.dev.fd, nil, size)
		return err
	})
}
