// SPDX-License-Identifier: Apache-2.0

package passthrough

import "transfused.org/transfused/service/fuse"

// op serves one opcode. serve checks every field of the body before it uses it, and appends what the reply carries.
// It returns 0, the errno to reply with, or [later].
type op struct {
	serve  func(*request) fuse.Errno
	writes bool // changes something: EROFS on a read-only export
	slow   bool // may take long: another goroutine goes on reading meanwhile
	names  bool // changes names in the directory that the request is about
	moves  bool // data, perhaps much: the same, if there is something to read already
}

// later is returned by an operation that has taken request.replier and answers after it has returned.
const later = fuse.Errno(1 << 20)

// ops are what we serve; ENOSYS is the answer to what is not here.
var ops = [fuse.OpMax]op{
	fuse.OpInit:        {serve: opInit},
	fuse.OpDestroy:     {serve: opDestroy},
	fuse.OpLookup:      {serve: opLookup},
	fuse.OpForget:      {serve: opForget},
	fuse.OpBatchForget: {serve: opBatchForget},

	fuse.OpGetattr:  {serve: opGetattr},
	fuse.OpSetattr:  {serve: opSetattr, writes: true},
	fuse.OpStatx:    {serve: opStatx},
	fuse.OpReadlink: {serve: opReadlink},

	fuse.OpMknod:   {serve: opMknod, writes: true, names: true},
	fuse.OpMkdir:   {serve: opMkdir, writes: true, names: true},
	fuse.OpSymlink: {serve: opSymlink, writes: true, names: true},
	fuse.OpLink:    {serve: opLink, writes: true, names: true},
	fuse.OpCreate:  {serve: opCreate, writes: true, names: true},
	fuse.OpTmpfile: {serve: opTmpfile, writes: true},
	fuse.OpUnlink:  {serve: opUnlink, writes: true, names: true},
	fuse.OpRmdir:   {serve: opRmdir, writes: true, names: true},
	fuse.OpRename:  {serve: opRename, writes: true, names: true},
	fuse.OpRename2: {serve: opRename2, writes: true, names: true},

	fuse.OpOpen:    {serve: opOpen},
	fuse.OpRead:    {serve: opRead, moves: true},
	fuse.OpWrite:   {serve: opWrite, writes: true, moves: true},
	fuse.OpFlush:   {serve: opFlush},
	fuse.OpRelease: {serve: opRelease},
	fuse.OpFsync:   {serve: opFsync, slow: true},

	fuse.OpOpendir:     {serve: opOpendir},
	fuse.OpReaddir:     {serve: opReaddir},
	fuse.OpReaddirplus: {serve: opReaddirplus},
	fuse.OpReleasedir:  {serve: opReleasedir},
	fuse.OpFsyncdir:    {serve: opFsync, slow: true},

	fuse.OpSetxattr:    {serve: opSetxattr, writes: true},
	fuse.OpGetxattr:    {serve: opGetxattr},
	fuse.OpListxattr:   {serve: opListxattr},
	fuse.OpRemovexattr: {serve: opRemovexattr, writes: true},

	fuse.OpGetlk:     {serve: opGetlk},
	fuse.OpSetlk:     {serve: opSetlk},
	fuse.OpSetlkw:    {serve: opSetlkw},
	fuse.OpInterrupt: {serve: opInterrupt},

	fuse.OpStatfs:          {serve: opStatfs},
	fuse.OpSyncfs:          {serve: opSyncfs, slow: true},
	fuse.OpFallocate:       {serve: opFallocate, writes: true, slow: true},
	fuse.OpLseek:           {serve: opLseek},
	fuse.OpCopyFileRange:   {serve: opCopyFileRange, writes: true, slow: true},
	fuse.OpCopyFileRange64: {serve: opCopyFileRange64, writes: true, slow: true},

	fuse.OpAccess: {serve: opAccess},
	fuse.OpIoctl:  {serve: opIoctl},
	fuse.OpPoll:   {serve: opPoll},
}
