// SPDX-License-Identifier: Apache-2.0

package wire

// SuitabilityRequest asks which of Paths suit a mount, or, with Export, an export.
type SuitabilityRequest struct {
	Export bool // in the type, not in the body
	ID     uint16
	Paths  []string
}

// Type is TypeMountSuitability or TypeExportSuitability.
func (m *SuitabilityRequest) Type() Type {
	if m.Export {
		return TypeExportSuitability
	}
	return TypeMountSuitability
}

func (m *SuitabilityRequest) fields(c *codec) {
	c.u16("id", &m.ID)
	paths(c, &m.Paths)
}

// SuitabilityReply answers both kinds of SuitabilityRequest with those of its
// paths that suit, in their order.
type SuitabilityReply struct {
	ID    uint16
	Paths []string
}

// Type is TypeSuitabilityReply.
func (*SuitabilityReply) Type() Type { return TypeSuitabilityReply }

func (m *SuitabilityReply) fields(c *codec) {
	c.u16("id", &m.ID)
	paths(c, &m.Paths)
}

// paths are strings to the end of the message, each with a NUL that its length
// does not count.
func paths(c *codec, v *[]string) {
	for i := 0; c.err == nil && (c.enc && i < len(*v) || !c.enc && len(c.b) > 0); i++ {
		if !c.enc {
			*v = append(*v, "")
		}
		c.str("path", &(*v)[i], MaxPath)
		var nul uint8
		c.u8("nul", &nul)
		if nul != 0 {
			c.fail("nul", "path %q is not terminated", clip((*v)[i]))
		}
	}
}

// PerfstatRequest asks the guest to begin timing the requests of the mount at
// Dir, or, with Stop, to end and report.
type PerfstatRequest struct {
	Stop bool // in the type, not in the body
	ID   uint16
	Dir  string
}

// Type is TypeStartPerfstat or TypeStopPerfstat.
func (m *PerfstatRequest) Type() Type {
	if m.Stop {
		return TypeStopPerfstat
	}
	return TypeStartPerfstat
}

func (m *PerfstatRequest) fields(c *codec) {
	c.u16("id", &m.ID)
	c.rest("dir", &m.Dir, MaxPath)
}

// PerfstatReply answers a PerfstatRequest. Only the answer to one with Stop has
// entries, and it may have none: the ID tells the two apart. Times are in
// nanoseconds of the guest's CLOCK_MONOTONIC.
type PerfstatReply struct {
	ID      uint16
	Now     uint64
	Entries []PerfEntry // at most MaxPerfEntries are sent
}

// PerfEntry is one FUSE request: when it was read from the device, and when its
// reply came; Stop is 0 where none was seen.
type PerfEntry struct{ Unique, Start, Stop uint64 }

const (
	// MaxPerfEntries fill a message of MaxControl bytes exactly.
	MaxPerfEntries = (MaxControl - perfHeader) / perfEntry

	perfHeader  = headerLen + 2 + 8
	perfEntry   = 24
	perfSegment = 2730 // entries that the seed keeps together
	perfExtra   = 16   // garbage that it sends for each segment, after all entries
)

// Type is TypePerfstatReply.
func (*PerfstatReply) Type() Type { return TypePerfstatReply }

func (m *PerfstatReply) fields(c *codec) {
	c.u16("id", &m.ID)
	c.u64("now", &m.Now)
	n := len(m.Entries)
	if !c.enc && c.err == nil {
		var ok bool
		if n, ok = perfEntries(len(c.b)); !ok {
			c.fail("entries", "%d bytes hold no whole number of them", len(c.b))
			return
		}
		m.Entries = make([]PerfEntry, n)
	}
	for i := 0; i < n && c.err == nil; i++ {
		e := &m.Entries[i]
		c.u64("unique", &e.Unique)
		c.u64("start", &e.Start)
		c.u64("stop", &e.Stop)
	}
	if !c.enc && c.err == nil {
		c.b = nil // the seed's garbage
	}
}

// perfEntries returns how many entries there are in size bytes. Up to what fits
// MaxControl the two forms can't be mistaken for each other; only the seed sends
// more.
func perfEntries(size int) (n int, ok bool) {
	if size%perfEntry == 0 && size <= MaxPerfEntries*perfEntry {
		return size / perfEntry, true
	}
	const segment = perfSegment*perfEntry + perfExtra
	segments := (size + segment - 1) / segment
	size -= segments * perfExtra
	n = size / perfEntry
	return n, size%perfEntry == 0 && (n+perfSegment-1)/perfSegment == segments
}

// ErrorReply answers any request of version 1 that failed.
type ErrorReply struct {
	ID   uint16
	Text string
}

// Type is TypeErrorReply.
func (*ErrorReply) Type() Type { return TypeErrorReply }

func (m *ErrorReply) fields(c *codec) {
	c.u16("id", &m.ID)
	c.restText("text", &m.Text, MaxControl-headerLen-2)
}

// LogError is an error of the guest, for the host's log.
type LogError struct{ Text string }

// Type is TypeLogError.
func (*LogError) Type() Type { return TypeLogError }

func (m *LogError) fields(c *codec) { c.restText("text", &m.Text, MaxControl-headerLen) }

// LogNotice is something to know about the guest, for the host's log.
type LogNotice struct{ Text string }

// Type is TypeLogNotice.
func (*LogNotice) Type() Type { return TypeLogNotice }

func (m *LogNotice) fields(c *codec) { c.restText("text", &m.Text, MaxControl-headerLen) }

// Pong answers an event with ActionPing, on the control channel.
type Pong struct{}

// Type is TypePong.
func (*Pong) Type() Type { return TypePong }

func (*Pong) fields(*codec) {}

// NotifyOpen is the first message of a notify channel of version 1, for the
// mount at Dir.
type NotifyOpen struct{ Dir string }

// Type is TypeNotifyOpen.
func (*NotifyOpen) Type() Type { return TypeNotifyOpen }

func (m *NotifyOpen) fields(c *codec) { c.rest("dir", &m.Dir, MaxPath) }
