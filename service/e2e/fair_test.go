// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// floodEnv makes this test binary flood the directories in it until it is killed.
const floodEnv = "TRANSFUSED_TEST_FLOOD"

// fairBound is how much longer a quiet guest's requests may take, at the 99th percentile, while another guest floods.
const fairBound = 3

// TestFair has 16 guests with 4 mounts each; one of them floods, and the others must go on nearly as fast.
//
// A VM with one CPU is a guest's programs on one CPU: those of the one that floods on CPU 0, those of the others on CPU 1. The host's
// processes run where they like. Guests and host are sessions of their own, of which each has the same share where they meet
// (sched_autogroup), as VMMs and services have it by their cgroups.
//
// Where all have looked into the directory in which the flood makes its files, each change is theirs to be told, in 60 mounts here.
func TestFair(t *testing.T) {
	if dirs := os.Getenv(floodEnv); dirs != "" {
		flood(strings.Fields(dirs))
	}
	if os.Getenv(scaleEnv) == "" {
		t.Skip("NOT RUN: it measures times, which other tests disturb: make scale")
	}
	if runtime.NumCPU() < 2 {
		t.Skip("NOT RUN: with one CPU all wait for it")
	}
	t.Run("exports of their own", func(t *testing.T) { fair(t, func(i int) string { return fmt.Sprint(i) }, false) })
	t.Run("one export", func(t *testing.T) { fair(t, func(i int) string { return "0" }, false) })
	t.Run("one directory", func(t *testing.T) {
		if _, err := os.Readlink("/proc/1/fd/0"); err != nil {
			t.Skipf("NOT RUN: guests can't tell here that nobody watches, and act all that changes: %v", err)
		}
		fair(t, func(i int) string { return "0" }, true)
	})
}

// fair measures it where the i-th guest's export is the directory export(i) of the rig's. looked: all have looked into the one that is flooded.
func fair(t *testing.T, export func(i int) string, looked bool) {
	const guests, mounts = 16, 4
	r := newRig(t, 0)
	r.memory()
	for i := range guests {
		for j := range 16 {
			file := filepath.Join(r.export, export(i), fmt.Sprint("f", j))
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, make([]byte, 1<<20), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	made := filepath.Join(r.export, export(0), "made")
	if err := os.Mkdir(made, 0o755); err != nil {
		t.Fatal(err)
	}
	r.attr = &syscall.SysProcAttr{Setsid: true}
	r.vms(guests, func(i int) string { return filepath.Join(r.export, export(i)) })
	flooded := r.vm(0, mounts, "0")
	var quiet []string
	for i := 1; i < guests; i++ {
		quiet = append(quiet, r.vm(i, mounts, "1")...)
	}
	for _, dir := range quiet {
		if !looked {
			break
		}
		if _, err := os.ReadDir(filepath.Join(dir, "made")); err != nil {
			t.Fatal(err)
		}
	}

	cmd := exec.Command("taskset", "-c", "0", filepath.Join(bin, "suites"), "-test.run=^TestFair$")
	cmd.Env = append(os.Environ(), floodEnv+"="+strings.Join(flooded, " "))
	cmd.SysProcAttr, cmd.Stderr = r.attr, os.Stderr
	var alone, beside times
	aside(func() {
		var cpu unix.CPUSet
		cpu.Set(1)
		if err := unix.SchedSetaffinity(0, &cpu); err != nil {
			t.Error(err)
			return
		}
		probes := openProbes(t, quiet)
		defer probes.close()
		for range 5 {
			probes.run(t, &alone, 2*time.Second)
		}
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		time.Sleep(time.Second)
		for range 5 {
			before := created(made)
			probes.run(t, &beside, 2*time.Second)
			if created(made) == before {
				t.Error("there was no flood")
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		cmd.Wait() // it was killed
	})
	for op, name := range probeNames {
		a, b := alone[op], beside[op]
		if len(a) == 0 || len(b) == 0 {
			t.Fatal("nothing was measured")
		}
		slices.Sort(a)
		slices.Sort(b)
		at := func(s []time.Duration, percent int) time.Duration {
			return s[(len(s)-1)*percent/100].Round(100 * time.Nanosecond)
		}
		ratio := float64(at(b, 99)) / float64(at(a, 99))
		t.Logf("%s: median %v, p99 %v; while another guest floods %v, %v: p99 %.2f times (%d and %d)", name, at(a, 50), at(a, 99), at(b, 50), at(b, 99), ratio, len(a), len(b))
		if ratio > fairBound {
			t.Errorf("%s: the 99th percentile is %.2f times as long beside a guest that floods", name, ratio)
		}
	}
}

var probeNames = [...]string{"getattr", "read of 4 KiB"}

// times are how long requests took, by their place in probeNames.
type times [len(probeNames)][]time.Duration

// probes are a file of each quiet mount.
type probes struct {
	fds []int
	buf []byte
}

func openProbes(t *testing.T, mounts []string) *probes {
	// O_DIRECT wants memory at a page.
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Error(err)
	}
	p := &probes{buf: buf}
	for i, dir := range mounts {
		fd, err := unix.Open(filepath.Join(dir, fmt.Sprint("f", i%16)), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		p.fds = append(p.fds, fd)
	}
	return p
}

func (p *probes) close() {
	for _, fd := range p.fds {
		unix.Close(fd)
	}
	unix.Munmap(p.buf)
}

// run asks one mount after the other.
func (p *probes) run(t *testing.T, all *times, d time.Duration) {
	empty := [1]byte{}
	for begin := time.Now(); time.Since(begin) < d; {
		for _, fd := range p.fds {
			begun := time.Now()
			var st unix.Statx_t
			// Not unix.Statx, which would take a string.
			if _, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(&empty)), unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC,
				unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(&st)), 0); errno != 0 {
				t.Error(errno)
				return
			}
			all[0] = append(all[0], time.Since(begun))
			offset := rand.Int64N(256) * 4096
			begun = time.Now()
			if _, err := unix.Pread(fd, p.buf, offset); err != nil {
				t.Error(err)
				return
			}
			all[1] = append(all[1], time.Since(begun))
		}
	}
}

// flood reads, and makes files, by many threads in each directory, as fast as it can, for ever.
func flood(dirs []string) {
	const threads = 16 // of each directory
	for i, dir := range dirs {
		for j := range threads {
			go func() {
				runtime.LockOSThread()
				fd, err := unix.Open(filepath.Join(dir, fmt.Sprint("f", j)), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
				if err != nil {
					fmt.Fprintln(os.Stderr, "flood:", err)
					os.Exit(1)
				}
				buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
				for n := 0; err == nil; n++ {
					for range 8 {
						if _, err = unix.Pread(fd, buf, rand.Int64N(256)*4096); err != nil {
							break
						}
					}
					name := filepath.Join(dir, "made", fmt.Sprintf("%d-%d-%d", i, j, n))
					var f int
					if f, err = unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644); err == nil {
						unix.Close(f)
						err = unix.Unlink(name)
					}
				}
				fmt.Fprintln(os.Stderr, "flood:", err)
				os.Exit(1)
			}()
		}
	}
	select {}
}

// created is when the last name was made or removed in dir.
func created(dir string) unix.Timespec {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return unix.Timespec{}
	}
	return st.Mtim
}
