// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the two programs together, as they are built and started by a user: transfuse-host and transfused
// over Unix sockets, the kernel's FUSE between them. It has no code but its tests,
// and what of the suites a mount does not have (Missing), which package vmtest has to know too.
//
// Decisions:
//   - The programs are built without cgo, as for release: with it a host could not confine its workers.
//   - A test's mount is looked at by no goroutine that serves it: both ends are other processes.
//   - Mounts and log lines are waited for, never slept for.
//   - After each test there is no process of the programs, no mount, no socket, and both ended with 0.
//   - The suites run on each kind of mount that differs in what it can: who mounts, who serves, which protocol, how many streams.
//   - TestSoak changes one tree from all sides at random for half a second in each mode, and for as long as TRANSFUSED_SOAK says; TRANSFUSED_SEED repeats
//     the choices of a run, though not which of two was faster. With TRANSFUSED_RACE the programs are built with the race detector; then
//     a worker is not walled in completely. make soak does both for half an hour.
//   - TestScale tells what each thing costs that a guest can have many of, in bytes and descriptors, and bounds it: with 20,000 inodes, or as many
//     as TRANSFUSED_SCALE says. With that, TestFair measures what guests notice of another one that floods. make scale does both with 1,000,000.
//   - With TRANSFUSED_STREAMS, TestBesideLargeData measures for so long each how long a getattr takes beside large data, over one stream, two and four.
//   - POSIX in full is fstest's matter on a mount of version 2; others run it with a smaller large directory.
package e2e
