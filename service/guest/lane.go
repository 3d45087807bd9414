// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// maxStreams is how many streams a mount may have, and defaultStreams how many one has that does not say.
const (
	maxStreams     = 4
	defaultStreams = 2
)

// lane is one stream of a mount, and what is under way on it. It is for the pump's goroutine.
//
// A mount with several has its large data on others than the first, so that what is small does not stand behind them in a socket. While
// the socket of such a one is full what is left to send waits in the lane, and the pump goes on.
type lane struct {
	sock int // outside the runtime's poller, as the device is

	in         []byte // from the stream; from start to end it was read and is not yet written
	start, end int
	bulk       bulk

	unsent []byte // of a request, what the socket has not taken yet
	piped  int    // bytes behind that, in the pipe bulk.out
	spare  []byte // has unsent, or is for the pump to read into while that is in what it has read into; nil: there was no need of it
	atHost int    // requests for large data whose reply has not come; of the first stream it means nothing
}

// sends tells whether something is left to send.
func (l *lane) sends() bool { return len(l.unsent)+l.piped > 0 }

// push sends of what is left as much as the socket takes.
func (l *lane) push() error {
	for l.sends() {
		var n int
		var err error
		if len(l.unsent) > 0 {
			n, err = writeNow(l.sock, l.unsent)
			l.unsent = l.unsent[n:]
		} else {
			n, err = l.bulk.out.Give(l.sock, nil, l.piped)
			l.piped -= max(n, 0)
		}
		switch err {
		case nil, unix.EINTR:
		case unix.EAGAIN:
			return nil
		default:
			return fmt.Errorf("%w: write: %w", ErrStream, err)
		}
	}
	return nil
}

// forLarge returns the stream for the next large data: of those for it that have nothing left to send, the one that has the least to answer. Nil: there
// is none now.
func (p *Pump) forLarge() *lane {
	if len(p.lanes) == 1 {
		return &p.lanes[0]
	}
	var to *lane
	for i := 1; i < len(p.lanes); i++ {
		if l := &p.lanes[i]; !l.sends() && (to == nil || l.atHost < to.atHost) {
			to = l
		}
	}
	return to
}

// send sends b, which is in buf, over l, and behind it so many bytes of its pipe. Over the first stream it goes before anything else
// is read from the device; of what goes over another, the socket takes what it can for now.
func (p *Pump) send(l *lane, b []byte, piped int) error {
	l.unsent, l.piped = b, piped
	err := l.push()
	if l != &p.lanes[0] {
		if len(l.unsent) > 0 {
			p.buf, l.spare = l.spare, p.buf
		}
		return err
	}
	for err == nil && l.sends() {
		err = p.waitForStreams()
	}
	return err
}

// waitForStreams waits until a stream can go on, and has it. While requests wait for that, replies are received: a host that waits for us to
// read could otherwise wait for ever.
func (p *Pump) waitForStreams() error {
	drains := p.drains
	_, err := p.wait(false, -1)
	switch {
	case err == nil:
		return p.streams()
	case err == errDrained && !drains:
		return nil // the request that was read goes out first
	}
	return err
}

// receive reads what has come from the host on l and writes each whole message to the device, at most what one read gives: a host that sends for ever must not
// keep the pump here.
func (p *Pump) receive(l *lane) error {
	for {
		if len(l.in) < p.maxReply {
			l.in = append(prefaulted(p.maxReply)[:0], l.in[:l.end]...)[:p.maxReply]
		}
		if l.bulk.toCome > 0 {
			if copied, err := p.receivePiped(l); err != nil || !copied {
				return err
			}
		}
		room := l.in[l.end:]
		if l.bulk.reads && l.end < fuse.OutHeaderSize {
			room = room[:fuse.OutHeaderSize-l.end]
		}
		n, err := readNow(l.sock, room)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return nil
		case err == nil && n == 0:
			err = io.EOF
			if l.end > l.start {
				err = io.ErrUnexpectedEOF
			}
			fallthrough
		case err != nil:
			return fmt.Errorf("%w: read: %w", ErrStream, err)
		}
		l.end += n
		for l.end-l.start >= fuse.OutHeaderSize {
			size := int(binary.LittleEndian.Uint32(l.in[l.start:]))
			if size < fuse.OutHeaderSize || size > p.maxReply {
				return fmt.Errorf("%w: a message of %d bytes; 16 to %d are allowed", ErrProtocol, size, p.maxReply)
			}
			if p.goesPiped(l, size) {
				break
			}
			if l.end-l.start < size {
				break
			}
			if err := p.reply(l.in[l.start : l.start+size]); err != nil {
				return err
			}
			l.atHost--
			l.start += size
		}
		// Only the beginning of one message may be left: the rest is read behind it.
		some := l.start > 0
		if some {
			l.end = copy(l.in, l.in[l.start:l.end])
			l.start = 0
		}
		if l.bulk.toCome > 0 {
			if err := l.bulk.in.Write(l.in[:l.end]); err != nil {
				return err
			}
			continue
		}
		if l.end == 0 || some {
			return nil
		}
	}
}
