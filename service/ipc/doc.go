// SPDX-License-Identifier: Apache-2.0

// Package ipc joins a process of transfused to the children that it makes of
// itself: the guest daemon to its helper, the host server to its workers.
//
// A child is this same program, executed again from /proc/self/exe with a
// role. Parent and child hold the two ends of a SOCK_SEQPACKET pair: one
// message is one packet, a JSON value of at most MaxMessage bytes, and
// descriptors travel beside it (SCM_RIGHTS). JSON, because these messages are
// a few in a mount's life and both ends are always the same build; what is
// frequent or comes from another machine goes through package wire.
//
// Neither end trusts a length: a packet that does not fit is an error and not
// a longer buffer. A child must end when Recv returns io.EOF: its parent is
// gone. PR_SET_PDEATHSIG is not used, because it follows the thread that
// forked and Go moves goroutines between threads.
package ipc
