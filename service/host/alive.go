// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"fmt"
	"time"

	"transfused.org/transfused/service/wire"
)

// watch asks the guest for signs of life while ctx lasts. One that gives none
// for long is given up: the connections of a machine that vanished would stay
// for ever. A guest that is only paused is given the time of times.dead.
func (ss *session) watch(ctx context.Context, c *control) {
	ask := func(id uint32) error { return c.send(&wire.Ping{ID: id}) }
	if ss.version < wire.Version2 {
		if len(ss.guests()) == 0 {
			return // nobody told us where to ask
		}
		ask = func(uint32) error { return ss.v1.ping() }
	}
	warned := false
	due := time.Since(ss.start) + ss.srv.times.ping
	for id := uint32(1); pause(ctx, ss.srv.times.ping); id++ {
		ss.forgive(due)
		quiet := ss.quiet()
		switch {
		case quiet > ss.srv.times.dead:
			ss.cancel(fmt.Errorf("no sign of life for %v", quiet.Round(time.Second)))
			return
		case quiet > ss.srv.times.silent && !warned:
			ss.log.Warn("guest gives no sign of life", "for", quiet.Round(time.Second))
			warned = true
		case quiet < ss.srv.times.silent:
			warned = false
		}
		due = time.Since(ss.start) + ss.srv.times.ping
		if err := ask(id); err != nil {
			ss.log.Debug("ping failed", "error", err)
			due = time.Since(ss.start) + ss.srv.times.ping // that took long by the guest's fault
		}
	}
}
