// SPDX-License-Identifier: Apache-2.0

// Bench measures a mount of ours beside bindfs, sshfs, go-fuse's loopback, a file
// server in C and the bare directory, in one run, on one tree in memory, and judges
// it. README.md tells how to read its tables.
//
// Decisions:
//   - Everything is measured twice by this program re-executed: once bound to
//     one CPU with all that it starts, once free. Binding before the start is
//     the only way by which every thread of every server inherits it.
//   - Peers take turns, round by round, so that what disturbs the machine
//     disturbs all; a ratio is the median of the ratios of single rounds.
//   - "Cold" is a new mount, of all peers alike: dropping the kernel's caches
//     would send the servers a flood of FORGETs into the measurement. Of mounts
//     that others have made (-dirs) the caches are dropped, and it waits a moment.
//   - "Warm" is what was done once more than a second before: peers that keep
//     names and attributes for a second ask again, and that is the difference.
//   - CPU time is read from the clocks of the processes (clock_getcpuclockid(3)),
//     which count in ns; /proc/PID/stat counts in 10 ms. Clocks and counters are
//     read outside of the time that is measured.
//   - Messages are counted in a run of their own, of ours alone, because counting
//     needs a control socket and metrics that a measured one should not have.
//   - What is compared with a saved report are ratios and counts. Only counts
//     are the same on every machine, and so only they can fail.
//   - Calls of several threads go around the scheduler as those of one do; each
//     thread has a P of its own for that time.
package main
