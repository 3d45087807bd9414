// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"

	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

type duplex struct {
	io.Reader
	io.Writer
}

func (duplex) Close() error { return nil }

func FuzzMountOptions(f *testing.F) {
	f.Add("ro,nosuid,fsname=x,max_read=4096")
	f.Add("suid,dev,exec,,")
	f.Add("max_read=-1")
	f.Add("streams=5")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := ParseMountOptions([]string{s})
		if err != nil {
			return
		}
		if again, err := ParseMountOptions(strings.Split(o.list(), ",")); err == nil && !strings.Contains(o.Source, `\`) && again != o {
			t.Errorf("%q: %+v, and from its own list %+v", s, o, again)
		}
	})
}

func FuzzMountSpec(f *testing.F) {
	f.Add("code=/mnt/code,ro")
	f.Add(`a=/x\,y\\,rw`)
	f.Add("=,")
	f.Fuzz(func(t *testing.T, s string) {
		if m, err := ParseMountSpec(s); err == nil && (m.Tag == "" || !strings.HasPrefix(m.Dir, "/")) {
			t.Errorf("%q: %+v", s, m)
		}
	})
}

// Nothing that comes on a notify channel reaches the device but whole notifications.
func FuzzNotify(f *testing.F) {
	f.Add(fuse.Append(nil, &fuse.OutHeader{Len: 16, Error: 2}))
	f.Add(fuse.Append(nil, &fuse.OutHeader{Len: 16, Unique: 2}))
	f.Add(fuse.Append(nil, &fuse.OutHeader{Len: 0xffffffff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dev := writes(func(w []byte) {
			var h fuse.OutHeader
			if _, ok := fuse.Decode(&h, w); !ok || int(h.Len) != len(w) || h.Unique != 0 {
				t.Errorf("wrote % x", w)
			}
		})
		if notifyLoop(duplex{bytes.NewReader(b), io.Discard}, dev) == nil {
			t.Error("no error at the end")
		}
	})
}

type writes func([]byte)

func (w writes) Write(b []byte) (int, error) { w(b); return len(b), nil }

// No stream of replies makes the pump panic, or hold more than it agreed to.
func FuzzReplies(f *testing.F) {
	f.Add(message(4, 0, []byte("body")))
	f.Add(message(2, 0, fuse.Append(nil, &fuse.InitOut{Major: 7, Minor: 45, MaxWrite: 1 << 31, MaxPages: 65535, Flags: uint32(fuse.MAX_PAGES)})))
	f.Add(message(0, 0, nil))
	f.Add([]byte("\xff\xff\xff\xff garbage garbage"))
	f.Fuzz(func(t *testing.T, b []byte) {
		null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		conn, host := streamPair(t)
		p, err := NewPump(null, conn, PumpOptions{Ahead: true})
		if err != nil {
			t.Fatal(err)
		}
		p.initUnique = 2
		go func() {
			host.Write(b)
			host.Close()
		}()
		for err == nil {
			if _, err = p.wait(true, -1); err == nil {
				err = p.streams()
			}
		}
		if !errors.Is(err, ErrStream) && !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
		if p.maxReply > MaxData+2*headRoom || p.requestSize > MaxData+headRoom+maxHeld {
			t.Errorf("buffers of %d and %d bytes", p.maxReply, p.requestSize)
		}
		p.dev.close()
		p.waker.close()
		unix.Close(p.lanes[0].sock)
	})
}
