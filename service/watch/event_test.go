// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// record makes an information record as the kernel does.
func record(kind byte, handle, name string) []byte {
	le := binary.NativeEndian
	b := []byte{kind, 0, 0, 0}
	b = le.AppendUint64(b, 7)
	b = le.AppendUint32(b, uint32(len(handle)-4))
	b = append(b, handle...)
	if kind != unix.FAN_EVENT_INFO_TYPE_FID {
		b = append(append(b, name...), 0)
	}
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	le.PutUint16(b[2:], uint16(len(b)))
	return b
}

func encode(mask uint64, pid int32, records ...[]byte) []byte {
	le := binary.NativeEndian
	b := make([]byte, metadataSize)
	for _, r := range records {
		b = append(b, r...)
	}
	le.PutUint32(b, uint32(len(b)))
	b[4] = unix.FANOTIFY_METADATA_VERSION
	le.PutUint16(b[6:], metadataSize)
	le.PutUint64(b[8:], mask)
	le.PutUint32(b[16:], 0xffffffff)
	le.PutUint32(b[20:], uint32(pid))
	return b
}

func touch(mask uint64, name string) []byte {
	return encode(mask, 5, record(unix.FAN_EVENT_INFO_TYPE_DFID_NAME, "\x01\x00\x00\x00dir", name), record(unix.FAN_EVENT_INFO_TYPE_FID, "\x01\x00\x00\x00"+name, ""))
}

// What is the same is told once, and never across a change of names.
func TestJoin(t *testing.T) {
	b := newBatch()
	var buf []byte
	for _, e := range [][]byte{
		touch(unix.FAN_MODIFY, "a"),
		touch(unix.FAN_MODIFY, "b"),
		touch(unix.FAN_MODIFY|unix.FAN_CLOSE_WRITE, "a"),
		encode(unix.FAN_MODIFY, 6, record(unix.FAN_EVENT_INFO_TYPE_DFID_NAME, "\x01\x00\x00\x00dir", "a"), record(unix.FAN_EVENT_INFO_TYPE_FID, "\x01\x00\x00\x00a", "")),
		touch(unix.FAN_DELETE, "a"),
		touch(unix.FAN_MODIFY, "b"),
		touch(unix.FAN_MODIFY, "b"),
		encode(unix.FAN_Q_OVERFLOW, 0),
		touch(unix.FAN_MODIFY, "b"),
	} {
		buf = append(buf, e...)
	}
	if err := b.fill(buf); err != nil {
		t.Fatal(err)
	}
	type told struct {
		Op   Op
		Name string
		PID  int32
	}
	var got []told
	for _, e := range b.events {
		got = append(got, told{e.op, string(e.name), e.pid})
	}
	want := []told{
		{Modify | CloseWrite, "a", 5}, {Modify, "b", 5}, {Modify, "a", 6}, {Delete, "a", 5}, {Modify, "b", 5}, {0, "", 0}, {Modify, "b", 5},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if !b.events[5].overflow || string(b.events[0].dir) != "\x01\x00\x00\x00dir" || string(b.events[0].file) != "\x01\x00\x00\x00a" || b.events[0].fsid != 7 {
		t.Errorf("%+v", b.events)
	}
}

// No bytes make it panic, or read on and on.
func FuzzDecode(f *testing.F) {
	f.Add(touch(unix.FAN_MODIFY, "a"))
	f.Add(append(touch(unix.FAN_CREATE|unix.FAN_ONDIR, "name"), encode(unix.FAN_Q_OVERFLOW, 0)...))
	f.Add(encode(unix.FAN_RENAME, 1, record(unix.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, "\x01\x00\x00\x00dir", "a"),
		record(unix.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME, "\x01\x00\x00\x00other", "b"), record(unix.FAN_EVENT_INFO_TYPE_FID, "\x01\x00\x00\x00f", "")))
	b := newBatch()
	f.Fuzz(func(t *testing.T, in []byte) {
		if b.fill(in) == nil && len(b.events) > len(in)/metadataSize {
			t.Errorf("%d events in %d bytes", len(b.events), len(in))
		}
	})
}
