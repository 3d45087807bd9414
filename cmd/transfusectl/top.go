// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// What top shows where the output is no terminal.
const (
	plainColumns    = 80
	plainOperations = 10
)

func newTop(a *app) *cobra.Command {
	var iterations int
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show live what passes the mounts",
		Long: `top shows, every --interval, the requests and bytes a second of each mount, the requests that are not yet answered, and their latency; below
them the busiest operations of all mounts. READ/S and WRITE/S are bytes to and from the applications. Latencies are of the whole time
since the mount was made or the daemon was started: the half, and all but a hundredth, of the requests took at most that long.

It ends with q or Ctrl-C. Where the output is no terminal, or with --json, each round is written below the one before.`,
		Example: `  transfusectl top
  transfusectl top --iterations 1 --json=pretty`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			if iterations < 0 || interval < 10*time.Millisecond {
				return usage(cmd, fmt.Errorf("--iterations %d, --interval %s: numbers from 0 and times from 10ms are wanted", iterations, interval))
			}
			ctx, cancel := a.within(cmd.Context(), 0)
			defer cancel()
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			return a.top(ctx, cmd.OutOrStdout(), iterations, interval)
		},
	}
	cmd.Flags().IntVarP(&iterations, "iterations", "n", 0, "end after this many rounds (0: never)")
	cmd.Flags().DurationVarP(&interval, "interval", "i", time.Second, "time between two rounds")
	return cmd
}

// sample is what the daemon says at one time.
type sample struct {
	at     time.Time
	status api.GuestStatus
	mounts []api.Mount
	counts map[string]api.Statistics // by mount's ID
}

// topRound is a round as JSON.
type topRound struct {
	Time       time.Time      `json:"time"`
	Mounts     []topMount     `json:"mounts"`
	Operations []topOperation `json:"operations"`
}

type topMount struct {
	ID        string      `json:"id"`
	Tag       string      `json:"tag"`
	Directory string      `json:"directory"`
	State     api.State   `json:"state"`
	Requests  float64     `json:"requestsPerSecond"`
	Read      float64     `json:"readBytesPerSecond"`
	Written   float64     `json:"writtenBytesPerSecond"`
	InFlight  uint64      `json:"inFlight"`
	Latency   api.Latency `json:"latency"`
}

type topOperation struct {
	Name     string      `json:"name"`
	Mount    string      `json:"mount"` // its directory
	Requests float64     `json:"requestsPerSecond"`
	Total    uint64      `json:"requests"`
	Latency  api.Latency `json:"latency"`
}

func (a *app) sample(ctx context.Context) (s sample, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	g := a.guest()
	if s.status, err = g.GetStatus(ctx); err != nil {
		return s, err
	}
	if s.mounts, err = g.GetMounts(ctx); err != nil {
		return s, err
	}
	s.at, s.counts = time.Now(), map[string]api.Statistics{}
	for _, m := range s.mounts {
		c, err := g.GetStatistics(ctx, m.ID)
		if err != nil && !isKind(err, api.NotFound) { // it ended meanwhile
			return s, err
		}
		s.counts[m.ID] = c
	}
	return s, nil
}

// round computes what has happened between two samples.
func round(old, now sample) topRound {
	r := topRound{Time: now.at, Mounts: []topMount{}, Operations: []topOperation{}}
	seconds := now.at.Sub(old.at).Seconds()
	per := func(was, is uint64) float64 {
		if is < was || seconds <= 0 {
			return 0 // the daemon was started again
		}
		return float64(is-was) / seconds
	}
	for _, m := range now.mounts {
		c, was := now.counts[m.ID], old.counts[m.ID]
		r.Mounts = append(r.Mounts, topMount{m.ID, m.Tag, m.Directory, m.State, per(was.Requests, c.Requests),
			per(was.ReplyBytes, c.ReplyBytes), per(was.RequestBytes, c.RequestBytes), c.InFlight, c.Latency})
		for _, o := range c.Operations {
			var before uint64
			if i := slices.IndexFunc(was.Operations, func(p api.Operation) bool { return p.Name == o.Name }); i >= 0 {
				before = was.Operations[i].Requests
			}
			r.Operations = append(r.Operations, topOperation{o.Name, m.Directory, per(before, o.Requests), o.Requests, o.Latency})
		}
	}
	slices.SortStableFunc(r.Operations, func(a, b topOperation) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), cmp.Compare(b.Total, a.Total), cmp.Compare(a.Name, b.Name))
	})
	return r
}

