// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/bench/figures"
)

// bench is one case.
type bench struct {
	name, group, what string
	unit              figures.Unit
	run               func(ctx context.Context, p *peer, round int, m *meter) error
	cold              bool     // a new mount for each round
	warm              bool     // done before each round, too, and more than a second before it
	maxRuns           int      // 0: no limit
	needs             []string // programs
	in                string   // what of the tree it needs, if that may be missing
}

// cases: those with a new mount come first, so that the processes that are
// looked at for their memory at the end have had all other loads.
var cases = []bench{
	{name: "coldstat", group: "cold", what: "stat of each file of a tree, cold", unit: figures.Micros, run: coldStat(1), cold: true},
	{name: "coldstat8", group: "threads", what: "coldstat by 8 threads", unit: figures.Micros, run: coldStat(8), cold: true, maxRuns: 3},
	{name: "coldstat64", group: "threads", what: "coldstat by 64 threads", unit: figures.Micros, run: coldStat(64), cold: true, maxRuns: 3},
	{name: "find", group: "cold", what: "find over a tree of packages, cold", unit: figures.Seconds, run: find, cold: true, needs: []string{"find"}},
	{name: "lslR", group: "cold", what: "ls -lR of it, cold", unit: figures.Seconds, run: list, cold: true, needs: []string{"ls"}},
	{name: "tar", group: "cold", what: "tar -c of it, cold", unit: figures.Seconds, run: tarUp, cold: true, maxRuns: 3, needs: []string{"tar"}},
	{name: "gitstatus", group: "cold", what: "git status, cold", unit: figures.Seconds, run: gitStatus, cold: true, needs: []string{"git"}, in: "repo"},

	{name: "warmstat", group: "warm", what: "stat of each file of a tree, warm", unit: figures.Micros, run: warmStat(1), warm: true},
	{name: "warmstat8", group: "threads", what: "warmstat by 8 threads", unit: figures.Micros, run: warmStat(8), warm: true, maxRuns: 3},
	{name: "warmstat64", group: "threads", what: "warmstat by 64 threads", unit: figures.Micros, run: warmStat(64), warm: true, maxRuns: 3},
	{name: "warmfind", group: "warm", what: "find over a tree of packages, warm", unit: figures.Seconds, run: find, warm: true, maxRuns: 3, needs: []string{"find"}},
	{name: "warmgit", group: "warm", what: "git status, warm", unit: figures.Seconds, run: gitStatus, warm: true, maxRuns: 3, needs: []string{"git"}, in: "repo"},

	{name: "getattr", group: "calls", what: "statx AT_STATX_FORCE_SYNC", unit: figures.Micros, run: getattr},
	{name: "read4k", group: "calls", what: "random 4 KiB read, O_DIRECT", unit: figures.Micros, run: read4k(1)},
	{name: "read4k8", group: "threads", what: "read4k by 8 threads", unit: figures.Micros, run: read4k(8), maxRuns: 3},
	{name: "read4k64", group: "threads", what: "read4k by 64 threads", unit: figures.Micros, run: read4k(64), maxRuns: 3},
	{name: "randwrite4k", group: "calls", what: "random 4 KiB write, O_DIRECT", unit: figures.Micros, run: randWrite, maxRuns: 3},
	{name: "create", group: "calls", what: "open(O_CREAT|O_EXCL) and close", unit: figures.Micros, run: create},
	{name: "unlink", group: "calls", what: "unlink of these", unit: figures.Micros, run: unlink},
	{name: "fsmark", group: "calls", what: "create, write 4 KiB, fsync, close", unit: figures.Micros, run: fsMark},
	{name: "mdtest", group: "calls", what: "mkdir, stat and rmdir", unit: figures.Micros, run: mdTest},

	{name: "cp", group: "programs", what: "cp -a of a tree into it", unit: figures.Seconds, run: copyFiles, maxRuns: 3, needs: []string{"cp"}},
	{name: "untar", group: "programs", what: "tar -x of the tree of packages", unit: figures.Seconds, run: untar, maxRuns: 3, needs: []string{"tar"}},
	{name: "build", group: "programs", what: "tar -x of a small program in C, make", unit: figures.Seconds, run: compile, maxRuns: 3, needs: []string{"tar", "make", "gcc"}},
	{name: "seqwrite", group: "sequential", what: "write in blocks of 1 MiB", unit: figures.Rate, run: seqWrite, maxRuns: 3},
	{name: "seqread", group: "sequential", what: "read in blocks of 1 MiB, cold", unit: figures.Rate, run: seqRead, maxRuns: 3},
}

