// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

func newReload(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read its configuration again",
		Long: `reload has the daemon read its configuration again: mounts or exports that were added are made, those that were removed end, and the
others are not touched. A configuration with a fault is refused, and the old one stays in force.`,
		Example: `  transfusectl reload
  transfusectl --host reload`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.within(cmd.Context(), actTimeout)
			defer cancel()
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			if a.host {
				return a.failed(a.server().Reload(ctx))
			}
			return a.failed(a.guest().Reload(ctx))
		},
	}
}
