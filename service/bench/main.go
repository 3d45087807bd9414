// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/bench/figures"
)

// config is what the measuring processes get, on their standard input.
type config struct {
	Bin   string   // our binaries
	Dir   string   // where everything is made, on tmpfs
	Cases []string // by name, in order
	Peers []string
	Dirs  map[string]string // of peers that somebody else has mounted
	Runs  int
	Scale scale
	Stale time.Duration // how long before a warm round all was done once

	Sockets string // where ours among Dirs tells what it counts; "" if it does not
}

// stale is when names and attributes are no longer good for peers that keep them for one second.
const stale = 1200 * time.Millisecond

const measureEnv = "TRANSFUSED_BENCH_MEASURE"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case os.Getenv(loopbackEnv) != "":
		err = serveLoopback(os.Args[1:])
	case os.Getenv(measureEnv) != "":
		err = measureChild(ctx)
	default:
		err = run(ctx)
	}
	if errors.Is(err, errMiss) {
		os.Exit(1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
}

var errMiss = errors.New("worse than it must be at least, or than it was")

func run(ctx context.Context) error {
	bin := flag.String("bin", "", "`directory` of transfused and transfuse-host; default: build them")
	dir := flag.String("dir", "/dev/shm", "work below this `directory`, a tmpfs with 5 GiB free")
	runs := flag.Int("runs", 5, "rounds of each case; large transfers take 3 at most")
	cases := flag.String("cases", "", "comma-separated `cases`, or groups of them ("+strings.Join(groupNames(), ", ")+"); default: all of "+strings.Join(caseNames(), ","))
	peers := flag.String("peers", strings.Join(peerNames, ","), "comma-separated `peers` to measure")
	dirs := flag.String("dirs", "", "measure these, comma-separated `NAME=DIR`, which are mounted already and show what -make-tree makes, instead of peers")
	count := flag.Bool("count", false, "count what the kernel asks in the one directory of -dirs, instead of measuring")
	sockets := flag.String("sockets", "", "`directory` of guest-control.sock and metrics.sock of the mount of ours that -count is about: they tell what of it goes to the host")
	treeDir := flag.String("make-tree", "", "make the tree in this `directory`, and end")
	scaleName := flag.String("scale", "full", "how much each case does: `small or full`")
	jsonFile := flag.String("json", "", "write the figures to this `file`, too")
	svgFile := flag.String("svg", "", "draw how ours compares into this `file`")
	compareFile := flag.String("compare", "", "compare with the figures that -json wrote to this `file`, and exit with 1 when more messages are sent")
	markdownFile := flag.String("md", "", "write the tables to this `file`, too")
	check := flag.Bool("check", false, "exit with 1 when something is worse than it must be at least")
	flag.Parse()

	c := config{Bin: *bin, Runs: *runs, Stale: stale, Sockets: *sockets}
	var ok bool
	if c.Scale, ok = scales[*scaleName]; !ok {
		return fmt.Errorf("-scale: small or full, not %q", *scaleName)
	}
	if *treeDir != "" {
		return makeTree(ctx, *treeDir, c.Scale)
	}
	if *runs < 1 {
		return errors.New("-runs: at least 1")
	}
	var err error
	if *dirs != "" {
		c.Peers, c.Dirs, err = parseDirs(*dirs)
	} else {
		c.Peers, err = choose("-peers", *peers, peerNames)
	}
	if err != nil {
		return err
	}
	if *count && len(c.Dirs) != 1 {
		return errors.New("-count: it needs -dirs with one directory")
	}
	modes := []string{onOneCPU, free}
	c.Cases = groupNames()
	if *cases != "" {
		if c.Cases, err = choose("-cases", *cases, slices.Concat(groupNames(), caseNames())); err != nil {
			return err
		}
	}
	if c.Dirs != nil {
		modes = []string{free} // their servers are where they are
		c.Cases = able(c)
		if *count {
			modes = nil
		}
	}
	if err := requirements(c); err != nil {
		return err
	}
	var before *report
	if *compareFile != "" {
		if before, err = readReport(*compareFile, *scaleName); err != nil {
			return err
		}
	}
	work, err := os.MkdirTemp(*dir, "transfused-bench.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	c.Dir = work
	if c.Dirs == nil && c.Bin == "" && slices.Contains(c.Peers, ours) {
		c.Bin = filepath.Join(work, "bin")
		if err := build(ctx, c.Bin); err != nil {
			return err
		}
	}
	if c.Dirs == nil && (slices.Contains(c.Peers, cServer) || slices.Contains(c.Peers, cFloor)) {
		if err := buildFloor(ctx, work); err != nil {
			return err
		}
	}
	if err := makeLocal(c.Dir, c.Scale); err != nil {
		return err
	}
	if c.Dirs == nil {
		fmt.Fprintln(os.Stderr, "making the tree")
		if err := makeTree(ctx, filepath.Join(c.Dir, "tree"), c.Scale); err != nil {
			return fmt.Errorf("make the tree: %w", err)
		}
	}
	if c.Dirs == nil && slices.Contains(c.Peers, ours) {
		undo, err := copyForOurs(ctx, c.Dir)
		if err != nil {
			return fmt.Errorf("copy the tree: %w", err)
		}
		defer undo()
	}

	r := report{Host: figures.Machine(), Scale: *scaleName, Peers: c.Peers}
	for _, mode := range modes {
		res, err := measure(ctx, mode, c)
		if err != nil {
			return err
		}
		r.Modes = append(r.Modes, *res)
	}
	if *count || c.Dirs == nil && slices.Contains(c.Peers, ours) {
		if c.Runs = 1; c.Dirs == nil {
			c.Peers = []string{ours}
		}
		res, err := measure(ctx, counted, c)
		if err != nil {
			return err
		}
		r.Counts = counts(*res)
	}
	r.Floors = floors(r)
	var text, marked, drawn bytes.Buffer
	r.print(&text, table)
	r.print(&marked, figures.Markdown)
	r.draw(&drawn)
	var more int
	if before != nil {
		more = compare(&text, table, *before, r)
		compare(&marked, figures.Markdown, *before, r)
	}
	figures, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	os.Stdout.Write(text.Bytes())
	for _, file := range []struct {
		name string
		data []byte
	}{{*jsonFile, append(figures, '\n')}, {*markdownFile, marked.Bytes()}, {*svgFile, drawn.Bytes()}} {
		if file.name != "" {
			if err := os.WriteFile(file.name, file.data, 0o644); err != nil {
				return err
			}
		}
	}
	if more > 0 || *check && slices.ContainsFunc(r.Floors, func(f floor) bool { return !f.Pass && !f.Target }) {
		return errMiss
	}
	return nil
}

// readReport reads what -json wrote.
func readReport(name, scale string) (*report, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var r report
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if r.Scale != scale {
		return nil, fmt.Errorf("%s: of scale %q, not %q: its counts say nothing here", name, r.Scale, scale)
	}
	return &r, nil
}

// build makes static binaries of our two programs.
func build(ctx context.Context, bin string) error {
	fmt.Fprintln(os.Stderr, "building transfused and transfuse-host")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin+"/",
		"transfused.org/transfused/cmd/transfused", "transfused.org/transfused/cmd/transfuse-host")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build our programs (run bench inside the source tree, or give -bin): %w\n%s", err, out)
	}
	return nil
}

