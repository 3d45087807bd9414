// SPDX-License-Identifier: Apache-2.0

package wire

import "syscall"

// StreamOpen is the first message of a stream of FUSE messages, which the guest
// dials after a MountReply. OpenReply answers it.
type StreamOpen struct {
	SessionID [16]byte
	Token     []byte // as in Init
	MountID   uint32
	Index     uint16 // of this stream, below MountReply.Streams
	// Received and Sent count this stream's replies written to the device and
	// requests read from it, since the mount began; for a resumption.
	Received, Sent uint64
}

// Type is TypeStreamOpen.
func (*StreamOpen) Type() Type { return TypeStreamOpen }

func (m *StreamOpen) fields(c *codec) {
	c.id("session_id", &m.SessionID)
	c.blob("token", &m.Token, MaxToken)
	c.u32("mount_id", &m.MountID)
	c.u16("index", &m.Index)
	c.u64("received", &m.Received)
	c.u64("sent", &m.Sent)
}

// NotifyOpen2 is the first message of a notify channel of version 2, which the
// guest dials once the mount stands. OpenReply answers it.
type NotifyOpen2 struct {
	SessionID [16]byte
	Token     []byte // as in Init
	MountID   uint32
}

// Type is TypeNotifyOpen2.
func (*NotifyOpen2) Type() Type { return TypeNotifyOpen2 }

func (m *NotifyOpen2) fields(c *codec) {
	c.id("session_id", &m.SessionID)
	c.blob("token", &m.Token, MaxToken)
	c.u32("mount_id", &m.MountID)
}

// EventOpen is the first message of an event channel of version 2, one a
// session. OpenReply answers it.
type EventOpen struct {
	SessionID [16]byte
	Token     []byte // as in Init
	ThreadID  uint32 // the guest's thread that makes all calls of this channel
}

// Type is TypeEventOpen.
func (*EventOpen) Type() Type { return TypeEventOpen }

func (m *EventOpen) fields(c *codec) {
	c.id("session_id", &m.SessionID)
	c.blob("token", &m.Token, MaxToken)
	c.u32("thread_id", &m.ThreadID)
}

// OpenReply answers StreamOpen, NotifyOpen2 and EventOpen. After Errno 0 the
// connection is that channel; otherwise it ends.
type OpenReply struct {
	Errno syscall.Errno
	Text  string
	// Received and Sent count the stream's requests that arrived and its
	// replies that were sent, since the mount began; for a resumption.
	Received, Sent uint64
}

// Type is TypeOpenReply.
func (*OpenReply) Type() Type { return TypeOpenReply }

func (m *OpenReply) fields(c *codec) {
	c.errno("errno", &m.Errno)
	c.text("text", &m.Text)
	c.u64("received", &m.Received)
	c.u64("sent", &m.Sent)
}

// Ack tells the host on the control channel how many replies of one stream were
// written to the device since the mount began, so that it can forget them.
type Ack struct {
	MountID uint32
	Stream  uint16
	Count   uint64
}

// Type is TypeAck.
func (*Ack) Type() Type { return TypeAck }

func (m *Ack) fields(c *codec) {
	c.u32("mount_id", &m.MountID)
	c.u16("stream", &m.Stream)
	c.u64("count", &m.Count)
}
