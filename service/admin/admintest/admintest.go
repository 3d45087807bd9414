// SPDX-License-Identifier: Apache-2.0

// Package admintest has a guest and a host for tests of what calls api.Guest and api.Host: they keep what they are told in memory, and
// nothing is mounted but what Guest.Detached gives away.
package admintest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// Guest is a guest's daemon without mounts. Its exported fields are set before it is used; a nil map is an empty one.
type Guest struct {
	State    api.GuestStatus // Connected is what Connect and Disconnect say
	Initial  []api.Mount
	Offered  []api.Export
	Counts   map[string]api.Statistics // by mount's ID
	Requests []api.Request             // what a trace sees, at once
	InUse    map[string]bool           // mounts that only force or lazy unmounts
	Broken   map[string]error          // what a method, by its name, fails with

	once     sync.Once
	mu       sync.Mutex
	cond     *sync.Cond // of everything below, and of ends of contexts
	now      api.GuestStatus
	mounts   []api.Mount
	made     int
	calls    []string
	under    int // calls that wait
	watchers map[chan api.Change]bool
}

var _ api.Guest = (*Guest)(nil)

// enter locks g, and notes the call.
func (g *Guest) enter(call string) {
	g.once.Do(func() {
		g.cond = sync.NewCond(&g.mu)
		g.now, g.mounts = g.State, slices.Clone(g.Initial)
		g.watchers = map[chan api.Change]bool{}
	})
	g.mu.Lock()
	if call != "" {
		g.calls = append(g.calls, call)
		g.cond.Broadcast()
	}
}

// Calls are the calls so far that change or wait for something, in words.
func (g *Guest) Calls() []string {
	g.enter("")
	defer g.mu.Unlock()
	return slices.Clone(g.calls)
}

// AwaitWaiting returns when n calls wait, for the host or for the end of their contexts.
func (g *Guest) AwaitWaiting(ctx context.Context, n int) error {
	g.enter("")
	defer g.mu.Unlock()
	return g.await(ctx, func() bool { return g.under == n })
}

// await waits for f, which is called with mu locked, or the end of ctx.
func (g *Guest) await(ctx context.Context, f func() bool) error {
	defer context.AfterFunc(ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.cond.Broadcast()
	})()
	for !f() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		g.cond.Wait()
	}
	return nil
}

// waiting is await of a call of api.Guest, which AwaitWaiting sees.
func (g *Guest) waiting(ctx context.Context, f func() bool) error {
	g.under++
	g.cond.Broadcast()
	err := g.await(ctx, f)
	g.under--
	g.cond.Broadcast()
	return err
}

// Connect makes the host be there, or not.
func (g *Guest) Connect(there bool) {
	g.enter("")
	defer g.mu.Unlock()
	g.now.Connected = there
	g.cond.Broadcast()
	g.tell(api.Change{Kind: api.StatusChanged})
}

// tell passes a change on; a watcher that is behind is a fault of the test.
func (g *Guest) tell(c api.Change) {
	for w := range g.watchers {
		select {
		case w <- c:
		default:
			panic("admintest: a watcher does not read")
		}
	}
}

// Status is what was set, with the number of mounts.
func (g *Guest) Status() api.GuestStatus {
	g.enter("")
	defer g.mu.Unlock()
	s := g.now
	s.Mounts = len(g.mounts)
	return s
}

// Mounts are those that are there.
func (g *Guest) Mounts() []api.Mount {
	g.enter("")
	defer g.mu.Unlock()
	return slices.Clone(g.mounts)
}

// make makes a mount of what is offered.
func (g *Guest) make(ctx context.Context, spec api.MountSpec) (api.Mount, error) {
	if err := g.waiting(ctx, func() bool { return g.now.Connected }); err != nil {
		return api.Mount{}, err
	}
	if !slices.ContainsFunc(g.Offered, func(e api.Export) bool { return e.Tag == spec.Tag }) {
		return api.Mount{}, api.Errorf(api.Refused, "mount %s: the host has no export of that name: %w", spec.Tag, unix.ENOENT)
	}
	if slices.ContainsFunc(g.mounts, func(m api.Mount) bool { return m.Directory == spec.Directory }) {
		return api.Mount{}, api.Errorf(api.Exists, "mount %s: something is mounted at %s already: %w", spec.Tag, spec.Directory, unix.EBUSY)
	}
	g.made++
	m := api.Mount{ID: "new" + strconv.Itoa(g.made), Tag: spec.Tag, Directory: spec.Directory, Source: g.now.Server,
		Options: spec.Options, ReadOnly: slices.Contains(spec.Options, "ro"), State: api.Active, Streams: 1}
	g.mounts = append(g.mounts, m)
	g.tell(api.Change{Kind: api.Added, Mount: m})
	return m, nil
}

// Mount keeps the mount in memory.
func (g *Guest) Mount(ctx context.Context, spec api.MountSpec) (api.Mount, error) {
	call := fmt.Sprintf("Mount %s %s %s", spec.Tag, spec.Directory, strings.Join(spec.Options, ","))
	if spec.At != nil {
		at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", spec.At.Fd()))
		if err != nil {
			return api.Mount{}, err
		}
		call += " at " + at
	}
	g.enter(call)
	defer g.mu.Unlock()
	if err := g.Broken["Mount"]; err != nil {
		return api.Mount{}, err
	}
	return g.make(ctx, spec)
}