//go:embed floor/floor.c
var floorSource []byte

// buildFloor makes the program floor in dir.
func buildFloor(ctx context.Context, dir string) error {
	source := filepath.Join(dir, "floor.c")
	if err := os.WriteFile(source, floorSource, 0o600); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "gcc", "-O2", "-o", filepath.Join(dir, "floor"), source).CombinedOutput(); err != nil {
		return fmt.Errorf("build floor.c: %w\n%s", err, out)
	}
	return nil
}

// choose splits a list of names, of which all must be known.
func choose(option, list string, known []string) ([]string, error) {
	names := strings.Split(list, ",")
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%s: there is no %q: choose from %s", option, name, strings.Join(known, ","))
		}
	}
	return names, nil
}

// parseDirs reads NAME=DIR,….
func parseDirs(list string) (names []string, dirs map[string]string, err error) {
	dirs = map[string]string{}
	for _, one := range strings.Split(list, ",") {
		name, dir, _ := strings.Cut(one, "=")
		if name == "" || dir == "" || dirs[name] != "" || strings.Contains(name, "/") {
			return nil, nil, fmt.Errorf("-dirs: %q is not NAME=DIR with a name of its own", one)
		}
		names, dirs[name] = append(names, name), dir
	}
	return names, dirs, nil
}

