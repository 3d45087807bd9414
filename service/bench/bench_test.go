// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/fstest"

	"transfused.org/transfused/service/bench/figures"
)

var smallScale = scale{Getattrs: 20, Reads: 20, Stats: 120, Creates: 20, Copies: 60, Repo: 60, Small: 50, Sources: 2, Sequential: 2}

// TestMain lets the test program be the server of the peer gofuse.
func TestMain(m *testing.M) {
	if os.Getenv(loopbackEnv) != "" {
		if err := serveLoopback(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestMeasure runs every case at a small scale on what needs no server, and
// checks that nothing is left.
func TestMeasure(t *testing.T) {
	fstest.Leaks(t)
	c := config{Dir: t.TempDir(), Cases: caseNames(), Peers: []string{bare}, Runs: 2, Scale: smallScale}
	makeSmall(t, c)
	measureSmall(t, c)
	left, err := filepath.Glob(filepath.Join(c.Dir, "tree/scratch-*/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if !strings.HasPrefix(filepath.Base(f), "file") { // of create and randwrite4k
			t.Errorf("left %s", f)
		}
	}
}

// TestServers runs every case at a small scale on the servers in C and on go-fuse's loopback.
func TestServers(t *testing.T) {
	fstest.Leaks(t)
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	c := config{Dir: t.TempDir(), Cases: caseNames(), Peers: []string{cServer, goFuse, cFloor}, Runs: 2, Scale: smallScale}
	if err := requirements(c); err != nil {
		t.Fatal(err)
	}
	if err := buildFloor(t.Context(), c.Dir); err != nil {
		t.Fatal(err)
	}
	makeSmall(t, c)
	if res := measureSmall(t, c); len(res.PingPong) != c.Runs || slices.Min(res.PingPong) <= 0 {
		t.Errorf("ping-pong: %v", res.PingPong)
	}
}

// TestDirs measures a directory that somebody else has made, and leaves nothing in it.
func TestDirs(t *testing.T) {
	fstest.Leaks(t)
	if os.Geteuid() != 0 {
		t.Fatal("this test drops the kernel's caches: run it as root")
	}
	c := config{Dir: t.TempDir(), Cases: []string{"coldstat8", "find", "gitstatus", "getattr", "fsmark", "build"}, Peers: []string{ours, "virtiofs"}, Runs: 1, Scale: smallScale}
	makeSmall(t, c)
	tree := filepath.Join(c.Dir, "tree")
	c.Dirs = map[string]string{ours: tree, "virtiofs": tree}
	groups := c
	groups.Cases = groupNames()
	groups.Dirs = map[string]string{ours: tree}
	if got := able(groups); !slices.Equal(got, caseNames()) {
		t.Errorf("able to do %v only", got)
	}
	res := measureSmall(t, c)
	for _, r := range res.Rows {
		if len(r.CPU) > 0 {
			t.Errorf("%s: CPU %v, of servers that nobody knows", r.Case, r.CPU)
		}
	}
	if left, err := filepath.Glob(tree + "/scratch-*"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}

	c.Scale.Sequential++
	if _, err := measureAll(t.Context(), free, c); err == nil || !strings.Contains(err.Error(), "another scale") {
		t.Errorf("of another scale: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(tree, "repo")); err != nil {
		t.Fatal(err)
	}
	if got := able(groups); slices.Contains(got, "gitstatus") || slices.Contains(got, "warmgit") || !slices.Contains(got, "getattr") {
		t.Errorf("able, without a repository, to do %v", got)
	}
	if got := able(c); !slices.Contains(got, "gitstatus") {
		t.Errorf("left out what was asked for by its name: %v", got)
	}
}

// TestCounted counts the messages of ours.
func TestCounted(t *testing.T) {
	fstest.Leaks(t)
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	c := config{Dir: t.TempDir(), Cases: []string{"coldstat", "getattr", "create", "unlink", "mdtest"}, Peers: []string{ours}, Runs: 1, Scale: smallScale}
	c.Bin = filepath.Join(c.Dir, "bin")
	if err := build(t.Context(), c.Bin); err != nil {
		t.Fatal(err)
	}
	makeSmall(t, c)
	undo, err := copyForOurs(t.Context(), c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer undo()
	res, err := measureAll(t.Context(), counted, c)
	if err != nil {
		t.Fatal(err)
	}
	// The e2e tests tell which they are. The guest's daemon answers GETATTR of a directory only if it is asked soon enough.
	want := map[string][2]float64{"coldstat": {1, 1}, "getattr": {1, 1}, "create": {3, 4}, "unlink": {1, 2}, "mdtest": {3, 5}}
	all := counts(*res)
	if len(all) != len(want) {
		t.Errorf("%d cases are counted", len(all))
	}
	for _, k := range all {
		t.Logf("%s: %.3f messages; asked %v", k.Case, k.Sent, k.Asked)
		if got, bounds := math.Round(k.Sent), want[k.Case]; got < bounds[0] || got > bounds[1] {
			t.Errorf("%s: %.3f messages, want %v", k.Case, k.Sent, bounds)
		}
	}
}

// makeSmall makes what is measured.
func makeSmall(t *testing.T, c config) {
	t.Helper()
	if err := makeLocal(c.Dir, c.Scale); err != nil {
		t.Fatal(err)
	}
	if err := makeTree(t.Context(), filepath.Join(c.Dir, "tree"), c.Scale); err != nil {
		t.Fatal(err)
	}
}

// measureSmall measures all that c says, of which every case must have its figures.
func measureSmall(t *testing.T, c config) *modeResult {
	t.Helper()
	res, err := measureAll(t.Context(), free, c)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) != len(wanted(c)) {
		t.Errorf("%d rows, want %d", len(res.Rows), len(wanted(c)))
	}
	for _, r := range res.Rows {
		for _, p := range c.Peers {
			if v := r.Rounds[p]; len(v) != c.Runs || slices.Min(v) <= 0 {
				t.Errorf("%s of %s: rounds %v", r.Case, p, v)
			}
		}
	}
	return res
}

// sample is a report in which some promises are kept, and some just not.
func sample() report {
	one := func(v float64) []float64 { return []float64{v} }
	return report{Scale: "full", Peers: peerNames, Modes: []modeResult{{
		Mode: onOneCPU,
		Rows: []row{
			{Row: figures.Row{Case: "coldstat", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(51), "bindfs": one(30), cFloor: one(20)}}},
			{Row: figures.Row{Case: "find", Unit: figures.Seconds, N: 1000, Rounds: map[string][]float64{ours: one(0.033), "bindfs": one(0.020), "sshfs": one(0.01)}}},
			{Row: figures.Row{Case: "getattr", What: "a|b", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(40), "bindfs": one(10), "sshfs": one(1), cFloor: one(25), cServer: one(10)}},
				CPU: map[string][]float64{ours: one(22), "bindfs": one(10)}},
			{Row: figures.Row{Case: "create", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(90), "bindfs": one(10), "sshfs": one(80)}}},
			{Row: figures.Row{Case: "seqread", Unit: figures.Rate, Rounds: map[string][]float64{ours: one(590), "bindfs": one(2000), "sshfs": one(500), cFloor: one(600)}}},
			{Row: figures.Row{Case: "unlink", Unit: figures.Micros, Rounds: map[string][]float64{"sshfs": one(80)}}},
		},
		PingPong: one(10),
		Idle:     []memory{{Process: "a", PID: 1, RSS: 25 << 10}},
		Loaded:   []memory{{Process: "a", PID: 1, RSS: 39 << 10}, {Process: "b", PID: 2, RSS: 40 << 10}},
	}, {
		Mode: free,
		Rows: []row{
			{Row: figures.Row{Case: "coldstat", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(50), "sshfs": one(1)}}},
			{Row: figures.Row{Case: "coldstat8", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(40)}}},
			{Row: figures.Row{Case: "create", Unit: figures.Micros, Rounds: map[string][]float64{ours: one(900), "sshfs": one(1)}}},
		},
	}}, Counts: []count{{"coldstat", figures.Messages{Sent: 1, Asked: map[string]float64{"LOOKUP": 1, "GETATTR": 0.25}}}, {"find", figures.Messages{Sent: 0.5}}}}
}

