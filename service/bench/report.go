// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// report is everything that was measured, as -json writes it.
type report struct {
	Host   string
	Peers  []string
	Modes  []modeResult
	Floors []floor
}

type modeResult struct {
	Mode         string
	Rows         []row
	Idle, Loaded []memory // of our processes, one mount
}

// row is a case; Rounds are the figures of each peer in the order measured.
type row struct {
	Case, What string
	Unit       unit
	Rounds     map[string][]float64
}

// floor is a promise about our figures.
type floor struct {
	Text string
	Got  string
	Pass bool
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// ratio is how many times the cost of peer a is that of peer b: the median
// over rounds. Below 1, a is the faster, whatever the unit.
func (r row) ratio(a, b string) float64 {
	var v []float64
	x, y := r.Rounds[a], r.Rounds[b]
	for i := range min(len(x), len(y)) {
		if r.Unit == rate {
			v = append(v, y[i]/x[i])
		} else {
			v = append(v, x[i]/y[i])
		}
	}
	return median(v)
}

func (r row) line(peers []string) string {
	s := r.Case
	for _, p := range peers {
		s += fmt.Sprintf("  %s %s", p, r.figure(p))
	}
	return s
}

func (r row) figure(p string) string {
	m := median(r.Rounds[p])
	switch {
	case math.IsNaN(m):
		return "-"
	case r.Unit == seconds:
		return fmt.Sprintf("%.3f s", m)
	case r.Unit == micros:
		return fmt.Sprintf("%.1f µs", m)
	}
	return fmt.Sprintf("%.0f MB/s", m)
}

// print writes the report for people, in columns or, with a table function of its own, as Markdown.
func (r report) print(w io.Writer, table func(io.Writer, [][]string)) {
	fmt.Fprintf(w, "%s\n", r.Host)
	for _, m := range r.Modes {
		fmt.Fprintf(w, "\n%s: medians; in the last columns how many times our cost is theirs (below 1: ours is faster)\n\n", strings.ToUpper(m.Mode[:1])+m.Mode[1:])
		header := []string{"case", "what"}
		header = append(header, r.Peers...)
		var others []string
		if slices.Contains(r.Peers, ours) {
			for _, p := range r.Peers {
				if p != ours && p != bare {
					others = append(others, p)
					header = append(header, "/"+p)
				}
			}
		}
		lines := [][]string{header}
		for _, row := range m.Rows {
			line := []string{row.Case, row.What}
			for _, p := range r.Peers {
				line = append(line, row.figure(p))
			}
			for _, p := range others {
				line = append(line, fmt.Sprintf("%.2f", row.ratio(ours, p)))
			}
			lines = append(lines, line)
		}
		table(w, lines)
		if len(m.Idle)+len(m.Loaded) > 0 {
			lines := [][]string{{"process", "pid", "idle", "after load", "peak"}}
			for _, l := range m.Loaded {
				idle := "-"
				for _, i := range m.Idle {
					if i.PID == l.PID {
						idle = mebibytes(i.RSS)
					}
				}
				lines = append(lines, []string{l.Process, fmt.Sprint(l.PID), idle, mebibytes(l.RSS), mebibytes(l.Peak)})
			}
			fmt.Fprint(w, "\nresident memory with one mount\n\n")
			table(w, lines)
		}
	}
	if len(r.Floors) > 0 {
		lines := [][]string{{"", "floor, on one CPU", "measured"}}
		for _, f := range r.Floors {
			word := "PASS"
			if !f.Pass {
				word = "MISS"
			}
			lines = append(lines, []string{word, f.Text, f.Got})
		}
		fmt.Fprintln(w)
		table(w, lines)
	}
}

func mebibytes(kib int) string { return fmt.Sprintf("%.1f MiB", float64(kib)/1024) }

// table prints lines in columns, the first two to the left, figures to the right.
func table(w io.Writer, lines [][]string) {
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, s := range l {
			width[i] = max(width[i], len([]rune(s)))
		}
	}
	for _, l := range lines {
		for i, s := range l {
			pad := strings.Repeat(" ", width[i]-len([]rune(s)))
			if i < 2 {
				s += pad
			} else {
				s = pad + s
			}
			if i > 0 {
				s = "  " + s
			}
			fmt.Fprint(w, s)
		}
		fmt.Fprintln(w)
	}
}

// markdown prints lines as a table of Markdown.
func markdown(w io.Writer, lines [][]string) {
	for i, l := range lines {
		fmt.Fprint(w, "|")
		for _, cell := range l {
			fmt.Fprintf(w, " %s |", strings.ReplaceAll(cell, "|", `\|`))
		}
		fmt.Fprintln(w)
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat(" --- |", len(l)))
		}
	}
}

const (
	maxGetattrRatio = 4   // times bindfs
	minSequential   = 600 // MB/s
	maxResident     = 40 << 10
)

// floors judges what was measured on one CPU. Cases and peers that were not
// measured have no floor.
func floors(r report) (all []floor) {
	add := func(text, got string, pass bool) { all = append(all, floor{text, got, pass}) }
	for _, m := range r.Modes {
		if m.Mode != onOneCPU {
			continue
		}
		for _, row := range m.Rows {
			if len(row.Rounds[ours]) == 0 {
				continue
			}
			if row.Case == "getattr" {
				if x := row.ratio(ours, "bindfs"); !math.IsNaN(x) {
					add(fmt.Sprintf("getattr: at most %d times bindfs", maxGetattrRatio), fmt.Sprintf("%.2f times", x), x <= maxGetattrRatio)
				}
			} else if x := row.ratio(ours, "sshfs"); !math.IsNaN(x) {
				add(row.Case+": faster than sshfs", fmt.Sprintf("%.2f times its cost", x), x < 1)
			}
			if row.Unit == rate {
				x := median(row.Rounds[ours])
				add(fmt.Sprintf("%s: at least %d MB/s", row.Case, minSequential), row.figure(ours), x >= minSequential)
			}
		}
		for _, p := range m.Loaded {
			add(fmt.Sprintf("memory of %s (%d): under %d MiB", p.Process, p.PID, maxResident>>10), mebibytes(p.RSS), p.RSS < maxResident)
		}
	}
	return all
}

// machine names where this was measured.
func machine() string {
	var u unix.Utsname
	unix.Uname(&u)
	model := runtime.GOARCH
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			model = strings.TrimSpace(v)
			break
		}
	}
	return fmt.Sprintf("Linux %s, %d × %s, %s", unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), model, runtime.Version())
}
