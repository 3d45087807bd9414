// SPDX-License-Identifier: Apache-2.0

package host

import (
	"context"
	"log/slog"
	"maps"
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

// toldAgain is when a cause that goes on is logged once more: a guest that is refused dials again every few seconds.
const toldAgain = 10 * time.Minute

// Bounds of what is remembered of refusals: peers, and causes of each.
const (
	maxRefused = 64
	maxCauses  = 32
)

// refusals bounds the log of refused connections: for each peer a line for each cause, and in all what a limiter allows.
// So no guest can hide what another does.
type refusals struct {
	again            time.Duration // toldAgain, but for tests
	burst, perSecond float64

	mu     sync.Mutex // guards the rest
	peers  map[identity]*refused
	others *refused // the peers beyond maxRefused, together
}

type refused struct {
	limit *limiter
	last  time.Time
	told  map[cause]*telling
}

// cause is who is refused and why, without the numbers in the text: ports and process ids change each time.
type cause struct {
	who  identity
	text string
}

type telling struct {
	at      time.Time
	dropped int
}

func newRefusals(again time.Duration, burst, perSecond float64) *refusals {
	r := &refusals{again: again, burst: burst, perSecond: perSecond, peers: map[identity]*refused{}}
	r.others = r.newPeer()
	return r
}

func (r *refusals) newPeer() *refused {
	return &refused{limit: newLimiter(r.burst, r.perSecond), told: map[cause]*telling{}}
}

// peer returns what is remembered of who. Precondition: r.mu is held.
func (r *refusals) peer(who identity, now time.Time) *refused {
	p := r.peers[who]
	if p == nil {
		if len(r.peers) == maxRefused {
			maps.DeleteFunc(r.peers, func(_ identity, p *refused) bool { return now.Sub(p.last) > r.again })
		}
		if len(r.peers) == maxRefused {
			return r.others
		}
		p = r.newPeer()
		r.peers[who] = p
	}
	p.last = now
	return p
}

// allow says whether to log that who is refused for err, and how many such lines were left out before.
func (r *refusals) allow(who identity, err error, now time.Time) (ok bool, dropped int) {
	c := cause{who, withoutNumbers(err.Error())}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.peer(who, now)
	t := p.told[c]
	if t != nil && now.Sub(t.at) < r.again {
		t.dropped++
		return false, 0
	}
	if ok, dropped = p.limit.allow(now); !ok {
		return false, 0
	}
	if t != nil {
		dropped += t.dropped
	}
	if len(p.told) == maxCauses {
		clear(p.told)
	}
	p.told[c] = &telling{at: now}
	return true, dropped
}

func withoutNumbers(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}, s)
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
