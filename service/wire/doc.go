// SPDX-License-Identifier: Apache-2.0

// Package wire is the transfuse protocol: framing and messages of versions 1
// and 2, as ../PROTOCOL.md specifies them. It does no I/O but on the io.Reader
// and io.Writer that it is given, and knows nothing of sockets or mounts.
//
// Nothing here trusts the peer. A length is checked before anything is
// allocated or read for it, a Reader allocates its buffer once, and decoding a
// body allocates at most a small multiple of the body's size.
//
// Decisions:
//   - Each message has one method that lists its fields with their names and
//     bounds, and serves encoding and decoding alike, so that the two can't
//     disagree, and what we send is bounded as what we accept.
//   - Messages are pointers (*Init, *Pong): a type switch on a value would
//     compile and never match.
//   - Version 1 numbers its messages for each direction, so that decoding needs
//     to know who reads: ToHost and ToGuest.
//   - A message decodes completely or not at all: a body that ends early and one
//     that goes on are both refused. Init of version 2 is the exception; what
//     follows its last known field is ignored, since it is sent before the
//     version is agreed.
//   - A type that was not agreed is an error. New messages come with a version or
//     a feature bit of Init, so nobody has to skip what he doesn't know.
//   - Texts are for people: too long ones are cut when they are sent, and invalid
//     UTF-8 is kept when it is received (quote it when you log it). Everything
//     else that is out of bounds is an error at both ends.
//   - What a peer did wrong wraps ErrProtocol; what the stream did (io.EOF
//     between messages, io.ErrUnexpectedEOF within one, deadlines) does not.
package wire
