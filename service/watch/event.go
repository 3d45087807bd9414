// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/maphash"

	"golang.org/x/sys/unix"
)

// Sizes in bytes, from linux/fanotify.h.
const (
	metadataSize   = 24 // struct fanotify_event_metadata
	infoHeaderSize = 4  // struct fanotify_event_info_header
	fidSize        = infoHeaderSize + 8 + 8
)

// event is one of fanotify's. Its slices are parts of the buffer that it was read into.
type event struct {
	op           Op
	overflow     bool
	pid          int32
	fsid         uint64
	dir, name    []byte // a handle (see handleOf) and a name in it
	newDir, newN []byte
	file         []byte
	info         []byte // all records, to compare
}

// touches are the operations that leave names as they are.
const touches = Modify | Attrib | CloseWrite | IsDir

var errEvent = errors.New("fanotify: an event that can't be read")

// mask has the kernel's bits for what is told.
const mask = unix.FAN_CREATE | unix.FAN_DELETE | unix.FAN_MODIFY | unix.FAN_ATTRIB | unix.FAN_CLOSE_WRITE | unix.FAN_RENAME | unix.FAN_ONDIR

func opOf(mask uint64) (o Op) {
	for _, m := range [...]struct {
		bit uint64
		op  Op
	}{
		{unix.FAN_CREATE, Create}, {unix.FAN_DELETE, Delete}, {unix.FAN_MODIFY, Modify}, {unix.FAN_ATTRIB, Attrib},
		{unix.FAN_CLOSE_WRITE, CloseWrite}, {unix.FAN_RENAME, Rename}, {unix.FAN_ONDIR, IsDir},
	} {
		if mask&m.bit != 0 {
			o |= m.op
		}
	}
	return o
}

// decode reads the first event in b, and returns what follows it.
func decode(b []byte) (e event, rest []byte, err error) {
	le := binary.NativeEndian
	if len(b) < metadataSize {
		return e, nil, errEvent
	}
	n, head := int64(le.Uint32(b)), int64(le.Uint16(b[6:]))
	if b[4] != unix.FANOTIFY_METADATA_VERSION || head < metadataSize || n < head || n > int64(len(b)) {
		return e, nil, errEvent
	}
	bits := le.Uint64(b[8:])
	e.op, e.overflow, e.pid = opOf(bits), bits&unix.FAN_Q_OVERFLOW != 0, int32(le.Uint32(b[20:]))
	e.info, rest = b[head:n], b[n:]
	for i := e.info; len(i) > 0; {
		if len(i) < infoHeaderSize {
			return e, nil, errEvent
		}
		size := int(le.Uint16(i[2:]))
		if size < infoHeaderSize || size > len(i) {
			return e, nil, errEvent
		}
		if err := e.record(i[:size]); err != nil {
			return e, nil, err
		}
		i = i[size:]
	}
	return e, rest, nil
}

// record reads one information record.
func (e *event) record(r []byte) error {
	le := binary.NativeEndian
	switch r[0] {
	case unix.FAN_EVENT_INFO_TYPE_FID, unix.FAN_EVENT_INFO_TYPE_DFID, unix.FAN_EVENT_INFO_TYPE_DFID_NAME,
		unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
	default:
		return nil
	}
	if len(r) < fidSize {
		return errEvent
	}
	e.fsid = le.Uint64(r[infoHeaderSize:])
	end := fidSize + int64(le.Uint32(r[infoHeaderSize+8:]))
	if end > int64(len(r)) {
		return errEvent
	}
	handle, name := r[infoHeaderSize+12:end], r[end:]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	switch r[0] {
	case unix.FAN_EVENT_INFO_TYPE_FID:
		e.file = handle
	case unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME:
		e.newDir, e.newN = handle, name
	default:
		e.dir, e.name = handle, name
	}
	return nil
}

// self says that the event is of the directory dir itself.
func (e *event) self() bool {
	return e.dir != nil && e.file == nil && (len(e.name) == 0 || string(e.name) == ".")
}

// batch decodes what one read gave, and joins what is the same.
type batch struct {
	events []event
	seed   maphash.Seed
	seen   map[uint64]int // index in events by the hash of info; since the last event that changed names
}

func newBatch() *batch { return &batch{seed: maphash.MakeSeed(), seen: make(map[uint64]int)} }

// fill takes the events of b. After an error the ones before it are there.
func (t *batch) fill(b []byte) error {
	clear(t.seen)
	clear(t.events)
	t.events = t.events[:0]
	for len(b) > 0 {
		e, rest, err := decode(b)
		if err != nil {
			return err
		}
		b = rest
		if e.overflow || e.op&^touches != 0 {
			clear(t.seen)
		} else {
			h := maphash.Bytes(t.seed, e.info)
			if i, ok := t.seen[h]; ok {
				if old := &t.events[i]; old.pid == e.pid && old.op&IsDir == e.op&IsDir && bytes.Equal(old.info, e.info) {
					old.op |= e.op
					continue
				}
			}
			t.seen[h] = len(t.events)
		}
		t.events = append(t.events, e)
	}
	return nil
}
