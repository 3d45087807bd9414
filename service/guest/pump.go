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
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
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
	// maxHeld is how many bytes of requests that nobody waits for are held back for the next request to take along, maxReleases how many of
	// them may be RELEASEs, and holdDelay for how many milliseconds at most. Each by itself would wake the server.
	maxHeld     = 4 << 10
	maxReleases = 8 // the kernel counts them among those that may be under way in the background (max_background)
	holdDelay   = 10
	// pipeTime is after how many milliseconds in which nothing comes the pipes for large data are closed.
	pipeTime = 1000
)

// Stream is a connected stream socket that a Pump speaks to the host over, such as *transport.Conn.
type Stream interface {
	io.Closer
	syscall.Conn
}

// Stats are a Pump's counts since it started.
type Stats struct {
	Requests, Replies     uint64 // messages from and to the device
	RequestBytes, RxBytes uint64 // bytes of them
	Dropped               uint64 // replies that nobody waited for (ENOENT)
	Answered              uint64 // requests that were answered here
	Minor, MaxWrite       uint32 // what INIT agreed; 0 before
}

// Pump carries FUSE messages between one mount's device and one stream. It reads the headers and INIT, and answers what
// PumpOptions let it; meaning is the server's business otherwise. A mount that gets another stream gets another pump.
type Pump struct {
	dev     *device
	ownsDev bool
	sock    int // the stream, outside the runtime's poller as the device is
	log     *slog.Logger
	traffic *traffic
	loop    *watchdog.Loop
	waker   *waker
	resend  bool // begin by having the kernel send again what has no answer

	// Of Run's goroutine.
	yielder     transport.Yielder
	releases    int // that are held back
	drains      bool
	requestSize int // what a request may need, in bytes; grows once, at INIT's reply
	maxReply    int
	initUnique  uint64
	readahead   uint32 // that the kernel asked for
	canResend   bool
	in          []byte // from the stream; from start to end it was read and is not yet written
	start, end  int
	minor       atomic.Uint32
	maxWrite    atomic.Uint32
	agreed      func(agreed) // called when INIT's reply is known, before the kernel has it; nil: not

	bulk      bulk
	ahead     bool // the host may tell attributes ahead
	shortcuts shortcuts

	perf atomic.Pointer[recorder]

	draining atomic.Int64 // when to end at the latest, in ns since began; 0: not
	once     sync.Once
	cause    error // written once, before done is closed
	done     chan struct{}
}

// agreed is what a pump learned from INIT: what another one of the same mount must know.
type agreed struct {
	RequestSize, MaxReply int
	Minor, MaxWrite       uint32
	Resend                bool // the kernel can send requests again (FUSE_HAS_RESEND)
}

// check says what is wrong with values that another program wrote.
func (a agreed) check() error {
	if a.RequestSize < minRequest || a.RequestSize > MaxData+headRoom+maxHeld || a.MaxReply < minReply || a.MaxReply > MaxData+fuse.OutHeaderSize+headRoom {
		return fmt.Errorf("sizes of FUSE messages that can't be: %+v", a)
	}
	return nil
}

// pageSize is in bytes; requests of the kernel are counted in pages of its own.
var pageSize = os.Getpagesize()

var (
	// ErrProtocol is the cause of Run's error when the host broke the FUSE protocol.
	ErrProtocol = errors.New("the host broke the FUSE protocol")
	// ErrStream is the cause of Run's error when the stream ended under the mount.
	ErrStream = errors.New("the stream to the host ended")
	// errDrained is the cause of Run's error after Drain.
	errDrained = errors.New("drained")
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
	sock, err := dupNonblocking(conn)
	conn.Close() // takes it out of the poller
	if err != nil {
		dev.Close()
		return nil, err
	}
	d, err := newDevice(dev)
	if err != nil {
		unix.Close(sock)
		return nil, err
	}
	p, err := newPump(d, sock, o)
	if err != nil {
		d.close()
		return nil, err
	}
	p.ownsDev = true
	return p, nil
}

