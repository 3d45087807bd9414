// SPDX-License-Identifier: Apache-2.0

package fuse

// Bits of SetattrIn.Valid.
const (
	FATTR_MODE         = 1 << 0
	FATTR_UID          = 1 << 1
	FATTR_GID          = 1 << 2
	FATTR_SIZE         = 1 << 3
	FATTR_ATIME        = 1 << 4
	FATTR_MTIME        = 1 << 5
	FATTR_FH           = 1 << 6
	FATTR_ATIME_NOW    = 1 << 7
	FATTR_MTIME_NOW    = 1 << 8
	FATTR_LOCKOWNER    = 1 << 9
	FATTR_CTIME        = 1 << 10
	FATTR_KILL_SUIDGID = 1 << 11
)

// Bits of OpenOut.OpenFlags.
const (
	FOPEN_DIRECT_IO              = 1 << 0
	FOPEN_KEEP_CACHE             = 1 << 1
	FOPEN_NONSEEKABLE            = 1 << 2
	FOPEN_CACHE_DIR              = 1 << 3
	FOPEN_STREAM                 = 1 << 4
	FOPEN_NOFLUSH                = 1 << 5
	FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
	FOPEN_PASSTHROUGH            = 1 << 7
)

// Bits of INIT: the low 32 are InitIn.Flags, the high 32 are InitIn.Flags2 when INIT_EXT is set.
const (
	ASYNC_READ           uint64 = 1 << 0
	POSIX_LOCKS          uint64 = 1 << 1
	FILE_OPS             uint64 = 1 << 2
	ATOMIC_O_TRUNC       uint64 = 1 << 3
	EXPORT_SUPPORT       uint64 = 1 << 4
	BIG_WRITES           uint64 = 1 << 5
	DONT_MASK            uint64 = 1 << 6
	SPLICE_WRITE         uint64 = 1 << 7
	SPLICE_MOVE          uint64 = 1 << 8
	SPLICE_READ          uint64 = 1 << 9
	FLOCK_LOCKS          uint64 = 1 << 10
	HAS_IOCTL_DIR        uint64 = 1 << 11
	AUTO_INVAL_DATA      uint64 = 1 << 12
	DO_READDIRPLUS       uint64 = 1 << 13
	READDIRPLUS_AUTO     uint64 = 1 << 14
	ASYNC_DIO            uint64 = 1 << 15
	WRITEBACK_CACHE      uint64 = 1 << 16
	NO_OPEN_SUPPORT      uint64 = 1 << 17
	PARALLEL_DIROPS      uint64 = 1 << 18
	HANDLE_KILLPRIV      uint64 = 1 << 19
	POSIX_ACL            uint64 = 1 << 20
	ABORT_ERROR          uint64 = 1 << 21
	MAX_PAGES            uint64 = 1 << 22
	CACHE_SYMLINKS       uint64 = 1 << 23
	NO_OPENDIR_SUPPORT   uint64 = 1 << 24
	EXPLICIT_INVAL_DATA  uint64 = 1 << 25
	MAP_ALIGNMENT        uint64 = 1 << 26
	SUBMOUNTS            uint64 = 1 << 27
	HANDLE_KILLPRIV_V2   uint64 = 1 << 28
	SETXATTR_EXT         uint64 = 1 << 29
	INIT_EXT             uint64 = 1 << 30
	INIT_RESERVED        uint64 = 1 << 31
	SECURITY_CTX         uint64 = 1 << 32
	HAS_INODE_DAX        uint64 = 1 << 33
	CREATE_SUPP_GROUP    uint64 = 1 << 34
	HAS_EXPIRE_ONLY      uint64 = 1 << 35
	DIRECT_IO_ALLOW_MMAP uint64 = 1 << 36
	PASSTHROUGH          uint64 = 1 << 37
	NO_EXPORT_SUPPORT    uint64 = 1 << 38
	HAS_RESEND           uint64 = 1 << 39
	ALLOW_IDMAP          uint64 = 1 << 40
	OVER_IO_URING        uint64 = 1 << 41
	REQUEST_TIMEOUT      uint64 = 1 << 42
)

// Flags of single requests, under the kernel's names without FUSE_.
const (
	RELEASE_FLUSH        = 1 << 0 // ReleaseIn.ReleaseFlags
	RELEASE_FLOCK_UNLOCK = 1 << 1

	GETATTR_FH = 1 << 0 // GetattrIn.GetattrFlags, StatxIn.GetattrFlags

	LK_FLOCK = 1 << 0 // LkIn.LkFlags

	WRITE_CACHE        = 1 << 0 // WriteIn.WriteFlags: from the page cache, the handle is guessed
	WRITE_LOCKOWNER    = 1 << 1
	WRITE_KILL_SUIDGID = 1 << 2

	READ_LOCKOWNER = 1 << 1 // ReadIn.ReadFlags

	IOCTL_COMPAT       = 1 << 0 // IoctlIn.Flags
	IOCTL_UNRESTRICTED = 1 << 1
	IOCTL_RETRY        = 1 << 2
	IOCTL_32BIT        = 1 << 3
	IOCTL_DIR          = 1 << 4
	IOCTL_COMPAT_X32   = 1 << 5

	POLL_SCHEDULE_NOTIFY = 1 << 0 // PollIn.Flags

	FSYNC_FDATASYNC = 1 << 0 // FsyncIn.FsyncFlags

	ATTR_SUBMOUNT = 1 << 0 // Attr.Flags
	ATTR_DAX      = 1 << 1

	OPEN_KILL_SUIDGID = 1 << 0 // OpenIn.OpenFlags, CreateIn.OpenFlags

	SETXATTR_ACL_KILL_SGID = 1 << 0 // SetxattrIn.SetxattrFlags

	EXPIRE_ONLY = 1 << 0 // NotifyInvalEntryOut.Flags
)

// Extension types of ExtHeader.Type. 0 to MAX_NR_SECCTX count security contexts.
const (
	MAX_NR_SECCTX = 31
	EXT_GROUPS    = 32
)

// Sizes that the kernel fixes, in bytes.
const (
	MIN_READ_BUFFER = 8192 // the smallest buffer to read the device with

	NAME_MAX = 255 // the longest name of a directory entry on Linux (FUSE_NAME_MAX is 1024 until 6.14, 4095 since)
)
