// SPDX-License-Identifier: Apache-2.0

package wire

import "syscall"

// ExportsRequest asks the host which exports this guest may mount.
type ExportsRequest struct{ ID uint32 }

// Type is TypeExportsRequest.
func (*ExportsRequest) Type() Type { return TypeExportsRequest }

func (m *ExportsRequest) fields(c *codec) { c.u32("id", &m.ID) }

// ExportsReply answers an ExportsRequest. A list that does not fit one message
// comes in several of one ID, all but the last with More.
type ExportsReply struct {
	ID      uint32
	More    bool
	Exports []ExportInfo
}

// ExportInfo is an export as its guests see it.
type ExportInfo struct {
	Tag      string
	ReadOnly bool
	Text     string // what it is, for people; may be empty
}

// Type is TypeExportsReply.
func (*ExportsReply) Type() Type { return TypeExportsReply }

func (m *ExportsReply) fields(c *codec) {
	c.u32("id", &m.ID)
	c.bool("more", &m.More)
	list(c, "exports", &m.Exports, MaxExports, func(c *codec, e *ExportInfo) {
		c.tag("tag", &e.Tag)
		c.bool("read_only", &e.ReadOnly)
		c.text("text", &e.Text)
	})
}

// MountRequest asks the host for the export named Tag. Dir is where the guest
// will mount it, which the host shows and never interprets; Options are those of
// the mount that concern the host.
type MountRequest struct {
	ID      uint32
	Tag     string
	Dir     string
	Options []string
}

// Type is TypeMountRequest.
func (*MountRequest) Type() Type { return TypeMountRequest }

func (m *MountRequest) fields(c *codec) {
	c.u32("id", &m.ID)
	c.tag("tag", &m.Tag)
	c.str("dir", &m.Dir, MaxPath)
	options(c, &m.Options)
}

func options(c *codec, v *[]string) {
	list(c, "options", v, MaxOptions, func(c *codec, s *string) { c.str("option", s, MaxOption) })
}

// MountReply answers a MountRequest. Errno 0: the mount exists at the host under
// MountID, for this session, until Unmounted. Otherwise Errno and Text name the
// cause, and the rest is zero.
type MountReply struct {
	ID       uint32
	Errno    syscall.Errno
	Text     string
	MountID  uint32
	ReadOnly bool
	MaxWrite uint32 // bytes of data in one READ or WRITE of this mount, at most
	Streams  uint16 // how many the guest has to open, at least 1
	Source   string // what the mount table shows as its source
	NoFlush  bool   // FLUSH only drops locks: the guest may answer it where there are none
}

// Type is TypeMountReply.
func (*MountReply) Type() Type { return TypeMountReply }

func (m *MountReply) fields(c *codec) {
	c.u32("id", &m.ID)
	c.errno("errno", &m.Errno)
	c.text("text", &m.Text)
	c.u32("mount_id", &m.MountID)
	c.bool("read_only", &m.ReadOnly)
	c.u32("max_write", &m.MaxWrite)
	c.u16("streams", &m.Streams)
	c.str("source", &m.Source, MaxName)
	c.bool("no_flush", &m.NoFlush)
}

// MountAsk asks the guest to mount the export named Tag at Dir. The guest
// decides whether it may; if so it sends the ordinary MountRequest, and in the
// end a MountResult either way.
type MountAsk struct {
	ID      uint32
	Tag     string
	Dir     string // absolute in the guest
	Options []string
}

// Type is TypeMountAsk.
func (*MountAsk) Type() Type { return TypeMountAsk }

func (m *MountAsk) fields(c *codec) {
	c.u32("id", &m.ID)
	c.tag("tag", &m.Tag)
	c.str("dir", &m.Dir, MaxPath)
	options(c, &m.Options)
}

// MountResult answers a MountAsk, with its ID: Errno 0 and the MountID of the
// mount that now stands, or the cause.
type MountResult struct {
	ID      uint32
	MountID uint32
	Errno   syscall.Errno
	Text    string
}

// Type is TypeMountResult.
func (*MountResult) Type() Type { return TypeMountResult }

func (m *MountResult) fields(c *codec) {
	c.u32("id", &m.ID)
	c.u32("mount_id", &m.MountID)
	c.errno("errno", &m.Errno)
	c.text("text", &m.Text)
}

// Reason is why a mount ends. A reader keeps numbers that it doesn't know.
type Reason uint16

// Reasons of Unmounted and UnmountAsk.
const (
	ReasonAsked      Reason = 1 // somebody on the sender's side wanted it
	ReasonShutdown   Reason = 2 // the sender ends
	ReasonExportGone Reason = 3 // the export is no longer offered to this guest
	ReasonStreamLost Reason = 4 // a stream ended and could not be resumed
	ReasonProtocol   Reason = 5 // the reader broke the protocol
	ReasonFailed     Reason = 6 // the mount could not be completed, or its device failed
)

// Unmounted tells the host that the mount is gone and its MountID free.
type Unmounted struct {
	MountID uint32
	Reason  Reason
	Text    string
}

// Type is TypeUnmounted.
func (*Unmounted) Type() Type { return TypeUnmounted }

func (m *Unmounted) fields(c *codec) {
	c.u32("mount_id", &m.MountID)
	c.u16("reason", (*uint16)(&m.Reason))
	c.text("text", &m.Text)
}

// UnmountAsk asks the guest to unmount. It answers with UnmountReply; if that
// is a success Unmounted precedes it.
type UnmountAsk struct {
	ID      uint32
	MountID uint32
	Reason  Reason
	Text    string
}

// Type is TypeUnmountAsk.
func (*UnmountAsk) Type() Type { return TypeUnmountAsk }

func (m *UnmountAsk) fields(c *codec) {
	c.u32("id", &m.ID)
	c.u32("mount_id", &m.MountID)
	c.u16("reason", (*uint16)(&m.Reason))
	c.text("text", &m.Text)
}

// UnmountReply answers an UnmountAsk: Errno 0, or why the mount still stands.
type UnmountReply struct {
	ID    uint32
	Errno syscall.Errno
	Text  string
}

// Type is TypeUnmountReply.
func (*UnmountReply) Type() Type { return TypeUnmountReply }

func (m *UnmountReply) fields(c *codec) {
	c.u32("id", &m.ID)
	c.errno("errno", &m.Errno)
	c.text("text", &m.Text)
}