func (a *app) top(ctx context.Context, w io.Writer, iterations int, interval time.Duration) error {
	old, err := a.sample(ctx)
	if err != nil {
		return a.failed(err)
	}
	live := a.terminal && a.json == jsonOff
	resized := make(chan os.Signal, 1)
	if live {
		var end func()
		ctx, end = screen(ctx, w)
		defer end()
		signal.Notify(resized, unix.SIGWINCH)
		defer signal.Stop(resized)
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for n := 0; ; {
		now := old
		select {
		case <-ctx.Done():
			return nil
		case <-resized:
			a.drawScreen(w, old, round(old, old))
			continue
		case <-ticker.C:
			if now, err = a.sample(ctx); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return a.failed(err)
			}
		}
		r := round(old, now)
		switch {
		case a.json != jsonOff:
			if err := a.json.write(w, r); err != nil {
				return err
			}
		case live:
			a.drawScreen(w, now, r)
		default:
			a.draw(w, now, r, plainColumns, plainOperations)
		}
		if n++; n == iterations {
			return nil
		}
		if old = now; !live && a.json == jsonOff {
			fmt.Fprintln(w)
		}
	}
}

// drawScreen draws a round over the one before.
func (a *app) drawScreen(w io.Writer, s sample, r topRound) {
	columns, rows := plainColumns, 24
	if size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 && size.Row > 0 {
		columns, rows = int(size.Col), int(size.Row)
	}
	var b bytes.Buffer
	a.draw(&b, s, r, columns, max(0, rows-len(r.Mounts)-6))
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	// Home, each line with what is to its right erased, and what is below.
	io.WriteString(w, "\x1b[H"+strings.Join(lines[:min(len(lines), rows-1)], "\x1b[K\r\n")+"\x1b[K\x1b[J")
}

// draw writes a round in lines of at most so many columns.
func (a *app) draw(w io.Writer, s sample, r topRound, columns, operations int) {
	connected := "host not connected"
	if s.status.Connected {
		connected = fmt.Sprintf("host connected, protocol %d", s.status.Protocol)
	}
	fmt.Fprintln(w, cut(fmt.Sprintf("transfused %s  %s  %s, %s", clean(s.status.Version), s.at.Format("15:04:05"), connected, count(len(r.Mounts), "mount")), columns))
	fmt.Fprintln(w)
	// MOUNT has what the other columns leave.
	format := "%%-%ds  %%-12s %%6s %%6s %%7s %%4s %%6s %%6s\n"
	width := max(10, columns-len("  reconnecting 123456 123456 1234567 1234 123456 123456"))
	format = fmt.Sprintf(format, width)
	fmt.Fprint(w, a.paint(bold, fmt.Sprintf(format, "MOUNT", "STATE", "REQ/S", "READ/S", "WRITE/S", "WAIT", "P50", "P99")))
	for _, m := range r.Mounts {
		fmt.Fprintf(w, format, cutLeft(clean(m.Directory), width), clean(string(m.State)), rate(m.Requests), size(m.Read), size(m.Written),
			rate(float64(m.InFlight)), nanoseconds(m.Latency.P50), nanoseconds(m.Latency.P99))
	}
	if len(r.Operations) == 0 || operations == 0 {
		return
	}
	fmt.Fprintln(w)
	width = max(10, columns-len("copy_file_range  123456 12345678 123456 123456 123456  "))
	fmt.Fprint(w, a.paint(bold, fmt.Sprintf("%-15s  %6s %8s %6s %6s %6s  %s\n", "OPERATION", "REQ/S", "TOTAL", "P50", "P99", "MAX", "MOUNT")))
	for _, o := range r.Operations[:min(operations, len(r.Operations))] {
		fmt.Fprintf(w, "%-15s  %6s %8s %6s %6s %6s  %s\n", cut(clean(o.Name), 15), rate(o.Requests), rate(float64(o.Total)),
			nanoseconds(o.Latency.P50), nanoseconds(o.Latency.P99), nanoseconds(o.Latency.Max), cutLeft(clean(o.Mount), width))
	}
}

// cut keeps the beginning of s, cutLeft its end, in n columns.
func cut(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}

func cutLeft(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return "…" + string(r[len(r)-n+1:])
}

// screen takes the terminal over: another screen, no cursor, and keys as they are pressed, of which q ends the context. end gives it back.
func screen(ctx context.Context, w io.Writer) (_ context.Context, end func()) {
	ctx, cancel := context.WithCancel(ctx)
	io.WriteString(w, "\x1b[?1049h\x1b[?25l")
	var keys sync.WaitGroup
	restore := func() {}
	if old, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		raw := *old
		raw.Lflag &^= unix.ICANON | unix.ECHO
		// A read gives what is there after a tenth of a second at most, so that its goroutine can be joined.
		raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 0, 1
		if unix.IoctlSetTermios(0, unix.TCSETS, &raw) == nil {
			restore = func() { _ = unix.IoctlSetTermios(0, unix.TCSETS, old) } // the terminal may be gone
			keys.Go(func() {
				b := make([]byte, 64)
				for ctx.Err() == nil {
					n, err := unix.Read(0, b)
					if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
						return
					}
					if n > 0 && bytes.ContainsAny(b[:n], "qQ") {
						cancel()
					}
				}
			})
		}
	}
	return ctx, func() {
		cancel()
		keys.Wait()
		restore()
		io.WriteString(w, "\x1b[?25h\x1b[?1049l")
	}
}
