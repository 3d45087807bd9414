// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseIDRange(t *testing.T) {
	for _, c := range []struct {
		in   string
		want IDRange
		err  string
	}{
		{"0:100000:65536", IDRange{0, 100000, 65536}, ""},
		{"1000:1000:1", IDRange{1000, 1000, 1}, ""},
		{"0:0:4294967295", IDRange{0, 0, 4294967295}, ""},
		{"1:0:4294967295", IDRange{}, "ids end before"},
		{"0:5:0", IDRange{}, "at least 1"},
		{"0:5", IDRange{}, "three numbers"},
		{"0:5:-1", IDRange{}, "not a number"},
		{"0:5:4294967296", IDRange{}, "not a number"},
		{"", IDRange{}, "three numbers"},
	} {
		got, err := ParseIDRange(c.in)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: error %v, want one with %q", c.in, err, c.err)
			}
			continue
		}
		if err != nil || got != c.want || got.String() != c.in {
			t.Errorf("%q: got %v, %v", c.in, got, err)
		}
	}
}

func TestIDMapValidate(t *testing.T) {
	for _, c := range []struct {
		name string
		m    IDMap
		ok   bool
	}{
		{"empty", nil, true},
		{"neighbours", IDMap{{0, 100, 10}, {10, 110, 10}}, true},
		{"guest sides meet", IDMap{{0, 100, 10}, {9, 200, 10}}, false},
		{"host sides meet", IDMap{{0, 100, 10}, {50, 109, 1}}, false},
		{"too long", IDMap{{10, 0, noID - 9}}, false},
	} {
		if err := c.m.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestIDs(t *testing.T) {
	owner := &Cred{1000, 1001}
	type row struct{ id, uid, gid uint32 } // noID: unmapped
	for _, c := range []struct {
		name    string
		ids     ids
		in, out []row
	}{
		{"trust", ids{},
			[]row{{0, 0, 0}, {7, 7, 7}, {noID, noID, noID}}, []row{{0, 0, 0}, {7, 7, 7}}},
		{"owner", ids{root: owner},
			[]row{{0, 1000, 1001}, {7, 7, 7}, {noID, noID, noID}}, []row{{0, 0, 0}, {1000, 1000, 1000}}},
		{"map beside owner", ids{uids: IDMap{{1000, 5000, 10}}, gids: IDMap{{1000, 6000, 10}}, root: owner},
			[]row{{0, 1000, 1001}, {1009, 5009, 6009}, {1010, noID, noID}, {999, noID, noID}, {noID, noID, noID}},
			[]row{{5009, 1009, overflowID}, {6000, overflowID, 1000}, {0, overflowID, overflowID}}},
		{"map of 0 wins over owner", ids{uids: IDMap{{0, 100000, 65536}}, gids: IDMap{{0, 100000, 65536}}, root: owner},
			[]row{{0, 100000, 100000}, {65536, noID, noID}}, []row{{100000, 0, 0}}},
		{"map without 0, trust", ids{uids: IDMap{{1, 1, 1}}, gids: IDMap{{1, 1, 1}}},
			[]row{{0, noID, noID}, {1, 1, 1}}, []row{{0, overflowID, overflowID}}},
		{"squash", ids{squash: owner, root: &Cred{5, 5}},
			[]row{{0, 1000, 1001}, {7, 1000, 1001}, {noID, noID, noID}}, []row{{1000, 1000, 1000}, {0, 0, 0}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := func(f func(uint32) (uint32, bool), id uint32) uint32 {
				if v, ok := f(id); ok {
					return v
				}
				return noID
			}
			for _, w := range c.in {
				if d := cmp.Diff([]uint32{w.uid, w.gid}, []uint32{got(c.ids.uidIn, w.id), got(c.ids.gidIn, w.id)}); d != "" {
					t.Errorf("guest's %d: -want +got\n%s", w.id, d)
				}
			}
			for _, w := range c.out {
				if d := cmp.Diff([]uint32{w.uid, w.gid}, []uint32{c.ids.uidOut(w.id), c.ids.gidOut(w.id)}); d != "" {
					t.Errorf("host's %d: -want +got\n%s", w.id, d)
				}
			}
		})
	}
}
