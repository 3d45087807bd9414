// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"syscall"
)

// Action is the call that an event has the guest make.
type Action uint8

// Actions. Those of version 1 end at ActionMknod, ActionPing apart, which
// version 2 has not.
const (
	ActionRmdir      Action = 0
	ActionUnlink     Action = 1
	ActionMkdir      Action = 2
	ActionSymlink    Action = 3
	ActionTruncate   Action = 4 // shows as a modification
	ActionChmod      Action = 5 // shows as a change of attributes
	ActionMknod      Action = 6 // version 1: a regular file of mode 0600
	ActionRename     Action = 7 // version 2: Path to NewPath
	ActionCloseWrite Action = 8 // version 2: open for writing, and close
	ActionWatched    Action = 9 // version 2: no call; ENODATA if nobody would see one
	ActionPing       Action = 128
)

// EventV1 is one event of version 1. Path is absolute in the guest.
type EventV1 struct {
	Path   string
	Action Action
}

// AppendEventV1 appends e as it goes over an 'e' channel.
func AppendEventV1(b []byte, e EventV1) ([]byte, error) {
	n := len(e.Path) + 1
	if headerLen+n+1 > MaxEvent {
		return b, fmt.Errorf("%w: event of version 1: path of %d bytes, at most %d", ErrProtocol, len(e.Path), MaxEvent-headerLen-2)
	}
	if i := bytes.IndexByte([]byte(e.Path), 0); i >= 0 {
		return b, fmt.Errorf("%w: event of version 1: path %q holds a NUL", ErrProtocol, clip(e.Path))
	}
	b = le.AppendUint32(b, uint32(headerLen+n+1))
	b = binary.BigEndian.AppendUint16(b, uint16(n)) // the one number in network order
	b = append(b, e.Path...)
	return append(b, 0, byte(e.Action)), nil
}

// EventReader reads the events of an 'e' channel, as Reader reads messages.
type EventReader struct{ r *Reader }

// NewEventReader returns an EventReader.
func NewEventReader(r io.Reader) *EventReader { return &EventReader{NewReader(r, MaxEvent)} }

// Next returns the next event; errors are those of Reader.Next.
func (r *EventReader) Next() (EventV1, error) {
	// The frame is that of a message, with n, big-endian, where the type is.
	t, body, err := r.r.Next()
	if err != nil {
		return EventV1{}, err
	}
	n := int(bits.ReverseBytes16(uint16(t)))
	if len(body) != n+1 {
		return EventV1{}, fmt.Errorf("%w: event of version 1: path and action of %d and 1 bytes in %d", ErrProtocol, n, len(body))
	}
	path, a := body[:n], Action(body[n])
	if n == 0 && a == ActionPing {
		return EventV1{Action: a}, nil // it has no use for a path, and the seed asks for none
	}
	if n == 0 || bytes.IndexByte(path, 0) != n-1 {
		return EventV1{}, fmt.Errorf("%w: event of version 1: path %q does not end with its only NUL", ErrProtocol, clip(string(path)))
	}
	return EventV1{Path: string(path[:n-1]), Action: a}, nil
}

// Event is one event of version 2, on an event channel. Paths are relative to
// the root of the mount, without a leading slash; an empty one is the root.
type Event struct {
	Number  uint64 // counts up from 1 in each session
	MountID uint32
	Action  Action
	Mode    uint32 // st_mode of the file as it is at the host
	Path    string
	NewPath string // of ActionRename, else empty
}

// Type is TypeEvent.
func (*Event) Type() Type { return TypeEvent }

func (m *Event) fields(c *codec) {
	c.u64("number", &m.Number)
	c.u32("mount_id", &m.MountID)
	c.u8("action", (*uint8)(&m.Action))
	c.u32("mode", &m.Mode)
	c.str("path", &m.Path, MaxPath)
	c.str("new_path", &m.NewPath, MaxPath)
}

// EventDone answers an Event on its channel, in order: what its call returned.
type EventDone struct {
	Number uint64
	Errno  syscall.Errno
}

// Type is TypeEventDone.
func (*EventDone) Type() Type { return TypeEventDone }

func (m *EventDone) fields(c *codec) {
	c.u64("number", &m.Number)
	c.errno("errno", &m.Errno)
}
