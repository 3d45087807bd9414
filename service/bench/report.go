// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
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
	Scale  string // by its name
	Peers  []string
	Modes  []modeResult
	Counts []count
	Floors []floor
}

type modeResult struct {
	Mode         string
	Rows         []row
	PingPong     []float64 // CPU time of a round trip over a socket between two processes, µs
	Idle, Loaded []memory  // of our processes, one mount
}

// row is a case; Rounds are the figures of each peer in the order measured.
type row struct {
	Case, What string
	Unit       unit
	N          int // operations of a round
	Rounds     map[string][]float64
	CPU        map[string][]float64 // µs of CPU for each operation, of who asks and who serves
	Messages   *messages            `json:",omitempty"` // of ours, for each operation
}

// count is what a case asks of ours.
type count struct {
	Case string
	messages
}

func counts(m modeResult) (all []count) {
	for _, r := range m.Rows {
		if r.Messages != nil {
			all = append(all, count{r.Case, *r.Messages})
		}
	}
	return all
}

// row is the one of that case, or an empty one.
func (m modeResult) row(name string) row {
	for _, r := range m.Rows {
		if r.Case == name {
			return r
		}
	}
	return row{}
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

func (r row) figure(p string) string { return r.Unit.figure(median(r.Rounds[p])) }

func (u unit) figure(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case u == seconds:
		return fmt.Sprintf("%.3f s", v)
	case u == micros:
		return fmt.Sprintf("%.1f µs", v)
	}
	return fmt.Sprintf("%.0f MB/s", v)
}

// others are the peers that ours is compared with.
func (r report) others() (names []string) {
	if slices.Contains(r.Peers, ours) {
		for _, p := range r.Peers {
			if p != ours && p != bare {
				names = append(names, p)
			}
		}
	}
	return names
}

// print writes the report for people, in columns or, with a table function of its own, as Markdown.
func (r report) print(w io.Writer, table func(io.Writer, [][]string)) {
	fmt.Fprintf(w, "%s\n", r.Host)
	for _, m := range r.Modes {
		fmt.Fprintf(w, "\n%s: medians; in the last columns how many times our cost is theirs (below 1: ours is faster)\n\n", strings.ToUpper(m.Mode[:1])+m.Mode[1:])
		header := []string{"case", "what"}
		header = append(header, r.Peers...)
		others := r.others()
		for _, p := range others {
			header = append(header, "/"+p)
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
		m.printCPU(w, r.Peers, table)
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
	if len(r.Counts) > 0 {
		lines := [][]string{{"case", "asked by the kernel for each operation", "messages to the host"}}
		for _, c := range r.Counts {
			var ops []string
			for _, op := range slices.Sorted(maps.Keys(c.Asked)) {
				if c.Asked[op] >= 0.005 {
					ops = append(ops, fmt.Sprintf("%s %.2f", op, c.Asked[op]))
				}
			}
			lines = append(lines, []string{c.Case, strings.Join(ops, ", "), fmt.Sprintf("%.2f", c.Sent)})
		}
		who := ours
		if len(r.Modes) == 0 {
			who = r.Peers[0]
		}
		fmt.Fprintf(w, "\nrequests of %s; the daemon in the guest answers some of ours by itself\n\n", who)
		table(w, lines)
	}
	if len(r.Floors) > 0 {
		lines := [][]string{{"", "at least, on one CPU if not said otherwise", "measured", "goal", ""}}
		for _, f := range r.Floors {
			word, reached := "PASS", ""
			switch {
			case f.Target && f.Pass:
				word = "target met"
			case f.Target:
				word = "target missed"
			case !f.Pass:
				word = "MISS"
			}
			if f.Reached {
				reached = "reached"
			}
			lines = append(lines, []string{word, f.Text, f.Got, f.Goal, reached})
		}
		fmt.Fprintln(w)
		table(w, lines)
	}
}

// printCPU writes what CPU time the cases took whose figures are times for each operation.
func (m modeResult) printCPU(w io.Writer, peers []string, table func(io.Writer, [][]string)) {
	lines := [][]string{append([]string{"case", "what"}, peers...)}
	for _, r := range m.Rows {
		if r.Unit != micros || len(r.CPU) == 0 {
			continue
		}
		line := []string{r.Case, r.What}
		for _, p := range peers {
			line = append(line, micros.figure(median(r.CPU[p])))
		}
		lines = append(lines, line)
	}
	if len(lines) == 1 {
		return
	}
	fmt.Fprint(w, "\nCPU time for each operation, of who asks and of all servers\n\n")
	table(w, lines)
	if len(m.PingPong) > 0 {
		fmt.Fprintf(w, "\nof 80 bytes to another process and back, over a Unix socket: %s\n", micros.figure(median(m.PingPong)))
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
