// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"

	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/wire"
)

// relay is a slog.Handler that also sends what it logs to the host, while the control channel is up. The local log has
// everything: a host's log may not be seen from here. A host of version 2 gets no notices: it knows itself who connects and what is
// mounted.
type relay struct {
	slog.Handler
	attrs string
	to    *atomic.Pointer[control]
}

func (r *relay) Handle(ctx context.Context, rec slog.Record) error {
	if c := r.to.Load(); c != nil && (rec.Level >= slog.LevelWarn || rec.Level >= slog.LevelInfo && c.version < wire.Version2) {
		var text strings.Builder
		text.WriteString(rec.Message)
		text.WriteString(r.attrs)
		rec.Attrs(func(a slog.Attr) bool {
			if !sd.IsEvent(a) {
				text.WriteString(" " + a.String())
			}
			return true
		})
		var m wire.Message = &wire.LogNotice{Text: text.String()}
		if rec.Level >= slog.LevelWarn {
			m = &wire.LogError{Text: text.String()}
		}
		c.offer(m)
	}
	return r.Handler.Handle(ctx, rec)
}

func (r *relay) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := &relay{Handler: r.Handler.WithAttrs(attrs), attrs: r.attrs, to: r.to}
	for _, a := range attrs {
		n.attrs += " " + a.String()
	}
	return n
}

func (r *relay) WithGroup(name string) slog.Handler {
	return &relay{Handler: r.Handler.WithGroup(name), attrs: r.attrs, to: r.to}
}
