// SPDX-License-Identifier: Apache-2.0

// Package varlink speaks varlink (varlink.org) over Unix stream sockets: the control sockets of both programs, which transfusectl
// and varlinkctl(1) call.
//
// A message is a JSON object and a NUL byte. A call names a method and has parameters; it gets one reply, none where it is
// oneway, or with more as many as there are, all but the last of which say that it continues. Descriptors travel beside a message
// (SCM_RIGHTS), as systemd passes them: with the first byte of it, by a sendmsg(2) that has no other message.
//
// Decisions:
//   - Whoever may open the socket may call: what a caller may do is the method's business, which is told the peer as the kernel knows
//     it (SO_PEERCRED).
//   - A server is bounded against its clients: the length of a call, the calls that wait behind one, connections of one user and of all
//     users, the time for which a reply may lie unread. Root and the server's own user have connections apart, so that others can't keep
//     them out. Descriptors are taken from those two alone, those of others are dropped.
//   - A connection serves one call at a time, as varlink has it. Meanwhile it is read on, so that the end of its client ends the
//     call's context.
//   - A message that is none ends its connection, after a reply that says why.
//   - Parameters that a method does not know are refused: what was meant would be lost. Clients ignore what they don't know in a
//     reply, so that a server may say more.
package varlink