// packagesOf are the Debian packages of programs that cases and peers need.
var packagesOf = map[string]string{
	"git": "git", "cp": "coreutils", "ls": "coreutils", "find": "findutils", "tar": "tar", "make": "make", "gcc": "gcc libc6-dev",
	"bindfs": "bindfs", "sshfs": "sshfs", sftpServer: "openssh-sftp-server", "fusermount3": "fuse3",
}

func absent(program string) bool {
	_, err := exec.LookPath(program)
	return err != nil
}

// able are the cases whose programs, and part of the tree, are there, and those that are asked for by their own name.
func able(c config) (names []string) {
	for _, b := range wanted(c) {
		why := ""
		for _, program := range b.needs {
			if absent(program) {
				why = "there is no program " + program
			}
		}
		for _, dir := range c.Dirs {
			if _, err := os.Stat(filepath.Join(dir, b.in)); err != nil {
				why = err.Error()
			}
		}
		if why != "" && !slices.Contains(c.Cases, b.name) {
			fmt.Fprintf(os.Stderr, "without %s: %s\n", b.name, why)
			continue
		}
		names = append(names, b.name)
	}
	return names
}

// requirements says what is to be installed.
func requirements(c config) error {
	var need []string
	for _, b := range wanted(c) {
		need = append(need, b.needs...)
	}
	if c.Dirs == nil {
		need = append(need, "fusermount3", "git", "cp") // the tree has a repository, and is copied
		for _, p := range c.Peers {
			switch p {
			case "bindfs":
				need = append(need, p)
			case "sshfs", lax:
				need = append(need, "sshfs", sftpServer)
			case cServer, cFloor:
				need = append(need, "gcc")
				if os.Geteuid() != 0 {
					return fmt.Errorf("%s and %s mount by themselves: run this as root, or choose others by -peers", cServer, cFloor)
				}
			}
		}
	}
	var missing []string
	for _, program := range need {
		if absent(program) {
			missing = append(missing, packagesOf[program])
		}
	}
	if len(missing) == 0 {
		return nil
	}
	slices.Sort(missing)
	return fmt.Errorf("programs are missing, install them: apt-get install -y %s", strings.Join(slices.Compact(missing), " "))
}

// measure runs this program again in the given mode and returns its figures.
func measure(ctx context.Context, mode string, c config) (*modeResult, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Env = append(os.Environ(), measureEnv+"="+mode)
	cmd.Stdin, cmd.Stderr = strings.NewReader(string(b)), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("measure %s: %w", mode, err)
	}
	var r modeResult
	return &r, json.Unmarshal(out, &r)
}

// measureChild is the measuring process.
func measureChild(ctx context.Context) error {
	mode := os.Getenv(measureEnv)
	if mode == onOneCPU {
		if err := bindToOneCPU(); err != nil {
			return fmt.Errorf("bind to one CPU: %w", err)
		}
	}
	os.Unsetenv(measureEnv)
	var c config
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	r, err := measureAll(ctx, mode, c)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// bindToOneCPU binds this process to the first CPU that it may use. It binds
// one thread and begins anew, so that all threads to come inherit it.
func bindToOneCPU() error {
	var may, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return err
	}
	if may.Count() == 1 {
		return nil
	}
	cpu := 0
	for !may.IsSet(cpu) {
		cpu++
	}
	one.Set(cpu)
	runtime.LockOSThread()
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}
