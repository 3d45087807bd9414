// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

func newTrace(a *app) *cobra.Command {
	var mount, operation string
	var lines int
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "Show requests as they pass",
		Long: `trace writes a line for each FUSE request that passes the guest's daemon, when its reply has been written: the time at which it came, the mount,
the operation, the node and the process that caused it, the lengths of request and reply in bytes, the reply's errno, and how long it
took. It ends with Ctrl-C. What comes faster than it can be written is left out.

With --json each request is an object in a line of its own.`,
		Example: `  transfusectl trace --mount /mnt/code
  transfusectl trace --operation write --json=short`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			ctx := cmd.Context()
			if a.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, a.timeout)
				defer cancel()
			}
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			ms, err := a.guest().GetMounts(ctx)
			if err != nil {
				return a.failed(err)
			}
			filter := api.TraceFilter{Operation: operation}
			if mount != "" {
				m, err := a.find(ctx, mount)
				if err != nil {
					return a.failed(err)
				}
				filter.Mount = m.ID
			}
			return a.trace(ctx, cmd.OutOrStdout(), filter, lines, ms)
		},
	}
	cmd.Flags().StringVarP(&mount, "mount", "m", "", "only requests of this mount: its directory, id or tag")
	cmd.Flags().StringVarP(&operation, "operation", "p", "", "only this operation: lookup, read, write …")
	cmd.Flags().IntVarP(&lines, "lines", "n", 0, "end after this many requests (0: never)")
	cmd.RegisterFlagCompletionFunc("mount", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.completeMounts(cmd)
	})
	return cmd
}

func (a *app) trace(ctx context.Context, to io.Writer, filter api.TraceFilter, lines int, ms []api.Mount) error {
	ctx, enough := context.WithCancel(ctx)
	defer enough()
	dirs := map[string]string{}
	for _, m := range ms {
		dirs[m.ID] = m.Directory
	}
	w := bufio.NewWriter(to)
	if a.json == jsonOff && !a.noLegend {
		a.traceLine(w, "TIME", "OPERATION", "NODE", "PID", "LENGTH", "REPLY", "ERRNO", "TOOK", "MOUNT")
		w.Flush()
	}
	var failed error
	n := 0
	err := a.guest().Trace(ctx, filter, func(r api.Request) {
		if failed != nil || lines > 0 && n == lines {
			return
		}
		if n++; a.json != jsonOff {
			failed = a.json.write(w, r)
		} else {
			dir, ok := dirs[r.Mount]
			if !ok {
				dir = r.Mount // it was made meanwhile
			}
			a.traceLine(w, r.Time.Local().Format("15:04:05.000000"), r.Operation, fmt.Sprint(r.NodeID), fmt.Sprint(r.PID), fmt.Sprint(r.Length),
				fmt.Sprint(r.Reply), errnoName(r.Errno), nanoseconds(uint64(max(r.Duration, 0))), dir)
		}
		// Each line at once: a person looks, or a program waits for it.
		if err := w.Flush(); failed == nil {
			failed = err
		}
		if failed != nil || n == lines {
			enough()
		}
	})
	switch {
	case failed != nil:
		return failed
	case n == lines && lines > 0:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		return nil // it was ended as it is meant to be
	}
	return a.failed(err)
}

func (a *app) traceLine(w io.Writer, when, op, node, pid, length, reply, errno, took, mount string) {
	fmt.Fprintf(w, "%-15s  %-12s %8s %7s %7s %7s  %-7s %7s  %s\n", when, clean(op), node, pid, length, reply, errno, took, clean(mount))
}

// errnoName is the name of a reply's errno, which FUSE has as a negative number; "-" for none.
func errnoName(e int) string {
	if e == 0 {
		return "-"
	}
	if e < 0 {
		e = -e
	}
	if name := unix.ErrnoName(unix.Errno(e)); name != "" {
		return name
	}
	return fmt.Sprint(e)
}
