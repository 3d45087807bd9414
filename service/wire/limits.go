// SPDX-License-Identifier: Apache-2.0

package wire

// Bounds in bytes, headers included, of what may be sent and is accepted.
const (
	// MaxControl bounds every message of a control or event channel but the
	// first (the seed's control buffer).
	MaxControl = 65536
	// MaxFirst bounds the first message of a connection, which is read before
	// the peer is known: Init, NotifyOpen, StreamOpen and their like.
	MaxFirst = 8192
	// MaxPerfstat is what a host has to accept instead of MaxControl when it
	// asks a guest of the seed for its perfstat, whose replies have no bound.
	// Ours keep to MaxControl.
	MaxPerfstat = 1 << 20
	// MaxEvent bounds an event of version 1 (the seed's event buffer).
	MaxEvent = 4096
	// MaxMountArgs bounds the arguments of a version 1 mount: the seed reads
	// them into a buffer of 4096 and terminates them there.
	MaxMountArgs = 4095
)

// Bounds of fields, in bytes or elements.
const (
	MaxTag     = 255  // a tag; not empty
	MaxPath    = 4095 // a path: PATH_MAX without its NUL
	MaxName    = 255  // software, kernel, socket and source names
	MaxText    = 4096 // text for people in version 2; longer ones are cut
	MaxToken   = 1024 // a token; empty where the transport proves the peer
	MaxOption  = 1024 // one mount option
	MaxOptions = 64   // mount options of one request
	MaxExports = 1024 // exports in one ExportsReply
	MaxErrno   = 4095 // MAX_ERRNO of the kernel
)
