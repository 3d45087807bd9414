// SPDX-License-Identifier: Apache-2.0

package figures

import (
	"strings"
	"testing"
)

func TestRatio(t *testing.T) {
	for _, c := range []struct {
		name string
		row  Row
		want float64
	}{
		{"time", Row{Unit: Micros, Rounds: map[string][]float64{"ours": {10, 20, 90}, "theirs": {20, 40, 30}}}, 0.5},
		{"rate", Row{Unit: Rate, Rounds: map[string][]float64{"ours": {800}, "theirs": {400}}}, 0.5},
		{"the median is of ratios", Row{Unit: Micros, Rounds: map[string][]float64{"ours": {1, 100}, "theirs": {2, 100}}}, 0.75},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.row.Ratio("ours", "theirs"); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestMarkdown(t *testing.T) {
	var b strings.Builder
	Markdown(&b, [][]string{{"case", ""}, {"a|b", "1.5 µs"}})
	want := `| case |        |
| ---- | ------ |
| a\|b | 1.5 µs |
`
	if b.String() != want {
		t.Errorf("got\n%s", b.String())
	}
}
