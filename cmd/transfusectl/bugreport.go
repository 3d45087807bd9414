// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// journalLines are the last ones of each unit that a report has.
const journalLines = 200

func newBugReport(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "bug-report",
		Short: "Write all that a maintainer asks for, as one text",
		Long: `bug-report writes versions, what doctor finds, the daemon's status and mounts, the state of the units and the last lines that they logged.
Contents of files and tokens are not in it; names of directories, exports and machines are, so read it before you pass it on.

With --host it is about the host's server.`,
		Example: `  transfusectl bug-report > report.txt`,
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.within(cmd.Context(), actTimeout)
			defer cancel()
			// It goes to a file or a web page: no colors, and no pager.
			a.color, a.json = false, jsonOff
			a.bugReport(ctx, cmd.OutOrStdout(), thisMachine())
			return nil
		},
	}
}

func (a *app) bugReport(ctx context.Context, w io.Writer, m machine) {
	section := func(title string) { fmt.Fprintf(w, "\n== %s ==\n", title) }
	release, _, _ := m.release()
	fmt.Fprintf(w, "transfusectl %s, %s\n", version, time.Now().UTC().Format(time.RFC3339))
	fmt.Fprintf(w, "Linux %s\n", clean(release))
	for line := range strings.Lines(m.read("etc/os-release")) {
		if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			fmt.Fprintln(w, clean(strings.Trim(strings.TrimSpace(name), `"`)))
		}
	}

	section("doctor")
	a.writeFindings(w, a.diagnose(ctx, m))

	section("status")
	if r, err := a.report(ctx); err != nil {
		fmt.Fprintln(w, clean(a.failed(err).Error()))
	} else {
		a.writeStatus(w, r)
	}

	section("mount table")
	for line := range strings.Lines(m.read("proc/self/mountinfo")) {
		if strings.Contains(line, " fuse.transfuse ") {
			fmt.Fprintln(w, clean(strings.TrimSpace(line)))
		}
	}

	for _, name := range units(a.host) {
		section(name)
		u, err := m.unit(ctx, name)
		if err != nil {
			fmt.Fprintln(w, "systemctl:", err)
			continue
		}
		for _, key := range []string{"LoadState", "UnitFileState", "ActiveState", "SubState", "Result", "NRestarts"} {
			if u[key] != "" {
				fmt.Fprintf(w, "%s=%s\n", key, u[key])
			}
		}
		out, err := m.run(ctx, "journalctl", "--no-pager", "--quiet", "--boot", "--output=short-iso", fmt.Sprintf("--lines=%d", journalLines), "--unit="+name)
		if err != nil {
			fmt.Fprintln(w, "journalctl:", err)
		}
		for line := range strings.Lines(out) {
			fmt.Fprintln(w, clean(strings.TrimRight(line, "\n")))
		}
	}
}
