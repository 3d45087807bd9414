// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"
	"io"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// notifier is a notify channel: notifications go, and the errno of each comes back. A nil one tells nobody.
type notifier struct {
	conn io.ReadWriteCloser
	buf  []byte
	sent []sent // what buf holds
	err  error
}

// sent is a notification that was written: of an inode, or of nothing that matters any more.
type sent struct {
	inode uint64
	data  bool
}

// Notify has the guest's kernel told of changes over a notify channel, until that ends or another one takes its place. It
// owns the connection.
func (fs *FS) Notify(conn io.ReadWriteCloser) {
	c := &fs.caching
	c.mu.Lock()
	if c.notify != nil {
		c.notify.conn.Close()
	}
	if c.closed {
		conn.Close()
		c.mu.Unlock()
		return
	}
	c.notify = &notifier{conn: conn}
	fs.beginTelling()
	again := c.before
	c.before = true
	c.mu.Unlock()
	if again {
		fs.distrust() // of what happened meanwhile it was not told, and it may have cached things for long
	}
	c.told.Store(true)
}

// notifyEnded takes a notifier away that has failed.
func (fs *FS) notifyEnded(n *notifier) {
	c := &fs.caching
	c.mu.Lock()
	defer c.mu.Unlock()
	n.conn.Close()
	if c.notify == n {
		c.notify = nil
		c.told.Store(false)
	}
}

func (n *notifier) begin(code fuse.NotifyCode, size int) {
	n.buf = fuse.Append(n.buf, &fuse.OutHeader{Len: uint32(fuse.OutHeaderSize + size), Error: int32(code)})
}

// inode has the kernel ask for an inode's attributes again, and with data forget its pages, or a directory's names.
func (n *notifier) inode(id uint64, data bool) {
	if n == nil || id == 0 {
		return
	}
	for _, s := range n.sent { // a directory in which much is made needs it once for all
		if s.inode == id && (s.data || !data) {
			return
		}
	}
	out := fuse.NotifyInvalInodeOut{Ino: id, Off: -1}
	if data {
		out.Off = 0 // to its end
	}
	n.begin(fuse.NOTIFY_INVAL_INODE, 24)
	n.buf = fuse.Append(n.buf, &out)
	n.sent = append(n.sent, sent{id, data})
}

// entry has the kernel forget what a name leads to, or that it leads to nothing.
func (n *notifier) entry(dir uint64, name string) { n.name(dir, name, 0) }

// name is entry; with EXPIRE_ONLY the kernel asks again what the name leads to, before it believes it.
func (n *notifier) name(dir uint64, name string, flags uint32) {
	if n == nil || dir == 0 || name == "" {
		return
	}
	n.begin(fuse.NOTIFY_INVAL_ENTRY, 16+len(name)+1)
	n.buf = fuse.Append(n.buf, &fuse.NotifyInvalEntryOut{Parent: dir, Namelen: uint32(len(name)), Flags: flags})
	n.buf = append(append(n.buf, name...), 0)
	n.sent = append(n.sent, sent{})
}

// flushAt is flush if k notifications are there.
func (n *notifier) flushAt(fs *FS, k int) {
	if n != nil && len(n.sent) >= k {
		n.flush(fs)
	}
}

// flush writes what is there, and waits until the kernel has taken all of it.
func (n *notifier) flush(fs *FS) {
	for n != nil && len(n.sent) > 0 && n.err == nil {
		was := n.sent
		if _, n.err = n.conn.Write(n.buf); n.err != nil {
			break
		}
		n.buf, n.sent = n.buf[:0], nil
		for _, s := range was {
			var answer [4]byte
			if _, n.err = io.ReadFull(n.conn, answer[:]); n.err != nil {
				break
			}
			if s.inode != 0 && binary.LittleEndian.Uint32(answer[:]) == uint32(unix.ENOENT) {
				// Perhaps its first LOOKUP is under way. To forget the name waits for that.
				fs.mu.Lock()
				dir, name := uint64(0), ""
				if x := fs.nodes[s.inode]; x != nil && x.nlookup > 0 && x.parent != nil {
					dir, name = x.parent.id, x.name
				}
				fs.mu.Unlock()
				n.entry(dir, name)
			}
		}
	}
	if n != nil && n.err != nil {
		fs.notifyEnded(n)
		n.buf, n.sent = nil, nil
	}
}
