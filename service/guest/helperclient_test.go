// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

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
	for i := range 100 { // whether it has come, or been attached meanwhile, is a matter of microseconds
		late := i%2 == 0
		key, dir := uint64(i+1), filepath.Join(t.TempDir(), "mnt")
		id, waiting, err := h.start(call{Op: opMount, Key: key, Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if late {
			h.forget(id, waiting) // if the answer was quicker, all the same
		} else {
			for until := time.Now().Add(wait); len(waiting) == 0 && time.Now().Before(until); {
				time.Sleep(time.Millisecond)
			}
			h.forget(id, waiting)
		}
		for until := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			a, err := h.call(ctx, call{Op: opAttach, Key: key})
			cancel()
			if err != nil || time.Now().After(until) {
				t.Fatalf("the mount is still there: %+v, %v", a.Mount, err)
			}
			if a.Mount == (mountID{}) {
				break
			}
		}
		awaitMounted(t, dir, false)
	}
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	if _, err := h.call(ctx, call{Op: opUnmount, Key: 1}); err != nil {
		t.Error(err)
	}
}

// Suitability requests about a mount that does not answer keep so many threads, and no more.
func TestSuitabilityIsBounded(t *testing.T) {
	fstest.Leaks(t)
	h := newHelper(t)
	dir := t.TempDir()
	dev, err := Mount(dir, MountOptions{Source: "silent"})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	defer dev.Close()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	answers := make(chan error, maxSuits+1)
	for range maxSuits + 1 {
		go func() {
			_, err := h.call(ctx, call{Op: opSuit, Paths: []string{filepath.Join(dir, "x")}})
			answers <- err
		}()
	}
	if err := <-answers; !errors.Is(err, unix.EAGAIN) {
		t.Errorf("one too many: %v", err)
	}
	dev.Close() // fails the others' calls
	for range maxSuits {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if _, err := h.call(ctx, call{Op: opSuit, Paths: []string{dir + "2"}}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
