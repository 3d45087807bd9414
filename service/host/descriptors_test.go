// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"
)

// Mounts for which a worker has no descriptor left are refused, and those that it has go on.
func TestNoDescriptorsLeft(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}}, func(s *Server) { s.limits.Files = 80 })
	g := newGuest(t, h.addr, 1).connect()
	f, _ := g.mount("code")
	for range 80 {
		if r := g.request("code"); r.Errno != 0 {
			if err := f.serves(); err != nil {
				t.Errorf("the first mount: %v", err)
			}
			return
		}
	}
	t.Error("80 mounts with 80 descriptors")
}
