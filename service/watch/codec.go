// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"encoding/binary"
	"errors"
)

// MaxEncoded is the most that a Change takes, in bytes.
const MaxEncoded = 4 + 3*16 + 4 + 2*(2+255)

// Append appends a change in the form that Decode reads: little-endian, names of at most 255 bytes with their length before them. The PID
// is left out.
func Append(b []byte, c *Change) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(c.Op))
	for _, i := range [...]Inode{c.Dir, c.NewDir, c.Inode} {
		b = le.AppendUint64(le.AppendUint64(b, i.Dev), i.Ino)
	}
	b = le.AppendUint32(b, c.Mode)
	for _, s := range [...]string{c.Name, c.NewName} {
		s = s[:min(len(s), 255)]
		b = append(le.AppendUint16(b, uint16(len(s))), s...)
	}
	return b
}

var errShort = errors.New("a change is cut off")

// Decode takes a change from the beginning of b, and returns the rest.
func Decode(b []byte) (c Change, rest []byte, err error) {
	le := binary.LittleEndian
	if len(b) < 4+3*16+4 {
		return c, nil, errShort
	}
	c.Op, b = Op(le.Uint32(b)), b[4:]
	for _, i := range [...]*Inode{&c.Dir, &c.NewDir, &c.Inode} {
		i.Dev, i.Ino, b = le.Uint64(b), le.Uint64(b[8:]), b[16:]
	}
	c.Mode, b = le.Uint32(b), b[4:]
	for _, s := range [...]*string{&c.Name, &c.NewName} {
		if len(b) < 2 || len(b)-2 < int(le.Uint16(b)) {
			return c, nil, errShort
		}
		n := int(le.Uint16(b))
		*s, b = string(b[2:2+n]), b[2+n:]
	}
	return c, b, nil
}
