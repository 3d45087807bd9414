// SPDX-License-Identifier: Apache-2.0

// Package guest is the guest's daemon: it takes mounts, and carries FUSE messages between /dev/fuse and the host.
//
// # Two processes
//
// The daemon (Run) pumps, keeps the channels and decides. It makes no call that may wait for one of its own mounts: a
// process that waits so can't be killed, and holds its devices open. Whatever looks at a path is done by the helper
// (Helper), the same program executed again: mount points, mounting and unmounting, suitability, events,
// notifications. The daemon passes it descriptors of channels; it passes back the device of each mount. The helper
// serves each call in a goroutine of its own, so that one dead mount stops no other. If the daemon is killed the helper
// detaches what is left, unless that is in a store; if the helper ends, so does the daemon, and another helper detaches.
//
// # Entries, and the next process
//
// What somebody wants mounted is an entry: the configuration, an administrator (api.Guest), the host. It is listed with a
// state, and one that is kept is mounted again when it was lost. With a store (the service manager's, package sd) a mount's
// device is put there before its first request is read and before it is seen, with a record of what another process must know to go
// on (record.go). When the daemon ends and is to be started again it reads no more requests, waits a moment for the answers to those
// at the host, and leaves. The next one lists the mounts as they were, waits for the host, opens as many streams of the same
// mount of the same session, and writes FUSE_NOTIFY_RESEND. Where that is not known (before Linux 6.9) requests without an
// answer fail with EINTR when the daemon leaves in order; after a kill they wait until they are interrupted.
//
// Notify and event channels are dialled again when they are lost (version 2). A mount goes on without them: it misses what
// the host would tell, which tells the kernel to believe nothing once the channel is back.
//
// Not even a test may open a file of such a mount as an *os.File in the process that pumps: the file joins the runtime's
// poller, whose lock the kernel holds while it sends POLL to that very process.
//
// # The pump
//
// One goroutine carries both directions, and waits in poll(2) on a thread of its own, not in the runtime's poller. Nothing is
// allocated, locked or started for a message. While a stream takes no more it goes on receiving replies, so that the two
// ends never wait for each other. What nobody waits for travels with the next request: FORGETs, and RELEASEs of files that were open for reading.
//
// A mount may have several streams (lane): the first for what is small, the others for READs and WRITEs of much, which go to the one that has the least to
// answer. What such a stream does not take waits there, one request a stream, and the pump goes on with what is small; only where all are full it reads no more
// requests until one is not. It receives one large reply, after the requests that are there, and looks at what is small again. The reply comes where its request went, so that the host needs to know
// nothing of this. INTERRUPTs go over the first stream, as does what waits interruptibly: the host remembers one whose request it does not find.
// What the shortcuts know does not rest on the stream: a request counts as at the host from when it was read here until its reply is written.
//
// Before it sleeps it looks for the next message again and again for up to 50 µs, while messages follow each other so fast, and so does the host's worker
// (transport.Spinner). Between two looks it yields: on one CPU that is the switch to who has the next message, without a wake-up. On that machine, in turns,
// medians of three rounds, without and with it at both ends: one CPU getattr 21.5 and 17.3 µs, cold stat 30 and 26, create 95 and 74; two CPUs getattr 37 and 19, cold stat 52 and
// 27, create 140 and 107, with as much CPU time for a getattr (34 and 32 µs) or a cold stat (47 and 43), and half as much more for a create (135 and 200). Without the yield one CPU took
// 78 µs for a getattr.
//
// Three requests are answered here: where a host of version 2 lets us, GETATTR of a directory whose attributes the host told
// with the reply of a change in it, and FLUSH of a file without locks; and the kernel's question for the capabilities of a new file (shortcuts).
//
// The figures behind that, Linux 6.18, Go 1.26, 2 virtual CPUs: 80 bytes there and back between two Go processes over a
// socket pair, both on one CPU, take 7.6 µs through the poller and 3.4 µs with blocking descriptors, if there are more Ps than
// threads that wait (transport.PrepareBlocking). A forced getattr through both programs, all on one CPU, tmpfs behind, AMD EPYC, medians
// of four rounds in turns: 33.5 µs with two goroutines, one a direction; 25.8 µs when they yield now and then
// (transport.Yielder); 24.5 µs with one for both. poll(2) before read(2) in the server, which saves it the wake-ups that the kernel gives all
// sleepers on a Unix socket, won nothing; nor did SCHED_BATCH. A second reader of the device was measured and lost.
//
// Large data go through pipes (bulk, package splice) over a stream that hands on pages. The kernel gives a request to a pipe whole or loses it, so that over
// such a stream max_write is half of what a pipe holds. On one CPU of two, AMD EPYC, tmpfs behind, dd of 1 GiB by 1 MiB, in turns: writing a new file 570 to 810 MB/s
// copied and 920 to 940 by pipes, writing it again 1200 to 1400 and 1700 to 1900, reading it 690 to 860 and 1100 to 1200.
//
// The pump learns max_write and max_pages from INIT's reply, and bounds both to MaxData there, whatever the kernel would
// allow; the buffers grow with INIT's reply. Features that need the device's
// owner at the server (PASSTHROUGH, OVER_IO_URING) are hidden from both sides.
//
// # Mounts
//
// A file system is made apart (fsopen, fsmount) and moved onto a descriptor of the mount point in the end, so that nobody can
// exchange what was checked. Paths are walked by openat2 without symbolic links; that needs Linux 5.6. No descriptor of a
// mount is held, or umount would find it busy: it is opened for each event, and recognised by its mount id. A read-only
// mount is read-only for everybody else; events are acted through a detached clone that is made for that one event
// (open_tree, mount_setattr: Linux 5.12).
//
// An unmounting asked for here or by the host writes back first. What is still in use after that is detached; what takes
// over five seconds is aborted. A mount that has lost a stream waits for new ones where it is stored; else it is detached at once,
// and one that this guest asked for is made again when the host is back. A mount that a killed daemon left behind is recognised (ENOTCONN,
// type fuse.transfuse) and replaced.
//
// A mount of version 1 has exactly the options that the host sent. One of version 2 has default_permissions, and, as
// root, allow_other. Options suid and dev are the guest administrator's to give, never the host's, unless allowed.
//
// # Events
//
// The thread whose id the host knows makes the call of each event and nothing else; parents are resolved by
// other threads, whose LOOKUPs the host answers as anybody's. So the host can tell what it must fake. In version 1 a name
// that is not there is not worth a line: the host has one removed to see where a path leads.
//
// To act costs several calls and requests, and mostly nobody watches. A host of version 2 that has much to be acted asks first, and the helper
// looks for marks on the mount's file system in what /proc tells of the descriptors of all processes (watched.go): of what was before nobody is to see anything
// who watches later.
//
// # Peers
//
// Who dials the socket must have the CID of the configured server, and, for CID 1 which all processes of this machine
// have, a port below 1024; over a Unix socket, be root or the daemon's user. A host answers for itself at the address
// that is dialled. What a peer sends ends its connection, or its mount, and never the process.
package guest
