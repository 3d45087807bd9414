// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"path/filepath"
	"slices"

	"transfused.org/transfused/service/transport"
)

// warnings are what of c can serve nobody, each a line with its mend. It is no error: what is left serves others.
func (c *Config) warnings() []string {
	var ws []string
	for _, a := range c.addresses() {
		if a.Family == transport.Hybrid && len(c.Token) == 0 && !c.AllowUnprivileged {
			ws = append(ws, fmt.Sprintf("listen %s: every guest will be refused, since hybrid vsock hides who connects: give both ends a --token-file, or start this one with --allow-unprivileged-guests", a))
		}
	}
	users := slices.ContainsFunc(c.addresses(), func(a transport.Addr) bool { return a.Family == transport.Unix })
	for _, e := range c.Exports {
		if len(e.Guests) == 0 && !users && !c.mountedBy(e.Tag) {
			ws = append(ws, fmt.Sprintf("export %s: nobody may mount it, since over vsock only those may whom it names: add guests=CID, guests=PATH or guests=any", e.Tag))
		}
		for _, r := range e.Guests {
			if !slices.ContainsFunc(c.addresses(), r.reachableBy) {
				ws = append(ws, fmt.Sprintf("export %s: guests=%s: no guest of that name can connect: add the --listen for it, or correct the name", e.Tag, r))
			}
		}
	}
	return ws
}

// mountedBy says whether a guest at which this host mounts tag may do so without guests=; see granted.
func (c *Config) mountedBy(tag string) bool {
	return slices.ContainsFunc(c.Guests, func(g Guest) bool {
		return g.Addr.Family != transport.Unix && slices.ContainsFunc(g.Mounts, func(m GuestMount) bool { return m.Tag == tag })
	})
}

// reachableBy says whether a peer that the rule names may come by the address.
func (r GuestRule) reachableBy(a transport.Addr) bool {
	switch {
	case r.Any:
		return true
	case r.Path != "":
		return a.Family != transport.Vsock && filepath.Clean(a.Path) == r.Path
	}
	return a.Family == transport.Vsock
}
