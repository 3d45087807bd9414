// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
)

// completeTimeout is how long a person at the Tab key waits at most.
const completeTimeout = time.Second

// completing prepares a for a completion: cobra runs no PersistentPreRunE for it.
func (a *app) completing(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	_ = a.prepare(cmd) // faults in other flags are told when the command is run
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return context.WithTimeout(ctx, completeTimeout)
}

// completeTags are the exports' tags.
func (a *app) completeTags(cmd *cobra.Command) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := a.completing(cmd)
	defer cancel()
	es, _ := a.guest().Exports(ctx) // without a daemon there is nothing to offer
	var tags []string
	for _, e := range es {
		tags = append(tags, cobra.CompletionWithDesc(clean(e.Tag), clean(e.Text)))
	}
	return tags, cobra.ShellCompDirectiveNoFileComp
}

// completeMounts are the mounts' directories.
func (a *app) completeMounts(cmd *cobra.Command) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := a.completing(cmd)
	defer cancel()
	ms, _ := a.guest().GetMounts(ctx) // the same
	var dirs []string
	for _, m := range ms {
		dirs = append(dirs, cobra.CompletionWithDesc(clean(m.Directory), clean(m.Tag)))
	}
	return dirs, cobra.ShellCompDirectiveNoFileComp
}
