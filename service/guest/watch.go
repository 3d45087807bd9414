// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"

	"transfused.org/transfused/service/api"
)

// watcher is somebody who wants to know of changes. What he has not taken is kept as the latest of each mount.
type watcher struct {
	mu      sync.Mutex // guards pending
	pending []api.Change
	wake    chan struct{}
}

// put never waits.
func (w *watcher) put(c api.Change) {
	w.mu.Lock()
	i := slices.IndexFunc(w.pending, func(p api.Change) bool {
		return p.Mount.ID == c.Mount.ID && (p.Kind == c.Kind || p.Kind == api.Added && c.Kind == api.Changed)
	})
	if i >= 0 {
		w.pending[i].Mount = c.Mount // who does not know it yet hears of it as it is now
	} else {
		w.pending = append(w.pending, c)
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() []api.Change {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.pending
	w.pending = nil
	return p
}

// publishLocked tells all watchers of a change of e. Precondition: d.mu is held.
func (d *Daemon) publishLocked(k api.ChangeKind, e *entry) {
	c := api.Change{Kind: k, Mount: d.infoLocked(e)}
	for w := range d.watchers {
		w.put(c)
	}
}

// Watch is api.Guest's.
func (d *Daemon) Watch(ctx context.Context) ([]api.Mount, <-chan api.Change) {
	w := &watcher{wake: make(chan struct{}, 1)}
	out := make(chan api.Change)
	d.mu.Lock()
	d.watchers[w] = true
	now := d.mountsLocked()
	d.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			d.mu.Lock()
			delete(d.watchers, w)
			d.mu.Unlock()
		}()
		for {
			select {
			case <-w.wake:
			case <-ctx.Done():
				return
			}
			for _, c := range w.take() {
				select {
				case out <- c:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return now, out
}

// mountsLocked are all entries, by number. Precondition: d.mu is held.
func (d *Daemon) mountsLocked() []api.Mount {
	all := []api.Mount{}
	for _, e := range d.entries {
		all = append(all, d.infoLocked(e))
	}
	slices.SortFunc(all, func(a, b api.Mount) int {
		if len(a.ID) != len(b.ID) {
			return len(a.ID) - len(b.ID)
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all
}

// entryOf returns the entry with an ID, or nil.
func (d *Daemon) entryOf(id string) *entry {
	n, err := strconv.ParseUint(id, 10, 64)
	if err != nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.entries[n]
}
