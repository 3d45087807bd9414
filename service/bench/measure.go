// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/bench/figures"
)

// How everything is measured.
const (
	onOneCPU = "one CPU"
	free     = "free"
	counted  = "counted" // ours alone and once, to count messages: nothing of it is a figure
)

const (
	// settling is for what operations leave to be done after them, to be counted with them.
	settling = 100 * time.Millisecond
	// pings are the round trips of one round of ping-pong.
	pings = 5000
)

// meter takes the time of a case on one peer.
type meter struct {
	p     *peer
	count bool // messages
	n     int  // operations

	took, cpu time.Duration
	messages  messages

	begin    time.Time
	clocks   []clock
	programs time.Duration
}

// clock is one of a process, and what it said at the beginning.
type clock struct {
	id    int32
	begin time.Duration
}

// start begins. What reads clocks and counters is outside of the time that it measures.
func (m *meter) start() (err error) {
	if m.count {
		time.Sleep(settling)
		if m.messages, err = m.p.messages(); err != nil {
			return err
		}
	}
	m.clocks = []clock{{id: unix.CLOCK_PROCESS_CPUTIME_ID}}
	for _, pid := range m.p.pids() {
		m.clocks = append(m.clocks, clock{id: int32(^pid<<3 | 2)}) // clock_getcpuclockid(3): that of all its threads, in ns
	}
	for i := range m.clocks {
		m.clocks[i].begin = m.clocks[i].now()
	}
	if m.programs, err = programs(); err != nil {
		return err
	}
	m.begin = time.Now()
	return nil
}

// stop ends the time that n operations took.
func (m *meter) stop(n int) error {
	m.took, m.n = time.Since(m.begin), n
	used, err := programs()
	if err != nil {
		return err
	}
	m.cpu = used - m.programs
	for _, c := range m.clocks {
		m.cpu += max(0, c.now()-c.begin)
	}
	if m.count {
		time.Sleep(settling)
		now, err := m.p.messages()
		if err != nil {
			return err
		}
		m.messages = now.less(m.messages)
	}
	return nil
}

// now is the CPU time of a process, or 0 when it has ended: what mounts may have a child for a moment.
func (c clock) now() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(c.id, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// programs is the CPU time of those that this process has run.
func programs() (time.Duration, error) {
	var r unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_CHILDREN, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), err
}

// each calls call n times, from so many threads, and measures that.
func (m *meter) each(threads, n int, call func(thread, i int) error) error {
	// These calls keep their share of the scheduler; see raw.go.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(threads + 1))
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	errs := make([]error, threads)
	for t := range threads {
		ready.Add(1)
		done.Go(func() {
			errs[t] = undisturbed(func() error {
				ready.Done()
				<-begin
				for i := t; i < n; i += threads {
					if err := call(t, i); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	ready.Wait()
	err := m.start()
	close(begin)
	done.Wait()
	return errors.Join(append(errs, err, m.stop(n))...)
}

// figure is what was measured, in the unit of the case.
func (m *meter) figure(u figures.Unit) float64 {
	switch u {
	case figures.Micros:
		return float64(m.took.Nanoseconds()) / 1e3 / float64(m.n)
	case figures.Seconds:
		return m.took.Seconds()
	}
	return float64(m.n) * block / 1e6 / m.took.Seconds()
}

// measureAll runs all cases on all peers.
func measureAll(ctx context.Context, mode string, c config) (res *modeResult, err error) {
	var peers []*peer
	for _, name := range c.Peers {
		p := newPeer(name, c)
		p.told = mode == counted
		defer func() { err = errors.Join(err, p.unmount()) }()
		if p.theirs {
			// As if we had not been there.
			defer func() { err = errors.Join(err, os.RemoveAll(filepath.Join(p.dir, "scratch-"+p.name))) }()
		}
		if err := p.mount(ctx); err != nil {
			return nil, err
		}
		peers = append(peers, p)
	}
	res = &modeResult{Mode: mode}
	fresh := false
	for _, b := range wanted(c) {
		if !b.cold && !fresh {
			// The memory of fresh processes, before any load.
			fresh = true
			for _, p := range peers {
				if err := p.remount(ctx); err != nil {
					return nil, err
				}
				if p.name == ours {
					res.Idle = p.memory()
				}
			}
		}
		row := row{Row: figures.Row{Case: b.name, What: b.what, Unit: b.unit, Rounds: map[string][]float64{}}, CPU: map[string][]float64{}}
		runs := c.Runs
		if b.maxRuns > 0 {
			runs = min(runs, b.maxRuns)
		}
		for round := range runs {
			if b.warm {
				for _, p := range peers {
					if err := b.run(ctx, p, round, &meter{p: p}); err != nil {
						return nil, fmt.Errorf("%s on %s: %w", b.name, p.name, err)
					}
				}
				time.Sleep(c.Stale)
			}
			for _, p := range peers {
				if b.cold {
					if err := p.remount(ctx); err != nil {
						return nil, err
					}
				}
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				m := &meter{p: p, count: p.told}
				if err := b.run(ctx, p, round, m); err != nil {
					return nil, fmt.Errorf("%s on %s: %w", b.name, p.name, err)
				}
				row.N = m.n
				row.Rounds[p.name] = append(row.Rounds[p.name], m.figure(b.unit))
				if !p.theirs { // whose servers may be anywhere
					row.CPU[p.name] = append(row.CPU[p.name], float64(m.cpu.Nanoseconds())/1e3/float64(m.n))
				}
				if m.count {
					row.Messages = m.messages.each(m.n)
				}
			}
			if b.name == "getattr" && slices.Contains(c.Peers, cFloor) && c.Dirs == nil {
				us, err := pingPong(ctx, c)
				if err != nil {
					return nil, err
				}
				res.PingPong = append(res.PingPong, us)
			}
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", mode, row.line(c.Peers))
		res.Rows = append(res.Rows, row)
	}
	for _, p := range peers {
		if p.name == ours {
			res.Loaded = p.memory()
		}
	}
	return res, nil
}

// pingPong is the CPU time, in µs, of one round trip of 80 bytes between two processes.
func pingPong(ctx context.Context, c config) (float64, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(c.Dir, "floor"), "pingpong", strconv.Itoa(pings)).Output()
	if err != nil {
		return 0, fmt.Errorf("floor pingpong: %w", err)
	}
	return strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
}
