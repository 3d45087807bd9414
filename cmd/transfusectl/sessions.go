// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/api"
)

func newSessions(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "sessions",
		Short: "List the guests that are connected to the host",
		Long: `sessions lists the guests that are connected to the host's server, with their mounts. It always asks the host's server, as if
--host was given, and is for root.`,
		Example: `  transfusectl sessions
  transfusectl sessions --json=pretty`,
		Args: arguments(),
		PreRun: func(cmd *cobra.Command, _ []string) {
			if !a.host && !cmd.Flags().Changed("socket") {
				a.socket = api.HostSocket
			}
			a.host = true
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.within(cmd.Context(), answerTimeout)
			defer cancel()
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			ss, err := a.server().GetSessions(ctx)
			if err != nil {
				return a.failed(err)
			}
			return a.show(cmd, ss, func(w io.Writer) {
				var rows [][]cell
				for _, s := range ss {
					state := "connected"
					if s.Lost {
						state = "lost"
					}
					rows = append(rows, []cell{text(s.ID), text(s.Peer), {text: state, style: sessionStyle(s)}, text(ago(s.Since)),
						figure(strconv.Itoa(s.Protocol)), figure(strconv.Itoa(len(s.Mounts))), figure(strconv.Itoa(s.Worker)), text(s.Guest), text(s.Kernel)})
				}
				a.table(w, []string{"ID", "PEER", "STATE", "SINCE", "PROTOCOL", "MOUNTS", "WORKER", "GUEST", "KERNEL"}, rows)
				if !a.noLegend {
					fmt.Fprintf(w, "\n%s.\n", count(len(ss), "session"))
				}
			})
		},
	}
}
