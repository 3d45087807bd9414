// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"strconv"
	"strings"
)

// overflowID is shown to the guest as the owner whom no map knows: the kernel's overflowuid, "nobody".
const overflowID = 65534

// noID is the kernel's invalid uid and gid. To setfsuid and chown it means "leave it as it is", so taking it from a
// guest would make its files those of the server.
const noID = ^uint32(0)

// RootPolicy says who the guest's uid 0 and gid 0 are on the host, where no map speaks of them.
type RootPolicy int

const (
	RootOwner RootPolicy = iota // the owner and the group of the export's root directory
	RootTrust                   // the host's uid 0 and gid 0
)

// Cred is an owner on the host.
type Cred struct{ UID, GID uint32 }

// IDRange maps Count ids, from Guest in the guest to Host on the host.
type IDRange struct{ Guest, Host, Count uint32 }

// ParseIDRange parses GUEST:HOST:COUNT.
func ParseIDRange(s string) (IDRange, error) {
	f := strings.Split(s, ":")
	if len(f) != 3 {
		return IDRange{}, fmt.Errorf("id map %q: give GUEST:HOST:COUNT, three numbers", s)
	}
	var n [3]uint32
	for i := range f {
		v, err := strconv.ParseUint(f[i], 10, 32)
		if err != nil {
			return IDRange{}, fmt.Errorf("id map %q: %q is not a number from 0 to %d", s, f[i], noID)
		}
		n[i] = uint32(v)
	}
	r := IDRange{n[0], n[1], n[2]}
	return r, r.check()
}

func (r IDRange) String() string { return fmt.Sprintf("%d:%d:%d", r.Guest, r.Host, r.Count) }

func (r IDRange) check() error {
	// The last id of either side must stay below noID.
	if r.Count == 0 || r.Count > noID-max(r.Guest, r.Host) {
		return fmt.Errorf("id map %s: the count must be at least 1, and the ids end before %d", r, noID)
	}
	return nil
}

// IDMap maps ids both ways; ids in no range are unmapped. The empty map is the identity.
type IDMap []IDRange

// Validate reports ranges that are empty, too long, or meet each other on either side: each id must
// have one counterpart, or a file's owner would change by being read and written back.
func (m IDMap) Validate() error {
	for i, r := range m {
		if err := r.check(); err != nil {
			return err
		}
		for _, o := range m[:i] {
			if meet(r.Guest, r.Count, o.Guest, o.Count) || meet(r.Host, r.Count, o.Host, o.Count) {
				return fmt.Errorf("id map %s: overlaps %s; make the ranges disjoint on both sides", r, o)
			}
		}
	}
	return nil
}

func meet(a, na, b, nb uint32) bool {
	return uint64(a) < uint64(b)+uint64(nb) && uint64(b) < uint64(a)+uint64(na)
}

func (m IDMap) toHost(id uint32) (uint32, bool) {
	for _, r := range m {
		if id-r.Guest < r.Count { // wraps to a great number below Guest
			return r.Host + (id - r.Guest), true
		}
	}
	return id, len(m) == 0
}

func (m IDMap) toGuest(id uint32) uint32 {
	for _, r := range m {
		if id-r.Host < r.Count {
			return r.Guest + (id - r.Host)
		}
	}
	if len(m) == 0 {
		return id
	}
	return overflowID
}

// ids translates owners between guest and host as the export's policy says. It does not change once made.
type ids struct {
	uids, gids IDMap
	root       *Cred // the guest's 0 where no range covers it; nil: as any other id
	squash     *Cred // every id of the guest; nil: none
}

// uidIn is the host's uid for one of the guest's; ok is false if it has none.
func (m *ids) uidIn(uid uint32) (host uint32, ok bool) {
	if m.squash != nil {
		return m.squash.UID, uid != noID
	}
	if m.root != nil {
		return in(m.uids, uid, &m.root.UID)
	}
	return in(m.uids, uid, nil)
}

// gidIn is the host's gid for one of the guest's; ok is false if it has none.
func (m *ids) gidIn(gid uint32) (host uint32, ok bool) {
	if m.squash != nil {
		return m.squash.GID, gid != noID
	}
	if m.root != nil {
		return in(m.gids, gid, &m.root.GID)
	}
	return in(m.gids, gid, nil)
}

func in(m IDMap, id uint32, root *uint32) (uint32, bool) {
	if id == noID {
		return 0, false
	}
	// A range that names the guest's 0 was written on purpose and wins over the policy.
	if host, ok := m.toHost(id); ok && (id != 0 || root == nil || len(m) > 0) {
		return host, true
	}
	if id == 0 && root != nil {
		return *root, true
	}
	return 0, false
}

// uidOut and gidOut are what the guest sees. The policies for root and for squashing do not work backwards: the
// guest sees who owns a file on the host.
func (m *ids) uidOut(uid uint32) uint32 { return m.uids.toGuest(uid) }
func (m *ids) gidOut(gid uint32) uint32 { return m.gids.toGuest(gid) }
