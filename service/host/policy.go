// SPDX-License-Identifier: Apache-2.0

package host

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"os"
	"slices"

	"transfused.org/transfused/service/transport"
)

// identity is what of a peer stays the same over all its connections: a
// session belongs to one, and connections of another are not let in.
type identity struct {
	family transport.Family
	cid    uint32 // Vsock
	path   string // Hybrid: the VMM's socket
	uid    uint32 // Unix
}

func identify(p transport.Peer) identity {
	switch p.Family {
	case transport.Vsock:
		return identity{family: p.Family, cid: p.CID}
	case transport.Hybrid:
		return identity{family: p.Family, path: p.Local.Path}
	}
	return identity{family: p.Family, uid: p.UID}
}

// privilegedPorts end here; only root of a guest binds them.
const privilegedPorts = 1024

// policy decides who may connect and what he sees. It is not changed: the server takes another.
type policy struct {
	exports           []*Export
	guests            []Guest
	token             []byte
	allowUnprivileged bool
	uid               uint32 // of this server
}

func newPolicy(c *Config) *policy {
	p := &policy{guests: c.Guests, token: c.Token, allowUnprivileged: c.AllowUnprivileged, uid: uint32(os.Geteuid())}
	for _, e := range c.Exports {
		p.exports = append(p.exports, &e)
	}
	return p
}

// admit says whether a connection of p that gave token may be served, or why
// not, with the mend. It does not look at what the connection is for.
func (c *policy) admit(p transport.Peer, token []byte) error {
	right := len(c.token) > 0 && len(token) > 0 && sameToken(c.token, token)
	if len(c.token) > 0 && len(token) > 0 && !right {
		return fmt.Errorf("wrong token: give both ends the same --token-file")
	}
	switch p.Family {
	case transport.Vsock:
		if err := c.admitVsock(p); err != nil {
			return err
		}
	case transport.Hybrid:
		if len(c.token) > 0 && !right && !c.allowUnprivileged {
			return fmt.Errorf("no token: give the guest the --token-file of the host")
		}
		if len(c.token) == 0 && !c.allowUnprivileged {
			return fmt.Errorf("hybrid vsock hides who connects: give both ends a --token-file, or start the host with --allow-unprivileged-guests")
		}
	case transport.Unix:
		// SO_PEERCRED says who it is; the exports say whether he may.
	default:
		return fmt.Errorf("unknown peer")
	}
	if len(c.visible(p)) == 0 {
		return fmt.Errorf("no export is for this guest: add guests=%s to one", ruleFor(p))
	}
	return nil
}

// admitVsock is admit as far as vsock itself tells.
func (c *policy) admitVsock(p transport.Peer) error {
	if p.CID <= transport.CIDHost && !c.named(p) {
		return fmt.Errorf("CID %d is refused unless it is named: add guests=%[1]d to an export", p.CID)
	}
	if p.Port >= privilegedPorts && !c.allowUnprivileged {
		return fmt.Errorf("source port %d is not below %d, so that it may be any process of the guest: run transfused as root there, or start the host with --allow-unprivileged-guests", p.Port, privilegedPorts)
	}
	return nil
}

// stranger says whether p is one that admit refuses whatever it sends. It is heard all the same, to be told why.
func (c *policy) stranger(p transport.Peer) bool {
	return p.Family == transport.Vsock && c.admitVsock(p) != nil || len(c.visible(p)) == 0
}

// visible returns the exports that p may mount, in the order of the
// configuration.
func (c *policy) visible(p transport.Peer) []*Export {
	var es []*Export
	for _, e := range c.exports {
		if e.allows(p, c.uid) || c.granted(p, e.Tag) {
			es = append(es, e)
		}
	}
	return es
}

// export returns the export named tag, if p may mount it.
func (c *policy) export(p transport.Peer, tag string) *Export {
	for _, e := range c.visible(p) {
		if e.Tag == tag {
			return e
		}
	}
	return nil
}

// granted says whether the host itself mounts tag at this guest, which needs
// no guests= beside it. The address of a Unix guest says nothing of its peer.
func (c *policy) granted(p transport.Peer, tag string) bool {
	return slices.ContainsFunc(c.guests, func(g Guest) bool {
		return g.Addr.Family != transport.Unix && g.is(p) &&
			slices.ContainsFunc(g.Mounts, func(m GuestMount) bool { return m.Tag == tag })
	})
}

// named says whether the configuration names the CID of p.
func (c *policy) named(p transport.Peer) bool {
	return slices.ContainsFunc(c.guests, func(g Guest) bool { return g.is(p) }) ||
		slices.ContainsFunc(c.exports, func(e *Export) bool {
			return slices.Contains(e.Guests, GuestRule{CID: p.CID})
		})
}

// is says whether p is that guest, as far as its address tells.
func (g Guest) is(p transport.Peer) bool {
	switch g.Addr.Family {
	case transport.Vsock:
		return p.Family == transport.Vsock && p.CID == g.Addr.CID
	case transport.Hybrid:
		return p.Family == transport.Hybrid && p.Local.Path == g.Addr.Path
	}
	return p.Family == transport.Unix
}

// sameToken compares in a time that depends on neither content nor length of
// the right one.
func sameToken(a, b []byte) bool {
	ha, hb := sha256.Sum256(a), sha256.Sum256(b)
	return subtle.ConstantTimeCompare(ha[:], hb[:]) == 1
}

func ruleFor(p transport.Peer) GuestRule {
	switch p.Family {
	case transport.Vsock:
		return GuestRule{CID: p.CID}
	case transport.Hybrid, transport.Unix:
		return GuestRule{Path: p.Local.Path}
	}
	return GuestRule{Any: true}
}
