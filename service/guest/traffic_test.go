// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/fuse"
)

// A bucket holds what is at most an eighth less than its bound.
func TestBuckets(t *testing.T) {
	for _, ns := range []uint64{0, 1, 7, 8, 15, 16, 17, 1000, 123456789, 1<<40 - 1} {
		to := upTo(bucketOf(ns))
		if to < ns || to-ns > ns/8+1 {
			t.Errorf("%d ns is in a bucket up to %d", ns, to)
		}
		if b := bucketOf(ns); b > 0 && upTo(b-1) >= ns {
			t.Errorf("%d ns is also in the bucket up to %d", ns, upTo(b-1))
		}
	}
	if b := bucketOf(1 << 62); b != maxBucket {
		t.Errorf("years are in bucket %d", b)
	}
}

func TestTraffic(t *testing.T) {
	var tr traffic
	seen := make(chan api.Request, 10)
	remove := tr.trace(&tracer{mount: "1", op: "READ", out: seen})
	begin := func(op fuse.Opcode, unique uint64) {
		tr.begin(&fuse.InHeader{Len: 80, Opcode: op, Unique: unique, NodeID: 5, PID: 9})
	}
	begin(fuse.OpRead, 2)
	begin(fuse.OpLookup, 4)
	begin(fuse.OpForget, 6) // has no reply
	begin(fuse.OpRead, 2|fuse.UniqueResend)
	if s := tr.statistics(); s.InFlight != 2 || s.Requests != 4 {
		t.Errorf("%d under way of %d, want 2 of 4", s.InFlight, s.Requests)
	}
	if diff := cmp.Diff([]uint64{2, 4}, tr.pending()); diff != "" {
		t.Error(diff)
	}
	tr.end(2|fuse.UniqueResend, 116, 0)
	tr.end(4, 16, -2)
	s := tr.statistics()
	if s.InFlight != 0 || s.ReplyBytes != 132 || s.RequestBytes != 320 || len(s.Operations) != 2 {
		t.Errorf("%+v", s)
	}
	if o := s.Operations[1]; o.Name != "READ" || o.Requests != 1 || o.Latency.Max == 0 || o.Latency.P50 > o.Latency.Max {
		t.Errorf("%+v", o)
	}
	r := <-seen
	if r.Operation != "READ" || r.NodeID != 5 || r.PID != 9 || r.Length != 80 || r.Reply != 116 || time.Since(r.Time) < r.Duration {
		t.Errorf("%+v", r)
	}
	if len(seen) != 0 {
		t.Error("a LOOKUP is traced where READs are wanted")
	}
	remove()
	begin(fuse.OpRead, 8)
	tr.end(8, 16, 0)
	if len(seen) != 0 || tr.tracers.Load() != nil {
		t.Error("traced after the end")
	}
}

// Who doesn't read gets the last change of each mount.
func TestWatcher(t *testing.T) {
	w := watcher{wake: make(chan struct{}, 1)}
	put := func(k api.ChangeKind, id string, s api.State) {
		w.put(api.Change{Kind: k, Mount: api.Mount{ID: id, State: s}})
	}
	put(api.Added, "1", api.Mounting)
	put(api.Changed, "1", api.Active)
	put(api.Added, "2", api.Mounting)
	put(api.Changed, "1", api.Reconnecting)
	put(api.Removed, "2", api.Failed)
	want := []api.Change{
		{Kind: api.Added, Mount: api.Mount{ID: "1", State: api.Reconnecting}},
		{Kind: api.Added, Mount: api.Mount{ID: "2", State: api.Mounting}},
		{Kind: api.Removed, Mount: api.Mount{ID: "2", State: api.Failed}},
	}
	if diff := cmp.Diff(want, w.take()); diff != "" {
		t.Error(diff)
	}
}
