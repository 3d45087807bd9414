// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"math/bits"
	"sync/atomic"
	"time"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/fuse"
)

// inFlightSlots is how many requests without an answer are known, a power of two: of more, the oldest have no latency.
const inFlightSlots = 2048

// traffic counts what passes a mount, through all of its pumps. The pump's goroutine writes, anybody reads. Nothing is
// allocated but what an operation needs when it comes for the first time.
type traffic struct {
	requests, requestBytes, replies, replyBytes, dropped, answered atomic.Uint64
	waiting                                                        atomic.Int64 // requests without an answer

	slots [inFlightSlots]inFlight // of the pump's goroutine; found by unique, which the kernel counts up in steps of two
	ops   [fuse.OpMax]atomic.Pointer[opTraffic]

	tracers atomic.Pointer[[]*tracer]
}

// inFlight is a request that was read. Its unique is 0 when it was answered.
type inFlight struct {
	unique, nodeID uint64
	begin          time.Time
	op             fuse.Opcode
	pid, length    uint32
}

// opTraffic counts one operation. Buckets are of latencies in ns, eight for each power of two: they are at most 1/8 too wide.
type opTraffic struct {
	requests atomic.Uint64
	max      atomic.Uint64
	buckets  [maxBucket + 1]atomic.Uint64
}

// maxBucket holds what took over 2^40 ns, some 18 minutes.
const maxBucket = 37*8 + 15

func bucketOf(ns uint64) int {
	if ns < 8 {
		return int(ns)
	}
	e := bits.Len64(ns) - 4
	return min(e*8+int(ns>>e), maxBucket)
}

// upTo is the largest latency of a bucket.
func upTo(bucket int) uint64 {
	if bucket < 16 {
		return uint64(bucket)
	}
	e := bucket/8 - 1
	return (uint64(bucket%8+8)+1)<<e - 1
}

// begin notes a request that was read.
func (t *traffic) begin(h *fuse.InHeader) {
	t.requests.Add(1)
	t.requestBytes.Add(uint64(h.Len))
	if h.Opcode.NoReply() || h.Opcode == fuse.OpInterrupt {
		return
	}
	unique := h.Unique &^ fuse.UniqueResend
	s := &t.slots[unique>>1%inFlightSlots]
	if s.unique == unique {
		return // it was sent again: its time goes on
	}
	t.waiting.Add(1)
	*s = inFlight{unique, h.NodeID, time.Now(), h.Opcode, h.PID, h.Len}
}

// end notes a reply that is about to be written.
func (t *traffic) end(unique uint64, length int, errno int32) {
	t.replies.Add(1)
	t.replyBytes.Add(uint64(length))
	if unique&fuse.UniqueIntr != 0 {
		return
	}
	t.waiting.Add(-1)
	unique &^= fuse.UniqueResend
	s := &t.slots[unique>>1%inFlightSlots]
	if s.unique != unique {
		return
	}
	s.unique = 0
	took := time.Since(s.begin)
	if s.op < fuse.OpMax {
		o := t.ops[s.op].Load()
		if o == nil {
			o = new(opTraffic)
			t.ops[s.op].Store(o)
		}
		o.requests.Add(1)
		ns := uint64(max(took, 0))
		o.buckets[bucketOf(ns)].Add(1)
		if ns > o.max.Load() {
			o.max.Store(ns)
		}
	}
	if all := t.tracers.Load(); all != nil {
		for _, tr := range *all {
			tr.saw(s, unique, took, length, errno)
		}
	}
}

// pending returns the uniques of requests that have no answer, as far as they are known. Precondition: no pump runs.
func (t *traffic) pending() (uniques []uint64) {
	for i := range t.slots {
		if u := t.slots[i].unique; u != 0 {
			uniques = append(uniques, u)
		}
	}
	return uniques
}

// statistics are the counts in the words of an administrator.
func (t *traffic) statistics() api.Statistics {
	s := api.Statistics{
		Requests: t.requests.Load(), InFlight: uint64(max(0, t.waiting.Load())), RequestBytes: t.requestBytes.Load(),
		ReplyBytes: t.replyBytes.Load(), Dropped: t.dropped.Load(), Operations: []api.Operation{},
	}
	var all [maxBucket + 1]uint64
	var most uint64
	for op := range t.ops {
		o := t.ops[op].Load()
		if o == nil {
			continue
		}
		var each [maxBucket + 1]uint64
		for i := range each {
			each[i] = o.buckets[i].Load()
			all[i] += each[i]
		}
		most = max(most, o.max.Load())
		s.Operations = append(s.Operations, api.Operation{Name: fuse.Opcode(op).String(), Requests: o.requests.Load(), Latency: latency(&each, o.max.Load())})
	}
	s.Latency = latency(&all, most)
	return s
}

func latency(buckets *[maxBucket + 1]uint64, most uint64) api.Latency {
	var n uint64
	for _, c := range buckets {
		n += c
	}
	at := func(percent uint64) uint64 {
		var seen uint64
		for i, c := range buckets {
			if seen += c; c > 0 && seen*100 >= n*percent {
				return min(upTo(i), most)
			}
		}
		return 0
	}
	return api.Latency{P50: at(50), P90: at(90), P99: at(99), Max: most}
}

// tracer is somebody who wants to see requests. What comes faster than it is taken is left out.
type tracer struct {
	mount string
	op    string // empty: all
	out   chan api.Request
}

func (tr *tracer) saw(s *inFlight, unique uint64, took time.Duration, reply int, errno int32) {
	name := s.op.String()
	if tr.op != "" && tr.op != name {
		return
	}
	select {
	case tr.out <- api.Request{Mount: tr.mount, Time: s.begin, Operation: name, Unique: unique, NodeID: s.nodeID, PID: s.pid, Length: s.length,
		Reply: uint32(reply), Errno: int(-errno), Duration: took}:
	default:
	}
}

// trace adds tr; remove takes it away.
func (t *traffic) trace(tr *tracer) (remove func()) {
	t.change(func(all []*tracer) []*tracer { return append(all, tr) })
	return func() {
		t.change(func(all []*tracer) (rest []*tracer) {
			for _, o := range all {
				if o != tr {
					rest = append(rest, o)
				}
			}
			return rest
		})
	}
}

func (t *traffic) change(f func([]*tracer) []*tracer) {
	for {
		old := t.tracers.Load()
		var all []*tracer
		if old != nil {
			all = append(all, *old...)
		}
		all = f(all)
		next := &all
		if len(all) == 0 {
			next = nil
		}
		if t.tracers.CompareAndSwap(old, next) {
			return
		}
	}
}
