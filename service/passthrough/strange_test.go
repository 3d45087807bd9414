// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// newTold makes a guest that is told what its host says to have changed.
func newTold(t *testing.T) *pushed {
	p := newPushed(t, func(c *Config) { c.Dirs = nil })
	p.fs.Watched(true)
	return p
}

// change is one of a name in the root. The file is there.
func (p *pushed) change(op watch.Op, name string) watch.Change {
	p.t.Helper()
	var st unix.Stat_t
	must(p.t, unix.Lstat(p.host(name), &st))
	return watch.Change{Op: op, Dir: p.fs.root.inode(), Name: name, Inode: watch.Inode{Dev: p.fs.root.key.dev, Ino: st.Ino}, Mode: st.Mode}
}

// Of a name that the guest can't have heard of it is not told. A directory in which much changes it is told once for all.
func TestStrangeNames(t *testing.T) {
	p := newTold(t)
	equal(t, "what is not there is not there for", p.lookupNone(1, "absent"), longTTL)
	must(t, os.WriteFile(p.host("known"), nil, 0o644))
	p.lookup(1, "known")
	must(t, os.Link(p.host("known"), p.host("link")))
	var all []watch.Change
	for _, name := range []string{"new", "newer", "absent", "link"} {
		if name != "link" {
			must(t, os.WriteFile(p.host(name), nil, 0o644))
		}
		all = append(all, p.change(watch.Create, name))
	}
	for _, name := range []string{"new", "known"} {
		all = append(all, p.change(watch.Delete, name))
	}
	// What the guest does not know takes a place where it has seen another, and one where it has seen one that it has seen elsewhere since.
	must(t, os.WriteFile(p.host("taken"), nil, 0o644))
	must(t, os.WriteFile(p.host("over"), nil, 0o644))
	must(t, os.Link(p.host("over"), p.host("one")))
	must(t, os.Link(p.host("taken"), p.host("kept"))) // or another would get its number
	for _, name := range []string{"taken", "over", "one"} {
		p.lookup(1, name)
	}
	for _, name := range []string{"taken", "over"} {
		must(t, os.WriteFile(p.host("other"), nil, 0o644))
		must(t, os.Rename(p.host("other"), p.host(name)))
	}
	all = append(all, p.change(watch.Create, "taken"), p.change(watch.Create|watch.Arrived, "over"))
	moved := p.change(watch.Rename, "newer")
	moved.NewDir, moved.NewName = moved.Dir, "absent"
	p.fs.Changed(append(all, moved))
	got := append(p.until("entry 1 newer"), "entry 1 newer")
	want := []string{"inode 1 data", "entry 1 absent", "entry 1 link", "inode 2", "entry 1 known", "entry 1 taken", "entry 1 over", "entry 1 newer"}
	slices.Sort(want)
	slices.Sort(got)
	if got = slices.Compact(got); !slices.Equal(got, want) {
		t.Errorf("told %q, want %q", got, want)
	}
}

// counted acts nothing, and tells whether anybody watches.
type counted struct {
	watched bool
	asked   atomic.Int32
	gate    chan struct{} // the call for "gate" takes one of it when it begins, and another one to end
	p       *pushed
}

func (*counted) Thread() uint32 { return 1 << 31 }
func (*counted) Plain() bool    { return false }
func (c *counted) Act(a Act) fuse.Errno {
	switch {
	case a.Path == "gate":
		<-c.gate
		<-c.gate
		return 0
	case a.Op != ActWatched:
		c.p.told("act " + a.Path)
		return 0
	}
	defer c.p.told("asked")
	c.asked.Add(1)
	if !c.watched {
		return unix.ENODATA
	}
	return 0
}

// Much is acted only if somebody watches; of little that is not asked.
func TestActedIfWatched(t *testing.T) {
	for _, c := range []struct {
		name    string
		n       int // changes at once
		watched bool
		acted   int
		asked   int32
	}{
		{"few", manyActs - 1, false, manyActs - 1, 0},
		{"many, nobody watches", 2 * manyActs, false, 0, 1},
		{"many, somebody watches", maxSure + manyActs, true, maxSure + manyActs, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newTold(t)
			a := &counted{watched: c.watched, p: p, gate: make(chan struct{})}
			p.fs.Act(a)
			// All is to wait before any of it is acted.
			must(t, os.WriteFile(p.host("gate"), nil, 0o644))
			p.fs.Changed([]watch.Change{p.change(watch.Create, "gate")})
			a.gate <- struct{}{}
			var all []watch.Change
			for i := range c.n {
				name := fmt.Sprint("f", i)
				must(t, os.WriteFile(p.host(name), nil, 0o644))
				all = append(all, p.change(watch.Create, name))
			}
			p.fs.Changed(all)
			close(a.gate)
			if c.acted > 0 {
				p.until(fmt.Sprint("act f", c.n-1))
			} else {
				p.until("asked")
			}
			// What comes later is acted again.
			must(t, os.WriteFile(p.host("end"), nil, 0o644))
			p.fs.Changed([]watch.Change{p.change(watch.Create, "end")})
			got := p.until("act end")
			if c.acted == 0 && slices.ContainsFunc(got, func(s string) bool { return s[:3] == "act" }) {
				t.Errorf("acted for nobody: %q", got)
			}
			if n := a.asked.Load(); n != c.asked {
				t.Errorf("asked %d times whether anybody watches, want %d", n, c.asked)
			}
		})
	}
}
