// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"sync"
	"time"

	"transfused.org/transfused/service/watch"
)

// ownLog is what the guest has done lately, in directories that are watched: inotify tells it again, and not who it was.
//
// Who makes a change notes it before the system call, by request.expect. What is told by inotify takes one note away, and is not acted in the guest, which
// has seen its own event. The kernel joins events that are alike, so notes may be left over; they are believed for ownLife. Whether
// another has changed the same thing at the same time is found out by looking (FS.check): when the event comes, or, if the
// request is still under way and the guest does not know its outcome yet, when that is done. Other requests may be between their system call
// and what we note of it just then, so what looks wrong is looked at again when they are done.
type ownLog struct {
	mu    sync.Mutex
	m     map[entryKey]*own
	doing int               // requests' names that are pending
	begun uint64            // expect and settle that were called
	again map[entryKey]look // what is to be checked when the next request is done
}

// look is a check.
type look struct {
	op    watch.Op
	tries int // that it looked wrong
}

// own is what the guest has done to one name.
type own struct {
	left    [5]uint32 // by bit of the Op: events that may come
	pending int       // requests that are under way
	missed  watch.Op  // events that came meanwhile
	until   int64     // when it is not believed any more, Unix time in ns
}

const (
	ownLife = 2 * time.Second
	maxOwn  = 8192 // names, but for those of requests that are under way
	maxLook = 16   // tries
)

// expect notes that op is about to happen. begin: by a request that has not done anything to this name yet, and calls settle.
func (l *ownLog) expect(at entryKey, op watch.Op, begin bool) {
	now := time.Now().UnixNano()
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.m[at]
	if o == nil {
		if l.m == nil {
			l.m = map[entryKey]*own{}
		}
		if len(l.m) >= maxOwn {
			l.tidy(now)
		}
		o = &own{}
		l.m[at] = o
	} else if o.pending == 0 && o.until < now {
		*o = own{}
	}
	for i := range o.left {
		if op&(1<<i) != 0 {
			o.left[i]++
		}
	}
	o.until = now + int64(ownLife)
	l.begun++
	if begin {
		o.pending++
		l.doing++
	}
}

// tidy makes room. What is thrown away is told as if another had done it.
func (l *ownLog) tidy(now int64) {
	for at, o := range l.m {
		if o.pending == 0 && o.until < now {
			delete(l.m, at)
		}
	}
	for at, o := range l.m {
		if len(l.m) <= maxOwn*3/4 {
			break
		}
		if o.pending == 0 {
			delete(l.m, at)
		}
	}
}

// settle ends what expect began, and returns what is to be checked now.
func (l *ownLog) settle(at entryKey) map[entryKey]look {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.m[at]
	o.until = time.Now().UnixNano() + int64(ownLife)
	l.begun++
	l.doing--
	if o.pending--; o.pending == 0 {
		if o.missed != 0 {
			l.lookAgain(at, look{op: o.missed})
			o.missed = 0
		}
		l.used(at, o)
	}
	again := l.again
	l.again = nil
	return again
}

// lookAgain needs l.mu.
func (l *ownLog) lookAgain(at entryKey, k look) {
	if l.again == nil {
		l.again = map[entryKey]look{}
	}
	old := l.again[at]
	l.again[at] = look{old.op | k.op, max(old.tries, k.tries)}
}

// state is that of the log before a check looks.
func (l *ownLog) state() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.begun
}

// wrong tells what to do with a check that was not right, and began with that state: to tell the guest, or to look again now, or neither, as settle
// will have it looked at again.
func (l *ownLog) wrong(at entryKey, k look, state uint64) (tell, retry bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k.tries++
	switch {
	case k.tries >= maxLook || l.doing == 0 && l.begun == state:
		return true, false
	case l.doing == 0:
		return false, true
	}
	l.lookAgain(at, k)
	return false, false
}

// match tells which of op the guest has done. wait: settle will tell of it.
func (l *ownLog) match(at entryKey, op watch.Op) (mine watch.Op, wait bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.m[at]
	if o == nil {
		return 0, false
	}
	if o.pending == 0 && o.until < time.Now().UnixNano() {
		delete(l.m, at)
		return 0, false
	}
	for i := range o.left {
		if op&(1<<i) != 0 && o.left[i] > 0 {
			o.left[i]--
			mine |= 1 << i
		}
	}
	if o.pending > 0 {
		o.missed |= mine
		return mine, true
	}
	l.used(at, o)
	return mine, false
}

// used forgets o if nothing is left of it.
func (l *ownLog) used(at entryKey, o *own) {
	if o.left == [5]uint32{} && o.pending == 0 {
		delete(l.m, at)
	}
}

// expect notes that the request is about to do op to a name in a directory, until it ends.
func (r *request) expect(op watch.Op, dir *node, name cname) {
	if r.fs.c.Dirs != nil && dir.isWatched() {
		r.expectAt(entryKey{dir.id, name.String()}, op)
	}
}

// expectFile is expect, of a file's data or attributes.
func (r *request) expectFile(op watch.Op, n *node) {
	fs := r.fs
	if fs.c.Dirs == nil {
		return
	}
	var at entryKey
	fs.mu.Lock()
	if n.parent != nil && n.parent.isWatched() {
		at = entryKey{n.parent.id, n.name}
	}
	fs.mu.Unlock()
	if at.dir != 0 {
		r.expectAt(at, op)
	}
	if n.isWatched() { // a directory
		r.expectAt(entryKey{n.id, ""}, op)
	}
}

func (r *request) expectAt(at entryKey, op watch.Op) {
	begin := true
	for _, e := range r.expected[:r.nexpected] {
		begin = begin && e != at
	}
	if begin && r.nexpected == len(r.expected) {
		return // no request changes so many; another's name came in between
	}
	r.fs.dirs.own.expect(at, op, begin)
	if begin {
		r.expected[r.nexpected] = at
		r.nexpected++
	}
}

// settle ends what expect began.
func (r *request) settle() {
	for _, at := range r.expected[:r.nexpected] {
		for at, k := range r.fs.dirs.own.settle(at) {
			r.fs.check(at, k)
		}
	}
	clear(r.expected[:])
	r.nexpected = 0
}
