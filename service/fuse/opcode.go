// SPDX-License-Identifier: Apache-2.0

package fuse

import "strconv"

// Protocol versions (fuse.h, "Version negotiation").
const (
	Major    = 7
	Minor    = 45 // Linux 6.18
	MinMinor = 31 // Linux 5.4
)

// RootID is the node id of the root (FUSE_ROOT_ID).
const RootID = 1

// UniqueResend is set by the kernel in the unique of a request that it sends again after
// FUSE_NOTIFY_RESEND (Linux 6.9). A reply must carry it.
const UniqueResend = 1 << 63

// UniqueIntr is set by the kernel in the unique of an INTERRUPT request.
const UniqueIntr = 1

// Opcode says what a request asks (enum fuse_opcode).
type Opcode uint32

// The opcodes of enum fuse_opcode.
const (
	OpLookup          Opcode = 1
	OpForget          Opcode = 2 // no reply
	OpGetattr         Opcode = 3
	OpSetattr         Opcode = 4
	OpReadlink        Opcode = 5
	OpSymlink         Opcode = 6
	OpMknod           Opcode = 8
	OpMkdir           Opcode = 9
	OpUnlink          Opcode = 10
	OpRmdir           Opcode = 11
	OpRename          Opcode = 12
	OpLink            Opcode = 13
	OpOpen            Opcode = 14
	OpRead            Opcode = 15
	OpWrite           Opcode = 16
	OpStatfs          Opcode = 17
	OpRelease         Opcode = 18
	OpFsync           Opcode = 20
	OpSetxattr        Opcode = 21
	OpGetxattr        Opcode = 22
	OpListxattr       Opcode = 23
	OpRemovexattr     Opcode = 24
	OpFlush           Opcode = 25
	OpInit            Opcode = 26
	OpOpendir         Opcode = 27
	OpReaddir         Opcode = 28
	OpReleasedir      Opcode = 29
	OpFsyncdir        Opcode = 30
	OpGetlk           Opcode = 31
	OpSetlk           Opcode = 32
	OpSetlkw          Opcode = 33
	OpAccess          Opcode = 34
	OpCreate          Opcode = 35
	OpInterrupt       Opcode = 36 // no reply but EAGAIN or ENOSYS
	OpBmap            Opcode = 37
	OpDestroy         Opcode = 38
	OpIoctl           Opcode = 39
	OpPoll            Opcode = 40
	OpNotifyReply     Opcode = 41 // no reply
	OpBatchForget     Opcode = 42 // no reply
	OpFallocate       Opcode = 43
	OpReaddirplus     Opcode = 44
	OpRename2         Opcode = 45
	OpLseek           Opcode = 46
	OpCopyFileRange   Opcode = 47
	OpSetupmapping    Opcode = 48
	OpRemovemapping   Opcode = 49
	OpSyncfs          Opcode = 50
	OpTmpfile         Opcode = 51
	OpStatx           Opcode = 52
	OpCopyFileRange64 Opcode = 53

	// OpMax is one more than the greatest opcode, for tables.
	OpMax = 54
)

var opNames = [OpMax]string{
	OpLookup: "LOOKUP", OpForget: "FORGET", OpGetattr: "GETATTR", OpSetattr: "SETATTR", OpReadlink: "READLINK",
	OpSymlink: "SYMLINK", OpMknod: "MKNOD", OpMkdir: "MKDIR", OpUnlink: "UNLINK", OpRmdir: "RMDIR",
	OpRename: "RENAME", OpLink: "LINK", OpOpen: "OPEN", OpRead: "READ", OpWrite: "WRITE", OpStatfs: "STATFS",
	OpRelease: "RELEASE", OpFsync: "FSYNC", OpSetxattr: "SETXATTR", OpGetxattr: "GETXATTR",
	OpListxattr: "LISTXATTR", OpRemovexattr: "REMOVEXATTR", OpFlush: "FLUSH", OpInit: "INIT",
	OpOpendir: "OPENDIR", OpReaddir: "READDIR", OpReleasedir: "RELEASEDIR", OpFsyncdir: "FSYNCDIR",
	OpGetlk: "GETLK", OpSetlk: "SETLK", OpSetlkw: "SETLKW", OpAccess: "ACCESS", OpCreate: "CREATE",
	OpInterrupt: "INTERRUPT", OpBmap: "BMAP", OpDestroy: "DESTROY", OpIoctl: "IOCTL", OpPoll: "POLL",
	OpNotifyReply: "NOTIFY_REPLY", OpBatchForget: "BATCH_FORGET", OpFallocate: "FALLOCATE",
	OpReaddirplus: "READDIRPLUS", OpRename2: "RENAME2", OpLseek: "LSEEK", OpCopyFileRange: "COPY_FILE_RANGE",
	OpSetupmapping: "SETUPMAPPING", OpRemovemapping: "REMOVEMAPPING", OpSyncfs: "SYNCFS", OpTmpfile: "TMPFILE",
	OpStatx: "STATX", OpCopyFileRange64: "COPY_FILE_RANGE_64",
}

// String is the kernel's name without FUSE_, or "OPCODE(n)".
func (o Opcode) String() string {
	if o < OpMax && opNames[o] != "" {
		return opNames[o]
	}
	return "OPCODE(" + strconv.FormatUint(uint64(o), 10) + ")"
}

// NoReply says that the kernel waits for no answer to o. (INTERRUPT may be answered by an error.)
func (o Opcode) NoReply() bool {
	return o == OpForget || o == OpBatchForget || o == OpInterrupt || o == OpNotifyReply
}

// NotifyCode says what a notification asks; it stands in the Error field of an OutHeader whose Unique is 0.
type NotifyCode int32

// The codes of enum fuse_notify_code.
const (
	NOTIFY_POLL        NotifyCode = 1
	NOTIFY_INVAL_INODE NotifyCode = 2
	NOTIFY_INVAL_ENTRY NotifyCode = 3
	NOTIFY_STORE       NotifyCode = 4
	NOTIFY_RETRIEVE    NotifyCode = 5
	NOTIFY_DELETE      NotifyCode = 6
	NOTIFY_RESEND      NotifyCode = 7 // 7.40
	NOTIFY_INC_EPOCH   NotifyCode = 8 // 7.44
	NOTIFY_PRUNE       NotifyCode = 9 // 7.45
)
