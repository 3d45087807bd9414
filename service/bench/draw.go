// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"io"
	"math"
	"slices"
)

// The drawing, in pixels.
const (
	barHeight = 11
	rowGap    = 9
	leftEdge  = 110 // names
	plotWidth = 560
	topEdge   = 74
	maxFactor = 32.0 // the axis goes from 1/maxFactor to maxFactor times
)

// drawn are the peers that are shown of our own; of directories that others have mounted, all are.
var drawn = []string{"bindfs", "sshfs", cFloor}

// draw writes an SVG: how many times our cost is theirs, by case, of the first mode. Bars to the left are where ours is faster.
func (r report) draw(w io.Writer) {
	var peers []string
	for _, p := range r.others() {
		if slices.Contains(drawn, p) || !slices.Contains(peerNames, p) {
			peers = append(peers, p)
		}
	}
	if len(r.Modes) == 0 {
		return
	}
	m := r.Modes[0]
	rowHeight := len(peers)*barHeight + rowGap
	bottom := topEdge + len(m.Rows)*rowHeight
	width, height := leftEdge+plotWidth+60, bottom+34
	x := func(ratio float64) float64 {
		ratio = min(max(ratio, 1/maxFactor), maxFactor)
		return leftEdge + plotWidth*(0.5+math.Log2(ratio)/math.Log2(maxFactor)/2)
	}
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img" aria-label="how many times the cost of %s is that of other file systems">
<style>
svg { background: #fff; font: 11px system-ui, sans-serif; fill: #24292f }
.grid { stroke: #d8dee4 } .one { stroke: #57606a } .p0 { fill: #2f6fc4 } .p1 { fill: #c4622d } .p2 { fill: #3d8b57 } .p3 { fill: #8a4fb0 }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117; fill: #e6edf3 }
.grid { stroke: #30363d } .one { stroke: #9198a1 } .p0 { fill: #6ea8f0 } .p1 { fill: #f0976a } .p2 { fill: #6cc088 } .p3 { fill: #c393e6 }
}
</style>
`, width, height, width, height, ours)
	text := func(x float64, y int, anchor, more, s string) {
		fmt.Fprintf(w, `<text x="%.1f" y="%d" text-anchor="%s"%s>%s</text>`+"\n", x, y, anchor, more, html.EscapeString(s))
	}
	text(12, 20, "start", ` font-size="14" font-weight="bold"`, fmt.Sprintf("How many times the cost of %s is theirs (%s)", ours, m.Mode))
	text(12, 36, "start", "", r.Host)
	for i, p := range peers {
		at := leftEdge + i*120
		fmt.Fprintf(w, `<rect class="p%d" x="%d" y="44" width="10" height="10"/>`+"\n", i%4, at)
		text(float64(at+14), 53, "start", "", p)
	}
	for f := 1 / maxFactor; f <= maxFactor; f *= 2 {
		class, label := "grid", fmt.Sprintf("%g", f)
		if f < 1 {
			label = fmt.Sprintf("1/%g", 1/f)
		}
		if f == 1 {
			class = "one"
		}
		fmt.Fprintf(w, `<line class="%s" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`+"\n", class, x(f), topEdge-6, x(f), bottom)
		text(x(f), bottom+14, "middle", "", label)
	}
	text(x(1)-8, bottom+29, "end", "", "← ours is faster")
	text(x(1)+8, bottom+29, "start", "", "ours is slower →")
	for i, row := range m.Rows {
		y := topEdge + i*rowHeight
		text(leftEdge-10, y+(rowHeight-rowGap)/2+4, "end", "", row.Case)
		for k, p := range peers {
			ratio := row.Ratio(ours, p)
			if math.IsNaN(ratio) || ratio <= 0 {
				continue
			}
			from, to, at, anchor := x(1), x(ratio), x(ratio)+3, "start"
			if ratio < 1 {
				from, to, at, anchor = x(ratio), x(1), x(ratio)-3, "end"
			}
			fmt.Fprintf(w, `<rect class="p%d" x="%.1f" y="%d" width="%.1f" height="%d"/>`+"\n", k%4, from, y+k*barHeight, max(to-from, 1), barHeight-1)
			text(at, y+k*barHeight+barHeight-2, anchor, ` font-size="9"`, fmt.Sprintf("%.2f", ratio))
		}
	}
	fmt.Fprintln(w, "</svg>")
}
