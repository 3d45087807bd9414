// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"time"

	"transfused.org/transfused/service/fuse"
)

// absences are the names that the guest may believe for long not to be in a directory. They are remembered because no node has them, and a guest that is
// to believe nothing any more has to be told each. There are at most 2*maxAbsences: of more the guest asks about the oldest again.
type absences struct {
	now, before map[entryKey]struct{}
	old         map[entryKey]struct{} // the guest is to be told to forget them; nil: none
	others      time.Time             // until when the guest may believe it of names that are not remembered
}

const maxAbsences = 4096

// absent is for how long the guest may cache that a name is not in dir, where the request did not find it.
func (fs *FS) absent(r *request, dir *node, name cname) time.Duration {
	switch {
	case fs.c.Cache == CacheAlways:
		return longTTL * time.Second
	case fs.c.Cache != CacheCoherent || !fs.pushed() || r.seq != fs.caching.seq.Load():
		return 0
	case fs.c.Dirs != nil && !r.covers(dir):
		return 0
	case fs.c.Dirs == nil && (dir.key.dev != fs.root.key.dev || dir.key.mnt != fs.root.key.mnt):
		return 0
	}
	c := &fs.caching
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.absences
	if !fs.expires() {
		a.others = time.Now().Add(2 * fs.c.TTL)
		return fs.c.TTL // the name may be a directory by now, which must not be forgotten
	}
	if len(a.now) == maxAbsences {
		if a.old != nil {
			a.others = time.Now().Add(2 * fs.c.TTL) // it arrives later than now
			return fs.c.TTL                         // the guest does not keep up
		}
		a.now, a.before, a.old = nil, a.now, a.before
		c.wake.Signal()
	}
	if a.now == nil {
		a.now = map[entryKey]struct{}{}
	}
	a.now[entryKey{dir.id, name.String()}] = struct{}{}
	if r.seq != c.seq.Load() {
		return 0 // a change that came meanwhile may have been told before this name was remembered
	}
	return longTTL * time.Second
}

// believesAbsent tells whether the guest may believe that a name is not there.
func (c *caching) believesAbsent(k entryKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.absences
	_, now := a.now[k]
	_, before := a.before[k]
	return now || before || a.old != nil || time.Now().Before(a.others)
}

// tellAbsent tells the guest to ask again about names that it may believe not to be there.
func (fs *FS) tellAbsent(names map[entryKey]struct{}, n *notifier) {
	for k := range names {
		n.name(k.dir, k.name, fuse.EXPIRE_ONLY)
		n.flushAt(fs, maxBatch)
	}
	n.flush(fs)
}