// Detached makes a tmpfs, and keeps the mount in memory.
func (g *Guest) Detached(ctx context.Context, spec api.MountSpec) (*os.File, api.Mount, error) {
	g.enter(fmt.Sprintf("Detached %s %s %s", spec.Tag, spec.Directory, strings.Join(spec.Options, ",")))
	defer g.mu.Unlock()
	if err := g.Broken["Detached"]; err != nil {
		return nil, api.Mount{}, err
	}
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, api.Mount{}, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", spec.Tag); err != nil {
		return nil, api.Mount{}, os.NewSyscallError("fsconfig", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, api.Mount{}, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, api.Mount{}, os.NewSyscallError("fsmount", err)
	}
	f := os.NewFile(uintptr(fd), "detached "+spec.Tag)
	m, err := g.make(ctx, spec)
	if err != nil {
		f.Close()
		return nil, m, err
	}
	return f, m, nil
}

func (g *Guest) index(id string) (int, error) {
	i := slices.IndexFunc(g.mounts, func(m api.Mount) bool { return m.ID == id })
	if i < 0 {
		return i, api.Errorf(api.NotFound, "there is no mount %q", id)
	}
	return i, nil
}

// Unmount takes the mount out of memory.
func (g *Guest) Unmount(_ context.Context, id string, how api.Unmounting) error {
	g.enter(fmt.Sprintf("Unmount %s force=%t lazy=%t", id, how.Force, how.Lazy))
	defer g.mu.Unlock()
	i, err := g.index(id)
	if err != nil {
		return err
	}
	if g.InUse[id] && how == (api.Unmounting{}) {
		return api.Errorf(api.Busy, "unmount %s: it is in use: %w", g.mounts[i].Directory, unix.EBUSY)
	}
	g.tell(api.Change{Kind: api.Removed, Mount: g.mounts[i]})
	g.mounts = slices.Delete(g.mounts, i, i+1)
	return g.Broken["Unmount"]
}

// Remount changes the mount in memory.
func (g *Guest) Remount(_ context.Context, id string, readOnly bool) error {
	g.enter(fmt.Sprintf("Remount %s readOnly=%t", id, readOnly))
	defer g.mu.Unlock()
	i, err := g.index(id)
	if err != nil {
		return err
	}
	g.mounts[i].ReadOnly = readOnly
	g.tell(api.Change{Kind: api.Changed, Mount: g.mounts[i]})
	return g.Broken["Remount"]
}

// Exports are what was set.
func (g *Guest) Exports(context.Context) ([]api.Export, error) {
	g.enter("")
	defer g.mu.Unlock()
	if !g.now.Connected {
		return nil, api.Errorf(api.Unreachable, "the host at %s is not connected", g.now.Server)
	}
	return slices.Clone(g.Offered), g.Broken["Exports"]
}

// Reload only notes the call.
func (g *Guest) Reload(context.Context) error {
	g.enter("Reload")
	defer g.mu.Unlock()
	return g.Broken["Reload"]
}

// Wait waits for Connect.
func (g *Guest) Wait(ctx context.Context) error {
	g.enter("Wait")
	defer g.mu.Unlock()
	return g.waiting(ctx, func() bool { return g.now.Connected })
}

// Statistics are what was set; none for other mounts.
func (g *Guest) Statistics(id string) (api.Statistics, error) {
	g.enter("")
	defer g.mu.Unlock()
	if _, err := g.index(id); err != nil {
		return api.Statistics{}, err
	}
	return g.Counts[id], nil
}

// Trace passes the requests that were set and waits.
func (g *Guest) Trace(ctx context.Context, filter api.TraceFilter, f func(api.Request)) error {
	g.enter("Trace")
	defer g.mu.Unlock()
	if filter.Mount != "" {
		if _, err := g.index(filter.Mount); err != nil {
			return err
		}
	}
	for _, r := range g.Requests {
		if (filter.Mount == "" || filter.Mount == r.Mount) && (filter.Operation == "" || strings.EqualFold(filter.Operation, r.Operation)) {
			f(r)
		}
	}
	return g.waiting(ctx, func() bool { return false })
}

// Watch tells what the other methods change.
func (g *Guest) Watch(ctx context.Context) ([]api.Mount, <-chan api.Change) {
	g.enter("Watch")
	defer g.mu.Unlock()
	w := make(chan api.Change, 64)
	g.watchers[w] = true
	g.under++
	g.cond.Broadcast()
	context.AfterFunc(ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.watchers, w)
		close(w)
		g.under--
		g.cond.Broadcast()
	})
	return slices.Clone(g.mounts), w
}

// Host is a host's server without guests. Its fields are set before it is used.
type Host struct {
	State   api.HostStatus
	Offered []api.Export
	Guests  []api.Session
	Broken  map[string]error // what a method, by its name, fails with

	mu      sync.Mutex
	reloads int
	watcher []chan struct{}
}

var _ api.Host = (*Host)(nil)

// Status is what was set.
func (h *Host) Status() api.HostStatus { return h.State }

// Exports are what was set.
func (h *Host) Exports() []api.Export { return h.Offered }

// Sessions are what was set.
func (h *Host) Sessions() []api.Session { return h.Guests }

// Reload counts, and is a change.
func (h *Host) Reload(context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reloads++
	for _, w := range h.watcher {
		select {
		case w <- struct{}{}:
		default:
		}
	}
	return h.Broken["Reload"]
}

// Reloads is how often Reload was called.
func (h *Host) Reloads() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reloads
}

// Watchers is how many watch.
func (h *Host) Watchers() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.watcher)
}

// Watch tells of reloads.
func (h *Host) Watch(ctx context.Context) <-chan struct{} {
	w := make(chan struct{}, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watcher = append(h.watcher, w)
	context.AfterFunc(ctx, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.watcher = slices.DeleteFunc(h.watcher, func(o chan struct{}) bool { return o == w })
		close(w)
	})
	return w
}
