// SPDX-License-Identifier: Apache-2.0

// Package transport connects guests and hosts: it parses addresses, dials,
// listens and takes inherited sockets, over vsock, hybrid vsock and Unix
// sockets.
//
// Decisions:
//
//   - Whatever made a socket (package net, mdlayher/vsock, mdlayher/socket, a
//     parent process), a connection ends up as an *os.File in the runtime's
//     poller. Reading and writing it allocates nothing, a Write is whole even
//     beside other Writes, and the descriptor can be passed to another process.
//   - A vsock connection is dialled from a source port below 1024 where the
//     process may bind one: only root of a guest can, so the host takes such a
//     port for root's word. Without the right it comes from any port, and the
//     host decides.
//   - Hybrid vsock (Firecracker, Cloud Hypervisor, vhost-device-vsock) is the
//     host's end of a guest's vsock as Unix sockets. The host dials by
//     "CONNECT port\n" and "OK port\n" on the VMM's socket; it listens for the
//     guest's connections to port P on a socket named after the VMM's, with
//     _P behind. The guest's source port is not to be seen there, so that the
//     peer proves itself by a token.
//   - Unix sockets are made with mode 0600 from their first moment, and their
//     peers are known by SO_PEERCRED. Who may connect is the caller's business.
//   - Socket buffers are raised to 4 MiB: the largest message is written
//     without waiting for its reader, which saves wake-ups of idle CPUs. Busy
//     CPUs pay for it, about 190 µs for a MiB instead of 115 µs through a Unix
//     socket, as the bytes leave the cache (BenchmarkWrite).
//   - Errors name the address, the reason and the mend, and unwrap to the
//     system's own (errors.Is with unix.ECONNREFUSED and the like).
package transport
