// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/fstest"
)

var smallScale = scale{Getattrs: 20, Reads: 20, Stats: 120, Creates: 20, Copies: 60, Repo: 60, Small: 50, Sources: 2, Sequential: 2}

// TestMeasure runs every case at a small scale on what needs no server, and
// checks that nothing is left.
func TestMeasure(t *testing.T) {
	fstest.Leaks(t)
	c := config{Dir: t.TempDir(), Cases: caseNames(), Peers: []string{bare}, Runs: 2, Scale: smallScale}
	measureSmall(t, c)
	left, err := filepath.Glob(filepath.Join(c.Dir, "tree/scratch-*/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if !strings.HasPrefix(filepath.Base(f), "file") { // of case create
			t.Errorf("left %s", f)
		}
	}
}

// TestFloor runs every case at a small scale on the servers in C.
func TestFloor(t *testing.T) {
	fstest.Leaks(t)
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	c := config{Dir: t.TempDir(), Cases: caseNames(), Peers: []string{cServer, cFloor}, Runs: 2, Scale: smallScale}
	if err := requirements(c); err != nil {
		t.Fatal(err)
	}
	if err := buildFloor(t.Context(), c.Dir); err != nil {
		t.Fatal(err)
	}
	measureSmall(t, c)
}

// measureSmall makes the tree and measures all that c says, of which every case must have its figures.
func measureSmall(t *testing.T, c config) {
	t.Helper()
	if err := makeLocal(c.Dir, c.Scale); err != nil {
		t.Fatal(err)
	}
	if err := makeTree(t.Context(), filepath.Join(c.Dir, "tree"), c.Scale); err != nil {
		t.Fatal(err)
	}
	res, err := measureAll(t.Context(), free, c)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) != len(cases) {
		t.Errorf("%d rows, want %d", len(res.Rows), len(cases))
	}
	for _, r := range res.Rows {
		for _, p := range c.Peers {
			if v := r.Rounds[p]; len(v) != c.Runs || slices.Min(v) <= 0 {
				t.Errorf("%s of %s: rounds %v", r.Case, p, v)
			}
		}
	}
}

func TestRatio(t *testing.T) {
	for _, c := range []struct {
		name string
		row  row
		want float64
	}{
		{"time", row{Unit: micros, Rounds: map[string][]float64{ours: {10, 20, 90}, "sshfs": {20, 40, 30}}}, 0.5},
		{"rate", row{Unit: rate, Rounds: map[string][]float64{ours: {800}, "sshfs": {400}}}, 0.5},
		{"the median is of ratios", row{Unit: micros, Rounds: map[string][]float64{ours: {1, 100}, "sshfs": {2, 100}}}, 0.75},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.row.ratio(ours, "sshfs"); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestFloors(t *testing.T) {
	one := func(v float64) []float64 { return []float64{v} }
	r := report{Peers: peerNames, Modes: []modeResult{{
		Mode: onOneCPU,
		Rows: []row{
			{Case: "getattr", Unit: micros, Rounds: map[string][]float64{ours: one(40), "bindfs": one(10), "sshfs": one(1)}},
			{Case: "create", Unit: micros, Rounds: map[string][]float64{ours: one(90), "bindfs": one(10), "sshfs": one(80)}},
			{Case: "seqread", Unit: rate, Rounds: map[string][]float64{ours: one(590), "bindfs": one(2000), "sshfs": one(500)}},
			{Case: "unlink", Unit: micros, Rounds: map[string][]float64{"sshfs": one(80)}},
		},
		Loaded: []memory{{Process: "a", PID: 1, RSS: 39 << 10}, {Process: "b", PID: 2, RSS: 40 << 10}},
	}, {
		Mode: free,
		Rows: []row{{Case: "create", Unit: micros, Rounds: map[string][]float64{ours: one(900), "sshfs": one(1)}}},
	}}}
	want := []floor{
		{"getattr: at most 4 times bindfs", "4.00 times", true},
		{"create: faster than sshfs", "1.12 times its cost", false},
		{"seqread: faster than sshfs", "0.85 times its cost", true},
		{"seqread: at least 600 MB/s", "590 MB/s", false},
		{"memory of a (1): under 40 MiB", "39.0 MiB", true},
		{"memory of b (2): under 40 MiB", "40.0 MiB", false},
	}
	if d := cmp.Diff(want, floors(r)); d != "" {
		t.Error(d)
	}
	r.Floors = want
	var b bytes.Buffer
	r.print(&b, table)
	for _, s := range []string{"PASS  getattr", "MISS  create", "/sshfs", "590 MB/s", "-"} {
		if !strings.Contains(b.String(), s) {
			t.Errorf("no %q in\n%s", s, &b)
		}
	}
	b.Reset()
	r.print(&b, markdown)
	for _, s := range []string{"\n| case | what | bare |", "\n| --- | --- | --- |", "\n| getattr |", "\n| MISS | create: faster than sshfs | 1.12 times its cost |\n"} {
		if !strings.Contains(b.String(), s) {
			t.Errorf("no %q in\n%s", s, &b)
		}
	}
}
