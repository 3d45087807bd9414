// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/api"
)

func newMounts(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "mounts",
		Short: "List the mounts",
		Long: `mounts lists all mounts that the guest's daemon has or wants: those of its configuration, those that were asked for while it ran, and those
of its host. A mount that does not work says why.`,
		Example: `  transfusectl mounts
  transfusectl mounts --json=pretty`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), answerTimeout)
			defer cancel()
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			ms, err := a.guest().GetMounts(ctx)
			if err != nil {
				return a.failed(err)
			}
			return a.show(cmd, ms, func(w io.Writer) { a.writeMounts(w, ms) })
		},
	}
}

func (a *app) writeMounts(w io.Writer, ms []api.Mount) {
	var rows [][]cell
	for _, m := range ms {
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		rows = append(rows, []cell{text(m.ID), text(m.Tag), text(m.Directory), text(mode),
			{text: string(m.State), style: stateStyle(m.State)}, text(ago(m.Since)), text(m.Error)})
	}
	a.table(w, []string{"ID", "TAG", "DIRECTORY", "MODE", "STATE", "SINCE", "ERROR"}, rows)
	if !a.noLegend {
		fmt.Fprintf(w, "\n%s.\n", count(len(ms), "mount"))
	}
}
