// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// soakEnv is for how long TestSoak goes on in each mode, and seedEnv the seed of its choices, which it tells.
const (
	soakEnv = "TRANSFUSED_SOAK"
	seedEnv = "TRANSFUSED_SEED"
)

// TestSoak has host and guests change one tree at random, all at once, and compares what they see whenever they stand still.
func TestSoak(t *testing.T) {
	duration, seed := time.Second/2, rand.Uint64()
	if s := os.Getenv(soakEnv); s != "" {
		var err error
		if duration, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
	}
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedEnv, err)
		}
	}
	t.Logf("%s=%d", seedEnv, seed)
	for _, m := range []soak{
		{name: "coherent", pushed: true},
		{name: "none", options: ",cache=none"},
		// Nobody tells when these see what others change: what is looked for is errors, races and leaks.
		{name: "always", options: ",cache=always", blind: true},
		{name: "writeback", options: ",cache=always,writeback", blind: true},
		{name: "always, alone", options: ",cache=always", alone: true},
		{name: "writeback, alone", options: ",cache=always,writeback", alone: true},
	} {
		t.Run(m.name, func(t *testing.T) {
			m.rig = newRig(t, 0)
			m.run(duration, seed)
		})
	}
}

type soak struct {
	*rig
	name    string
	options string // of the export
	pushed  bool   // what the host changes its guests are told
	blind   bool   // guests are neither told what others change nor do they ask
	alone   bool   // one guest is the only one who changes anything

	guests   []*rig // each with its mount
	changers []*changer
	watches  []*inotify
	lags     []time.Duration
	steps    int
	events   int // seen by the guests' inotify
}

// soakBound is much longer than what is believed for a second is believed, on a machine with much else to do; what was to be told and was not is
// believed for ever.
const soakBound = 5 * time.Second

