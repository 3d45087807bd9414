// SPDX-License-Identifier: Apache-2.0

//go:build !race

package guest

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/fuse"
)

// The pump allocates nothing for a message, with and without perfstat.
func TestPumpAllocatesNothing(t *testing.T) {
	fstest.Leaks(t)
	for _, tt := range []struct {
		name    string
		perf    bool
		streams int
	}{{"plain", false, 1}, {"perfstat", true, 1}, {"four streams", false, 4}} {
		t.Run(tt.name, func(t *testing.T) {
			dir, p, stop := pumpQuiet(t, tt.streams)
			if tt.perf {
				p.startPerf()
			}
			var st unix.Statx_t
			allocs := testing.AllocsPerRun(2000, func() {
				if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_FORCE_SYNC, unix.STATX_ALL, &st); err != nil {
					t.Error(err)
				}
			})
			if n := p.Stats().Requests; n < 2000 {
				t.Errorf("only %d requests came", n)
			}
			// The path of the call itself is one allocation (its NUL-terminated copy).
			if allocs > 1 {
				t.Errorf("%v allocations for each GETATTR, the test's own one included", allocs)
			}
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// pumpQuiet is pumpTo with a server that allocates nothing for GETATTR.
func pumpQuiet(t *testing.T, streams int) (dir string, p *Pump, stop func() error) {
	s := &tinyFS{}
	reply := message(0, 0, fuse.Append(nil, &fuse.AttrOut{Attr: s.attr(fuse.RootID)}))
	s.handle = func(h fuse.InHeader, body []byte) []byte {
		if h.Opcode != fuse.OpGetattr {
			return nil
		}
		binary.LittleEndian.PutUint64(reply[8:], h.Unique)
		return reply
	}
	serve := []func(*os.File){func(c *os.File) { s.serve(c) }}
	for range streams - 1 {
		serve = append(serve, func(c *os.File) { (&tinyFS{}).serve(c) })
	}
	return pumpOver(t, serve...)
}
