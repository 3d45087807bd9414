// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"transfused.org/transfused/service/fstest"
)

func newHelper(t *testing.T) *helper {
	t.Helper()
	needRoot(t)
	h, err := startHelper(nil, "", func(s string) { t.Error(s) }, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	return h
}

func awaitMounted(t *testing.T, dir string, want bool) {
	t.Helper()
	for until := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		// Not mountinfo.Mounted, which looks at dir: it would wait for the mount's server.
		found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		if err == nil && (len(found) > 0) == want {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("%s is mounted: %v, %v; want %v", dir, len(found) > 0, err, want)
		}
	}
}

// Who asks for a mount and gives up leaves none, whether its answer has come or is yet to come.
func TestMountGivenUp(t *testing.T) {
	fstest.Leaks(t)
	h := newHelper(t)
	for _, late := range []bool{true, false} {
		dir := filepath.Join(t.TempDir(), "mnt")
		id, waiting, err := h.start(call{Op: opMount, Key: 1, Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if late {
			h.mu.Lock() // the answer waits for this
			_, there := h.calls[id]
			delete(h.calls, id)
			awaitMounted(t, dir, true)
			h.mu.Unlock()
			if !there {
				h.drop(<-waiting) // it was quicker
			}
		} else {
			for until := time.Now().Add(wait); len(waiting) == 0 && time.Now().Before(until); {
				time.Sleep(time.Millisecond)
			}
			h.forget(id, waiting)
		}
		awaitMounted(t, dir, false)
	}
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	if _, err := h.call(ctx, call{Op: opUnmount, Key: 1}); err != nil {
		t.Error(err)
	}
}
