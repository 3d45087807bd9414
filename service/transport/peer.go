// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Peer is what the kernel says of a connection's other end. It can be carried
// as JSON with the descriptor of the connection.
type Peer struct {
	Family Family
	// CID and Port are the other end's, of Vsock alone.
	CID, Port uint32
	// PID, UID and GID are SO_PEERCRED of the other process, at the time of
	// its connect(2) or listen(2); of Unix, and of the VMM for Hybrid.
	PID      int32
	UID, GID uint32
	// Local is the address that was listened on or dialled; none for a Pair.
	Local Addr
}

// String names the peer for a log.
func (p Peer) String() string {
	switch p.Family {
	case Vsock:
		return fmt.Sprintf("vsock:%s:%d", cidString(p.CID), p.Port)
	case Hybrid:
		return fmt.Sprintf("%s (VMM with pid %d, uid %d)", p.Local, p.PID, p.UID)
	case Unix:
		return fmt.Sprintf("process with pid %d, uid %d", p.PID, p.UID)
	}
	return "unknown peer"
}

// peerOf is the peer of f, a connected socket by way of local, whose other
// end has the address remote.
func peerOf(f *os.File, remote net.Addr, local Addr) (Peer, error) {
	if a, ok := remote.(*vsock.Addr); ok {
		return Peer{Family: Vsock, CID: a.ContextID, Port: a.Port, Local: local}, nil
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	if err := control(raw, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}); err != nil {
		return Peer{}, err
	}
	family := Unix
	if local.Family == Hybrid {
		family = Hybrid
	}
	return Peer{Family: family, PID: cred.Pid, UID: cred.Uid, GID: cred.Gid, Local: local}, nil
}
