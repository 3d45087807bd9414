// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/api"
)

func newUnmount(a *app) *cobra.Command {
	var how api.Unmounting
	cmd := &cobra.Command{
		Use:     "unmount DIR|ID",
		Aliases: []string{"umount"},
		Short:   "End a mount",
		Long: `unmount ends the mount at the directory DIR, or the one with the id ID (see mounts). A mount that is in use is refused.

A mount of the configuration stays unmounted until the configuration is read again.`,
		Example: `  transfusectl unmount /mnt/code
  transfusectl unmount --lazy /mnt/code`,
		Args: arguments("DIR or ID"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeMounts(cmd)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.guestOnly(cmd); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), actTimeout)
			defer cancel()
			if err := a.ready(ctx, false); err != nil {
				return a.failed(err)
			}
			m, err := a.find(ctx, args[0])
			if err != nil {
				return a.failed(err)
			}
			return a.failed(a.guest().Unmount(ctx, m.ID, how))
		},
	}
	cmd.Flags().BoolVarP(&how.Force, "force", "f", false, "fail what waits for the host, as umount -f")
	cmd.Flags().BoolVarP(&how.Lazy, "lazy", "l", false, "detach it now, and end it when nobody uses it, as umount -l")
	return cmd
}

// find returns the mount that a person means: by its id, its directory, or its tag if no other has that.
func (a *app) find(ctx context.Context, name string) (api.Mount, error) {
	ms, err := a.guest().GetMounts(ctx)
	if err != nil {
		return api.Mount{}, err
	}
	dir, _ := filepath.Abs(name) // it fails only for a relative name where the current directory is gone
	var found []api.Mount
	for _, m := range ms {
		if m.ID == name || m.Directory == dir {
			return m, nil
		}
		if m.Tag == name {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return api.Mount{}, fmt.Errorf("there is no mount %q: transfusectl mounts lists them", name)
	}
	return api.Mount{}, fmt.Errorf("%s of %q: name the directory or the id of one", count(len(found), "mount"), name)
}

// isKind tells whether err is an api.Error of kind k.
func isKind(err error, k api.Kind) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Kind == k
}
