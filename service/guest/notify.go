// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/wire"
)

// maxNotify is the longest notification: NOTIFY_STORE with the data of one WRITE.
const maxNotify = MaxData + 64

// serveNotify writes notifications to the device and answers each with a u32, 0 or the errno, until either ends. A
// write may wait for inode locks, and so for the mount's server: here it may.
func (h *helperServer) serveNotify(dir string, conn io.ReadWriteCloser, dev *os.File) {
	defer conn.Close()
	d, err := newDevice(dev)
	if err == nil {
		defer d.close()
		err = notifyLoop(conn, d)
	}
	if err != nil {
		h.channelEnded("notify channel of "+dir+": notify", err)
	}
}

func notifyLoop(conn io.ReadWriter, dev io.Writer) error {
	buf := make([]byte, 4096)
	var answer [4]byte
	for {
		if _, err := io.ReadFull(conn, buf[:fuse.OutHeaderSize]); err != nil {
			return err
		}
		var h fuse.OutHeader
		fuse.Decode(&h, buf)
		if h.Len < uint32(fuse.OutHeaderSize) || h.Len > maxNotify {
			return fmt.Errorf("%w: a notification of %d bytes; 16 to %d are allowed", wire.ErrProtocol, h.Len, maxNotify)
		}
		if n := int(h.Len); n > len(buf) {
			buf = append(make([]byte, 0, n), buf[:fuse.OutHeaderSize]...)[:n]
		}
		if _, err := io.ReadFull(conn, buf[fuse.OutHeaderSize:h.Len]); err != nil {
			return err
		}
		var errno unix.Errno
		if h.Unique != 0 || fuse.NotifyCode(h.Error) == fuse.NOTIFY_RESEND {
			// A reply does not belong here, and to have requests sent again is the pump's to decide.
			errno = unix.EINVAL
		} else if _, err := dev.Write(buf[:h.Len]); err != nil {
			if errno = errnoOf(err); errno == 0 {
				return err
			}
		}
		if errno == unix.ENODEV {
			return nil // unmounted
		}
		binary.LittleEndian.PutUint32(answer[:], uint32(errno))
		if _, err := conn.Write(answer[:]); err != nil {
			return err
		}
	}
}
