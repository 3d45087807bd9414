// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Block takes c out of the runtime's poller: from here on Read and Write wait
// in their system calls, each on a thread of its own, which takes half the
// time of the poller's way (doc.go). Deadlines no longer work, and Close shuts
// the connection down for every process that holds it. It is called before c
// is shared, and O_NONBLOCK is cleared for all duplicates.
func (c *Conn) Block() error {
	var n int
	if err := control(c.raw, func(fd int) (err error) {
		n, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewSyscallError("fcntl", err)
	}); err != nil {
		return err
	}
	if err := unix.SetNonblock(n, false); err != nil {
		unix.Close(n)
		return os.NewSyscallError("fcntl", err)
	}
	c.f.Close()
	c.f, c.blocking = os.NewFile(uintptr(n), c.peer.String()), true
	c.raw, _ = c.f.SyscallConn() // as in NewConn
	return nil
}

// blockingProcs is how many Ps a process gets that has blocking Conns. A goroutine
// in a system call keeps its P until the runtime takes it away, and one that
// returns from a call waits for a free P: with as few as there are CPUs, small
// messages took up to four times as long (doc.go). Idle Ps cost some memory.
const blockingProcs = 16

// PrepareBlocking prepares this process for Conns that Block. It is called once, at its
// start.
func PrepareBlocking() {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), blockingProcs))
}

// yieldTime is below what the scheduler lets a goroutine run without having a look at it (forcePreemptNS, 10 ms).
const yieldTime = 8 * time.Millisecond

// Yielder has a goroutine that does nothing but short system calls go through the scheduler now and then. To the
// runtime (Go 1.26, retake in runtime/proc.go) it has otherwise been running all that time: its monitor then takes the P
// away in every system call and looks again each 20 µs, which cost as much as all the rest of a message. A Read of a
// blocking Conn does it.
type Yielder struct{ last atomic.Int64 } // ns since began

var began = time.Now()

// Yield may yield. It is cheap enough for every message.
func (y *Yielder) Yield() {
	if now := int64(time.Since(began)); now-y.last.Load() >= int64(yieldTime) {
		y.last.Store(now)
		runtime.Gosched()
	}
}
