// SPDX-License-Identifier: Apache-2.0

// Bench measures a mount of ours beside bindfs, sshfs and the bare directory,
// in one run, on one tree in memory. README.md tells how to read its table.
//
// Decisions:
//   - Everything is measured twice by this program re-executed: once bound to
//     one CPU with all that it starts, once free. Binding before the start is
//     the only way by which every thread of every server inherits it.
//   - Peers take turns, round by round, so that what disturbs the machine
//     disturbs all; a ratio is the median of the ratios of single rounds.
//   - "Cold" is a new mount, of all peers alike: dropping the kernel's caches
//     would send the servers a flood of FORGETs into the measurement.
package main
