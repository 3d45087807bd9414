// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"errors"
	"math/rand/v2"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// Source ports are taken from 512 to 1023, as rresvport(3) does: the ports
// below are those of services, which may want to start later.
const (
	firstReserved = 512
	countReserved = 512
)

func dialVsock(ctx context.Context, a Addr) (*Conn, error) {
	if a.CID == CIDAny {
		return nil, errors.New("any is an address to listen on; name the CID")
	}
	c, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	// Before connecting: the size is told to the peer in the first packet.
	// Smaller buffers work too.
	_ = control(raw, setBuffers)
	if err := bindReserved(rand.Uint32N(countReserved), func(port uint32) error {
		return c.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	}); err != nil {
		return nil, err
	}
	if _, err := c.Connect(ctx, &unix.SockaddrVM{CID: a.CID, Port: a.Port}); err != nil {
		return nil, err
	}
	f, err := dup(c, a.String())
	if err != nil {
		return nil, err
	}
	return NewConn(f, Peer{Family: Vsock, CID: a.CID, Port: a.Port, Local: a}), nil
}

// bindReserved binds a source port below 1024 by bind, the first free one
// from a start of 0 to 511. It starts anywhere, since a port just closed may
// still linger at the peer. A process without CAP_NET_BIND_SERVICE binds none:
// connect(2) then takes any port.
func bindReserved(start uint32, bind func(port uint32) error) error {
	for i := range uint32(countReserved) {
		err := bind(firstReserved + (start+i)%countReserved)
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			continue
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return nil
		}
		return err
	}
	return &reason{"all source ports from 512 to 1023 are in use; close connections", unix.EADDRINUSE}
}
