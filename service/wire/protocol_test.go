// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"fmt"
	"math/bits"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// These tests keep ../PROTOCOL.md and this package in agreement.

// protocol returns the document's lines.
func protocol(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("../PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(b), "\n")
}

// table returns the rows of the first table with this first line at or after
// lines[0], and before the next heading.
func table(lines []string, head string) (rows [][]string) {
	for i, line := range lines {
		if line == head {
			for _, row := range lines[i+2:] {
				if !strings.HasPrefix(row, "|") {
					return rows
				}
				cells := strings.Split(strings.Trim(row, "|"), "|")
				for i := range cells {
					cells[i] = strings.TrimSpace(cells[i])
				}
				rows = append(rows, cells)
			}
		}
		if i > 0 && strings.HasPrefix(line, "#") {
			break
		}
	}
	return rows
}

// section returns the lines from a heading on.
func section(t *testing.T, lines []string, heading string) []string {
	t.Helper()
	i := slices.Index(lines, heading)
	if i < 0 {
		t.Fatalf("PROTOCOL.md has no heading %q", heading)
	}
	return lines[i:]
}

func TestProtocolNumbers(t *testing.T) {
	var got, want []string
	for _, row := range table(section(t, protocol(t), "## 5. Message numbers"), "| number | message | version | direction | channel |") {
		got = append(got, strings.Join(row[:4], " "))
	}
	for _, k := range kinds {
		way := "both"
		switch k.d {
		case toHost:
			way = "guest → host"
		case toGuest:
			way = "host → guest"
		}
		version := 1
		if k.t >= 64 {
			version = 2
		}
		want = append(want, fmt.Sprint(k.t, " ", name(k.new()), " ", version, " ", way))
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-code +document)\n%s", diff)
	}
}

// TestProtocolFields compares each message's table of fields with what its
// fields method does.
func TestProtocolFields(t *testing.T) {
	size := map[string]int{"u8": 1, "bool": 1, "u16": 2, "count": 2, "u32": 4, "errno": 4, "u64": 8, "id": 16}
	number := regexp.MustCompile(`\d+$`)
	lines := protocol(t)
	for _, m := range samples() {
		t.Run(name(m), func(t *testing.T) {
			var got, want []string
			for _, row := range table(section(t, lines, "#### "+name(m)), "| offset | field | type | bound | meaning |") {
				bound := number.FindString(row[3])
				if bound == "" {
					bound = "0"
				}
				if row[2] == "errno" {
					bound = strconv.Itoa(MaxErrno) // said once, with the types
				}
				got = append(got, strings.Join([]string{row[0], strings.TrimPrefix(row[1], "↳ "), row[2], bound}, " "))
			}
			offset := headerLen
			c := codec{enc: true, seen: func(field, kind string, max int) {
				at := "…"
				if offset > 0 {
					at = strconv.Itoa(offset)
				}
				want = append(want, fmt.Sprint(at, " ", field, " ", kind, " ", max))
				if n, fixed := size[kind]; fixed && offset > 0 {
					offset += n
				} else {
					offset = 0
				}
			}}
			m.fields(&c)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-code +document)\n%s", diff)
			}
		})
	}
}

func TestProtocolConstants(t *testing.T) {
	lines := protocol(t)
	tests := []struct {
		heading, head string
		value, name   int // columns
		want          map[string]int
	}{
		{"## 13. Limits and times", "| name | value | bounds |", 1, 0, map[string]int{
			"MaxControl": MaxControl, "MaxFirst": MaxFirst, "MaxPerfstat": MaxPerfstat, "MaxEvent": MaxEvent, "MaxMountArgs": MaxMountArgs,
			"MaxTag": MaxTag, "MaxPath": MaxPath, "MaxName": MaxName, "MaxText": MaxText, "MaxToken": MaxToken, "MaxOption": MaxOption,
			"MaxOptions": MaxOptions, "MaxExports": MaxExports, "MaxErrno": MaxErrno, "MaxPerfEntries": MaxPerfEntries, "NonceLen": NonceLen,
		}},
		{"#### Event", "| action | name | what the guest does | what inotify shows |", 0, 1, map[string]int{
			"ActionRmdir": int(ActionRmdir), "ActionUnlink": int(ActionUnlink), "ActionMkdir": int(ActionMkdir), "ActionSymlink": int(ActionSymlink),
			"ActionTruncate": int(ActionTruncate), "ActionWatched": int(ActionWatched), "ActionChmod": int(ActionChmod), "ActionMknod": int(ActionMknod), "ActionRename": int(ActionRename),
			"ActionCloseWrite": int(ActionCloseWrite), "ActionPing": int(ActionPing),
		}},
		{"#### Init", "| bit | name | meaning |", 0, 1, map[string]int{"FeatureKeep": bits.TrailingZeros64(FeatureKeep)}},
		{"#### UnmountReply", "| reason | name | meaning |", 0, 1, map[string]int{
			"ReasonAsked": int(ReasonAsked), "ReasonShutdown": int(ReasonShutdown), "ReasonExportGone": int(ReasonExportGone),
			"ReasonStreamLost": int(ReasonStreamLost), "ReasonProtocol": int(ReasonProtocol), "ReasonFailed": int(ReasonFailed),
		}},
	}
	for _, tt := range tests {
		t.Run(tt.heading, func(t *testing.T) {
			got := map[string]int{}
			for _, row := range table(section(t, lines, tt.heading), tt.head) {
				n, err := strconv.Atoi(row[tt.value])
				if err != nil {
					t.Fatal(err)
				}
				got[row[tt.name]] = n
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-code +document)\n%s", diff)
			}
		})
	}
}
