// SPDX-License-Identifier: Apache-2.0

package wire

// Types of both versions and directions.
const TypeInit Type = 0

// Types of version 1, host to guest.
const (
	TypeMountSuitability Type = iota + 1
	TypeExportSuitability
	TypeStartPerfstat
	TypeStopPerfstat
)

// Types of version 1, guest to host.
const (
	TypeLogError Type = iota + 1
	TypeLogNotice
	TypePong
	TypeSuitabilityReply
	TypeNotifyOpen
	TypePerfstatReply
	TypeErrorReply
)

// Types of version 2.
const (
	TypeRefused Type = iota + 64
	TypePing
	TypeAlive
	TypeExportsRequest
	TypeExportsReply
	TypeMountRequest
	TypeMountReply
	TypeMountAsk
	TypeMountResult
	TypeUnmounted
	TypeUnmountAsk
	TypeUnmountReply
	TypeStreamOpen
	TypeNotifyOpen2
	TypeEventOpen
	TypeOpenReply
	TypeEvent
	TypeEventDone
	TypeAck
)

type direction uint8

const (
	toHost direction = 1 << iota
	toGuest
)

func (d direction) String() string {
	if d == toHost {
		return "host"
	}
	return "guest"
}

// kinds are all messages. PROTOCOL.md has the same table; a test compares them.
var kinds = []struct {
	t   Type
	d   direction
	new func() Message
}{
	{TypeInit, toHost | toGuest, func() Message { return new(Init) }},

	{TypeMountSuitability, toGuest, func() Message { return new(SuitabilityRequest) }},
	{TypeExportSuitability, toGuest, func() Message { return &SuitabilityRequest{Export: true} }},
	{TypeStartPerfstat, toGuest, func() Message { return new(PerfstatRequest) }},
	{TypeStopPerfstat, toGuest, func() Message { return &PerfstatRequest{Stop: true} }},

	{TypeLogError, toHost, func() Message { return new(LogError) }},
	{TypeLogNotice, toHost, func() Message { return new(LogNotice) }},
	{TypePong, toHost, func() Message { return new(Pong) }},
	{TypeSuitabilityReply, toHost, func() Message { return new(SuitabilityReply) }},
	{TypeNotifyOpen, toHost, func() Message { return new(NotifyOpen) }},
	{TypePerfstatReply, toHost, func() Message { return new(PerfstatReply) }},
	{TypeErrorReply, toHost, func() Message { return new(ErrorReply) }},

	{TypeRefused, toGuest, func() Message { return new(Refused) }},
	{TypePing, toHost | toGuest, func() Message { return new(Ping) }},
	{TypeAlive, toHost | toGuest, func() Message { return new(Alive) }},
	{TypeExportsRequest, toHost, func() Message { return new(ExportsRequest) }},
	{TypeExportsReply, toGuest, func() Message { return new(ExportsReply) }},
	{TypeMountRequest, toHost, func() Message { return new(MountRequest) }},
	{TypeMountReply, toGuest, func() Message { return new(MountReply) }},
	{TypeMountAsk, toGuest, func() Message { return new(MountAsk) }},
	{TypeMountResult, toHost, func() Message { return new(MountResult) }},
	{TypeUnmounted, toHost, func() Message { return new(Unmounted) }},
	{TypeUnmountAsk, toGuest, func() Message { return new(UnmountAsk) }},
	{TypeUnmountReply, toHost, func() Message { return new(UnmountReply) }},
	{TypeStreamOpen, toHost, func() Message { return new(StreamOpen) }},
	{TypeNotifyOpen2, toHost, func() Message { return new(NotifyOpen2) }},
	{TypeEventOpen, toHost, func() Message { return new(EventOpen) }},
	{TypeOpenReply, toGuest, func() Message { return new(OpenReply) }},
	{TypeEvent, toGuest, func() Message { return new(Event) }},
	{TypeEventDone, toHost, func() Message { return new(EventDone) }},
	{TypeAck, toHost, func() Message { return new(Ack) }},
}
