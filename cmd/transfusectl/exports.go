// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/api"
)

func newExports(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "exports",
		Short: "List what can be mounted",
		Long:  `exports lists what the host offers this guest. With --host it lists all that the host's server exports, from where and to whom.`,
		Example: `  transfusectl exports
  transfusectl --host exports --json=pretty`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx, cancel := a.within(cmd.Context(), answerTimeout)
			defer cancel()
			if err := a.ready(ctx, true); err != nil {
				return a.failed(err)
			}
			var es []api.Export
			if a.host {
				es, err = a.server().GetExports(ctx)
			} else {
				es, err = a.guest().Exports(ctx)
			}
			if err != nil {
				return a.failed(err)
			}
			return a.show(cmd, es, func(w io.Writer) { a.writeExports(w, es) })
		},
	}
}

func (a *app) writeExports(w io.Writer, es []api.Export) {
	headings := []string{"TAG", "MODE"}
	if a.host {
		headings = append(headings, "DIRECTORY", "GUESTS", "OPTIONS")
	}
	var rows [][]cell
	for _, e := range es {
		mode := "rw"
		if e.ReadOnly {
			mode = "ro"
		}
		row := texts(e.Tag, mode)
		if a.host {
			row = append(row, texts(e.Directory, strings.Join(e.Guests, ","), strings.Join(e.Options, ","))...)
		}
		rows = append(rows, append(row, text(e.Text)))
	}
	a.table(w, append(headings, "TEXT"), rows)
	if !a.noLegend {
		fmt.Fprintf(w, "\n%s.\n", count(len(es), "export"))
	}
}
