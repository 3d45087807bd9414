// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// limiter bounds how often something that a peer can cause is logged: burst
// times at once, and perSecond in the long run.
type limiter struct {
	burst, perSecond float64

	mu      sync.Mutex // guards the rest
	tokens  float64
	last    time.Time
	dropped int
}

func newLimiter(burst, perSecond float64) *limiter {
	return &limiter{burst: burst, perSecond: perSecond, tokens: burst}
}

// allow says whether to go on, and how many were dropped since the last time
// that it said yes.
func (l *limiter) allow(now time.Time) (ok bool, dropped int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.last.IsZero() {
		l.tokens = min(l.burst, l.tokens+l.perSecond*now.Sub(l.last).Seconds())
	}
	l.last = now
	if l.tokens < 1 {
		l.dropped++
		return false, 0
	}
	l.tokens--
	dropped, l.dropped = l.dropped, 0
	return true, dropped
}

// limitedHandler limits what a guest can cause in the log, but for errors,
// which are the host's own.
type limitedHandler struct {
	slog.Handler
	limit *limiter
}

// Handle drops r, or says with it how many were dropped before.
func (h limitedHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelError {
		ok, dropped := h.limit.allow(time.Now())
		if !ok {
			return nil
		}
		r.Add(droppedAttr(dropped)...)
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs keeps the limit.
func (h limitedHandler) WithAttrs(as []slog.Attr) slog.Handler {
	return limitedHandler{h.Handler.WithAttrs(as), h.limit}
}

// WithGroup keeps the limit.
func (h limitedHandler) WithGroup(name string) slog.Handler {
	return limitedHandler{h.Handler.WithGroup(name), h.limit}
}

// droppedAttr tells of log lines that were left out.
func droppedAttr(n int) []any {
	if n == 0 {
		return nil
	}
	return []any{"left_out_before", n}
}

// maxLogged bounds one text of a peer in our log, in bytes.
const maxLogged = 1024

// quote makes the text of a peer safe for any log: on one line, without
// control characters, bounded. What is harmless stays as it is.
func quote(s string) string {
	if len(s) > maxLogged {
		s = s[:maxLogged] + "…"
	}
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}
