// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"transfused.org/transfused/service/bench/figures"
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

// row is a case, with what is known of ours, or of all.
type row struct {
	figures.Row
	CPU      map[string][]float64 // µs of CPU for each operation, of who asks and who serves
	Messages *figures.Messages    `json:",omitempty"` // of ours, for each operation
}

// count is what a case asks of ours.
type count struct {
	Case string
	figures.Messages
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

func (r row) line(peers []string) string {
	s := r.Case
	for _, p := range peers {
		s += fmt.Sprintf("  %s %s", p, r.Figure(p))
	}
	return s
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
				line = append(line, row.Figure(p))
			}
			for _, p := range others {
				line = append(line, row.Times(ours, p))
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
			lines = append(lines, []string{c.Case, c.Operations(), fmt.Sprintf("%.2f", c.Sent)})
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
		if r.Unit != figures.Micros || len(r.CPU) == 0 {
			continue
		}
		line := []string{r.Case, r.What}
		for _, p := range peers {
			line = append(line, figures.Micros.Format(figures.Median(r.CPU[p])))
		}
		lines = append(lines, line)
	}
	if len(lines) == 1 {
		return
	}
	fmt.Fprint(w, "\nCPU time for each operation, of who asks and of all servers\n\n")
	table(w, lines)
	if len(m.PingPong) > 0 {
		fmt.Fprintf(w, "\nof 80 bytes to another process and back, over a Unix socket: %s\n", figures.Micros.Format(figures.Median(m.PingPong)))
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