func caseNames() (names []string) {
	for _, b := range cases {
		names = append(names, b.name)
	}
	return names
}

// groupNames are the names by which -cases takes several.
func groupNames() (names []string) {
	for _, b := range cases {
		if !slices.Contains(names, b.group) {
			names = append(names, b.group)
		}
	}
	return names
}

// wanted are the cases that c names, or whose group it names.
func wanted(c config) (all []bench) {
	for _, b := range cases {
		if slices.Contains(c.Cases, b.name) || slices.Contains(c.Cases, b.group) {
			all = append(all, b)
		}
	}
	return all
}

func getattr(_ context.Context, p *peer, _ int, m *meter) error {
	fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	var empty byte
	call := func(_, _ int) error {
		return rawStatx(fd, &empty, unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, &st)
	}
	n := p.c.Scale.Getattrs
	if err := (&meter{p: p}).each(1, n/10, call); err != nil {
		return err
	}
	return m.each(1, n, call)
}

// pageBuffer is a page, as O_DIRECT wants it.
func pageBuffer() ([]byte, error) {
	return unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
}

// randomPages calls call n times with a page of a file of mebibytes, by so many threads, which each have a buffer. The places are the same for all peers.
func randomPages(m *meter, threads, n, mebibytes, round int, call func(buf []byte, offset int64) (int, error)) error {
	var bufs [][]byte
	var places []*rand.Rand
	for t := range threads {
		buf, err := pageBuffer()
		if err != nil {
			return err
		}
		defer unix.Munmap(buf)
		bufs = append(bufs, buf)
		places = append(places, rand.New(rand.NewPCG(uint64(round), uint64(t)+1)))
	}
	pages := int64(mebibytes) << 20 / 4096
	return m.each(threads, n, func(t, _ int) error {
		if got, err := call(bufs[t], places[t].Int64N(pages)*4096); err != nil || got != 4096 {
			return fmt.Errorf("%d bytes: %w", got, err)
		}
		return nil
	})
}

func read4k(threads int) func(context.Context, *peer, int, *meter) error {
	return func(_ context.Context, p *peer, round int, m *meter) error {
		fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return randomPages(m, threads, p.c.Scale.Reads, p.c.Scale.Sequential, round, func(buf []byte, offset int64) (int, error) { return rawPread(fd, buf, offset) })
	}
}

// written is the size, in MiB, of the file of randWrite.
const written = 64

