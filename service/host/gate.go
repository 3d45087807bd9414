// SPDX-License-Identifier: Apache-2.0

package host

import "sync"

// gate bounds the connections that have not yet said who they are: in all,
// and of one peer, so that none can keep the others out.
type gate struct {
	max, maxEach int

	mu   sync.Mutex // guards the rest
	all  int
	each map[identity]int
}

func newGate(max, maxEach int) *gate {
	return &gate{max: max, maxEach: maxEach, each: map[identity]int{}}
}

// enter takes a place, which leave gives back.
func (g *gate) enter(id identity) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.all >= g.max || g.each[id] >= g.maxEach {
		return false
	}
	g.all++
	g.each[id]++
	return true
}

func (g *gate) leave(id identity) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.each[id]--; g.each[id] == 0 {
		delete(g.each, id)
	}
}