func TestFloors(t *testing.T) {
	r := sample()
	want := []floor{
		{Text: "getattr: at most 4 times bindfs", Got: "4.00 times", Pass: true},
		{Text: "create: faster than sshfs", Got: "1.12 times its cost"},
		{Text: "seqread: faster than sshfs", Got: "0.85 times its cost", Pass: true},
		{Text: "seqread: at least 600 MB/s", Got: "590 MB/s"},
		{"coldstat: at most bindfs + 1.4 times the relay in C for each of 1.00 messages", "51.0 µs, at most 51.0 µs", true, "47.2 µs", false, true},
		{"find: at most bindfs + 1.4 times the relay in C for each of 0.50 messages", "0.033 s, at most 0.030 s", false, "0.029 s", false, true},
		{"getattr: at most 1.4 times c-floor", "1.60 times", false, "1.15 times", false, true},
		{"getattr: CPU at most bindfs + 1.3 round trips of 80 bytes (10.0 µs)", "22.0 µs, at most 23.0 µs", true, "21.0 µs", false, true},
		{"seqread: at least 75 % of c-floor, faster than sshfs", "98 %; of sshfs 118 %, of bindfs 30 %", true, "95 %, faster than bindfs", false, true},
		{Text: "memory of a (1), idle: under 25 MiB", Got: "25.0 MiB", Target: true},
		{Text: "memory of a (1): under 40 MiB", Got: "39.0 MiB", Pass: true},
		{Text: "memory of b (2): under 40 MiB", Got: "40.0 MiB"},
		{Text: "coldstat8, free: more is done in the same time than in coldstat", Got: "1.25 times as much", Pass: true, Target: true},
	}
	if d := cmp.Diff(want, floors(r)); d != "" {
		t.Error(d)
	}
	r.Floors = want
	var b bytes.Buffer
	r.print(&b, table)
	for _, s := range []string{"PASS           getattr", "MISS           create", "target met     coldstat:", "target missed  find:", "/sshfs", "590 MB/s", "-", "GETATTR 0.25, LOOKUP 1.00", "Unix socket: 10.0 µs", "22.0 µs"} {
		if !strings.Contains(b.String(), s) {
			t.Errorf("no %q in\n%s", s, &b)
		}
	}
	b.Reset()
	r.print(&b, figures.Markdown)
	for _, s := range []string{"\n| case | what | bare |", "\n| getattr | a\\|b |", "\n| MISS | create: faster than sshfs | 1.12 times its cost |"} {
		if !strings.Contains(narrow(&b), s) {
			t.Errorf("no %q in\n%s", s, &b)
		}
	}
}