func randWrite(_ context.Context, p *peer, round int, m *meter) error {
	dir, err := p.scratch("randwrite")
	if err != nil {
		return err
	}
	name, size := filepath.Join(dir, "file"), min(written, p.c.Scale.Sequential)
	if fi, err := os.Stat(name); err != nil || fi.Size() != int64(size)<<20 {
		if err := os.WriteFile(name, make([]byte, size<<20), 0o644); err != nil {
			return err
		}
	}
	fd, err := unix.Open(name, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	n := p.c.Scale.Reads / 5
	left := n
	err = randomPages(m, 1, n, size, round, func(buf []byte, offset int64) (int, error) {
		got, err := rawPwrite(fd, buf, offset)
		// The last one waits for all of them: sshfs writes behind, with O_DIRECT too.
		if left--; left == 0 && err == nil {
			err = rawFsync(fd)
		}
		return got, err
	})
	return errors.Join(err, unix.Close(fd))
}

// statAll stats the files of the tree for it.
func statAll(p *peer, m *meter, threads int) error {
	n := p.c.Scale.Stats
	names := make([]string, n)
	for i := range names {
		names[i] = filepath.Join(p.dir, fmt.Sprintf("stat/d%03d/file%05d", i/filesPerDir, i))
	}
	ptrs, err := cstrings(names)
	if err != nil {
		return err
	}
	st := make([]unix.Statx_t, threads)
	return m.each(threads, n, func(t, i int) error {
		if err := rawStatx(unix.AT_FDCWD, ptrs[i], unix.AT_SYMLINK_NOFOLLOW, &st[t]); err != nil {
			return fmt.Errorf("stat %s: %w", names[i], err)
		}
		return nil
	})
}

func coldStat(threads int) func(context.Context, *peer, int, *meter) error {
	return func(_ context.Context, p *peer, _ int, m *meter) error { return statAll(p, m, threads) }
}

// warmStat differs in what was done before.
var warmStat = coldStat

// scratch is the directory in which a peer writes, through its mount.
func (p *peer) scratch(name string) (string, error) {
	dir := filepath.Join(p.dir, "scratch-"+p.name, name)
	return dir, os.MkdirAll(dir, 0o755)
}

// scratchNames are n names in a scratch directory, for the kernel too.
func scratchNames(p *peer, dir string, n int) (names []string, ptrs []*byte, err error) {
	dir, err = p.scratch(dir)
	if err != nil {
		return nil, nil, err
	}
	for i := range n {
		names = append(names, fmt.Sprintf("%s/file%05d", dir, i))
	}
	ptrs, err = cstrings(names)
	return names, ptrs, err
}

// removeAll removes files of which some may not be there.
func removeAll(names []string) error {
	for _, name := range names {
		if err := unix.Unlink(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func create(_ context.Context, p *peer, _ int, m *meter) error {
	names, ptrs, err := scratchNames(p, "create", p.c.Scale.Creates)
	if err != nil {
		return err
	}
	// What the round before made, if the case unlink did not remove it.
	if err := removeAll(names); err != nil {
		return err
	}
	return m.each(1, len(ptrs), func(_, i int) error {
		fd, err := rawOpen(ptrs[i], unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		return rawClose(fd)
	})
}

func unlink(_ context.Context, p *peer, _ int, m *meter) error {
	names, ptrs, err := scratchNames(p, "create", p.c.Scale.Creates)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	return m.each(1, len(ptrs), func(_, i int) error { return rawUnlink(ptrs[i], 0) })
}

func fsMark(_ context.Context, p *peer, _ int, m *meter) error {
	names, ptrs, err := scratchNames(p, "fsmark", p.c.Scale.Creates/2)
	if err != nil {
		return err
	}
	buf, err := pageBuffer()
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	err = m.each(1, len(ptrs), func(_, i int) error {
		fd, err := rawOpen(ptrs[i], unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return err
		}
		if n, err := rawPwrite(fd, buf, 0); err != nil || n != len(buf) {
			return fmt.Errorf("wrote %d bytes: %w", n, err)
		}
		if err := rawFsync(fd); err != nil {
			return err
		}
		return rawClose(fd)
	})
	return errors.Join(err, removeAll(names))
}

func mdTest(_ context.Context, p *peer, _ int, m *meter) error {
	n := p.c.Scale.Creates / 2
	names, ptrs, err := scratchNames(p, "mdtest", n)
	if err != nil {
		return err
	}
	var st unix.Statx_t
	if err := m.each(1, 3*n, func(_, i int) error {
		name := ptrs[i%n]
		switch i / n {
		case 0:
			return rawMkdir(name, 0o755)
		case 1:
			return rawStatx(unix.AT_FDCWD, name, unix.AT_SYMLINK_NOFOLLOW, &st)
		}
		return rawUnlink(name, unix.AT_REMOVEDIR)
	}); err != nil {
		return fmt.Errorf("directories like %s: %w", names[0], err)
	}
	m.n = n // an operation is all three
	return nil
}

const block = 1 << 20

func seqWrite(_ context.Context, p *peer, round int, m *meter) error {
	dir, err := p.scratch("write")
	if err != nil {
		return err
	}
	name := filepath.Join(dir, fmt.Sprint(round))
	buf := []byte(strings.Repeat("sixteen bytes...", block/16))
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	defer os.Remove(name)
	n := p.c.Scale.Sequential
	if err := present(2 * n * block); err != nil {
		return err
	}
	if err := m.start(); err != nil {
		return err
	}
	for range n {
		if got, err := unix.Write(fd, buf); err != nil || got != block {
			unix.Close(fd)
			return fmt.Errorf("wrote %d bytes: %w", got, err)
		}
	}
	// The close belongs to it: peers that write behind must have written.
	return errors.Join(unix.Close(fd), m.stop(n))
}

// present has so much free memory that the machine really has. What is free in a VM its host takes back (free page reporting), and finds
// anew for whoever touches it next: here at 0.5 GB/s instead of 3.
func present(size int) error {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	return os.NewSyscallError("munmap", unix.Munmap(b))
}

func seqRead(_ context.Context, p *peer, _ int, m *meter) error {
	fd, err := unix.Open(filepath.Join(p.dir, "big"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The mount's pages go; those of the tmpfs behind it stay.
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	buf := make([]byte, block)
	n := p.c.Scale.Sequential
	if err := present(n * block); err != nil {
		return err
	}
	if err := m.start(); err != nil {
		return err
	}
	for left := n * block; left > 0; {
		got, err := unix.Read(fd, buf)
		if err != nil || got == 0 {
			return fmt.Errorf("read %d bytes: %w", got, err)
		}
		left -= got
	}
	return m.stop(n)
}
