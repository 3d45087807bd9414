// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// Limits bound what one guest session may hold of its host. All mounts of the session share one.
// A field that is 0 has its default. Set the fields before the first New; they are not changed afterwards.
type Limits struct {
	Nodes       int64 // inodes that the guest knows; 2 Mi (about 420 bytes each)
	Files       int64 // open files, directories and lock owners; half of Descriptors
	Descriptors int64 // descriptors, open files included; RLIMIT_NOFILE less 64
	Bytes       int64 // of large requests and replies under way; 64 MiB
	Requests    int64 // served at once by one stream; 64
	Serving     int64 // goroutines that serve, of all streams, but the first of each; 2048. Each may hold a thread in a system call
	Waits       int64 // SETLKW requests that wait; 1024

	once        sync.Once
	nodes       atomic.Int64
	files       atomic.Int64
	descriptors atomic.Int64
	waits       atomic.Int64
	serving     atomic.Int64
	pipes       atomic.Int64
	bytes       byteGauge
}

func (l *Limits) init() {
	l.once.Do(func() {
		or := func(p *int64, v int64) {
			if *p <= 0 {
				*p = v
			}
		}
		var rl unix.Rlimit
		// Not getrlimit: a confined worker may make one of the two calls only.
		if unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &rl) != nil || rl.Cur > 1<<20 {
			rl.Cur = 1 << 20
		}
		or(&l.Nodes, 2<<20)
		or(&l.Descriptors, max(int64(rl.Cur)-64, 64))
		or(&l.Files, l.Descriptors/2)
		or(&l.Bytes, 64<<20)
		or(&l.Requests, 64)
		or(&l.Serving, 2048)
		or(&l.Waits, 1024)
		l.bytes.max = max(l.Bytes, 2*maxBuffer)
		l.bytes.free.L = &l.bytes.mu
	})
}

// take counts one more in g, or says no.
func take(g *atomic.Int64, max int64) bool {
	if g.Add(1) > max {
		g.Add(-1)
		return false
	}
	return true
}

// takeServer counts one more goroutine of a stream that has n, if it may: the first of each always, more while there is room.
// The runtime ends a process that has 10,000 threads.
func (l *Limits) takeServer(n int64) bool {
	if n == 0 {
		l.serving.Add(1)
		return true
	}
	return n < l.Requests && take(&l.serving, l.Serving)
}

// takeFile counts an open file (or what holds a descriptor like one: a lock owner). Undo with giveFile.
func (fs *FS) takeFile() fuse.Errno {
	if !take(&fs.limits.files, fs.limits.Files) {
		return unix.ENFILE
	}
	if e := fs.takeFD(); e != 0 {
		fs.limits.files.Add(-1)
		return e
	}
	return 0
}

func (fs *FS) giveFile() {
	fs.limits.files.Add(-1)
	fs.giveFD()
}

// takeFD counts a descriptor; if there are too many, that of a node which can be opened again is closed.
func (fs *FS) takeFD() fuse.Errno {
	if take(&fs.limits.descriptors, fs.limits.Descriptors) {
		return 0
	}
	fs.evict()
	if take(&fs.limits.descriptors, fs.limits.Descriptors) {
		return 0
	}
	return unix.ENFILE
}

func (fs *FS) giveFD() { fs.limits.descriptors.Add(-1) }

// byteGauge makes those wait who want more bytes than are left, and hold none: if who holds some waited too, all could
// come to wait for each other.
type byteGauge struct {
	mu   sync.Mutex
	free sync.Cond
	used int64
	max  int64
}

func (g *byteGauge) take(n int, holds bool) {
	g.mu.Lock()
	for !holds && g.used > 0 && g.used+int64(n) > g.max {
		g.free.Wait()
	}
	g.used += int64(n)
	g.mu.Unlock()
}

func (g *byteGauge) give(n int) {
	g.mu.Lock()
	g.used -= int64(n)
	g.mu.Unlock()
	g.free.Broadcast()
}

// Buffers for requests and replies that do not fit a request's own. A size class is a power of two, and room for headers.
const (
	minBufferBits = 13
	maxBufferBits = 21
	bufferRoom    = 4096
	maxBuffer     = 1<<maxBufferBits + bufferRoom
)

func bufferSize(class int) int { return 1<<(minBufferBits+class) + bufferRoom }

type buffer struct {
	b     []byte
	class int
}

var bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool

// getBuffer returns a buffer of at least n bytes, n at most maxBuffer, when the session has them to spare; at once, if
// the request holds another.
func (l *Limits) getBuffer(n int, holds bool) *buffer {
	class := 0
	for n > bufferSize(class) {
		class++
	}
	size := bufferSize(class)
	l.bytes.take(size, holds)
	if b, _ := bufferPools[class].Get().(*buffer); b != nil {
		return b
	}
	return &buffer{b: make([]byte, size), class: class}
}

func (l *Limits) putBuffer(b *buffer) {
	l.bytes.give(len(b.b))
	bufferPools[b.class].Put(b)
}