func (s *soak) run(duration time.Duration, seed uint64) {
	t := s.t
	host := s.host(s.options)
	for i := range 2 {
		g := *s.rig
		g.mnt = filepath.Join(s.dir, fmt.Sprint("mnt", i))
		if strings.Contains(s.options, "writeback") {
			// The kernel does not tell the time of a write if it is the one that the file has already, by its coarse clock; the host
			// then has the time at which it was written back.
			g.ignore = regexp.MustCompile(` mtime \S+`)
		}
		s.guests = append(s.guests, &g)
		s.start("transfused", "--server", s.address("h"), "--socket", "none", "--mount", "code="+g.mnt)
		s.mounted(g.mnt)
		if s.alone {
			break
		}
	}
	host.awaitTimes("msg=mounted", len(s.guests))

	change := func(dir string) {
		s.changers = append(s.changers, &changer{dir: dir, rnd: rand.New(rand.NewPCG(seed, uint64(100+len(s.changers))))})
	}
	change(s.export)
	for _, g := range s.guests {
		view(g.mnt)
		change(g.mnt)
		change(g.mnt)
		if s.pushed {
			s.watches = append(s.watches, watchTree(t, g.mnt))
		}
	}
	files := s.counts(descriptors)
	stop := make(chan struct{})
	var waits []func()
	for i, g := range s.guests {
		waits = append(waits, readers(t, 2, g.mnt, seed+uint64(i), stop))
	}

	var memory map[int]int // early on
	begin := time.Now()
	rnd := rand.New(rand.NewPCG(seed, 0))
	for rounds := 0; time.Since(begin) < duration && !t.Failed(); rounds++ {
		s.mix(1 + rnd.IntN(1<<rnd.IntN(9)))
		s.compare()
		if memory == nil && time.Since(begin) > duration/4 {
			memory = s.counts(resident)
		}
	}
	close(stop)
	for _, wait := range waits {
		wait()
	}
	t.Logf("%d changes; the views agreed after %s; inotify showed %d events", s.steps, distribution(s.lags), s.events)
	for pid, kib := range s.counts(resident) {
		t.Logf("%s: %d KiB of memory, %d at a quarter of the time", name(pid), kib, memory[pid])
		if kib > 2*memory[pid]+64<<10 {
			t.Errorf("%s takes ever more memory", name(pid))
		}
	}

	// What nobody holds and nobody can see any more the host has closed.
	for _, w := range s.watches {
		w.close()
	}
	for _, c := range s.changers {
		c.release()
	}
	for _, e := range s.list(s.export) {
		if err := os.RemoveAll(filepath.Join(s.export, e)); err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		t.Error(err)
	}
	// A helper may have got its devices just now.
	s.eventually("the host's and guests' files are closed", func() string {
		now := s.counts(descriptors)
		if maps.EqualFunc(now, files, func(now, then int) bool { return now <= then+2 }) {
			return ""
		}
		return fmt.Sprint("open files of each process: ", now, ", before: ", files)
	})
	connections := filepath.Join(s.dir, "connections")
	if err := os.Mkdir(connections, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("fusectl", connections, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(connections, 0)
	for _, g := range s.guests {
		s.eventually("no request waits", func() string { return g.waiting(connections) })
	}
}

// mix makes n changes by each changer of the guests, and as many by the host's, but by one guest where it is alone.
func (s *soak) mix(n int) {
	paced := make(chan struct{}, 1) // the host is much faster than the guests
	var guests, all sync.WaitGroup
	do := func(c *changer) bool {
		if err := c.step(); err != nil {
			s.t.Error(err)
			return false
		}
		return true
	}
	for _, c := range s.changers[1:] {
		guests.Go(func() {
			for i := 0; i < n && do(c); i++ {
				select {
				case paced <- struct{}{}:
				default:
				}
			}
		})
	}
	all.Go(func() {
		for range paced {
			if !s.alone && !do(s.changers[0]) {
				return
			}
		}
	})
	guests.Wait()
	close(paced)
	all.Wait()
}

// compare has all guests see what the host has, now that nobody changes it.
func (s *soak) compare() {
	for _, g := range s.guests {
		if s.blind || s.alone {
			// What is written is written back.
			s.flush(g)
		}
	}
	for _, g := range s.guests {
		if s.blind {
			continue
		}
		lag, ok := g.agrees(time.Now(), soakBound)
		s.lags = append(s.lags, lag)
		if !ok {
			for _, c := range s.changers {
				s.t.Logf("changes in %s:\n%s", c.dir, strings.Join(c.log, "\n"))
			}
		}
	}
	for _, c := range s.changers {
		s.steps += len(c.log)
		c.log = c.log[:0]
	}
	if len(s.watches) == 0 {
		return // and the host must not change anything beside a guest that is alone
	}
	// Watchers are told as well as before.
	const last = "the.end" // a file: a directory that somebody has seen in a list before its event is not acted
	for _, w := range s.watches {
		w.mu.Lock()
		s.events += len(w.events)
		w.events = nil
		w.mu.Unlock()
	}
	script(s.t, s.export, ">"+last)
	for _, w := range s.watches {
		// What was before it is acted before it: that may take long, but goes on.
		for seen := -1; ; {
			events, ok := w.until(last, "CREATE", patience)
			if ok {
				break
			}
			if len(events) == seen {
				s.t.Errorf("inotify of %s shows no %s, and nothing else any more", w.dir, last)
				break
			}
			seen = len(events)
		}
	}
	script(s.t, s.export, "rm "+last)
}

// flush writes back what a guest has not written yet. syncfs would not wait for it.
func (s *soak) flush(g *rig) {
	err := filepath.WalkDir(g.mnt, func(path string, d os.DirEntry, err error) error {
		var fd int
		if err == nil && d.Type().IsRegular() {
			if fd, _, err = openRegular(path, os.O_RDONLY); err == nil {
				err = unix.Fsync(fd)
				unix.Close(fd)
			}
		}
		if unexpected(err) {
			return err
		}
		return nil
	})
	if err != nil {
		s.t.Error(err)
	}
}

func (s *soak) list(dir string) (names []string) {
	es, err := os.ReadDir(dir)
	if err != nil {
		s.t.Error(err)
	}
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names
}

// eventually waits until wrong tells nothing.
func (s *soak) eventually(what string, wrong func() string) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		text := wrong()
		if text == "" {
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("not after %v: %s: %s", patience, what, text)
			return
		}
	}
}

// counts has one number of each process of the programs.
func (s *soak) counts(of func(pid int) int) map[int]int {
	all := map[int]int{}
	for _, pid := range processes("") {
		all[pid] = of(pid)
	}
	return all
}

// resident is the memory of a process, in KiB.
func resident(pid int) (kib int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if _, rest, ok := strings.Cut(string(b), "VmRSS:"); ok {
		fmt.Sscan(rest, &kib)
	}
	return kib
}

func name(pid int) string {
	return fmt.Sprintf("process %d (%s)", pid, strings.Join(slices.Compact(strings.Fields(commandLine(pid)))[:1], " "))
}

// waiting tells what the kernel waits for in a mount; connections is the kernel's list of them.
func (r *rig) waiting(connections string) string {
	var st unix.Stat_t
	if err := unix.Stat(r.mnt, &st); err != nil {
		return err.Error()
	}
	b, err := os.ReadFile(filepath.Join(connections, fmt.Sprint(unix.Minor(st.Dev)), "waiting"))
	if n := strings.TrimSpace(string(b)); err != nil || n != "0" {
		return fmt.Sprint(n, " requests ", err)
	}
	return ""
}
