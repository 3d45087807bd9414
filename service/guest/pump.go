// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

const (
	// MaxData is the most data that one READ or WRITE carries, in bytes: what version 1 fixed, and
	// what the kernel allows by default (fs.fuse.max_pages_limit, 256 pages).
	MaxData = 1 << 20
	// minRequest is the smallest buffer that a request is read into: the kernel wants 8192
	// (FUSE_MIN_READ_BUFFER), and answers E2BIG to a SETXATTR of 64 KiB that does not fit.
	minRequest = 128 << 10
	// minReply is the longest reply that is taken whatever INIT says: 64 KiB of an extended
	// attribute, and the 32 pages of a kernel that knows no max_pages, with room for the header.
	minReply = 128<<10 + 4096
	// headRoom is what stands before the data of a WRITE: fuse_in_header and fuse_write_in.
	headRoom = 4096
	// maxForgets is how many bytes of FORGETs are held back for the next request to take along, and forgetDelay for
	// how many milliseconds at most. Nobody waits for them, and each by itself would wake the server.
	maxForgets  = 4 << 10
	forgetDelay = 10
)

// Stream is what a Pump speaks to the host over, such as *transport.Conn. A Write is whole even beside another, and
// Close wakes a Read and a Write.
type Stream = io.ReadWriteCloser

// Stats are a Pump's counts since it started.
type Stats struct {
	Requests, Replies     uint64 // messages from and to the device
	RequestBytes, RxBytes uint64 // bytes of them
	Dropped               uint64 // replies that nobody waited for (ENOENT)
	Answered              uint64 // requests that were answered here
	Minor, MaxWrite       uint32 // what INIT agreed; 0 before
}

// Pump carries FUSE messages between one mount's device and one stream. It reads the headers and INIT, and answers what
// PumpOptions let it; meaning is the server's business otherwise.
type Pump struct {
	dev  *device
	conn Stream
	log  *slog.Logger

	requestSize atomic.Int64 // what a request may need, in bytes; grows once, at INIT's reply
	maxReply    int          // owned by replies
	initUnique  atomic.Uint64
	minor       atomic.Uint32
	maxWrite    atomic.Uint32

	requests, requestBytes, replied, replyBytes, dropped, answered atomic.Uint64

	ahead     bool // the host may tell attributes ahead
	shortcuts shortcuts

	perf atomic.Pointer[recorder]

	once  sync.Once
	cause error // written once, before done is closed
	done  chan struct{}
}

// pageSize is in bytes; requests of the kernel are counted in pages of its own.
var pageSize = os.Getpagesize()

var (
	// ErrProtocol is the cause of Run's error when the host broke the FUSE protocol.
	ErrProtocol = errors.New("the host broke the FUSE protocol")
	// ErrStream is the cause of Run's error when the stream ended under the mount.
	ErrStream = errors.New("the stream to the host ended")
)

// PumpOptions are what the host allows a pump, and where it logs.
type PumpOptions struct {
	Ahead   bool // the host tells a directory's attributes after each change in it, and the pump answers GETATTR by them
	NoFlush bool // the pump answers the FLUSH of a file that nobody has locked
	Log     *slog.Logger
}

// NewPump makes a Pump of a mounted /dev/fuse that is non-blocking (Mount returns such a one) and of a stream on
// which the next bytes are FUSE messages. It owns both from then on, also when it fails; Run closes them.
func NewPump(dev *os.File, conn Stream, o PumpOptions) (*Pump, error) {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	d, err := newDevice(dev)
	if err != nil {
		conn.Close()
		return nil, err
	}
	p := &Pump{dev: d, conn: conn, log: log, maxReply: minReply, ahead: o.Ahead, done: make(chan struct{})}
	p.shortcuts.noFlush, p.shortcuts.locked = o.NoFlush, map[uint64]struct{}{}
	p.requestSize.Store(minRequest + headRoom + maxForgets)
	return p, nil
}

