// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"
	"io"
)

// headerLen is the u32 length, which counts itself, and the u16 type.
const headerLen = 6

// Reader reads framed messages. It takes from its stream exactly the messages
// it returned, never a byte more: what follows may not be framed, and another
// Reader can go on. It is for one goroutine.
type Reader struct {
	r      io.Reader
	max    int
	prefix [4]byte
	buf    []byte // allocated once, when a first length was found good
}

// NewReader returns a Reader that refuses messages over max bytes, header included.
func NewReader(r io.Reader, max int) *Reader { return &Reader{r: r, max: max} }

// Next returns the next message, whose body is valid until the next call.
// io.EOF means that the stream ended between messages, io.ErrUnexpectedEOF that
// it ended within one, and ErrProtocol that the length is out of bounds: then,
// as after any other error, nothing more can be read from this stream.
func (r *Reader) Next() (Type, []byte, error) {
	if _, err := io.ReadFull(r.r, r.prefix[:]); err != nil {
		return 0, nil, err
	}
	n := le.Uint32(r.prefix[:])
	if n < headerLen || uint64(n) > uint64(r.max) {
		return 0, nil, fmt.Errorf("%w: a message of %d bytes (bounds are %d and %d): is the peer a transfuse one?", ErrProtocol, n, headerLen, r.max)
	}
	if r.buf == nil {
		r.buf = make([]byte, r.max-len(r.prefix))
	}
	b := r.buf[:int(n)-len(r.prefix)]
	if _, err := io.ReadFull(r.r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Type(le.Uint16(b)), b[2:], nil
}
