// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"transfused.org/transfused/service/config"
)

func newCatConfig(a *app) *cobra.Command {
	var root string
	var effective bool
	cmd := &cobra.Command{
		Use:   "cat-config [guest|host]",
		Short: "Show the configuration files that count",
		Long: `cat-config shows the files of which the configuration of the guest's daemon is made, or with host (or --host) that of the host's server, in the
order in which they are read: what comes later overrides what came before, key by key. They are shown also where they have mistakes.

With --effective it shows what they come to, as one file. With --json that is what is shown, too.

It reads the files that are there now; a running daemon has those of its start or its last reload.`,
		Example: `  transfusectl cat-config
  transfusectl cat-config host --effective`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(cmd, fmt.Errorf("argument %q is one too many", args[1]))
			}
			if len(args) == 1 && args[0] != "guest" && args[0] != "host" {
				return usage(cmd, fmt.Errorf("there is no configuration of %q: guest or host is wanted", args[0]))
			}
			return nil
		},
		ValidArgs: []string{"guest", "host"},
		RunE: func(cmd *cobra.Command, args []string) error {
			name, program := config.Guest, "transfused"
			if a.host && len(args) == 0 || len(args) == 1 && args[0] == "host" {
				name, program = config.Host, "transfuse-host"
			}
			if !effective && a.json == jsonOff {
				b, err := config.Cat(root, name)
				if err != nil {
					return err
				}
				if len(b) == 0 {
					b = fmt.Appendf(nil, "# There is no configuration: %s runs with its defaults.\n", program)
				}
				return a.show(cmd, nil, func(w io.Writer) { w.Write(b) })
			}
			c, err := config.ReadAll(root, name, nil)
			if err != nil {
				return err
			}
			b, err := c.Effective()
			if err != nil {
				return err
			}
			all := map[string]any{}
			if err := toml.Unmarshal(b, &all); err != nil {
				return err
			}
			return a.show(cmd, all, func(w io.Writer) { w.Write(b) })
		},
	}
	cmd.Flags().StringVar(&root, "root", "", "read below this directory instead of /")
	cmd.Flags().BoolVar(&effective, "effective", false, "show what the files come to")
	cmd.MarkFlagDirname("root")
	return cmd
}
