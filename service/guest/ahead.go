// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

const (
	// aheadTime is how long something is an answer that was told ahead, or is known of a new file. The kernel asks right after.
	aheadTime = 10 * time.Millisecond
	// maxLocked is how many files with locks are remembered. With one more each FLUSH goes to the host.
	maxLocked = 1024
)

// shortcuts are the answers that the pump knows without the host. What they save is a round trip for each change in a
// directory, one for each close, one for each directory that is read, and one for each new file that is written to; what anything else means
// is the server's business.
//
// The kernel drops a directory's attributes after each change in it, and asks for them again, to check permissions by.
// The host tells them with the reply of the change (fuse.AheadOut). They are kept for one directory and a moment, and
// only if they can't be old: no request was at the host when the change went there, and none about the directory, nor
// another change, has gone since.
//
// When the kernel has read a directory it asks whether there are more entries. The host tells with the last ones that there are none
// (fuse.EndOut).
//
// Before a file is written to for the first time the kernel asks for its capabilities (security.capability), which a write
// takes away. A file that was just made (CREATE with O_EXCL) and about which nothing was asked since has none.
type shortcuts struct {
	noFlush bool                // FLUSH does nothing at the host, but to drop locks
	locked  map[uint64]struct{} // nodes that have been locked

	atHost    int                 // requests whose reply has not come, but for RELEASEs
	releasing map[uint64]struct{} // RELEASEs whose reply has not come, by their unique: they do nothing to a directory

	change fuse.AheadOut // the last change, if it went alone: Unique and NodeID, else 0; and its directory's attributes
	until  time.Time     // when they are no longer an answer; zero: they have not come

	end      fuse.EndOut // the last directory whose end was told; NodeID 0: none
	endUntil time.Time   // when that is no longer an answer

	creating   uint64    // the last CREATE with O_EXCL, by its unique
	created    uint64    // the node that the last one made, about which nothing was asked; 0: none
	createdEnd time.Time // when it is no longer new

	answer [fuse.OutHeaderSize + fuse.AttrOutSize]byte
}

// request looks at a request that is about to go to the host, and returns its answer if that is known here, valid until
// the next call.
func (s *shortcuts) request(h *fuse.InHeader, body []byte) []byte {
	if h.Opcode.NoReply() {
		return nil
	}
	if s.created != 0 && h.NodeID == s.created && h.Opcode != fuse.OpGetattr {
		s.created = 0
		if h.Opcode == fuse.OpGetxattr && len(body) > getxattrName && string(body[getxattrName:]) == "security.capability\x00" && time.Now().Before(s.createdEnd) {
			fuse.Put(s.answer[:], &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize), Error: -int32(unix.ENODATA), Unique: h.Unique})
			return s.answer[:fuse.OutHeaderSize]
		}
	}
	switch h.Opcode {
	case fuse.OpGetattr:
		if h.NodeID == s.change.NodeID && len(body) >= 4 && binary.LittleEndian.Uint32(body)&fuse.GETATTR_FH == 0 && s.attributes() {
			fuse.Put(s.answer[:], &fuse.OutHeader{Len: uint32(len(s.answer)), Unique: h.Unique})
			return s.answer[:]
		}
	case fuse.OpReaddir, fuse.OpReaddirplus:
		if h.NodeID == s.end.NodeID && len(body) >= readOffset+8 && binary.LittleEndian.Uint64(body[readOffset:]) == s.end.Offset {
			s.end.NodeID = 0
			if time.Now().Before(s.endUntil) {
				fuse.Put(s.answer[:], &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize), Unique: h.Unique})
				return s.answer[:fuse.OutHeaderSize]
			}
		}
		if h.NodeID == s.change.NodeID {
			s.forget() // its atime may change
		}
	case fuse.OpFlush:
		// Of a file that was not opened (handle 0) the host says that it never needs one.
		opened := len(body) >= 8 && binary.LittleEndian.Uint64(body) != 0
		if !s.mayLock(h.NodeID) && opened {
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
		s.forget()
		s.creating, s.end.NodeID = 0, 0
		if h.Opcode == fuse.OpCreate && len(body) >= 4 && binary.LittleEndian.Uint32(body)&unix.O_EXCL != 0 {
			s.creating = h.Unique
		}
		if s.atHost == 0 { // with others the host may do it in any order
			s.change.Unique, s.change.NodeID = h.Unique, h.NodeID
		}
	case fuse.OpRelease:
		s.releasing[h.Unique] = struct{}{}
		return nil
	case fuse.OpLookup:
	default:
		if h.NodeID == s.change.NodeID {
			s.forget()
		}
	}
	s.atHost++
	return nil
}

// forget forgets the last change, and what was told of it.
func (s *shortcuts) forget() { s.change.Unique, s.change.NodeID, s.until = 0, 0, time.Time{} }

// attributes puts what was told behind the header of answer, once, and tells whether there is anything.
func (s *shortcuts) attributes() bool {
	known := !s.until.IsZero() && time.Now().Before(s.until)
	fuse.Put(s.answer[fuse.OutHeaderSize:], &s.change.Attr)
	s.forget()
	return known
}

// told takes what the host tells ahead. False: this is something else.
func (s *shortcuts) told(msg []byte) bool {
	var (
		a fuse.AheadOut
		e fuse.EndOut
	)
	body := msg[fuse.OutHeaderSize:]
	switch code := binary.LittleEndian.Uint32(msg[4:]); {
	case code == fuse.AheadCode && len(body) == fuse.AheadOutSize:
		fuse.Decode(&a, body)
		if a.Unique == s.change.Unique && a.NodeID == s.change.NodeID {
			s.change.Attr, s.until = a.Attr, time.Now().Add(aheadTime)
		}
	case code == fuse.EndCode && len(body) == fuse.EndOutSize:
		fuse.Decode(&e, body)
		s.end, s.endUntil = e, time.Now().Add(aheadTime)
	default:
		return false
	}
	return true
}

// mayLock tells whether somebody may have locked a file, so that the host has to hear of its closing at once.
func (s *shortcuts) mayLock(node uint64) bool {
	_, locked := s.locked[node]
	return locked || !s.noFlush
}

// unanswered is how many requests have no reply yet.
func (s *shortcuts) unanswered() int { return s.atHost + len(s.releasing) }

// replied looks at a reply of the host.
func (s *shortcuts) replied(msg []byte) {
	unique := binary.LittleEndian.Uint64(msg[8:])
	if _, release := s.releasing[unique]; release {
		delete(s.releasing, unique)
	} else if unique&interruptBit == 0 {
		s.atHost--
	}
	if unique == s.creating && binary.LittleEndian.Uint32(msg[4:]) == 0 && len(msg) >= fuse.OutHeaderSize+8 {
		s.creating, s.created, s.createdEnd = 0, binary.LittleEndian.Uint64(msg[fuse.OutHeaderSize:]), time.Now().Add(aheadTime)
	}
}

const (
	getxattrName = 8 // where GETXATTR's name begins: behind fuse_getxattr_in
	readOffset   = 8 // the offset in fuse_read_in
	readSize     = 16
)

// interruptBit is set in the unique of an INTERRUPT, which may have a reply or none (FUSE_INT_REQ_BIT, fs/fuse/fuse_dev_i.h).
const interruptBit = 1
