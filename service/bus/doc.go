// SPDX-License-Identifier: Apache-2.0

// Package bus has the two programs on D-Bus: the guest's daemon as org.transfused1, the host's server as org.transfused.Host1. It
// knows them as api.Guest and api.Host. What each member of the interfaces means is in packaging/man/org.transfused1.5.md and
// org.transfused.Host1.5.md; a test compares them with the introspection.
//
// Decisions:
//   - A daemon needs no bus. StartGuest and StartHost return when the first attempt worked or failed; from then on the connection is made
//     whenever there is a bus, and nothing here ends a daemon or keeps it waiting. Nobody is replaced: while another has the name we are in
//     the queue for it.
//   - The host's server may run as instances and for users beside the plain service. There can be one owner of a name, so the plain
//     service alone is started on the bus, and no bus activates it: without an export there is nothing to serve.
//   - Interfaces are tables (iface), and what is dispatched, checked and introspected comes from them. godbus has a handler and a
//     prop package of its own; they are not used: the handler reads a map without its lock while Introspect is answered, prop tells
//     each property by itself, both have error names that no other service has, and neither has an ObjectManager.
//   - A change of the daemon is a reason to look at all of it again: update compares, and tells what differs. So nothing that was
//     missed stays wrong, and a burst of changes is one look. What is asked about objects is answered from the last look, under the lock
//     that signals are sent under: who subscribes first and asks then has a picture that the signals go on from.
//   - Every user of the machine may call. So a message may not be long, and one that godbus can't read is dropped (wire): both would
//     otherwise end the connection or eat the memory of a process that is never to be killed for its memory. No descriptors are
//     taken, since godbus doesn't close those that no argument names. Calls of one peer that wait are bounded.
//   - Who may do what is polkit's to say, by the peer's name on the bus. Root passes without being asked for, and where
//     polkit doesn't answer it is the only one.
//   - The directory of a new mount is looked up in the kernel's cache only (RESOLVE_CACHED): this process must never wait for one of
//     its own mounts. What is not cached, or not there, the daemon's helper looks for, by the same rule: no symbolic link is followed.
package bus
