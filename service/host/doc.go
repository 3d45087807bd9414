// SPDX-License-Identifier: Apache-2.0

// Package host is the file server of transfuse-host: it serves directories of
// this machine to guests.
//
// The parent process (Server) listens, finds out who connects, and keeps the
// sessions: one for each guest daemon, with its control channel and mounts. It
// reads no FUSE message. A worker process (Worker) serves each session: the
// parent passes it the directories of exports and the streams that arrived,
// and the worker runs package passthrough between the two.
//
// Decisions:
//
//   - A connection says with its first message what it is for. Until then it
//     is bounded in time, size and number, in all and by peer.
//   - Who a peer is comes from the transport: CID and source port of vsock,
//     credentials of Unix sockets; where it hides them (hybrid vsock) from a
//     token. All connections of a session have the same peer. What an export
//     does not show to a peer does not exist for it.
//   - A worker is made at a session's first mount and shuts itself in before it
//     sees a byte of the guest (confine). Where it may: namespaces of its own, a
//     root with nothing in it, the exports as detached mounts; otherwise
//     Landlock. Root keeps the capabilities of a file server. Always:
//     no_new_privs, an allow-list of system calls, limits of descriptors and
//     memory. A host on which that fails says so before it listens.
//   - The walls hold for every thread of the Go runtime, which is only possible
//     without cgo: a build with it refuses to serve as root.
//   - What is not walled: a root worker keeps CAP_DAC_READ_SEARCH, with which a
//     guest that took it over could open any file of the export's own file system by
//     its handle (open_by_handle_at). Where that matters, export a file system
//     of its own.
//   - A worker that dies, of a signal or a panic, takes its session along and no
//     other. The parent believes nothing that a worker says about anything but
//     that session, and waits for it with a limit.
//   - A session lives while it has a control channel or a mount in use. The
//     guest resumes it by its id (version 2) or by being the same peer
//     (version 1) on a new control channel. A guest that can come back for its
//     mounts has them kept without a stream (wire.FeatureKeep), for some minutes
//     without a control channel; a VM that has booted anew can't.
//   - A guest of version 1 acts events too (eventsV1). To the worker it is like one
//     of version 2, but plain: it follows paths (passthrough.Actor).
//   - Every goroutine of the parent belongs to the server or to a session, whose
//     end waits for it. A context's cause is the reason that is logged.
//   - The configuration can change while the server runs (Reconfigure). Who may do
//     what is one value that is replaced (policy); a session's mounts are compared
//     with it, and a mount that is made meanwhile looks again.
//
// Locks: server.reloading before server.mu before session.starting before session.mu; no lock is held
// for I/O but starting, which is there for that.
package host
