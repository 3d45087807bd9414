// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/admin"
)

func newWait(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "wait",
		Short: "Wait until the host is connected",
		Long: `wait returns when the guest's daemon is connected to its host, at once if it is already; with --timeout it fails if that takes longer. It
goes on through a restart of the daemon. With --wait it waits for a daemon that is not running, too.

transfused-wait-host.service calls it, for units that are ordered after the host.`,
		Example: `  transfusectl wait --timeout 30s`,
		Args:    arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), 0)
			defer cancel()
			if a.wait {
				return a.failed(a.ready(ctx, true))
			}
			err := waitHost(ctx, a.guest())
			if errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("the host is not connected after %s", a.timeout)
			}
			return a.failed(err)
		},
	}
}

// waitHost waits until the host is connected, also when the daemon is started again meanwhile.
func waitHost(ctx context.Context, g *admin.GuestClient) error {
	for {
		err := g.Wait(ctx)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
	}
}
