// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	onOneCPU = "one CPU"
	free     = "free"
)

// unit says how a figure is to be read.
type unit string

const (
	micros  unit = "µs"   // for each operation, less is better
	seconds unit = "s"    // less is better
	rate    unit = "MB/s" // more is better
)

// bench is one case.
type bench struct {
	name, what string
	unit       unit
	run        func(ctx context.Context, p *peer, round int) (float64, error)
	cold       bool     // a new mount for each round
	maxRuns    int      // 0: no limit
	needs      []string // programs
	in         string   // what of the tree it needs, if that may be missing
}

// cases: those with a new mount come first, so that the processes that are
// looked at for their memory at the end have had all other loads.
var cases = []bench{
	{name: "coldstat", what: "stat of each file of a tree, cold", unit: micros, run: coldStat, cold: true},
	{name: "gitstatus", what: "git status, cold", unit: seconds, run: gitStatus, cold: true, needs: []string{"git"}, in: "repo"},
	{name: "getattr", what: "statx AT_STATX_FORCE_SYNC", unit: micros, run: getattr},
	{name: "read4k", what: "random 4 KiB read, O_DIRECT", unit: micros, run: read4k},
	{name: "create", what: "open(O_CREAT|O_EXCL) and close", unit: micros, run: create},
	{name: "unlink", what: "unlink of these", unit: micros, run: unlink},
	{name: "cp", what: "cp -a of a tree into it", unit: seconds, run: copyFiles, maxRuns: 3, needs: []string{"cp"}},
	{name: "seqwrite", what: "write in blocks of 1 MiB", unit: rate, run: seqWrite, maxRuns: 3},
	{name: "seqread", what: "read in blocks of 1 MiB, cold", unit: rate, run: seqRead, maxRuns: 3},
}

func caseNames() (names []string) {
	for _, b := range cases {
		names = append(names, b.name)
	}
	return names
}

func wanted(c config) (all []bench) {
	for _, b := range cases {
		for _, name := range c.Cases {
			if b.name == name {
				all = append(all, b)
			}
		}
	}
	return all
}

