// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/godbus/dbus/v5"
)

// maxMessage is how long a message may be that we read, in bytes. The longest that is meant for us is Mount's: a path and options.
// The bus allows 32 MiB, which can be a gigabyte when it is decoded.
const maxMessage = 128 << 10

// writeTime is how long the bus has to take a message.
const writeTime = 10 * time.Second

// wire is the socket under a connection: it keeps from godbus what that can't read, and from the daemon a bus that does not read.
type wire struct {
	net.Conn
	log *slog.Logger
	in  *bufio.Reader
	// framed is set when messages begin, before the goroutine that reads them does.
	framed bool
	rest   []byte // of the message that is being read
}

func newWire(c net.Conn, log *slog.Logger) *wire {
	return &wire{Conn: c, log: log, in: bufio.NewReader(c)}
}

// Write writes p within writeTime, or closes the connection: half a message can't be mended.
func (w *wire) Write(p []byte) (int, error) {
	if string(p) == "BEGIN\r\n" { // the end of authentication (D-Bus specification, Authentication Protocol)
		w.framed = true
	}
	// If this fails so does the write.
	_ = w.SetWriteDeadline(time.Now().Add(writeTime))
	n, err := w.Conn.Write(p)
	if err != nil {
		w.Conn.Close()
	}
	return n, err
}

// Read reads what authentication says, and then messages.
func (w *wire) Read(p []byte) (int, error) {
	if !w.framed {
		return w.in.Read(p)
	}
	if len(w.rest) == 0 {
		if err := w.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// next reads the next message that godbus can read.
func (w *wire) next() error {
	for {
		// D-Bus specification, Message Format: byte order, type, flags, version, length of the body, serial, length of the fields.
		var head [16]byte
		if _, err := io.ReadFull(w.in, head[:]); err != nil {
			return err
		}
		var order binary.ByteOrder = binary.LittleEndian
		switch head[0] {
		case 'l':
		case 'B':
			order = binary.BigEndian
		default:
			return fmt.Errorf("a message begins with %#x, which is no byte order", head[0])
		}
		fields := int64(order.Uint32(head[12:]))
		size := int64(len(head)) + (fields+7)&^7 + int64(order.Uint32(head[4:]))
		if size > maxMessage {
			w.log.Debug("a D-Bus message is too long", "bytes", size)
			if _, err := io.CopyN(io.Discard, w.in, size-int64(len(head))); err != nil {
				return err
			}
			continue
		}
		message := make([]byte, size)
		copy(message, head[:])
		if _, err := io.ReadFull(w.in, message[len(head):]); err != nil {
			return err
		}
		if err := decodes(message); err != nil {
			w.log.Debug("a D-Bus message is not read", "error", err)
			continue
		}
		w.rest = message
		return nil
	}
}

// decodes says why godbus can't read message. There it would end the connection, or the process.
func decodes(message []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	_, err = dbus.DecodeMessage(bytes.NewReader(message))
	return err
}
