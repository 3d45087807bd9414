// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unicode/utf8"
)

// ErrProtocol is wrapped by every error that says what a peer did wrong, and by
// those that refuse to encode what a peer would refuse.
var ErrProtocol = errors.New("protocol violation")

var le = binary.LittleEndian

// codec walks the fields of one body. Encoding appends to b; decoding takes
// from its front. After the first error every field does nothing.
type codec struct {
	enc bool
	b   []byte
	err error
	// seen is told of each field, for the test that compares this package with
	// PROTOCOL.md; nil otherwise.
	seen func(field, kind string, max int)
}

func (c *codec) note(field, kind string, max int) {
	if c.seen != nil {
		c.seen(field, kind, max)
	}
}

func (c *codec) fail(field, format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s: %s", ErrProtocol, field, fmt.Sprintf(format, args...))
	}
}

// take returns the next n bytes of the body, or nil when there are fewer.
func (c *codec) take(field string, n int) []byte {
	if c.err != nil {
		return nil
	}
	if n > len(c.b) {
		c.fail(field, "needs %d bytes, the message has %d left", n, len(c.b))
		return nil
	}
	p := c.b[:n:n]
	c.b = c.b[n:]
	return p
}

func (c *codec) u8(field string, v *uint8) {
	c.note(field, "u8", 0)
	if c.enc {
		c.b = append(c.b, *v)
	} else if p := c.take(field, 1); p != nil {
		*v = p[0]
	}
}

func (c *codec) u16(field string, v *uint16) {
	c.note(field, "u16", 0)
	if c.enc {
		c.b = le.AppendUint16(c.b, *v)
	} else if p := c.take(field, 2); p != nil {
		*v = le.Uint16(p)
	}
}

func (c *codec) u32(field string, v *uint32) {
	c.note(field, "u32", 0)
	if c.enc {
		c.b = le.AppendUint32(c.b, *v)
	} else if p := c.take(field, 4); p != nil {
		*v = le.Uint32(p)
	}
}

func (c *codec) u64(field string, v *uint64) {
	c.note(field, "u64", 0)
	if c.enc {
		c.b = le.AppendUint64(c.b, *v)
	} else if p := c.take(field, 8); p != nil {
		*v = le.Uint64(p)
	}
}

func (c *codec) bool(field string, v *bool) {
	c.note(field, "bool", 0)
	if c.enc {
		var n byte
		if *v {
			n = 1
		}
		c.b = append(c.b, n)
	} else if p := c.take(field, 1); p != nil {
		if p[0] > 1 {
			c.fail(field, "is %d, not 0 or 1", p[0])
		}
		*v = p[0] == 1
	}
}

// errno is a u32, since Linux's numbers are what a guest's kernel gets in the end.
func (c *codec) errno(field string, v *syscall.Errno) {
	c.note(field, "errno", MaxErrno)
	if c.enc {
		if *v > MaxErrno {
			c.fail(field, "%d is no errno, they end at %d", uint64(*v), MaxErrno)
			return
		}
		c.b = le.AppendUint32(c.b, uint32(*v))
	} else if p := c.take(field, 4); p != nil {
		n := le.Uint32(p)
		if n > MaxErrno {
			c.fail(field, "%d is no errno, they end at %d", n, MaxErrno)
		}
		*v = syscall.Errno(n)
	}
}

func (c *codec) id(field string, v *[16]byte) {
	c.note(field, "id", 0)
	if c.enc {
		c.b = append(c.b, v[:]...)
	} else if p := c.take(field, 16); p != nil {
		*v = [16]byte(p)
	}
}

// sized is a u16 length and so many bytes, at most max.
func (c *codec) sized(field string, v []byte, max int) []byte {
	if !c.enc {
		p := c.take(field, 2)
		if p == nil {
			return nil
		}
		n := int(le.Uint16(p))
		if n > max {
			c.fail(field, "%d bytes long, at most %d", n, max)
			return nil
		}
		return c.take(field, n)
	}
	if len(v) > max {
		c.fail(field, "%d bytes long, at most %d", len(v), max)
		return nil
	}
	c.b = append(le.AppendUint16(c.b, uint16(len(v))), v...)
	return v
}

// blob is bytes with no meaning here. The decoded ones are a copy; empty is nil.
func (c *codec) blob(field string, v *[]byte, max int) {
	c.note(field, "bytes", max)
	p := c.sized(field, *v, max)
	if !c.enc {
		*v = append([]byte(nil), p...)
	}
}

// str is a string that ends up as a C string somewhere: it holds no NUL.
func (c *codec) str(field string, v *string, max int) {
	c.note(field, "string", max)
	s := string(c.sized(field, []byte(*v), max))
	if strings.IndexByte(s, 0) >= 0 {
		c.fail(field, "%q holds a NUL", clip(s))
	}
	if !c.enc {
		*v = s
	}
}

// tag is a str that is not empty.
func (c *codec) tag(field string, v *string) {
	c.str(field, v, MaxTag)
	if *v == "" {
		c.fail(field, "is empty")
	}
}

// text is for people: cut to its bound when it is sent.
func (c *codec) text(field string, v *string) {
	c.note(field, "text", MaxText)
	if c.enc {
		c.sized(field, []byte(cut(*v, MaxText)), MaxText)
		return
	}
	*v = string(c.sized(field, nil, MaxText))
}

// rest is the version 1 way: a string without a length, to the end of the message.
func (c *codec) rest(field string, v *string, max int) {
	c.note(field, "rest", max)
	if c.enc {
		if len(*v) > max {
			c.fail(field, "%d bytes long, at most %d", len(*v), max)
			return
		}
		c.b = append(c.b, *v...)
		return
	}
	if len(c.b) > max {
		c.fail(field, "%d bytes long, at most %d", len(c.b), max)
		return
	}
	*v = string(c.take(field, len(c.b)))
}

// restText is a rest for people, cut like text.
func (c *codec) restText(field string, v *string, max int) {
	s := *v
	if c.enc {
		s = cut(s, max)
	}
	c.rest(field, &s, max)
	if !c.enc {
		*v = s
	}
}

// list is a u16 count and so many elements. A count that lies costs nothing:
// the slice grows only with elements that were there.
func list[T any](c *codec, field string, v *[]T, max int, element func(*codec, *T)) {
	n := uint16(min(len(*v), 1<<16-1))
	c.note(field, "count", max)
	if c.enc {
		c.b = le.AppendUint16(c.b, n)
	} else if p := c.take(field, 2); p != nil {
		n = le.Uint16(p)
	}
	if int(n) > max {
		c.fail(field, "%d elements, at most %d", n, max)
	}
	for i := 0; i < int(n) && c.err == nil; i++ {
		if !c.enc {
			*v = append(*v, *new(T))
		}
		element(c, &(*v)[i])
	}
}

// cut shortens s to max bytes, between characters, and shows that it did.
func cut(s string, max int) string {
	if len(s) <= max {
		return s
	}
	const more = "…"
	i := max - len(more)
	for i > 0 && !utf8.RuneStart(s[i]) {
		i--
	}
	return s[:i] + more
}

// clip shortens what a peer sent for an error message.
func clip(s string) string { return cut(s, 64) }