// Run pumps until the file system is unmounted (nil), the stream ends (ErrStream), the host sends what is no FUSE
// message (ErrProtocol), or Close is called (os.ErrClosed). It returns when everything it started has ended and
// both descriptors are closed. It is called once.
func (p *Pump) Run() error {
	var wg sync.WaitGroup
	wg.Go(func() { p.end(p.readRequests()) })
	wg.Go(func() { p.end(p.readReplies()) })
	wg.Wait()
	p.dev.close()
	return p.cause
}

// Close ends Run with os.ErrClosed, unless it has ended already. Requests that wait for an answer fail
// with ECONNABORTED once no other process holds the device.
func (p *Pump) Close() { p.end(os.ErrClosed) }

// Device returns a duplicate of the mount's device, for passing it on. The error is os.ErrClosed after Run.
func (p *Pump) Device() (*os.File, error) { return p.dev.dup() }

// Done is closed when the pump begins to end.
func (p *Pump) Done() <-chan struct{} { return p.done }

// Stats returns the counts so far.
func (p *Pump) Stats() Stats {
	return Stats{
		Requests: p.requests.Load(), RequestBytes: p.requestBytes.Load(),
		Replies: p.replied.Load(), RxBytes: p.replyBytes.Load(), Dropped: p.dropped.Load(), Answered: p.answered.Load(),
		Minor: p.minor.Load(), MaxWrite: p.maxWrite.Load(),
	}
}

// end records the first cause, and wakes the others by closing what they wait on.
func (p *Pump) end(cause error) {
	p.once.Do(func() {
		p.cause = cause
		close(p.done)
		// A failed close tells nothing here: it is gone afterwards.
		p.conn.Close()
		p.dev.end()
	})
}

// prefaulted returns a buffer whose pages exist: the kernel copies into it without faults.
func prefaulted(size int) []byte {
	b := make([]byte, size)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	return b
}

// readRequests reads requests from the device and writes them to the stream.
func (p *Pump) readRequests() error {
	buf := prefaulted(int(p.requestSize.Load()))
	held := 0 // bytes of FORGETs that wait at the beginning of buf
	var h fuse.InHeader
	for {
		// After a FORGET there is often something to read already.
		if h.Opcode != fuse.OpForget {
			timeout := -1
			if held > 0 {
				timeout = forgetDelay
			}
			switch ready, err := p.dev.wait(timeout); {
			case err == os.ErrClosed:
				return err
			case err != nil:
				return fmt.Errorf("poll /dev/fuse: %w", err)
			case !ready:
				if _, err := p.conn.Write(buf[:held]); err != nil {
					return fmt.Errorf("%w: %w", ErrStream, err)
				}
				held = 0
				continue
			}
		}
		h.Opcode = 0
		n, err := unix.Read(p.dev.fd, buf[held:])
		switch err {
		case nil:
		case unix.EINTR, unix.EAGAIN, unix.ENOENT:
			// ENOENT: the request was interrupted while the kernel handed it over.
			continue
		case unix.ENODEV, unix.ECONNABORTED:
			// Unmounted, or aborted: umount -f, or the control file system.
			return nil
		case unix.EINVAL:
			// INIT's reply allows longer requests than this buffer was made for.
			if need := int(p.requestSize.Load()); need > len(buf) {
				buf = append(prefaulted(need)[:0], buf[:held]...)[:need]
				continue
			}
			return fmt.Errorf("read /dev/fuse: %w", err)
		default:
			return fmt.Errorf("read /dev/fuse: %w", err)
		}
		msg := buf[held : held+n]
		if n < fuse.InHeaderSize || int(binary.LittleEndian.Uint32(msg)) != n {
			return fmt.Errorf("read /dev/fuse: a request of %d bytes whose header says %d", n, binary.LittleEndian.Uint32(msg))
		}
		p.requests.Add(1)
		p.requestBytes.Add(uint64(n))
		if rec := p.perf.Load(); rec != nil {
			rec.start(binary.LittleEndian.Uint64(msg[8:]))
		}
		body, _ := fuse.Decode(&h, msg) // it is long enough
		if answer := p.shortcuts.request(&h, body); answer != nil {
			p.answered.Add(1)
			if err := p.write(answer, h.Unique); err != nil {
				return err
			}
			continue
		}
		switch h.Opcode {
		case fuse.OpInit:
			p.initRequest(msg)
		case fuse.OpForget, fuse.OpBatchForget:
			if held+n <= maxForgets {
				held += n
				continue
			}
		}
		if _, err := p.conn.Write(buf[:held+n]); err != nil {
			return fmt.Errorf("%w: %w", ErrStream, err)
		}
		held = 0
	}
}

