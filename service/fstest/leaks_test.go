// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// recorder is a testing.TB that keeps errors instead of failing.
type recorder struct {
	testing.TB
	errors   []string
	cleanups []func()
}

func (r *recorder) Errorf(f string, a ...any) { r.errors = append(r.errors, fmt.Sprintf(f, a...)) }
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }

func (r *recorder) end() string {
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
	return strings.Join(r.errors, "\n")
}

func TestLeaks(t *testing.T) {
	cases := []struct {
		name string
		leak func(t *testing.T, dir string) (undo func())
		want string
	}{
		{"nothing", func(*testing.T, string) func() { return func() {} }, ""},
		{"descriptor", func(t *testing.T, _ string) func() {
			f, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			return func() { f.Close() }
		}, "leaked descriptor"},
		{"goroutine", func(*testing.T, string) func() {
			c := make(chan int)
			go func() { <-c }()
			return func() { close(c) }
		}, "leaked goroutine"},
		{"process", func(t *testing.T, _ string) func() {
			c := exec.Command("sleep", "60")
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			return func() { c.Process.Kill(); c.Wait() }
		}, "leaked process"},
		{"mount", func(t *testing.T, dir string) func() {
			if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			return func() {}
		}, "leaked mount"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "mount" && os.Getuid() != 0 {
				t.Log("NOT RUN: mounting needs root")
				return
			}
			dir := t.TempDir()
			r := &recorder{TB: t}
			leaks(r, 0, dir)
			undo := c.leak(t, dir)
			got := r.end()
			undo()
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
