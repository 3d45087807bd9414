// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/wire"
)

// opened notes the streams that a daemon opens, and serves them.
type opened struct {
	mu     sync.Mutex // guards the rest
	all    []uint16   // their indexes
	conns  []net.Conn
	refuse int // this index; 0: none
	seen   func(o *opened, h fuse.InHeader) []byte
}

func (o *opened) stream(m *wire.StreamOpen, c net.Conn) bool {
	o.mu.Lock()
	o.all = append(o.all, m.Index)
	if m.Index == 0 {
		o.conns = nil
	}
	o.conns = append(o.conns, c)
	refused := o.refuse > 0 && int(m.Index) == o.refuse
	o.mu.Unlock()
	if refused {
		return false
	}
	wire.Write(c, &wire.OpenReply{})
	fs := &tinyFS{size: 5}
	if o.seen != nil {
		fs.handle = func(h fuse.InHeader, _ []byte) []byte { return o.seen(o, h) }
	}
	fs.serve(c)
	return true
}

// A mount has as many streams as were agreed, and opens no others, whatever the host says.
func TestV2Streams(t *testing.T) {
	for _, tt := range []struct {
		name         string
		options      []string
		most, number uint16 // of the host
		asked        []string
		want         []uint16
	}{
		{"an old host", nil, 0, 1, nil, []uint16{0}},
		{"an old host, and more are wanted", []string{"streams=4"}, 1, 1, nil, []uint16{0}},
		{"an old host that says more", []string{"streams=4"}, 1, 3, nil, []uint16{0}},
		{"one", []string{"streams=1"}, 4, 1, []string{"streams=1"}, []uint16{0}},
		{"the default", nil, 4, defaultStreams, []string{fmt.Sprint("streams=", defaultStreams)}, []uint16{0, 1, 2, 3}[:defaultStreams]},
		{"all", []string{"noatime,streams=4"}, 4, 4, []string{"streams=4"}, []uint16{0, 1, 2, 3}},
		{"fewer", []string{"streams=4"}, 4, 2, []string{"streams=4"}, []uint16{0, 1}},
		{"none", []string{"streams=4"}, 4, 0, []string{"streams=4"}, []uint16{0}},
		{"more than were asked for", []string{"streams=2"}, 0xffff, 0xffff, []string{"streams=2"}, []uint16{0, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fstest.Leaks(t)
			o := &opened{}
			h := startV2(t, func(c *Config, h *v2host) {
				c.Mounts[0].Options = tt.options
				h.most, h.number, h.stream = tt.most, tt.number, o.stream
			})
			expect[*wire.NotifyOpen2](h)
			if _, err := os.Stat(filepath.Join(h.mnt, "hello")); err != nil {
				t.Error(err)
			}
			h.mu.Lock()
			o.mu.Lock()
			if diff := cmp.Diff(tt.asked, h.asked); diff != "" && len(tt.asked)+len(h.asked) > 0 {
				t.Errorf("options: %s", diff)
			}
			if diff := cmp.Diff(tt.want, o.all); diff != "" {
				t.Errorf("streams: %s", diff)
			}
			o.mu.Unlock()
			h.mu.Unlock()
		})
	}
}

// A mount that can't have all of its streams is not made.
func TestV2StreamRefused(t *testing.T) {
	fstest.Leaks(t)
	o := &opened{refuse: 2}
	h := startV2(t, func(c *Config, h *v2host) {
		c.Mounts[0].Options = []string{"streams=3"}
		h.most, h.number, h.stream = 4, 3, o.stream
	})
	if m := expect[*wire.Unmounted](h); m.Reason != wire.ReasonFailed || !strings.Contains(m.Text, "open stream 2: no such stream") {
		t.Errorf("%+v", m)
	}
	o.mu.Lock()
	o.refuse = 0
	o.mu.Unlock()
	expect[*wire.NotifyOpen2](h) // it has tried again
}

// nowhere is a store for a daemon that does not come back.
type nowhere struct{}

func (nowhere) Put(string, ...*os.File) error { return nil }
func (nowhere) Remove(string) error           { return nil }

// With any of its streams a mount loses all. Where it is kept all are opened again, index 0 first, and then the kernel sends again what has no answer.
func TestV2StreamLost(t *testing.T) {
	const n = 3
	for lost := range n {
		fstest.Leaks(t)
		o := &opened{}
		waits, again := make(chan struct{}), make(chan int, 1)
		hold := true
		o.seen = func(o *opened, h fuse.InHeader) []byte {
			if h.Opcode != fuse.OpLookup {
				return nil
			}
			o.mu.Lock()
			defer o.mu.Unlock()
			if hold {
				hold = false
				close(waits)
				return []byte{}
			}
			if h.Unique&fuse.UniqueResend != 0 {
				again <- len(o.conns)
			}
			return nil
		}
		h := startV2(t, func(c *Config, h *v2host) {
			c.Store = nowhere{}
			c.Mounts[0].Options = []string{"streams=3"}
			h.keep, h.most, h.number, h.stream = true, n, n, o.stream
		})
		expect[*wire.NotifyOpen2](h)
		asked := make(chan error, 1)
		go func() { asked <- unix.Lstat(filepath.Join(h.mnt, "hello"), new(unix.Stat_t)) }()
		<-waits
		o.mu.Lock()
		o.conns[lost].Close()
		o.mu.Unlock()
		if err := <-asked; err != nil {
			t.Errorf("stream %d was lost, and a LOOKUP with it: %v", lost, err)
		}
		if had := <-again; had != n {
			t.Errorf("sent again when %d streams were open", had)
		}
		o.mu.Lock()
		if diff := cmp.Diff([]uint16{0, 1, 2, 0, 1, 2}, o.all); diff != "" {
			t.Error(diff)
		}
		o.mu.Unlock()
		h.end(nil)
	}
}
