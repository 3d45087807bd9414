// SPDX-License-Identifier: Apache-2.0

// Package figures is what the reports of benchmarks are made of: those of service/bench, and of service/vmtest, which reads them.
package figures

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

// Unit says how a figure is to be read.
type Unit string

const (
	Micros  Unit = "µs"   // for each operation, less is better
	Seconds Unit = "s"    // less is better
	Rate    Unit = "MB/s" // more is better
)

// Format writes a figure with its unit. NaN is one that was not measured.
func (u Unit) Format(v float64) string {
	switch {
	case math.IsNaN(v):
		return "-"
	case u == Seconds:
		return fmt.Sprintf("%.3f s", v)
	case u == Micros && v < 1000:
		return fmt.Sprintf("%.1f µs", v)
	}
	return fmt.Sprintf("%.0f %s", v, u)
}

// Row is a case. Rounds are the figures of each peer in the order in which they were measured.
type Row struct {
	Case, What string
	Unit       Unit
	N          int // operations of a round
	Rounds     map[string][]float64
}

// Ratio is how many times the cost of peer a is that of peer b: the median
// over rounds, in which they took turns. Below 1, a is the faster, whatever the unit. NaN: one of them was not measured.
func (r Row) Ratio(a, b string) float64 {
	var v []float64
	x, y := r.Rounds[a], r.Rounds[b]
	for i := range min(len(x), len(y)) {
		if r.Unit == Rate {
			v = append(v, y[i]/x[i])
		} else {
			v = append(v, x[i]/y[i])
		}
	}
	return Median(v)
}

// Times is Ratio as text.
func (r Row) Times(a, b string) string {
	return strings.ReplaceAll(fmt.Sprintf("%.2f", r.Ratio(a, b)), "NaN", "-")
}

// Figure is the median of a peer, with its unit.
func (r Row) Figure(peer string) string { return r.Unit.Format(Median(r.Rounds[peer])) }

// Median is the one in the middle, or between the two there. Of nothing it is NaN.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// Messages are what passed a mount, each as often as it did in all, or for each operation of a case.
type Messages struct {
	Sent  float64            // requests that went to the host and were answered by it
	Asked map[string]float64 // requests of the kernel that were answered, by the guest's daemon itself or by the host
}

// Operations lists what was asked, but for what is less than one in two hundred.
func (m Messages) Operations() string {
	var all []string
	for _, op := range slices.Sorted(maps.Keys(m.Asked)) {
		if m.Asked[op] >= 0.005 {
			all = append(all, fmt.Sprintf("%s %.2f", op, m.Asked[op]))
		}
	}
	return strings.Join(all, ", ")
}

// Markdown writes lines as a table, the first as its head, in columns that are aligned for terminals too.
func Markdown(w io.Writer, lines [][]string) {
	cell := func(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, s := range l {
			width[i] = max(width[i], len([]rune(cell(s))), 3)
		}
	}
	for n, l := range lines {
		for i, s := range l {
			fmt.Fprintf(w, "| %-*s ", width[i], cell(s))
		}
		fmt.Fprintln(w, "|")
		if n == 0 {
			for _, k := range width {
				fmt.Fprintf(w, "| %s ", strings.Repeat("-", k))
			}
			fmt.Fprintln(w, "|")
		}
	}
}

// Machine names the one that this runs on.
func Machine() string {
	var u unix.Utsname
	unix.Uname(&u) // never fails
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
