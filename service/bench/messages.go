// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"

	"transfused.org/transfused/service/admin"

	"transfused.org/transfused/service/bench/figures"
)

// messages are what passed a mount so far.
type messages struct {
	figures.Messages
	said float64 // requests that nobody answers: FORGET and the like; how many they are is a matter of time
}

func (m messages) less(before messages) messages {
	d := messages{figures.Messages{Sent: m.Sent - before.Sent, Asked: map[string]float64{}}, m.said - before.said}
	for op, n := range m.Asked {
		if n -= before.Asked[op]; n > 0 {
			d.Asked[op] = n
		}
	}
	d.Sent -= d.said
	return d
}

func (m messages) each(n int) *figures.Messages {
	e := &figures.Messages{Sent: m.Sent / float64(n), Asked: map[string]float64{}}
	for op, all := range m.Asked {
		e.Asked[op] = all / float64(n)
	}
	return e
}

// messages asks both programs, of which the peer was told to count, or the kernel.
func (p *peer) messages() (m messages, err error) {
	if p.theirs && (p.name != ours || p.c.Sockets == "") {
		return p.traced.messages(p.dir)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	g := admin.NewGuest(p.sock("guest-control"))
	mounts, err := g.GetMounts(ctx)
	if err == nil && len(mounts) != 1 {
		err = fmt.Errorf("%d mounts", len(mounts))
	}
	if err != nil {
		return m, fmt.Errorf("the guest's control socket: %w", err)
	}
	s, err := g.GetStatistics(ctx, mounts[0].ID)
	if err != nil {
		return m, fmt.Errorf("the guest's control socket: %w", err)
	}
	m.said, m.Asked = float64(s.Requests), map[string]float64{}
	for _, o := range s.Operations {
		m.Asked[o.Name] = float64(o.Requests)
		m.said -= float64(o.Requests)
	}
	m.Sent, err = p.served(ctx)
	return m, err
}

// served is what the host has served, by its metrics.
func (p *peer) served(ctx context.Context) (float64, error) {
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.sock("metrics"))
	}}
	defer t.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, "GET", "http://host/metrics", nil)
	if err != nil {
		return 0, err
	}
	reply, err := (&http.Client{Transport: t}).Do(r)
	if err != nil {
		return 0, fmt.Errorf("the host's metrics: %w", err)
	}
	defer reply.Body.Close()
	for s := bufio.NewScanner(reply.Body); s.Scan(); {
		if value, ok := strings.CutPrefix(s.Text(), `transfuse_host_requests_total{tag="bench"} `); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("the host's metrics (%s) do not tell what was served", reply.Status)
}
