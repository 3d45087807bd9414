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
	// largeData is how many bytes a READ asks for, or a WRITE has, at least, that goes over a stream for large data, if the mount has one.
	largeData = splice.MinData
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

// Pump carries FUSE messages between one mount's device and its streams. It reads the headers and INIT, and answers what
// PumpOptions let it; meaning is the server's business otherwise. A mount that gets other streams gets another pump.
type Pump struct {
	dev     *device
	ownsDev bool
	lanes   []lane // the streams, by their index: the first takes what is small, the others large data; one by itself takes all
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
	buf         []byte // requests are read into it; those that are held back are at its beginning
	polled      [2 + maxStreams]unix.PollFd
	spinner     transport.Spinner
	turn        int // of the streams for large data, the one that was received from last
	minor       atomic.Uint32
	maxWrite    atomic.Uint32
	agreed      func(agreed) // called when INIT's reply is known, before the kernel has it; nil: not

	saves     bool // the streams hand on pages (bulk)
	writes    bool // the last request was a large WRITE
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
	Spin    transport.Spin
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
	p, err := newPump(d, []int{sock}, o)
	if err != nil {
		d.close()
		return nil, err
	}
	p.ownsDev = true
	return p, nil
}

// newPump makes a Pump of a device that stays its caller's, and of its streams' non-blocking descriptors, 1 to maxStreams, which it owns, also
// when it fails.
func newPump(d *device, socks []int, o PumpOptions) (*Pump, error) {
	w, err := newWaker()
	if err != nil {
		closeAll(socks)
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Pump{dev: d, lanes: make([]lane, len(socks)), log: o.Log, waker: w, requestSize: minRequest + headRoom + maxHeld, maxReply: minReply, ahead: o.Ahead, done: make(chan struct{}),
		traffic: &traffic{}, loop: &watchdog.Loop{}}
	for i, sock := range socks {
		p.lanes[i].sock = sock
	}
	p.spinner.Max = o.Spin
	p.saves = splice.Saves(socks[0]) // the others are of the same transport
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

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
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

// Run pumps until the file system is unmounted (nil), a stream ends (ErrStream), the host sends what is no FUSE
// message (ErrProtocol), or Close is called (os.ErrClosed). It returns when all descriptors are closed. It is called once.
func (p *Pump) Run() error {
	err := p.pump()
	if err == errUnmounted {
		err = nil
	}
	p.loop.Enter(watchdog.WaitPeer) // it does nothing any more
	p.stop(err)
	p.waker.close()
	p.closePipes(true)
	if p.ownsDev {
		p.dev.close()
	}
	for i := range p.lanes {
		unix.Close(p.lanes[i].sock)
	}
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

// tries is how many requests are read one after the other without looking at the streams between them.
const tries = 8

// pump is the loop: what is there is read from the streams and written to the device, then the other way round. It waits
// in poll(2) alone.
func (p *Pump) pump() error {
	if p.resend {
		if err := p.sendAgain(); err != nil {
			return err
		}
	}
	held := 0 // bytes of requests that wait at the beginning of buf
	for {
		if p.drains {
			return p.drained(held)
		}
		p.yielder.Yield()
		timeout := -1
		if p.hasPipes() {
			timeout = pipeTime
		}
		if held > 0 {
			timeout = holdDelay
		}
		came, err := p.wait(true, timeout)
		if err == errDrained {
			continue
		}
		// What is small goes first.
		asked := p.polled[0].Revents != 0
		if err == nil {
			err = p.small()
		}
		if err == nil && !asked {
			err = p.large()
		}
		if err != nil {
			return err
		}
		if !came { // nothing came for them to go with
			if err := p.sendHeld(held, held, 0); err != nil {
				return err
			}
			held = 0
			p.closePipes(false)
		}
		// Who got a reply has often asked the next thing already.
		for range tries {
			if need := p.requestSize; need > len(p.buf) {
				p.buf = append(prefaulted(need)[:0], p.buf[:held]...)[:need]
			}
			n, next, err := p.request(held)
			if err != nil {
				return err
			}
			if held = n; !next || p.drains {
				break
			}
		}
		if asked {
			if err := p.large(); err != nil {
				return err
			}
		}
	}
}

// wait waits for at most timeout milliseconds (-1: for ever) until a stream can be received from, or takes what is left to send on it, which
// streams then does, or, with asks, until the device has a request. It tells the watchdog. came: any of that. The error is os.ErrClosed after Close,
// and errDrained, once, when the pump is to drain; from then on it waits for the streams alone, and errDrained says that the time has passed.
func (p *Pump) wait(asks bool, timeout int) (came bool, err error) {
	state := watchdog.WaitKernel
	if !asks || p.drains {
		state = watchdog.WaitPeer
	}
	p.loop.Enter(state)
	defer p.loop.Enter(watchdog.Running)
	all := p.polled[:2+len(p.lanes)]
	for i := range p.lanes {
		l := &p.lanes[i]
		all[2+i] = unix.PollFd{Fd: int32(l.sock), Events: unix.POLLIN}
		if l.sends() {
			all[2+i].Events |= unix.POLLOUT
		}
	}
	if p.drains {
		left := time.Duration(p.draining.Load()) - time.Since(began)
		if left <= 0 {
			return false, errDrained
		}
		n, err := unix.Poll(all[2:], int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return false, os.NewSyscallError("poll", err)
		}
		return n > 0, nil
	}
	woken, err := p.dev.waitWith(p.waker, &p.spinner, asks, all, timeout)
	if err == nil && !asks && all[0].Revents != 0 {
		return false, errUnmounted
	}
	if err == nil && woken {
		select {
		case <-p.done:
			return false, os.ErrClosed
		default:
			p.drains = true // what else wakes
			return false, errDrained
		}
	}
	for i := range all {
		came = came || all[i].Revents != 0
	}
	return came, err
}

// streams does what wait has found that can be done on the streams.
func (p *Pump) streams() error {
	if err := p.small(); err != nil {
		return err
	}
	return p.large()
}

// small receives what has come on the first stream, and sends what was left to send on any.
func (p *Pump) small() error {
	if p.polled[2].Revents&^unix.POLLOUT != 0 {
		if err := p.receive(&p.lanes[0]); err != nil {
			return err
		}
	}
	for i := range p.lanes {
		if p.polled[2+i].Revents&unix.POLLOUT != 0 {
			if err := p.lanes[i].push(); err != nil {
				return err
			}
		}
	}
	return nil
}

// large receives from one of the streams for large data on which something has come, in turns, and one message: what is small is not to wait for long.
func (p *Pump) large() error {
	n := len(p.lanes) - 1
	for i := range n {
		if at := 1 + (p.turn+i)%n; p.polled[2+at].Revents&^unix.POLLOUT != 0 {
			p.turn = at
			return p.receive(&p.lanes[at])
		}
	}
	return nil
}

// drained sends what was held back, and receives until nothing is missing or the time has come.
func (p *Pump) drained(held int) error {
	err := p.sendHeld(held, held, 0)
	for err == nil && p.shortcuts.unanswered() > 0 {
		if _, err = p.wait(false, 0); err == nil {
			err = p.streams()
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
func (p *Pump) request(held int) (nowHeld int, next bool, err error) {
	to := p.forLarge()
	n, piped, err := p.read(to, p.buf[held:])
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
	msg := p.buf[held : held+n]
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
	if len(p.lanes) == 1 || !isLarge(&h, body) {
		return 0, false, p.sendHeld(held+n, held, piped)
	}
	if held > 0 {
		err = p.sendHeld(held, held, 0)
	}
	for err == nil && to == nil {
		if err = p.waitForStreams(); err == nil {
			to = p.forLarge()
		}
	}
	if err != nil {
		return 0, false, err
	}
	to.atHost++
	return 0, false, p.send(to, msg, piped)
}

// isLarge tells whether a request goes over a stream for large data: the data are in it, or will be in its reply.
func isLarge(h *fuse.InHeader, body []byte) bool {
	switch h.Opcode {
	case fuse.OpWrite:
		return int(h.Len) >= fuse.WriteHead+largeData
	case fuse.OpRead:
		return len(body) >= readSize+4 && binary.LittleEndian.Uint32(body[readSize:]) >= largeData
	}
	return false
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

// sendHeld sends the first n bytes of buf, which begin with so many of requests that were held back, and behind them those in the pipe.
func (p *Pump) sendHeld(n, held, piped int) error {
	for at := 0; at < held; {
		var h fuse.InHeader
		body, _ := fuse.Decode(&h, p.buf[at:])
		p.begins(&h)
		p.shortcuts.request(&h, body[:int(h.Len)-fuse.InHeaderSize]) // there is no answer to it here
		at += int(h.Len)
	}
	p.releases = 0
	return p.send(&p.lanes[0], p.buf[:n], piped)
}

// reply writes one message of the host to the device. It returns an error only where the pump must end.
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
