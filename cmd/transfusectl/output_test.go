// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"transfused.org/transfused/service/api"
)

// Figures stay in their columns, and are what they say.
func TestFigures(t *testing.T) {
	for _, tt := range []struct {
		want, got string
	}{
		{"0", size(0)}, {"999", size(999)}, {"1000", size(1000)}, {"1.0K", size(1024)}, {"99.9K", size(99.9 * 1024)}, {"100K", size(99.96 * 1024)},
		{"1023K", size(1023 * 1024)}, {"1.0M", size(1023.9 * 1024)}, {"2.5G", size(2.5 * (1 << 30))},
		{"0", rate(0)}, {"9999", rate(9999)}, {"10.0k", rate(9999.6)}, {"123k", rate(123456)}, {"1.0M", rate(999999)},
		{"0ns", nanoseconds(0)}, {"999ns", nanoseconds(999)}, {"1.00us", nanoseconds(1000)}, {"10us", nanoseconds(9999)}, {"999us", nanoseconds(999400)},
		{"1.00ms", nanoseconds(999600)}, {"12s", nanoseconds(12e9)}, {"18446744074s", nanoseconds(1<<64 - 1)},
		{"0s", span(-time.Second)}, {"59s", span(59 * time.Second)}, {"1min", span(time.Minute)}, {"1min 1s", span(61 * time.Second)},
		{"2h", span(2*time.Hour + time.Second)}, {"3d 4h", span(76*time.Hour + time.Minute)},
		{"-", ago(time.Time{})},
		{"1 mount", count(1, "mount")}, {"0 mounts", count(0, "mount")},
		{"-", errnoName(0)}, {"ENOENT", errnoName(-2)}, {"EIO", errnoName(5)}, {"9999", errnoName(9999)},
		{"straße/ü", clean("straße/ü")}, {`a\x1b[2Jb\nc`, clean("a\x1b[2Jb\nc")}, {`"\\\x80`, clean("\"\\\\\x80")},
		{"abc", cut("abc", 3)}, {"ab…", cut("abcd", 3)}, {"…cd", cutLeft("abcd", 3)},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}

func TestRound(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	mounts := []api.Mount{{ID: "a", Tag: "code", Directory: "/mnt/" + strings.Repeat("x", 80), State: api.Reconnecting}, {ID: "b", Directory: "/b"}}
	old := sample{at: at, mounts: mounts[:1], counts: map[string]api.Statistics{"a": {Requests: 10, RequestBytes: 100, ReplyBytes: 1000,
		Operations: []api.Operation{{Name: "READ", Requests: 5}, {Name: "LOOKUP", Requests: 7}}}}}
	now := sample{at: at.Add(2 * time.Second), mounts: mounts, status: api.GuestStatus{Version: strings.Repeat("1", 200)}, counts: map[string]api.Statistics{
		"a": {Requests: 30, RequestBytes: 500, ReplyBytes: 9000, InFlight: 3, Latency: api.Latency{P50: 1, P99: 999999999999},
			Operations: []api.Operation{{Name: "READ", Requests: 13}, {Name: "LOOKUP", Requests: 7}, {Name: "WRITE", Requests: 12, Latency: api.Latency{Max: 2}}}},
		"b": {Requests: 4}}}
	r := round(old, now)
	want := topRound{
		Time: now.at,
		Mounts: []topMount{
			{ID: "a", Tag: "code", Directory: mounts[0].Directory, State: api.Reconnecting, Requests: 10, Read: 4000, Written: 200, InFlight: 3, Latency: api.Latency{P50: 1, P99: 999999999999}},
			{ID: "b", Directory: "/b", Requests: 2},
		},
		Operations: []topOperation{
			{Name: "WRITE", Mount: mounts[0].Directory, Requests: 6, Total: 12, Latency: api.Latency{Max: 2}},
			{Name: "READ", Mount: mounts[0].Directory, Requests: 4, Total: 13},
			{Name: "LOOKUP", Mount: mounts[0].Directory, Total: 7},
		},
	}
	if diff := cmp.Diff(want, r); diff != "" {
		t.Error(diff)
	}
	// Counts that went back are those of a daemon that was started again.
	if again := round(now, old); again.Mounts[0].Requests != 0 || again.Operations[0].Requests != 0 {
		t.Errorf("after a restart: %+v", again)
	}
	for _, columns := range []int{80, 120} {
		var b strings.Builder
		new(app).draw(&b, now, r, columns, 10)
		for line := range strings.Lines(b.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
				t.Errorf("%d columns where there are %d: %s", n, columns, line)
			}
		}
	}
}
