// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"transfused.org/transfused/service/fuse"
)

const (
	// aheadTime is how long attributes that were told ahead are an answer. The kernel asks right after the change.
	aheadTime = 10 * time.Millisecond
	// maxLocked is how many files with locks are remembered. With one more each FLUSH goes to the host.
	maxLocked = 1024
)

// shortcuts are the answers that the pump knows without the host. What they save is a round trip for each change in a
// directory, and one for each close; what anything else means is the server's business.
//
// The kernel drops a directory's attributes after each change in it, and asks for them again, to check permissions by.
// The host tells them with the reply of the change (fuse.AheadOut). They are kept for one directory and a moment, and
// only if they can't be old: no request was at the host when the change went there, and none about the directory, nor
// another change, has gone since.
type shortcuts struct {
	noFlush bool         // FLUSH does nothing at the host, but to drop locks
	atHost  atomic.Int64 // requests whose reply has not come

	// For the reader of the device.
	dir    uint64 // of the last change, if it went alone; 0: none
	locked map[uint64]struct{}
	answer [fuse.OutHeaderSize + fuse.AttrOutSize]byte

	mu     sync.Mutex
	change fuse.AheadOut // Unique and NodeID of that change, 0: none; and its directory's attributes
	until  time.Time     // when they are no longer an answer; zero: they have not come
}

// request looks at a request that is about to go to the host, and returns its answer if that is known here, valid until
// the next call. It is called by the reader of the device.
func (s *shortcuts) request(h *fuse.InHeader, body []byte) []byte {
	if h.Opcode.NoReply() {
		return nil
	}
	switch h.Opcode {
	case fuse.OpGetattr:
		if s.dir == h.NodeID && s.dir != 0 && len(body) >= 4 && binary.LittleEndian.Uint32(body)&fuse.GETATTR_FH == 0 && s.attributes() {
			fuse.Put(s.answer[:], &fuse.OutHeader{Len: uint32(len(s.answer)), Unique: h.Unique})
			return s.answer[:]
		}
	case fuse.OpFlush:
		if _, locked := s.locked[h.NodeID]; s.noFlush && !locked {
			fuse.Put(s.answer[:], &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize), Unique: h.Unique})
			return s.answer[:fuse.OutHeaderSize]
		}
	case fuse.OpSetlk, fuse.OpSetlkw:
		if len(s.locked) == maxLocked {
			s.noFlush = false
		}
		if s.noFlush {
			s.locked[h.NodeID] = struct{}{}
		}
	case fuse.OpMknod, fuse.OpMkdir, fuse.OpSymlink, fuse.OpLink, fuse.OpCreate, fuse.OpTmpfile,
		fuse.OpUnlink, fuse.OpRmdir, fuse.OpRename, fuse.OpRename2:
		if s.atHost.Load() == 0 {
			s.expect(h.Unique, h.NodeID)
		} else { // done in any order
			s.expect(0, 0)
		}
	case fuse.OpLookup:
	default:
		if s.dir == h.NodeID && s.dir != 0 {
			s.expect(0, 0)
		}
	}
	s.atHost.Add(1)
	return nil
}

// expect forgets what was told of another change than unique in dir.
func (s *shortcuts) expect(unique, dir uint64) {
	if s.dir == 0 && dir == 0 {
		return
	}
	s.dir = dir
	s.mu.Lock()
	s.change, s.until = fuse.AheadOut{Unique: unique, NodeID: dir}, time.Time{}
	s.mu.Unlock()
}

// attributes puts what was told of dir behind the header of answer, once, and tells whether there is anything.
func (s *shortcuts) attributes() bool {
	s.mu.Lock()
	known := time.Now().Before(s.until)
	if known {
		fuse.Put(s.answer[fuse.OutHeaderSize:], &s.change.Attr)
	}
	s.mu.Unlock()
	s.expect(0, 0)
	return known
}

// told takes what the host tells ahead.
func (s *shortcuts) told(a *fuse.AheadOut) {
	s.mu.Lock()
	if s.change.Unique == a.Unique && s.change.NodeID == a.NodeID {
		s.change.Attr, s.until = a.Attr, time.Now().Add(aheadTime)
	}
	s.mu.Unlock()
}

// replied counts a reply, before the kernel has it.
func (s *shortcuts) replied(unique uint64) {
	if unique&interruptBit == 0 {
		s.atHost.Add(-1)
	}
}

// interruptBit is set in the unique of an INTERRUPT, which may have a reply or none (FUSE_INT_REQ_BIT, fs/fuse/fuse_dev_i.h).
const interruptBit = 1
