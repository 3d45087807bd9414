// SPDX-License-Identifier: Apache-2.0

// Package fstest tests a directory as programs use it: by system calls, on
// whatever file system it lies. It knows nothing of FUSE or of transfused, so
// that a plain ext4 or tmpfs directory is the reference: a case that fails
// there is a wrong case.
//
// All runs the suite, Leaks is the check with which a test of mounts begins.
//
// The suite is also a program for machines without Go:
//
//	go test -c -o fstest.test ./service/fstest
//	./fstest.test -test.v -test.run Dir -dir /mnt/somewhere
//
// Without -dir it tests a temporary directory; -missing acl="mounted without it"
// names a case or a family that the file system does not have. What
// the machine or the file system can't run prints a line that begins with NOT RUN
// and says why.
//
// Decisions:
//   - Cases call the kernel directly (x/sys), since package os hides what is to
//     be looked at: O_EXCL, short reads, EINTR.
//   - What needs another process (locks, other users) re-executes this program;
//     its package's TestMain calls Child first.
//   - Every case works in a directory of its own and removes it.
package fstest
