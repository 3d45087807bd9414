// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/api"
	"transfused.org/transfused/service/guest"
)

func newMount(a *app) *cobra.Command {
	var options []string
	cmd := &cobra.Command{
		Use:   "mount TAG DIR",
		Short: "Mount an export of the host",
		Long: `mount mounts the host's export TAG at the directory DIR, which is made if it is missing, and returns when the mount stands. The mount lasts
until it is unmounted or the machine ends; one that is to be there after every boot belongs in fstab, or in the
daemon's configuration.

Options are those of mount(8) that make sense: ro, rw, suid, nosuid, dev, nodev, exec, noexec, atime, noatime, sync, allow_other,
default_permissions.

Called in another mount namespace than the daemon's (unshare -m), it mounts there.`,
		Example: `  transfusectl mount code /mnt/code
  transfusectl mount code /mnt/code -o ro,noexec
  transfusectl --wait --timeout 5m mount code /mnt/code`,
		Args: arguments("TAG", "DIR"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return a.completeTags(cmd)
			case 1:
				return nil, cobra.ShellCompDirectiveFilterDirs
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			if _, err := guest.ParseMountOptions(options); err != nil {
				return &exitError{exitUsage, err}
			}
			ctx, cancel := a.within(cmd.Context(), actTimeout)
			defer cancel()
			if err := a.ready(ctx, true); err != nil {
				return a.failed(err)
			}
			if !a.wait {
				s, err := a.guest().GetStatus(ctx)
				if err != nil {
					return a.failed(err)
				}
				if !s.Connected {
					return fmt.Errorf("mount %s: the host at %s is not connected: start transfuse-host there, or wait for it by --wait", args[0], s.Server)
				}
			}
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			// The kernel shows the mount where links lead.
			if real, err := filepath.EvalSymlinks(dir); err == nil {
				dir = real
			}
			m, err := mountAt(ctx, a.guest(), place{}, api.MountSpec{Tag: args[0], Directory: dir, Options: options})
			if err != nil {
				return a.failed(err)
			}
			if a.json != jsonOff {
				return a.json.write(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVarP(&options, "options", "o", nil, "mount options, separated by commas")
	return cmd
}