// readReplies reads the stream and writes each message to the device.
func (p *Pump) readReplies() error {
	buf := prefaulted(p.maxReply)
	start, end := 0, 0 // what was read and is not yet written
	for {
		n, err := p.conn.Read(buf[end:])
		if err != nil {
			if end > start && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("%w: %w", ErrStream, err)
		}
		end += n
		for end-start >= fuse.OutHeaderSize {
			size := int(binary.LittleEndian.Uint32(buf[start:]))
			if size < fuse.OutHeaderSize || size > p.maxReply {
				return fmt.Errorf("%w: a message of %d bytes; 16 to %d are allowed", ErrProtocol, size, p.maxReply)
			}
			if end-start < size {
				break
			}
			if err := p.reply(buf[start : start+size]); err != nil {
				return err
			}
			start += size
		}
		switch {
		case start == end:
			start, end = 0, 0
			if len(buf) < p.maxReply {
				buf = prefaulted(p.maxReply)
			}
		case start > 0:
			// Only the beginning of one message is left: the rest is read behind it.
			end = copy(buf, buf[start:end])
			start = 0
			if len(buf) < p.maxReply {
				buf = append(prefaulted(p.maxReply)[:0], buf[:end]...)[:p.maxReply]
			}
		}
	}
}

// reply writes one message to the device. It returns an error only where the pump must end.
func (p *Pump) reply(msg []byte) error {
	unique := binary.LittleEndian.Uint64(msg[8:])
	if unique == 0 {
		var a fuse.AheadOut
		if rest, ok := fuse.Decode(&a, msg[fuse.OutHeaderSize:]); p.ahead && ok && len(rest) == 0 && binary.LittleEndian.Uint32(msg[4:]) == fuse.AheadCode {
			p.shortcuts.told(&a)
			return nil
		}
		// A notification waits for locks that are held by who waits for a reply: it has its own channel.
		return fmt.Errorf("%w: notification %d in the stream of replies", ErrProtocol, int32(binary.LittleEndian.Uint32(msg[4:])))
	}
	if unique == p.initUnique.Load() && p.maxWrite.Load() == 0 {
		if err := p.initReply(msg); err != nil {
			return err
		}
	}
	p.shortcuts.replied(unique)
	return p.write(msg, unique)
}

// write writes one reply to the device. It returns an error only where the pump must end.
func (p *Pump) write(msg []byte, unique uint64) error {
	p.replied.Add(1)
	p.replyBytes.Add(uint64(len(msg)))
	if rec := p.perf.Load(); rec != nil {
		rec.stop(unique)
	}
	for {
		_, err := unix.Write(p.dev.fd, msg)
		if err == nil {
			return nil
		}
		switch errno := errnoOf(err); errno {
		case syscall.EINTR, syscall.EAGAIN:
			continue
		case syscall.ENOENT:
			// The request was interrupted, and its caller is gone.
			p.dropped.Add(1)
			return nil
		case syscall.ENODEV, syscall.ECONNABORTED:
			return nil // unmounted: the reader of requests sees it and says so
		case syscall.EINVAL:
			return fmt.Errorf("%w: the kernel refused a reply: length %d, error %d, unique %#x", ErrProtocol,
				len(msg), int32(binary.LittleEndian.Uint32(msg[4:])), unique)
		default:
			return fmt.Errorf("write /dev/fuse: %w", err)
		}
	}
}

func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	errors.As(err, &errno)
	return errno
}
