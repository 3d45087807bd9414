// SPDX-License-Identifier: Apache-2.0

package host

import (
	"cmp"
	"context"
	"fmt"
	"math/bits"
	"slices"
	"strconv"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/passthrough"
)

// What an administrator can ask: api.Host.
var _ api.Host = (*Server)(nil)

// Status tells how the server does.
func (s *Server) Status() api.HostStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := api.HostStatus{Version: s.conf.Version, Exports: len(s.policy().exports), Sessions: len(s.sessions), Text: s.textLocked()}
	for _, a := range s.conf.addresses() {
		st.Listen = append(st.Listen, a.String())
	}
	return st
}

// Exports are those of the configuration as it is, in its order.
func (s *Server) Exports() []api.Export {
	var es []api.Export
	for _, e := range s.policy().exports {
		x := api.Export{Tag: e.Tag, ReadOnly: e.ReadOnly, Directory: e.Dir, Options: e.Options.strings()}
		for _, g := range e.Guests {
			x.Guests = append(x.Guests, g.String())
		}
		es = append(es, x)
	}
	return es
}

// strings are the options as ParseExport takes them, but for ro and what is the default.
func (o *Options) strings() []string {
	var all []string
	add := func(given bool, name string, value any) {
		if given {
			all = append(all, name+fmt.Sprint(value))
		}
	}
	add(o.Suid, "suid", "")
	add(o.Dev, "dev", "")
	add(o.ACL, "acl", "")
	add(o.Root == passthrough.RootTrust, "root=", "trust")
	for _, r := range o.UIDs {
		add(true, "uidmap=", r)
	}
	for _, r := range o.GIDs {
		add(true, "gidmap=", r)
	}
	if o.Squash != nil {
		add(true, "squash=", fmt.Sprintf("%d:%d", o.Squash.UID, o.Squash.GID))
	}
	add(o.Submounts == passthrough.SubmountsFollow, "submounts=", "follow")
	add(o.Xattr == passthrough.XattrOff, "xattr=", "off")
	add(o.Xattr == passthrough.XattrUser, "xattr=", "user")
	for _, r := range o.XattrMap {
		add(true, "xattrmap=", r)
	}
	add(o.Cache == passthrough.CacheNone, "cache=", "none")
	add(o.Cache == passthrough.CacheAlways, "cache=", "always")
	add(o.Writeback, "writeback", "")
	add(o.MaxOpenFiles > 0, "max-open-files=", o.MaxOpenFiles)
	add(o.MaxInodes > 0, "max-inodes=", o.MaxInodes)
	add(o.MaxStreams > 0, "max-streams=", o.MaxStreams)
	return all
}

// Sessions are those of the guests, the oldest first. Their names are not those on the wire, which only their guests are to know.
func (s *Server) Sessions() []api.Session {
	s.mu.Lock()
	var all []*session
	for ss := range s.sessions {
		all = append(all, ss)
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *session) int { return cmp.Compare(a.number, b.number) })
	sessions := []api.Session{}
	for _, ss := range all {
		sessions = append(sessions, ss.describe())
	}
	return sessions
}

func (ss *session) describe() api.Session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	d := api.Session{
		ID: strconv.FormatUint(ss.number, 10), Peer: ss.peer.String(), Guest: quote(ss.about.Software), Kernel: quote(ss.about.Kernel),
		Protocol: int(ss.version), Since: ss.start, Lost: ss.control == nil, Mounts: []api.GuestsMount{},
	}
	if ss.worker != nil {
		d.Worker = ss.worker.proc.Pid()
	}
	ids := make([]uint32, 0, len(ss.mounts))
	for id := range ss.mounts {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		m := ss.mounts[id]
		g := api.GuestsMount{Tag: m.export.Tag, Directory: quote(m.dir), ReadOnly: m.export.ReadOnly, Streams: bits.OnesCount16(m.open)}
		if g.Watched = m.watched; m.watched == byInotify && ss.limited != "" {
			g.Watched += ", but for directories beyond its limit, which the guest looks at again after a second: " + ss.limited
		}
		d.Mounts = append(d.Mounts, g)
	}
	return d
}

// Reload reads the configuration again (Config.Reread) and takes it (Reconfigure).
func (s *Server) Reload(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return api.Errorf(api.Internal, "%w", context.Cause(ctx))
	}
	if s.conf.Reread == nil {
		return api.Errorf(api.Unsupported, "this server was started without a configuration that can be read again: restart it")
	}
	if s.started.Load() && s.conf.Reloading != nil {
		s.conf.Reloading()
		if s.conf.Ready != nil {
			defer s.conf.Ready()
		}
	}
	c, err := s.conf.Reread()
	if err != nil {
		s.refuseConfig(err)
	} else {
		err = s.Reconfigure(c)
	}
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	return nil
}

// Watch returns a channel that has a value after an export, a session or a mount has come, gone or changed.
func (s *Server) Watch(ctx context.Context) <-chan struct{} {
	ch := make(chan struct{}, 1)
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	s.watchers[ch] = true
	context.AfterFunc(ctx, func() {
		s.watchMu.Lock()
		defer s.watchMu.Unlock()
		delete(s.watchers, ch)
		close(ch)
	})
	return ch
}

// changed tells who watches. It does not wait.
func (s *Server) changed() {
	s.watchMu.Lock()
	defer s.watchMu.Unlock()
	for ch := range s.watchers {
		select {
		case ch <- struct{}{}:
		default: // it has one already
		}
	}
}
