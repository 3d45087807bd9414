// SPDX-License-Identifier: Apache-2.0

// Package fuse is the kernel's FUSE protocol as Go types: the structures, opcodes and flags of
// include/uapi/linux/fuse.h, with checked decoding and encoding. It does no I/O.
//
// Decisions:
//
//   - Names are the kernel's: struct fuse_write_in is WriteIn, FATTR_MODE is FATTR_MODE. Constants
//     that begin with FUSE_ in the header lose it, since the package's name says it: FUSE_ASYNC_READ is ASYNC_READ.
//   - Versions 7.31 (MinMinor) to 7.45 (Minor) are covered. Where a structure grew between them, the type is the
//     newest one, and the comment says what an older kernel sends.
//   - Numbers are in the byte order of the machine, as in the kernel. Guest and host are one machine. A peer
//     of the other order fails at the length in its first header.
//   - A structure in memory is the structure on the wire (the kernel pads all to 64 bits), so decoding
//     is one length check and one copy. It is written with package unsafe, in two functions, over the closed set of types
//     [Struct], none of which holds a pointer; a test pins the size and the offsets of each.
//   - Nothing here trusts its input: what does not fit is ok == false, never a panic, and no allocation follows a length
//     that was read.
package fuse
