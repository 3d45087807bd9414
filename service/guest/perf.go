// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"cmp"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/wire"
)

// perfSlots is how many recent requests are kept: a power of two that fits one control message of version 1.
const perfSlots = 2048

// recorder keeps when recent requests of one mount came and were answered. The slot is found by unique, which the
// kernel counts up in steps of two, so that neither end searches or locks.
type recorder struct {
	slots [perfSlots]perfSlot
}

type perfSlot struct{ unique, start, stop atomic.Uint64 }

func (r *recorder) slot(unique uint64) *perfSlot { return &r.slots[unique>>1%perfSlots] }

func (r *recorder) start(unique uint64) {
	s := r.slot(unique)
	s.stop.Store(0)
	s.start.Store(monotonic())
	s.unique.Store(unique)
}

func (r *recorder) stop(unique uint64) {
	if s := r.slot(unique); s.unique.Load() == unique {
		s.stop.Store(monotonic())
	}
}

// entries returns what was recorded, the oldest first.
func (r *recorder) entries() []wire.PerfEntry {
	var all []wire.PerfEntry
	for i := range r.slots {
		s := &r.slots[i]
		if u := s.unique.Load(); u != 0 {
			all = append(all, wire.PerfEntry{Unique: u, Start: s.start.Load(), Stop: s.stop.Load()})
		}
	}
	slices.SortFunc(all, func(a, b wire.PerfEntry) int { return cmp.Compare(a.Start, b.Start) })
	return all
}

// startPerf begins to record, from nothing.
func (p *Pump) startPerf() { p.perf.Store(new(recorder)) }

// stopPerf ends recording and returns what was recorded; nil if it was not on.
func (p *Pump) stopPerf() []wire.PerfEntry {
	if r := p.perf.Swap(nil); r != nil {
		return r.entries()
	}
	return nil
}

// monotonic is CLOCK_MONOTONIC in nanoseconds, as version 1 wants it.
func monotonic() uint64 {
	var ts unix.Timespec
	// It can't fail: the clock exists and ts is ours.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint64(ts.Nano())
}
