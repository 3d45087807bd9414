// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"
	"io"
)

// Type is the number of a message. Below 64 it is of version 1, where each
// direction has numbers of its own; from 64 on it is of version 2, in one space.
type Type uint16

// Message is one of this package's message types, always by pointer. The caller
// owns it; decoded ones share no memory with what they were decoded from.
type Message interface {
	Type() Type
	// fields encodes or decodes the body, field by field in the wire's order.
	fields(c *codec)
}

// Append appends m with its header to b. It fails, with b as it was, when m is
// out of the bounds that its reader will check.
func Append(b []byte, m Message) ([]byte, error) {
	c := codec{enc: true, b: le.AppendUint16(le.AppendUint32(b, 0), uint16(m.Type()))}
	m.fields(&c)
	n := len(c.b) - len(b)
	if n > MaxControl {
		c.fail("length", "%d bytes, at most %d", n, MaxControl)
	}
	if c.err != nil {
		return b, fmt.Errorf("encode %T: %w", m, c.err)
	}
	le.PutUint32(c.b[len(b):], uint32(n))
	return c.b, nil
}

// Write writes m with one call of w.Write, or nothing when m is out of bounds.
func Write(w io.Writer, m Message) error {
	b, err := Append(nil, m)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// ToHost decodes what a guest sent.
func ToHost(t Type, body []byte) (Message, error) { return decode(toHost, t, body) }

// ToGuest decodes what a host sent.
func ToGuest(t Type, body []byte) (Message, error) { return decode(toGuest, t, body) }

func decode(d direction, t Type, body []byte) (Message, error) {
	for _, k := range kinds {
		if k.t != t || k.d&d == 0 {
			continue
		}
		m := k.new()
		c := codec{b: body}
		m.fields(&c)
		if c.err == nil && len(c.b) > 0 {
			c.fail("length", "%d bytes after the last field", len(c.b))
		}
		if c.err != nil {
			return nil, fmt.Errorf("decode %T: %w", m, c.err)
		}
		return m, nil
	}
	return nil, fmt.Errorf("%w: no message to the %v has type %d", ErrProtocol, d, t)
}
