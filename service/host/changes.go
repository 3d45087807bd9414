// SPDX-License-Identifier: Apache-2.0

package host

import (
	"encoding/binary"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/watch"
)

// changes is a worker's end of what joins it to the hub.
type changes struct {
	w      *worker
	fd     int
	others *atomic.Uint32 // not 0: workers besides this one are to hear what the guest does

	mu    sync.Mutex
	wake  sync.Cond
	queue map[uint32][]watch.Change // by mount
	count int
}

// maxChanges is how many changes of the guest may wait for the parent to read them.
const maxChanges = 4096

func newChanges(w *worker, f, shared *os.File) (*changes, error) {
	memory, err := mapOthers(shared, false)
	if err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	c := &changes{w: w, fd: fd, others: othersIn(memory), queue: map[uint32][]watch.Change{}}
	c.wake.L = &c.mu
	go c.receive()
	go c.send()
	return c, nil
}

// heard tells whether anybody is to hear what the guest of a mount does. Who begins to listen later has kept nothing from before.
func (c *changes) heard() bool { return c.others.Load() != 0 || c.w.several.Load() }

// receive tells all mounts what the hub tells.
func (c *changes) receive() {
	b := make([]byte, packetSize)
	for {
		n, err := unix.Read(c.fd, b)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return // the parent has ended, or will see it
		}
		if _, cs, err := decodePacket(b[:n]); err == nil {
			c.w.changed(nil, cs)
		}
	}
}

// changed tells all mounts but one of changes.
func (w *worker) changed(but *passthrough.FS, cs []watch.Change) {
	w.mu.Lock()
	all := slices.Collect(maps.Values(w.mounts))
	w.mu.Unlock()
	for _, m := range all {
		if m.fs != but {
			m.fs.Changed(cs)
		}
	}
}

// report takes a change that the guest of a mount has made. It does not wait.
func (c *changes) report(id uint32, k watch.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	q := c.queue[id]
	if n := len(q); n > 0 && q[n-1] == k && k.Op&(watch.Modify|watch.Attrib) != 0 {
		return // a file that is being written
	}
	if c.count == maxChanges {
		if len(q) != 1 || q[0].Op != watch.Lost {
			c.queue[id] = []watch.Change{{Op: watch.Lost}}
		}
		return
	}
	c.count++
	c.queue[id] = append(q, k)
	c.wake.Signal()
}

// send tells the other mounts of this worker, and the hub, what the guest has done.
func (c *changes) send() {
	for {
		c.mu.Lock()
		for c.count == 0 {
			c.wake.Wait()
		}
		all := c.queue
		c.queue, c.count = map[uint32][]watch.Change{}, 0
		c.mu.Unlock()
		for id, cs := range all {
			c.w.mu.Lock()
			var own *passthrough.FS
			if m := c.w.mounts[id]; m != nil {
				own = m.fs
			}
			c.w.mu.Unlock()
			c.w.changed(own, cs)
			for len(cs) > 0 {
				b := binary.LittleEndian.AppendUint32(nil, id)
				for len(cs) > 0 && len(b) <= packetSize-watch.MaxEncoded {
					b, cs = watch.Append(b, &cs[0]), cs[1:]
				}
				for {
					_, err := unix.Write(c.fd, b)
					if err != unix.EINTR {
						break // without a parent there is nobody to tell
					}
				}
			}
		}
	}
}
