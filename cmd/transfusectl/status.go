// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
)

// statusReport is status as JSON.
type statusReport struct {
	Running  bool             `json:"running"`
	Well     bool             `json:"well"`
	Guest    *api.GuestStatus `json:"guest,omitempty"`
	Mounts   []api.Mount      `json:"mounts,omitempty"`
	Host     *api.HostStatus  `json:"host,omitempty"`
	Sessions []api.Session    `json:"sessions,omitempty"`
}

func newStatus(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show how the daemon does, and each of its mounts",
		Long: `status shows the version of the daemon, its connection to the host, and its mounts. With --host it shows the host's server and,
to root, the guests that are connected.

Exit codes: 0 running and well, 1 running, but the host is not connected or a mount does not work, 3 not running, 4 it can't be told.`,
		Example: `  transfusectl status
  transfusectl --host status
  transfusectl --json=short status`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := a.within(cmd.Context(), answerTimeout)
			defer cancel()
			r, err := a.report(ctx)
			switch {
			case admin.NotRunning(err):
				if a.json != jsonOff {
					if err := a.json.write(cmd.OutOrStdout(), r); err != nil {
						return err
					}
				}
				return a.failed(err)
			case err != nil:
				return &exitError{exitUnknown, a.failed(err)}
			}
			if err := a.show(cmd, r, func(w io.Writer) { a.writeStatus(w, r) }); err != nil {
				return err
			}
			if !r.Well {
				return &exitError{code: exitFailure}
			}
			return nil
		},
	}
}

func (a *app) report(ctx context.Context) (r statusReport, err error) {
	if err := a.ready(ctx, false); err != nil {
		return r, err
	}
	if a.host {
		s, err := a.server().GetStatus(ctx)
		if err != nil {
			return r, err
		}
		r.Running, r.Well, r.Host = true, true, &s
		r.Sessions, err = a.server().GetSessions(ctx)
		if isKind(err, api.Denied) {
			err = nil // others than root see the rest
		}
		for _, s := range r.Sessions {
			r.Well = r.Well && !s.Lost
		}
		return r, err
	}
	s, err := a.guest().GetStatus(ctx)
	if err != nil {
		return r, err
	}
	r.Running, r.Well, r.Guest = true, s.Connected, &s
	r.Mounts, err = a.guest().GetMounts(ctx)
	for _, m := range r.Mounts {
		r.Well = r.Well && m.State == api.Active
	}
	return r, err
}

func (a *app) writeStatus(w io.Writer, r statusReport) {
	mark := a.paint(good, "●")
	if !r.Well {
		mark = a.paint(notice, "●")
	}
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%10s: %s\n", name, value)
		}
	}
	if r.Host != nil {
		fmt.Fprintf(w, "%s transfuse-host %s\n", mark, clean(r.Host.Version))
		line("Status", clean(r.Host.Text))
		line("Listening", clean(strings.Join(r.Host.Listen, ", ")))
		line("Exports", fmt.Sprint(r.Host.Exports))
		line("Guests", fmt.Sprint(r.Host.Sessions))
		for _, s := range r.Sessions {
			fmt.Fprintf(w, "\n%s %s, %s\n", a.paint(sessionStyle(s), "●"), clean(s.Peer), clean(s.Guest))
			line("Since", moment(s.Since))
			for _, m := range s.Mounts {
				line("Mount", clean(fmt.Sprintf("%s on %s, %s", m.Tag, m.Directory, count(m.Streams, "stream"))))
				line("Watched", clean(m.Watched))
			}
		}
		return
	}
	s := r.Guest
	fmt.Fprintf(w, "%s transfused %s\n", mark, clean(s.Version))
	line("Status", clean(s.Text))
	connected := a.paint(bad, "not connected")
	if s.Connected {
		connected = fmt.Sprintf("%s, protocol %d", a.paint(good, "connected"), s.Protocol)
	}
	line("Host", clean(s.Server)+", "+connected)
	line("Program", clean(s.Host))
	line("Features", clean(strings.Join(s.Features, ", ")))
	for _, m := range r.Mounts {
		fmt.Fprintf(w, "\n%s %s on %s\n", a.paint(stateStyle(m.State), "●"), clean(m.Tag), clean(m.Directory))
		state := a.paint(stateStyle(m.State), clean(string(m.State)))
		if !m.Since.IsZero() {
			state += " since " + moment(m.Since)
		}
		line("State", state)
		line("Error", clean(m.Error))
		line("ID", clean(m.ID))
		line("Options", clean(strings.Join(m.Options, ",")))
		line("Streams", fmt.Sprint(m.Streams))
	}
}

func stateStyle(s api.State) style {
	switch s {
	case api.Active:
		return good
	case api.Failed:
		return bad
	}
	return notice
}

func sessionStyle(s api.Session) style {
	if s.Lost {
		return notice
	}
	return good
}

// count is a number of things in words.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
