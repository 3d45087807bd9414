// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// slack is how many times, and by how much, a count may differ from run to run: what several threads or programs ask for
// at once is in part a matter of time.
const (
	slackTimes = 1.03
	slackMore  = 0.02
)

// compare writes what a saved report has and what this one has, and returns how many cases send more messages. Figures are those of two machines or
// two days, and so not compared; how they relate to those of the same run is.
func compare(w io.Writer, table func(io.Writer, [][]string), before, now report) (more int) {
	var peers []string
	for _, p := range now.others() {
		if slices.Contains(before.Peers, p) {
			peers = append(peers, p)
		}
	}
	for _, m := range now.Modes {
		i := slices.IndexFunc(before.Modes, func(b modeResult) bool { return b.Mode == m.Mode })
		if i < 0 || len(peers) == 0 {
			continue
		}
		header := []string{"case", "what"}
		for _, p := range peers {
			header = append(header, "/"+p)
		}
		lines := [][]string{header}
		for _, row := range m.Rows {
			line := []string{row.Case, row.What}
			for _, p := range peers {
				line = append(line, thenAndNow(before.Modes[i].row(row.Case).Ratio(ours, p), row.Ratio(ours, p)))
			}
			lines = append(lines, line)
		}
		fmt.Fprintf(w, "\nCompared, %s: how many times our cost is theirs, then and now\n\n", m.Mode)
		table(w, lines)
	}
	lines := [][]string{{"case", "", "messages for each operation"}}
	for _, c := range now.Counts {
		then, word := math.NaN(), ""
		if i := slices.IndexFunc(before.Counts, func(b count) bool { return b.Case == c.Case }); i >= 0 {
			then = before.Counts[i].Sent
		}
		if c.Sent > then*slackTimes+slackMore {
			word = "MORE"
			more++
		}
		lines = append(lines, []string{c.Case, word, thenAndNow(then, c.Sent)})
	}
	if len(lines) > 1 {
		fmt.Fprint(w, "\nCompared: messages of ours, then and now\n\n")
		table(w, lines)
	}
	return more
}

func thenAndNow(then, now float64) string {
	s := fmt.Sprintf("%.2f → %.2f", then, now)
	return strings.ReplaceAll(s, "NaN", "-")
}
