// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/journal"
)

// LogHandler logs to the journal if standard error leads there, else as text to w.
func LogHandler(w io.Writer, level slog.Leveler) slog.Handler {
	text := TextHandler(w, level)
	if ok, err := journal.StderrIsJournalStream(); err != nil || !ok {
		return text
	}
	return &journalHandler{level: level, send: journal.Send, fallback: text}
}

// TextHandler logs as text to w.
func TextHandler(w io.Writer, level slog.Leveler) slog.Handler {
	return slog.NewTextHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if IsEvent(a) {
			return slog.Attr{}
		}
		return a
	}})
}

// journalHandler sends records by the journal's native protocol. Without groups: our programs use none.
type journalHandler struct {
	level    slog.Leveler
	attrs    []slog.Attr
	send     func(message string, priority journal.Priority, vars map[string]string) error
	fallback slog.Handler // where the journal takes nothing
}

var _ slog.Handler = (*journalHandler)(nil)

func (h *journalHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

func (h *journalHandler) WithAttrs(as []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], as...)
	c.fallback = h.fallback.WithAttrs(as)
	return &c
}

func (h *journalHandler) WithGroup(string) slog.Handler { return h }

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	text := strings.Builder{}
	text.WriteString(r.Message)
	vars := map[string]string{}
	add := func(a slog.Attr) bool {
		if IsEvent(a) {
			vars["MESSAGE_ID"] = a.Value.String()
			return true
		}
		value := a.Value.Resolve()
		s := value.String()
		text.WriteString(" " + a.Key + "=")
		if s == "" || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c == '"' || c == '=' || !strconv.IsPrint(c) }) {
			text.WriteString(strconv.Quote(s))
		} else {
			text.WriteString(s)
		}
		vars[field(a.Key)] = s
		var errno syscall.Errno
		if err, ok := value.Any().(error); ok && errors.As(err, &errno) {
			vars["ERRNO"] = strconv.Itoa(int(errno))
		}
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	if f, _ := runtime.CallersFrames([]uintptr{r.PC}).Next(); f.File != "" {
		vars["CODE_FILE"], vars["CODE_LINE"], vars["CODE_FUNC"] = f.File, strconv.Itoa(f.Line), f.Function
	}
	if h.send(text.String(), priority(r.Level), vars) != nil {
		return h.fallback.Handle(ctx, r)
	}
	return nil
}

// field is the journal's name for an attribute: capitals, digits and underscores, and not the journal's own.
func field(key string) string {
	return "TRANSFUSED_" + strings.Map(func(c rune) rune {
		switch {
		case 'a' <= c && c <= 'z':
			return c - 'a' + 'A'
		case 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
			return c
		}
		return '_'
	}, key)
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}
