// SPDX-License-Identifier: Apache-2.0

package host

import (
	"testing"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// The ordinary processes of a guest, which are not served, don't keep its root out by saying nothing.
func TestStrangersKeepNobodyOut(t *testing.T) {
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code", "guests=77")}})
	connect := func(port uint32) *transport.Conn {
		guest, host, err := transport.Pair()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { guest.Close() })
		f, err := host.File()
		if err != nil {
			t.Fatal(err)
		}
		host.Close()
		c := transport.NewConn(f, transport.Peer{Family: transport.Vsock, CID: 77, Port: port})
		h.s.wg.Go(func() { h.s.handle(t.Context(), c) })
		return guest
	}
	for range maxUnknownEach + 1 {
		connect(privilegedPorts)
	}
	h.logs.wait("connection refused", "too many") // they are all where they get to
	root := newGuest(t, h.addr, 1)
	root.c = connect(privilegedPorts - 1)
	send(t, root.c, root.hello())
	want[*wire.Init](t, root.c)
}
