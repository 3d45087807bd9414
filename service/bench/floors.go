// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"

	"transfused.org/transfused/service/bench/figures"
)

// floor is a promise about our figures, and perhaps what we want beyond it.
type floor struct {
	Text    string
	Got     string
	Pass    bool
	Goal    string `json:",omitempty"`
	Reached bool   `json:",omitempty"`
	Target  bool   `json:",omitempty"` // -check does not ask for it
}

const (
	maxGetattrRatio = 4   // times bindfs
	minSequential   = 600 // MB/s
	maxResident     = 40 << 10
	maxIdle         = 25 << 10

	must, goal       = 1.4, 1.15 // times the floor in C, or what it adds for each message
	mustCPU, goalCPU = 1.3, 1.1  // times a round trip over a socket, beyond bindfs
	mustRate         = 0.75      // of the floor in C
	goalRate         = 0.95
)

var (
	thanSSHFS = []string{"coldstat", "gitstatus", "read4k", "create", "unlink", "cp", "seqwrite", "seqread"}
	thanFloor = []string{"getattr", "read4k"}
	budgets   = []string{"coldstat", "find", "lslR", "create", "unlink", "cp"}
	withMore  = [][2]string{{"coldstat", "coldstat8"}, {"read4k", "read4k8"}}
)

// judge collects floors. What was not measured is not judged.
type judge struct {
	r   report
	all []floor
}

func (j *judge) add(f floor) { j.all = append(j.all, f) }

// floors judges what was measured.
func floors(r report) []floor {
	j := &judge{r: r}
	for _, m := range r.Modes {
		switch m.Mode {
		case onOneCPU:
			for _, row := range m.Rows {
				if len(row.Rounds[ours]) > 0 {
					j.oldFloors(row)
				}
			}
			for _, row := range m.Rows {
				if len(row.Rounds[ours]) > 0 {
					j.targets(m, row)
				}
			}
			j.memory(m)
		case free:
			j.threads(m)
		}
	}
	return j.all
}

// oldFloors are those that were reached before there were targets.
func (j *judge) oldFloors(row row) {
	if x := row.Ratio(ours, "bindfs"); row.Case == "getattr" && !math.IsNaN(x) {
		j.add(floor{Text: fmt.Sprintf("getattr: at most %d times bindfs", maxGetattrRatio), Got: fmt.Sprintf("%.2f times", x), Pass: x <= maxGetattrRatio})
	}
	if x := row.Ratio(ours, "sshfs"); slices.Contains(thanSSHFS, row.Case) && !math.IsNaN(x) {
		j.add(floor{Text: row.Case + ": faster than sshfs", Got: fmt.Sprintf("%.2f times its cost", x), Pass: x < 1})
	}
	if row.Unit == figures.Rate {
		x := figures.Median(row.Rounds[ours])
		j.add(floor{Text: fmt.Sprintf("%s: at least %d MB/s", row.Case, minSequential), Got: row.Figure(ours), Pass: x >= minSequential})
	}
}

// targets compare with the floor in C, and with what it says of a message's cost.
func (j *judge) targets(m modeResult, row row) {
	x := row.Ratio(ours, cFloor)
	if slices.Contains(thanFloor, row.Case) && !math.IsNaN(x) {
		j.add(floor{fmt.Sprintf("%s: at most %v times %s", row.Case, must, cFloor), fmt.Sprintf("%.2f times", x), x <= must, fmt.Sprintf("%v times", goal), x <= goal, true})
	}
	if row.Unit == figures.Rate && !math.IsNaN(x) {
		s, b := row.Ratio(ours, "sshfs"), row.Ratio(ours, "bindfs")
		j.add(floor{fmt.Sprintf("%s: at least %.0f %% of %s, faster than sshfs", row.Case, 100*mustRate, cFloor),
			fmt.Sprintf("%.0f %%; of sshfs %.0f %%, of bindfs %.0f %%", 100/x, 100/s, 100/b), 1/x >= mustRate && !(s >= 1),
			fmt.Sprintf("%.0f %%, faster than bindfs", 100*goalRate), 1/x >= goalRate && b < 1, true})
	}
	if slices.Contains(budgets, row.Case) {
		j.budget(m, row)
	}
	ping := figures.Median(m.PingPong)
	own, theirs := figures.Median(row.CPU[ours]), figures.Median(row.CPU["bindfs"])
	if row.Case == "getattr" && !math.IsNaN(ping+own+theirs) {
		most, want := theirs+mustCPU*ping, theirs+goalCPU*ping
		j.add(floor{fmt.Sprintf("getattr: CPU at most bindfs + %v round trips of 80 bytes (%s)", mustCPU, figures.Micros.Format(ping)),
			figures.Micros.Format(own) + ", at most " + figures.Micros.Format(most), own <= most, figures.Micros.Format(want), own <= want, true})
	}
}

// relay is what the floor in C pays for each message that goes through a relay and a socket, in µs: what its getattr costs there and on
// the device itself.
func (m modeResult) relay() float64 {
	r := m.row("getattr")
	there, here := r.Rounds[cFloor], r.Rounds[cServer]
	var v []float64
	for i := range min(len(there), len(here)) {
		v = append(v, there[i]-here[i])
	}
	return figures.Median(v)
}

// budget lets a case cost what bindfs needs, and what the messages of ours cost the floor in C, with a margin.
func (j *judge) budget(m modeResult, row row) {
	i := slices.IndexFunc(j.r.Counts, func(c count) bool { return c.Case == row.Case })
	if i < 0 {
		return
	}
	sent := j.r.Counts[i].Sent
	relay := m.relay() * sent // for each operation
	if row.Unit == figures.Seconds {
		relay *= float64(row.N) / 1e6
	}
	own, theirs := figures.Median(row.Rounds[ours]), figures.Median(row.Rounds["bindfs"])
	most, want := theirs+must*relay, theirs+goal*relay
	if math.IsNaN(own + most) {
		return
	}
	j.add(floor{fmt.Sprintf("%s: at most bindfs + %v times the relay in C for each of %.2f messages", row.Case, must, sent),
		row.Figure(ours) + ", at most " + row.Unit.Format(most), own <= most, row.Unit.Format(want), own <= want, true})
}

// threads compares what is done in the same time.
func (j *judge) threads(m modeResult) {
	for _, names := range withMore {
		one, more := figures.Median(m.row(names[0]).Rounds[ours]), figures.Median(m.row(names[1]).Rounds[ours])
		if x := one / more; !math.IsNaN(x) {
			j.add(floor{Text: fmt.Sprintf("%s, %s: more is done in the same time than in %s", names[1], free, names[0]),
				Got: fmt.Sprintf("%.2f times as much", x), Pass: x > 1, Target: true})
		}
	}
}

func (j *judge) memory(m modeResult) {
	for _, p := range m.Idle {
		j.add(floor{Text: fmt.Sprintf("memory of %s (%d), idle: under %d MiB", p.Process, p.PID, maxIdle>>10), Got: mebibytes(p.RSS), Pass: p.RSS < maxIdle, Target: true})
	}
	for _, p := range m.Loaded {
		j.add(floor{Text: fmt.Sprintf("memory of %s (%d): under %d MiB", p.Process, p.PID, maxResident>>10), Got: mebibytes(p.RSS), Pass: p.RSS < maxResident})
	}
}
