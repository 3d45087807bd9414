// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// leakGrace is how long goroutines and children may take to end after their
// test: a joined goroutine is still listed for an instant.
const leakGrace = 5 * time.Second

// Leaks fails t when at its end there are descriptors, goroutines, child
// processes, or mounts that were not there when Leaks was called. Call it first
// in a test: cleanups run last in, first out. Mounts are looked for below
// t.TempDir and below dirs, because other programs mount too; a mount that
// was left is detached after it was reported, so that the removal of the
// temporary directory can't reach through it.
//
// Not for tests that run in parallel with others of their process.
func Leaks(t testing.TB, dirs ...string) {
	t.Helper()
	leaks(t, leakGrace, dirs...)
}

func leaks(t testing.TB, grace time.Duration, dirs ...string) {
	// The removal of this directory is registered here, before ours, and so comes after ours.
	dirs = append(slices.Clone(dirs), filepath.Dir(t.TempDir()))
	wakePoller()
	before := resources(dirs)
	t.Cleanup(func() {
		deadline := time.Now().Add(grace)
		var left map[string]string
		// There is no event that tells the end of a goroutine of somebody else.
		for wait := time.Millisecond; ; wait *= 2 {
			left = resources(dirs)
			maps.DeleteFunc(left, func(k, v string) bool {
				b, ok := before[k]
				return ok && b == v || strings.HasPrefix(k, "goroutine") && ok
			})
			if len(left) == 0 || time.Now().After(deadline) {
				break
			}
			time.Sleep(wait)
		}
		for _, k := range slices.Sorted(maps.Keys(left)) {
			t.Errorf("leaked %s: %s", k, left[k])
			if dir, ok := strings.CutPrefix(k, "mount "); ok {
				_, dir, _ = strings.Cut(dir, " ")
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Errorf("detach the leaked mount: %v", err)
				}
			}
		}
	})
}

// resources names everything that this process holds, with what is known of it.
func resources(dirs []string) map[string]string {
	all := make(map[string]string)
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		// The descriptor that read the directory is gone by now.
		if l, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			all["descriptor "+e.Name()] = l
		}
	}
	for id, stack := range goroutines() {
		all["goroutine "+id] = stack
	}
	children, _ := filepath.Glob("/proc/self/task/*/children")
	for _, f := range children {
		pids, _ := os.ReadFile(f)
		for _, pid := range strings.Fields(string(pids)) {
			cmd, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			all["process "+pid] = string(bytes.ReplaceAll(cmd, []byte{0}, []byte{' '}))
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		dir := unescape(f[4])
		if slices.ContainsFunc(dirs, func(d string) bool { return dir == d || strings.HasPrefix(dir, d+"/") }) {
			all[fmt.Sprintf("mount %s %s", f[0], dir)] = strings.TrimSpace(line)
		}
	}
	return all
}

var goroutineHeader = regexp.MustCompile(`^goroutine (\d+) `)

// goroutines returns the stacks of all goroutines by number, but for those that
// package os/signal starts once and keeps.
func goroutines() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	all := make(map[string]string)
	for stack := range strings.SplitSeq(string(buf), "\n\n") {
		m := goroutineHeader.FindStringSubmatch(stack)
		if m == nil || strings.Contains(stack, "os/signal.loop") || strings.Contains(stack, "os/signal.signal_recv") {
			continue
		}
		all[m[1]] = stack
	}
	return all
}

// wakePoller makes the runtime open its epoll descriptors, which it keeps.
func wakePoller() {
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
}

// unescape undoes the octal escapes of mountinfo (proc_pid_mountinfo(5)).
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
