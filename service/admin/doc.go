// SPDX-License-Identifier: Apache-2.0

// Package admin carries api.Guest and api.Host over varlink: what the two programs serve at their control sockets, and the clients with
// which transfusectl and mount.transfuse call it. The interfaces are described in guest.varlink and host.varlink, for varlinkctl and
// for programs of others.
//
// Decisions:
//   - Root and the daemon's own user may do everything. All other users may read (Status, Mounts, Exports, Statistics, Wait, Watch) and
//     are refused the rest with api.Denied: a trace tells what others do, and sessions tell of other machines.
//   - A refused call, and a call that failed to change something, is logged here once; refused ones a few a second at most, because
//     anybody can make them.
//   - An api.Error travels as an error named after its kind, with its errno and text. Any other error is of kind Internal.
//   - A client connects for each call: ending its context then ends the call in the daemon too, and calls don't wait for each other.
//   - Descriptors are named by their place beside the message, as systemd does it.
package admin