// newPump makes a Pump of a device that stays its caller's, and of a stream's non-blocking descriptor, which it owns, also when it fails.
func newPump(d *device, sock int, o PumpOptions) (*Pump, error) {
	w, err := newWaker()
	if err != nil {
		unix.Close(sock)
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Pump{dev: d, sock: sock, log: o.Log, waker: w, requestSize: minRequest + headRoom + maxHeld, maxReply: minReply, ahead: o.Ahead, done: make(chan struct{}),
		traffic: &traffic{}, loop: &watchdog.Loop{}}
	p.bulk.saves = splice.Saves(sock)
	p.shortcuts = shortcuts{noFlush: o.NoFlush, locked: map[uint64]struct{}{}, releasing: map[uint64]struct{}{}}
	return p, nil
}

// goOn has a pump go on where another one of the same mount has ended. What was sent to the host and not answered is sent again:
// INIT too, if that is all there was.
func (p *Pump) goOn(a agreed) {
	p.resend = true
	if a == (agreed{}) {
		return
	}
	p.requestSize, p.maxReply = a.RequestSize, a.MaxReply
	p.minor.Store(a.Minor)
	p.maxWrite.Store(a.MaxWrite)
	p.shortcuts.noFlush = false // which files are locked is not known any more
}

func dupNonblocking(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dupErr error
	if err := raw.Control(func(of uintptr) {
		if fd, dupErr = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0); dupErr == nil {
			dupErr = unix.SetNonblock(fd, true)
		}
	}); err != nil {
		return -1, err
	}
	return fd, os.NewSyscallError("fcntl", dupErr)
}

// Run pumps until the file system is unmounted (nil), the stream ends (ErrStream), the host sends what is no FUSE
// message (ErrProtocol), or Close is called (os.ErrClosed). It returns when both descriptors are closed. It is called once.
func (p *Pump) Run() error {
	err := p.pump()
	if err == errUnmounted {
		err = nil
	}
	p.loop.Enter(watchdog.WaitPeer) // it does nothing any more
	p.stop(err)
	p.waker.close()
	p.bulk.close(true)
	if p.ownsDev {
		p.dev.close()
	}
	unix.Close(p.sock)
	return p.cause
}

// drain has Run end when every request that was read has its answer, or after timeout. No more requests are read from then on: they
// wait in the kernel for whoever reads the device next.
func (p *Pump) drain(timeout time.Duration) {
	p.draining.Store(int64(time.Since(began) + timeout))
	p.waker.wake()
}

var began = time.Now()

// Close ends Run with os.ErrClosed, unless it has ended already. Requests that wait for an answer fail
// with ECONNABORTED once no other process holds the device.
func (p *Pump) Close() { p.stop(os.ErrClosed) }

// Done is closed when the pump begins to end.
func (p *Pump) Done() <-chan struct{} { return p.done }

// Stats returns the counts so far.
func (p *Pump) Stats() Stats {
	t := p.traffic
	return Stats{
		Requests: t.requests.Load(), RequestBytes: t.requestBytes.Load(),
		Replies: t.replies.Load(), RxBytes: t.replyBytes.Load(), Dropped: t.dropped.Load(), Answered: t.answered.Load(),
		Minor: p.minor.Load(), MaxWrite: p.maxWrite.Load(),
	}
}