// narrow is a table without what aligns it.
func narrow(b *bytes.Buffer) string {
	return regexp.MustCompile(` +`).ReplaceAllString(b.String(), " ")
}

func TestCompare(t *testing.T) {
	before, now := sample(), sample()
	now.Counts = []count{{"coldstat", figures.Messages{Sent: 1.04}}, {"find", figures.Messages{Sent: 0.6}}, {"new", figures.Messages{Sent: 7}}}
	now.Modes[0].Rows[0].Rounds[ours] = []float64{60}
	var b bytes.Buffer
	if n := compare(&b, figures.Markdown, before, now); n != 1 {
		t.Errorf("%d cases send more", n)
	}
	for _, s := range []string{" 1.70 → 2.00 |", "| coldstat | | 1.00 → 1.04 |", "| find | MORE | 0.50 → 0.60 |", "| new | | - → 7.00 |"} {
		if !strings.Contains(narrow(&b), s) {
			t.Errorf("no %q in\n%s", s, &b)
		}
	}
	if n := compare(io.Discard, table, now, before); n != 0 {
		t.Errorf("fewer messages: %d cases send more", n)
	}
}

// A drawing is XML, and has a bar for each case and peer that were measured.
func TestDraw(t *testing.T) {
	r := sample()
	var b bytes.Buffer
	r.draw(&b)
	bars := 0
	for d := xml.NewDecoder(bytes.NewReader(b.Bytes())); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, &b)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "rect" {
			bars++
		}
	}
	if want := 3 + 2 + 2 + 3 + 2 + 3; bars != want { // the legend, and the rows
		t.Errorf("%d bars, want %d", bars, want)
	}
	b.Reset()
	report{Peers: []string{ours, "virtiofs"}, Modes: []modeResult{{Mode: free, Rows: []row{
		{Row: figures.Row{Case: "getattr", Unit: figures.Micros, Rounds: map[string][]float64{ours: {1}, "virtiofs": {8}}}},
	}}}}.draw(&b)
	if !strings.Contains(b.String(), ">virtiofs<") || !strings.Contains(b.String(), ">0.12<") {
		t.Errorf("virtiofs is not in\n%s", &b)
	}
}

func TestArguments(t *testing.T) {
	names, dirs, err := parseDirs("transfused=/mnt/a,virtiofs=/mnt/b=c")
	if err != nil || !slices.Equal(names, []string{ours, "virtiofs"}) || dirs["virtiofs"] != "/mnt/b=c" {
		t.Errorf("%v %v %v", names, dirs, err)
	}
	for _, s := range []string{"", "a", "a=", "=b", "a=b,a=c", "a/b=c"} {
		if _, _, err := parseDirs(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
	if _, err := choose("-cases", "getattr,nothing", caseNames()); err == nil || !strings.Contains(err.Error(), `no "nothing"`) {
		t.Error(err)
	}
	var got []string
	for _, b := range wanted(config{Cases: []string{"warm", "getattr"}}) {
		got = append(got, b.name)
	}
	if want := []string{"warmstat", "warmfind", "warmgit", "getattr"}; !slices.Equal(got, want) {
		t.Errorf("a group and a case: %v, want %v", got, want)
	}
	for _, name := range groupNames() {
		if slices.Contains(caseNames(), name) {
			t.Errorf("%s is a group and a case", name)
		}
	}
}
