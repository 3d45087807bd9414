// SPDX-License-Identifier: Apache-2.0

package wire

import "syscall"

// Versions of the protocol.
const (
	Version1 = 1
	Version2 = 2
)

// Features of Init.
const (
	// FeatureKeep: the host keeps a mount that has lost its stream, as long as its
	// session lives. A StreamOpen with index 0 and counts 0 goes on with it.
	FeatureKeep uint64 = 1 << 0
)

// Init is the first message of a control channel, from both ends: the guest
// offers, the host answers with what is agreed. Of version 1 it is six bytes,
// the header alone; a Version below 2 encodes as that, and decodes as 1.
type Init struct {
	// Version is the newest version that the guest speaks; in the host's
	// answer, the one that is spoken from here on.
	Version uint16
	// MinVersion is the oldest version that the sender would speak.
	MinVersion uint16
	// Features are the bits that the guest can do; in the host's answer the
	// subset that both will use.
	Features uint64
	// MaxMessage is the longest framed message that the sender accepts, in
	// bytes; at least MaxControl.
	MaxMessage uint32
	// MaxWrite is the most data in bytes of one READ or WRITE that the sender
	// can carry; a mount uses the smaller one.
	MaxWrite uint32
	// FuseMinor is the newest minor version of FUSE 7 that the sender knows.
	FuseMinor uint32
	// MaxStreams is how many streams of one mount the sender can serve.
	MaxStreams uint16
	// Window is how many replies the sender keeps, or leaves, unacknowledged
	// for a resumption; 0: it can't resume.
	Window uint16
	// BootID names the boot of the sender's kernel (/proc/sys/kernel/random/boot_id).
	BootID [16]byte
	// SessionID names the session. The guest draws it once, at random, and
	// gives it in every Init until it ends; the host repeats it.
	SessionID [16]byte
	// Token is the guest's proof of who it is, where the transport has none.
	// The host's answer has none.
	Token []byte
	// Kernel and Software are for people: uname's release, program and version.
	Kernel, Software string
	// Socket is the address that the guest listens on, for a host that asks
	// for mounts; empty when it doesn't listen.
	Socket string
}

// Type is TypeInit.
func (*Init) Type() Type { return TypeInit }

func (m *Init) fields(c *codec) {
	if c.enc && m.Version < Version2 {
		return
	}
	if !c.enc && len(c.b) == 0 {
		m.Version, m.MinVersion = Version1, Version1
		return
	}
	c.u16("version", &m.Version)
	if m.Version < Version2 {
		c.fail("version", "%d in the form of version 2", m.Version)
	}
	c.u16("min_version", &m.MinVersion)
	c.u64("features", &m.Features)
	c.u32("max_message", &m.MaxMessage)
	c.u32("max_write", &m.MaxWrite)
	c.u32("fuse_minor", &m.FuseMinor)
	c.u16("max_streams", &m.MaxStreams)
	c.u16("window", &m.Window)
	c.id("boot_id", &m.BootID)
	c.id("session_id", &m.SessionID)
	c.blob("token", &m.Token, MaxToken)
	c.str("kernel", &m.Kernel, MaxName)
	c.str("software", &m.Software, MaxName)
	c.str("socket", &m.Socket, MaxName)
	if !c.enc {
		c.b = nil // fields of a later version, see doc.go
	}
}

// Refused takes the place of the host's answer to any first message: the cause,
// and then the connection ends. After Init it may come at any time on the
// control channel.
type Refused struct {
	Errno syscall.Errno
	Text  string
}

// Type is TypeRefused.
func (*Refused) Type() Type { return TypeRefused }

func (m *Refused) fields(c *codec) {
	c.errno("errno", &m.Errno)
	c.text("text", &m.Text)
}

// Ping asks either end for an Alive with the same ID, on the control channel.
type Ping struct{ ID uint32 }

// Type is TypePing.
func (*Ping) Type() Type { return TypePing }

func (m *Ping) fields(c *codec) { c.u32("id", &m.ID) }

// Alive answers a Ping.
type Alive struct{ ID uint32 }

// Type is TypeAlive.
func (*Alive) Type() Type { return TypeAlive }

func (m *Alive) fields(c *codec) { c.u32("id", &m.ID) }