// stop records the first cause, and wakes pump.
func (p *Pump) stop(cause error) {
	p.once.Do(func() {
		p.cause = cause
		close(p.done)
		p.waker.wake()
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

// tries is how many requests are read one after the other without looking at the stream between them.
const tries = 8

// pump is the loop: what is there is read from the stream and written to the device, then the other way round. It waits
// in poll(2) alone.
func (p *Pump) pump() error {
	buf := prefaulted(p.requestSize)
	p.in = prefaulted(p.maxReply)
	if p.resend {
		if err := p.sendAgain(); err != nil {
			return err
		}
	}
	held := 0 // bytes of requests that wait at the beginning of buf
	for {
		if p.drains {
			return p.drained(buf[:held])
		}
		p.yielder.Yield()
		timeout := -1
		if p.bulk.out != nil || p.bulk.in != nil {
			timeout = pipeTime
		}
		if held > 0 {
			timeout = holdDelay
		}
		dev, sock, err := p.wait(unix.POLLIN, timeout)
		if err == errDrained {
			continue
		}
		if err != nil {
			return err
		}
		if sock != 0 {
			if err := p.receive(); err != nil {
				return err
			}
		}
		if !dev && sock == 0 { // nothing came for them to go with
			if err := p.sendHeld(buf[:held], held); err != nil {
				return err
			}
			held = 0
			p.bulk.close(false)
		}
		// Who got a reply has often asked the next thing already.
		for range tries {
			if need := p.requestSize; need > len(buf) {
				buf = append(prefaulted(need)[:0], buf[:held]...)[:need]
			}
			n, next, err := p.request(buf, held)
			if err != nil {
				return err
			}
			if held = n; !next || p.drains {
				break
			}
		}
	}
}

// wait waits as device.waitWith does, and tells the watchdog. The error is os.ErrClosed after Close, and errDrained, once, when
// the pump is to drain; from then on it waits for the stream alone, and errDrained says that the time has passed.
func (p *Pump) wait(events int16, timeout int) (dev bool, sock int16, err error) {
	state := watchdog.WaitKernel
	if events&unix.POLLOUT != 0 || p.drains {
		state = watchdog.WaitPeer
	}
	p.loop.Enter(state)
	defer p.loop.Enter(watchdog.Running)
	if p.drains {
		left := time.Duration(p.draining.Load()) - time.Since(began)
		if left <= 0 {
			return false, 0, errDrained
		}
		fds := [...]unix.PollFd{{Fd: int32(p.sock), Events: events}}
		if _, err := unix.Poll(fds[:], int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return false, 0, os.NewSyscallError("poll", err)
		}
		return false, fds[0].Revents, nil
	}
	dev, sock, woken, err := p.dev.waitWith(p.waker, p.sock, events, timeout)
	if err == nil && woken {
		select {
		case <-p.done:
			return dev, sock, os.ErrClosed
		default:
			p.drains = true // what else wakes
			return dev, sock, errDrained
		}
	}
	return dev, sock, err
}

// drained sends what was held back, and receives until nothing is missing or the time has come.
func (p *Pump) drained(held []byte) error {
	err := p.sendHeld(held, len(held))
	for err == nil && p.shortcuts.unanswered() > 0 {
		var ready int16
		if _, ready, err = p.wait(unix.POLLIN, 0); err == nil && ready != 0 {
			err = p.receive()
		}
	}
	if err != nil {
		return err
	}
	return errDrained
}

// sendAgain has the kernel send again what was read from the device and has no answer. Kernels before 6.9 can't: what an
// earlier pump has left there waits until it is interrupted.
func (p *Pump) sendAgain() error {
	var msg [fuse.OutHeaderSize]byte
	fuse.Put(msg[:], &fuse.OutHeader{Len: uint32(len(msg)), Error: int32(fuse.NOTIFY_RESEND)})
	_, err := writeNow(p.dev.fd, msg[:])
	switch errnoOf(err) {
	case 0:
		return nil
	case syscall.EINVAL:
		if p.maxWrite.Load() == 0 {
			return errors.New("INIT was lost with its stream, and this kernel can't send it again")
		}
		return nil
	case syscall.ENODEV, syscall.ECONNABORTED:
		return errUnmounted
	}
	return fmt.Errorf("write /dev/fuse: %w", err)
}

// errUnmounted ends pump in peace.
var errUnmounted = errors.New("unmounted")

// request reads one request, behind the held bytes of others in buf, and answers it, sends it to the host, or holds it
// too. It returns how many bytes are held then, and whether another request is likely to be there already.
func (p *Pump) request(buf []byte, held int) (nowHeld int, next bool, err error) {
	n, piped, err := p.read(buf[held:])
	switch err {
	case nil:
	case unix.EAGAIN:
		return held, false, nil
	case unix.EINTR, unix.ENOENT:
		// ENOENT: the request was interrupted while the kernel handed it over.
		return held, true, nil
	case unix.ENODEV, unix.ECONNABORTED:
		// Unmounted, or aborted: umount -f, or the control file system.
		return 0, false, errUnmounted
	default:
		return 0, false, fmt.Errorf("read /dev/fuse: %w", err)
	}
	msg := buf[held : held+n]
	if n < fuse.InHeaderSize || int(binary.LittleEndian.Uint32(msg)) != n+piped {
		return 0, false, fmt.Errorf("read /dev/fuse: a request of %d bytes whose header says %d", n+piped, binary.LittleEndian.Uint32(msg))
	}
	var h fuse.InHeader
	body, _ := fuse.Decode(&h, msg) // it is long enough
	if held+n <= maxHeld && p.holds(&h, body) {
		return held + n, true, nil
	}
	p.begins(&h)
	if answer := p.shortcuts.request(&h, body); answer != nil {
		p.traffic.answered.Add(1)
		return held, true, p.write(answer)
	}
	if h.Opcode == fuse.OpInit {
		p.initRequest(msg)
	}
	if err := p.sendHeld(buf[:held+n], held); err != nil || piped == 0 {
		return 0, false, err
	}
	return 0, false, p.sendBy(piped, func(left int) (int, error) { return p.bulk.out.Give(p.sock, nil, left) })
}

// begins counts a request whose time begins.
func (p *Pump) begins(h *fuse.InHeader) {
	p.traffic.begin(h)
	if rec := p.perf.Load(); rec != nil {
		rec.start(h.Unique)
	}
}

// holds tells whether a request is to be held back: FORGETs, and the RELEASE of a file that was open for reading and is not locked.
func (p *Pump) holds(h *fuse.InHeader, body []byte) bool {
	switch h.Opcode {
	case fuse.OpForget, fuse.OpBatchForget:
		return true
	case fuse.OpRelease:
		var in fuse.ReleaseIn
		if _, ok := fuse.Decode(&in, body); !ok || in.Flags&unix.O_ACCMODE != unix.O_RDONLY || p.shortcuts.mayLock(h.NodeID) || p.releases == maxReleases {
			return false
		}
		p.releases++
		return true
	}
	return false
}

// sendHeld sends b, which begins with so many bytes of requests that were held back.
func (p *Pump) sendHeld(b []byte, held int) error {
	for at := 0; at < held; {
		var h fuse.InHeader
		body, _ := fuse.Decode(&h, b[at:])
		p.begins(&h)
		p.shortcuts.request(&h, body[:int(h.Len)-fuse.InHeaderSize]) // there is no answer to it here
		at += int(h.Len)
	}
	p.releases = 0
	return p.send(b)
}

// send writes all of b to the stream.
func (p *Pump) send(b []byte) error {
	return p.sendBy(len(b), func(left int) (int, error) { return writeNow(p.sock, b[len(b)-left:]) })
}

// sendBy sends n bytes by calls of some, which sends as many of those that are left as the stream takes. While that takes none, replies are
// received: a host that waits for us to read could otherwise wait for ever.
func (p *Pump) sendBy(n int, some func(left int) (int, error)) error {
	for n > 0 {
		sent, err := some(n)
		switch {
		case err == nil:
			n -= sent
			continue
		case err == unix.EINTR:
			continue
		case err != unix.EAGAIN:
			return fmt.Errorf("%w: write: %w", ErrStream, err)
		}
		drains := p.drains
		_, ready, err := p.wait(unix.POLLIN|unix.POLLOUT, -1)
		if err == errDrained && !drains {
			continue // the request that was read goes out first
		}
		if err != nil {
			return err
		}
		if ready&^unix.POLLOUT != 0 {
			if err := p.receive(); err != nil {
				return err
			}
		}
	}
	return nil
}

// receive reads what has come from the host and writes each whole message to the device.
func (p *Pump) receive() error {
	for {
		if p.bulk.toCome > 0 {
			if copied, err := p.receivePiped(); err != nil || !copied {
				return err
			}
		}
		room := p.in[p.end:]
		if p.bulk.reads && p.end < fuse.OutHeaderSize {
			room = room[:fuse.OutHeaderSize-p.end]
		}
		n, err := readNow(p.sock, room)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return nil
		case err == nil && n == 0:
			err = io.EOF
			if p.end > p.start {
				err = io.ErrUnexpectedEOF
			}
			fallthrough
		case err != nil:
			return fmt.Errorf("%w: read: %w", ErrStream, err)
		}
		p.end += n
		for p.end-p.start >= fuse.OutHeaderSize {
			size := int(binary.LittleEndian.Uint32(p.in[p.start:]))
			if size < fuse.OutHeaderSize || size > p.maxReply {
				return fmt.Errorf("%w: a message of %d bytes; 16 to %d are allowed", ErrProtocol, size, p.maxReply)
			}
			if p.goesPiped(size) {
				break
			}
			if p.end-p.start < size {
				break
			}
			if err := p.reply(p.in[p.start : p.start+size]); err != nil {
				return err
			}
			p.start += size
		}
		// Only the beginning of one message may be left: the rest is read behind it.
		if p.start > 0 {
			p.end = copy(p.in, p.in[p.start:p.end])
			p.start = 0
		}
		if len(p.in) < p.maxReply {
			p.in = append(prefaulted(p.maxReply)[:0], p.in[:p.end]...)[:p.maxReply]
		}
		if p.bulk.toCome > 0 {
			if err := p.bulk.in.Write(p.in[:p.end]); err != nil {
				return err
			}
			continue
		}
		if p.end == 0 {
			return nil
		}
	}
}

// reply writes one message to the device. It returns an error only where the pump must end.
func (p *Pump) reply(msg []byte) error {
	unique := binary.LittleEndian.Uint64(msg[8:])
	if unique == 0 {
		if p.ahead && p.shortcuts.told(msg) {
			return nil
		}
		// A notification waits for locks that are held by who waits for a reply: it has its own channel.
		return fmt.Errorf("%w: notification %d in the stream of replies", ErrProtocol, int32(binary.LittleEndian.Uint32(msg[4:])))
	}
	if unique == p.initUnique && p.maxWrite.Load() == 0 {
		if err := p.initReply(msg); err != nil {
			return err
		}
	}
	p.shortcuts.replied(msg)
	return p.write(msg)
}

// write writes one reply to the device. It returns an error only where the pump must end.
func (p *Pump) write(msg []byte) error {
	return p.deliver(msg, func() error {
		_, err := writeNow(p.dev.fd, msg)
		return err
	})
}

// deliver counts a reply and has it written to the device. It returns an error only where the pump must end.
func (p *Pump) deliver(head []byte, write func() error) error {
	var h fuse.OutHeader
	fuse.Decode(&h, head)
	p.traffic.end(h.Unique, int(h.Len), h.Error)
	if rec := p.perf.Load(); rec != nil {
		rec.stop(h.Unique)
	}
	for {
		err := write()
		if err == nil {
			return nil
		}
		switch errno := errnoOf(err); errno {
		case syscall.EINTR, syscall.EAGAIN:
			continue
		case syscall.ENOENT:
			// The request was interrupted, and its caller is gone.
			p.traffic.dropped.Add(1)
			return nil
		case syscall.ENODEV, syscall.ECONNABORTED:
			return nil // unmounted: who reads requests sees it and says so
		case syscall.EINVAL:
			return fmt.Errorf("%w: the kernel refused a reply: length %d, error %d, unique %#x", ErrProtocol, h.Len, h.Error, h.Unique)
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
