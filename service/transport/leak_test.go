// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// checkLeaks fails the test if at its end there are descriptors or goroutines
// that were not there when it was called. Call it first.
func checkLeaks(t *testing.T) {
	t.Helper()
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	t.Cleanup(func() {
		// What was closed a moment ago may take another one to be gone: a
		// goroutine that was told to end, a descriptor in use by it.
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			now := openFiles(t)
			extra := slices.DeleteFunc(now, func(f string) bool { return slices.Contains(fds, f) })
			n := runtime.NumGoroutine()
			if len(extra) == 0 && n <= goroutines {
				return
			}
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				stacks = stacks[:runtime.Stack(stacks, true)]
				t.Errorf("leaked descriptors %q; %d goroutines, %d before:\n%s", extra, n, goroutines, stacks)
				return
			}
		}
	})
}

// openFiles lists this process's descriptors with what they refer to, without
// those of the runtime's poller.
func openFiles(t *testing.T) []string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && !strings.HasPrefix(target, "anon_inode:[event") {
			files = append(files, e.Name()+" "+target)
		}
	}
	return files
}

func diff[T any](t *testing.T, what string, want, got T) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}