// measureAll runs all cases on all peers.
func measureAll(ctx context.Context, mode string, c config) (res *modeResult, err error) {
	var peers []*peer
	for _, name := range c.Peers {
		p := newPeer(name, c)
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
	warm := false
	for _, b := range wanted(c) {
		if !b.cold && !warm {
			// The memory of fresh processes, before any load.
			warm = true
			for _, p := range peers {
				if err := p.remount(ctx); err != nil {
					return nil, err
				}
				if p.name == ours && !p.theirs {
					res.Idle = p.memory()
				}
			}
		}
		row := row{Case: b.name, What: b.what, Unit: b.unit, Rounds: map[string][]float64{}}
		runs := c.Runs
		if b.maxRuns > 0 {
			runs = min(runs, b.maxRuns)
		}
		for round := range runs {
			for _, p := range peers {
				if b.cold {
					if err := p.remount(ctx); err != nil {
						return nil, err
					}
				}
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				run := func() (float64, error) { return b.run(ctx, p, round) }
				if b.unit == micros {
					inner := run
					run = func() (float64, error) { return undisturbed(inner) }
				}
				v, err := run()
				if err != nil {
					return nil, fmt.Errorf("%s on %s: %w", b.name, p.name, err)
				}
				row.Rounds[p.name] = append(row.Rounds[p.name], v)
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

// each returns the time of one of n calls, in microseconds.
func each(start time.Time, n int) float64 {
	return float64(time.Since(start).Nanoseconds()) / 1e3 / float64(n)
}

func getattr(_ context.Context, p *peer, _ int) (float64, error) {
	fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	var empty byte
	call := func(n int) error {
		for range n {
			if err := rawStatx(fd, &empty, unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, &st); err != nil {
				return err
			}
		}
		return nil
	}
	n := p.c.Scale.Getattrs
	if err := call(n / 10); err != nil {
		return 0, err
	}
	start := time.Now()
	err = call(n)
	return each(start, n), err
}

func read4k(_ context.Context, p *peer, round int) (float64, error) {
	fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(buf)
	// The same places for all peers.
	r := rand.New(rand.NewPCG(uint64(round), 1))
	pages := int64(p.c.Scale.Sequential) << 20 / 4096
	n := p.c.Scale.Reads
	start := time.Now()
	for range n {
		if m, err := rawPread(fd, buf, r.Int64N(pages)*4096); err != nil || m != 4096 {
			return 0, fmt.Errorf("read %d bytes: %w", m, err)
		}
	}
	return each(start, n), nil
}

func coldStat(_ context.Context, p *peer, _ int) (float64, error) {
	n := p.c.Scale.Stats
	names := make([]string, n)
	for i := range names {
		names[i] = filepath.Join(p.dir, fmt.Sprintf("stat/d%03d/file%05d", i/filesPerDir, i))
	}
	ptrs, err := cstrings(names)
	if err != nil {
		return 0, err
	}
	var st unix.Statx_t
	start := time.Now()
	for i, name := range ptrs {
		if err := rawStatx(unix.AT_FDCWD, name, unix.AT_SYMLINK_NOFOLLOW, &st); err != nil {
			return 0, fmt.Errorf("stat %s: %w", names[i], err)
		}
	}
	return each(start, n), nil
}

// scratch is the directory in which a peer writes, through its mount.
func (p *peer) scratch(name string) (string, error) {
	dir := filepath.Join(p.dir, "scratch-"+p.name, name)
	return dir, os.MkdirAll(dir, 0o755)
}

func createdFiles(p *peer) (names []string, err error) {
	dir, err := p.scratch("create")
	for i := range p.c.Scale.Creates {
		names = append(names, fmt.Sprintf("%s/file%05d", dir, i))
	}
	return names, err
}

func create(_ context.Context, p *peer, _ int) (float64, error) {
	names, err := createdFiles(p)
	if err != nil {
		return 0, err
	}
	// What the round before made, if the case unlink did not remove it.
	for _, name := range names {
		if err := unix.Unlink(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	}
	ptrs, err := cstrings(names)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	for _, name := range ptrs {
		fd, err := rawOpen(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return 0, err
		}
		if err := rawClose(fd); err != nil {
			return 0, err
		}
	}
	return each(start, len(names)), nil
}

func unlink(_ context.Context, p *peer, _ int) (float64, error) {
	names, err := createdFiles(p)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return 0, err
		}
		unix.Close(fd)
	}
	ptrs, err := cstrings(names)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	for _, name := range ptrs {
		if err := rawUnlink(name); err != nil {
			return 0, err
		}
	}
	return each(start, len(names)), nil
}

func copyFiles(ctx context.Context, p *peer, round int) (float64, error) {
	dir, err := p.scratch("cp")
	if err != nil {
		return 0, err
	}
	to := filepath.Join(dir, fmt.Sprint(round))
	start := time.Now()
	out, err := exec.CommandContext(ctx, "cp", "-a", filepath.Join(p.c.Dir, "local"), to).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("cp -a: %w\n%s", err, out)
	}
	took := time.Since(start).Seconds()
	return took, os.RemoveAll(to)
}

func gitStatus(ctx context.Context, p *peer, _ int) (float64, error) {
	start := time.Now()
	err := git(ctx, filepath.Join(p.dir, "repo"), "status", "--porcelain")
	return time.Since(start).Seconds(), err
}

const block = 1 << 20

// megabytes returns the rate in MB/s of n MiB.
func megabytes(start time.Time, n int) float64 {
	return float64(n) * block / 1e6 / time.Since(start).Seconds()
}

func seqWrite(_ context.Context, p *peer, round int) (float64, error) {
	dir, err := p.scratch("write")
	if err != nil {
		return 0, err
	}
	name := filepath.Join(dir, fmt.Sprint(round))
	buf := []byte(strings.Repeat("sixteen bytes...", block/16))
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return 0, err
	}
	defer os.Remove(name)
	n := p.c.Scale.Sequential
	start := time.Now()
	for range n {
		if m, err := unix.Write(fd, buf); err != nil || m != block {
			unix.Close(fd)
			return 0, fmt.Errorf("wrote %d bytes: %w", m, err)
		}
	}
	// The close belongs to it: peers that write behind must have written.
	if err := unix.Close(fd); err != nil {
		return 0, err
	}
	return megabytes(start, n), nil
}

func seqRead(_ context.Context, p *peer, _ int) (float64, error) {
	fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// The mount's pages go; those of the tmpfs behind it stay.
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	buf := make([]byte, block)
	n := p.c.Scale.Sequential
	start := time.Now()
	for left := n * block; left > 0; {
		m, err := unix.Read(fd, buf)
		if err != nil || m == 0 {
			return 0, fmt.Errorf("read %d bytes: %w", m, err)
		}
		left -= m
	}
	return megabytes(start, n), nil
}
