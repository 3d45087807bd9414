// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/splice"
)

// ownerBits are features of INIT that need the device's owner beside the server: backing files are registered by an
// ioctl on the device, and io_uring's queues are made there. A server at the other end of a stream can't have them.
const ownerBits = fuse.PASSTHROUGH | fuse.OVER_IO_URING

// Offsets in INIT's body. They are the same in every minor version that has the field.
const (
	initFlags       = 12 // in and out
	initReadahead   = 8
	initFlags2In    = 16
	initMaxWrite    = 20
	initMaxPages    = 28
	initFlags2Out   = 32
	initRequestSize = 16 // before 7.36: major, minor, max_readahead, flags
)

// initRequest hides from the server what it can't have, and notes which reply to learn from.
func (p *Pump) initRequest(msg []byte) {
	body := msg[fuse.InHeaderSize:]
	clearBits(body, initFlags, uint32(ownerBits&0xffffffff))
	clearBits(body, initFlags2In, uint32(ownerBits>>32))
	if len(body) >= initFlags2In+4 && uint64(binary.LittleEndian.Uint32(body[initFlags:]))&fuse.INIT_EXT != 0 {
		p.canResend = uint64(binary.LittleEndian.Uint32(body[initFlags2In:]))<<32&fuse.HAS_RESEND != 0
	}
	if len(body) >= initReadahead+4 {
		p.readahead = binary.LittleEndian.Uint32(body[initReadahead:])
	}
	p.initUnique = binary.LittleEndian.Uint64(msg[8:])
}

// initReply learns the sizes, and bounds what the server asks of the kernel to what this pump can carry.
func (p *Pump) initReply(msg []byte) error {
	if errno := int32(binary.LittleEndian.Uint32(msg[4:])); errno != 0 {
		p.log.Warn("the host refused FUSE's INIT", "error", fuse.Errno(-errno))
		return nil
	}
	body := msg[fuse.OutHeaderSize:]
	if len(body) < initRequestSize {
		return fmt.Errorf("%w: %d bytes in INIT's reply", ErrProtocol, len(body))
	}
	clearBits(body, initFlags, uint32(ownerBits&0xffffffff))
	clearBits(body, initFlags2Out, uint32(ownerBits>>32))
	most := MaxData
	if p.saves {
		most = splice.MaxData
	}
	write := uint32(4096) // the kernel's least (fs/fuse/inode.c, process_init_reply)
	if len(body) >= initMaxWrite+4 {
		write = min(max(write, binary.LittleEndian.Uint32(body[initMaxWrite:])), uint32(most))
		binary.LittleEndian.PutUint32(body[initMaxWrite:], write)
	}
	pages := uint16(32) // FUSE_DEFAULT_MAX_PAGES_PER_REQ
	if len(body) >= initMaxPages+2 && uint64(binary.LittleEndian.Uint32(body[initFlags:]))&fuse.MAX_PAGES != 0 {
		pages = min(max(1, binary.LittleEndian.Uint16(body[initMaxPages:])), uint16(most/pageSize))
		binary.LittleEndian.PutUint16(body[initMaxPages:], pages)
	}
	// The kernel asks with what it reads ahead by default, and takes the smaller of the reply and what raiseReadAhead has set since.
	if binary.LittleEndian.Uint32(body[initReadahead:]) >= p.readahead {
		binary.LittleEndian.PutUint32(body[initReadahead:], readAheadKiB<<10)
	}
	p.minor.Store(binary.LittleEndian.Uint32(body[4:]))
	p.maxReply = max(minReply, int(pages)*pageSize+fuse.OutHeaderSize+headRoom)
	p.requestSize = int(max(minRequest, write)) + headRoom + maxHeld
	p.maxWrite.Store(write) // last: from here on a reply is not looked at again
	if p.agreed != nil {
		p.agreed(agreed{p.requestSize, p.maxReply, p.minor.Load(), write, p.canResend})
	}
	return nil
}

func clearBits(body []byte, off int, bits uint32) {
	if len(body) >= off+4 {
		binary.LittleEndian.PutUint32(body[off:], binary.LittleEndian.Uint32(body[off:])&^bits)
	}
}
