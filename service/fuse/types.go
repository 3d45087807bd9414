// SPDX-License-Identifier: Apache-2.0

package fuse

// InHeader begins each request (struct fuse_in_header). Len counts the header too; TotalExtlen is
// the length of the extensions at the end of the body, in units of 8 bytes.
type InHeader struct {
	Len         uint32
	Opcode      Opcode
	Unique      uint64
	NodeID      uint64
	UID, GID    uint32
	PID         uint32
	TotalExtlen uint16
	Padding     uint16
}

// OutHeader begins each reply and notification (struct fuse_out_header). Error is 0 or the negative errno; in a
// notification Unique is 0 and Error is the NotifyCode.
type OutHeader struct {
	Len    uint32
	Error  int32
	Unique uint64
}

// Attr are the attributes of an inode (struct fuse_attr). Rdev is in the kernel's 32-bit encoding (new_encode_dev).
type Attr struct {
	Ino, Size, Blocks               uint64
	Atime, Mtime, Ctime             uint64
	Atimensec, Mtimensec, Ctimensec uint32
	Mode, Nlink, UID, GID           uint32
	Rdev, Blksize, Flags            uint32
}

// SxTime is a time of Statx (struct fuse_sx_time).
type SxTime struct {
	Sec      int64
	Nsec     uint32
	Reserved int32
}

// Statx are the attributes of STATX (struct fuse_statx).
type Statx struct {
	Mask, Blksize                     uint32
	Attributes                        uint64
	Nlink, UID, GID                   uint32
	Mode                              uint16
	Spare0                            uint16
	Ino, Size, Blocks, AttributesMask uint64
	Atime, Btime, Ctime, Mtime        SxTime
	RdevMajor, RdevMinor              uint32
	DevMajor, DevMinor                uint32
	Spare2                            [14]uint64
}

// Kstatfs is the body of STATFS's reply (struct fuse_kstatfs, fuse_statfs_out).
type Kstatfs struct {
	Blocks, Bfree, Bavail, Files, Ffree uint64
	Bsize, Namelen, Frsize, Padding     uint32
	Spare                               [6]uint32
}

// FileLock is a POSIX lock (struct fuse_file_lock). End is inclusive.
type FileLock struct {
	Start, End uint64
	Type       uint32
	PID        uint32
}

// EntryOut answers LOOKUP, MKNOD, MKDIR, SYMLINK, LINK and stands in CREATE's and READDIRPLUS's replies.
type EntryOut struct {
	NodeID, Generation            uint64
	EntryValid, AttrValid         uint64 // seconds
	EntryValidNsec, AttrValidNsec uint32
	Attr                          Attr
}

// ForgetIn is the body of FORGET.
type ForgetIn struct{ Nlookup uint64 }

// ForgetOne is one of BATCH_FORGET's nodes; Count of them follow BatchForgetIn.
type ForgetOne struct{ NodeID, Nlookup uint64 }

// BatchForgetIn begins BATCH_FORGET.
type BatchForgetIn struct{ Count, Dummy uint32 }

// GetattrIn is the body of GETATTR.
type GetattrIn struct {
	GetattrFlags, Dummy uint32
	Fh                  uint64
}

// AttrOut answers GETATTR and SETATTR.
type AttrOut struct {
	AttrValid     uint64 // seconds
	AttrValidNsec uint32
	Dummy         uint32
	Attr          Attr
}

// AheadCode and EndCode stand in OutHeader.Error, with Unique 0, before an AheadOut and an EndOut.
const (
	AheadCode = 0x7466
	EndCode   = 0x7467
)

// EndOut is transfuse's own too: the host tells with the reply of a READDIR or READDIRPLUS that the directory ends with it. NodeID is that of
// the request, Offset that of the reply's last entry: where the guest's kernel will ask whether there are more.
type EndOut struct {
	NodeID, Offset uint64
}

// AheadOut is not the kernel's but transfuse's own: the host tells the attributes of a directory with the reply of a
// request that changed it, before the guest's kernel asks for them. Unique and NodeID are those of the request.
type AheadOut struct {
	Unique, NodeID uint64
	Attr           AttrOut
}

// StatxIn is the body of STATX (7.39).
type StatxIn struct {
	GetattrFlags, Reserved uint32
	Fh                     uint64
	SxFlags, SxMask        uint32
}

// StatxOut answers STATX.
type StatxOut struct {
	AttrValid            uint64 // seconds
	AttrValidNsec, Flags uint32
	Spare                [2]uint64
	Stat                 Statx
}

// MknodIn begins MKNOD; the name follows.
type MknodIn struct{ Mode, Rdev, Umask, Padding uint32 }

// MkdirIn begins MKDIR; the name follows.
type MkdirIn struct{ Mode, Umask uint32 }

// RenameIn begins RENAME; the old and the new name follow.
type RenameIn struct{ Newdir uint64 }

// Rename2In begins RENAME2; the old and the new name follow.
type Rename2In struct {
	Newdir         uint64
	Flags, Padding uint32
}

// LinkIn begins LINK; the new name follows. The request's node is the new parent.
type LinkIn struct{ Oldnodeid uint64 }

// SetattrIn is the body of SETATTR.
type SetattrIn struct {
	Valid, Padding                  uint32
	Fh, Size, LockOwner             uint64
	Atime, Mtime, Ctime             uint64
	Atimensec, Mtimensec, Ctimensec uint32
	Mode, Unused4                   uint32
	UID, GID                        uint32
	Unused5                         uint32
}

// OpenIn is the body of OPEN and OPENDIR. Flags are the O_ flags of the guest's architecture.
type OpenIn struct{ Flags, OpenFlags uint32 }

// CreateIn begins CREATE and TMPFILE; the name follows ("" with TMPFILE: the kernel sends "/", checked by no one).
type CreateIn struct{ Flags, Mode, Umask, OpenFlags uint32 }

// OpenOut answers OPEN and OPENDIR and ends CREATE's reply. BackingID is of passthrough (7.40).
type OpenOut struct {
	Fh        uint64
	OpenFlags uint32
	BackingID int32
}

// ReleaseIn is the body of RELEASE and RELEASEDIR.
type ReleaseIn struct {
	Fh                  uint64
	Flags, ReleaseFlags uint32
	LockOwner           uint64
}

// FlushIn is the body of FLUSH.
type FlushIn struct {
	Fh              uint64
	Unused, Padding uint32
	LockOwner       uint64
}

// ReadIn is the body of READ, READDIR and READDIRPLUS.
type ReadIn struct {
	Fh, Offset      uint64
	Size, ReadFlags uint32
	LockOwner       uint64
	Flags, Padding  uint32
}

// WriteIn begins WRITE; Size bytes follow.
type WriteIn struct {
	Fh, Offset       uint64
	Size, WriteFlags uint32
	LockOwner        uint64
	Flags, Padding   uint32
}

// WriteOut answers WRITE and COPY_FILE_RANGE.
type WriteOut struct{ Size, Padding uint32 }

// FsyncIn is the body of FSYNC and FSYNCDIR.
type FsyncIn struct {
	Fh                  uint64
	FsyncFlags, Padding uint32
}

// SetxattrIn begins SETXATTR; the name and Size bytes follow. Without SETXATTR_EXT the
// kernel sends SetxattrInCompat.
type SetxattrIn struct{ Size, Flags, SetxattrFlags, Padding uint32 }

// SetxattrInCompat begins SETXATTR where SETXATTR_EXT was not agreed (FUSE_COMPAT_SETXATTR_IN_SIZE).
type SetxattrInCompat struct{ Size, Flags uint32 }

// GetxattrIn begins GETXATTR (the name follows) and is the body of LISTXATTR.
type GetxattrIn struct{ Size, Padding uint32 }

// GetxattrOut answers GETXATTR and LISTXATTR of Size 0.
type GetxattrOut struct{ Size, Padding uint32 }

// LkIn is the body of GETLK, SETLK and SETLKW.
type LkIn struct {
	Fh, Owner        uint64
	Lk               FileLock
	LkFlags, Padding uint32
}

// LkOut answers GETLK.
type LkOut struct{ Lk FileLock }

// AccessIn is the body of ACCESS.
type AccessIn struct{ Mask, Padding uint32 }

// InitIn is the body of INIT. Kernels before 7.36 send InitInCompat; DecodeInitIn takes both.
type InitIn struct {
	Major, Minor, MaxReadahead, Flags, Flags2 uint32
	Unused                                    [11]uint32
}

// InitInCompat is the body of INIT before 7.36.
type InitInCompat struct{ Major, Minor, MaxReadahead, Flags uint32 }

// InitOut answers INIT.
type InitOut struct {
	Major, Minor, MaxReadahead, Flags  uint32
	MaxBackground, CongestionThreshold uint16
	MaxWrite, TimeGran                 uint32
	MaxPages, MapAlignment             uint16
	Flags2, MaxStackDepth              uint32
	RequestTimeout                     uint16 // seconds
	Unused                             [11]uint16
}

// InterruptIn is the body of INTERRUPT: the unique of the request that was interrupted.
type InterruptIn struct{ Unique uint64 }

// IoctlIn begins IOCTL; InSize bytes follow.
type IoctlIn struct {
	Fh              uint64
	Flags, Cmd      uint32
	Arg             uint64
	InSize, OutSize uint32
}

// IoctlOut begins IOCTL's reply.
type IoctlOut struct {
	Result                 int32
	Flags, InIovs, OutIovs uint32
}

// PollIn is the body of POLL.
type PollIn struct {
	Fh, Kh        uint64
	Flags, Events uint32
}

// PollOut answers POLL.
type PollOut struct{ Revents, Padding uint32 }

// FallocateIn is the body of FALLOCATE.
type FallocateIn struct {
	Fh, Offset, Length uint64
	Mode, Padding      uint32
}

// LseekIn is the body of LSEEK.
type LseekIn struct {
	Fh, Offset      uint64
	Whence, Padding uint32
}

// LseekOut answers LSEEK.
type LseekOut struct{ Offset uint64 }

// CopyFileRangeIn is the body of COPY_FILE_RANGE and COPY_FILE_RANGE_64.
type CopyFileRangeIn struct {
	FhIn, OffIn, NodeidOut, FhOut, OffOut, Len, Flags uint64
}

// CopyFileRangeOut answers COPY_FILE_RANGE_64.
type CopyFileRangeOut struct{ BytesCopied uint64 }

// SyncfsIn is the body of SYNCFS.
type SyncfsIn struct{ Padding uint64 }

// ExtHeader begins an extension of a request. Size counts the header.
type ExtHeader struct{ Size, Type uint32 }

// SuppGroups begins an EXT_GROUPS extension, after its ExtHeader; NrGroups gids (uint32) follow.
type SuppGroups struct{ NrGroups uint32 }

// Dirent is a directory entry of READDIR; Namelen bytes of name follow, padded to 8.
type Dirent struct {
	Ino, Off      uint64
	Namelen, Type uint32
}

// NotifyPollWakeupOut is the body of NOTIFY_POLL.
type NotifyPollWakeupOut struct{ Kh uint64 }

// NotifyInvalInodeOut is the body of NOTIFY_INVAL_INODE.
type NotifyInvalInodeOut struct {
	Ino      uint64
	Off, Len int64
}

// NotifyInvalEntryOut begins NOTIFY_INVAL_ENTRY; the name and a NUL follow.
type NotifyInvalEntryOut struct {
	Parent         uint64
	Namelen, Flags uint32
}

// NotifyDeleteOut begins NOTIFY_DELETE; the name and a NUL follow.
type NotifyDeleteOut struct {
	Parent, Child    uint64
	Namelen, Padding uint32
}

// NotifyStoreOut begins NOTIFY_STORE; Size bytes follow.
type NotifyStoreOut struct {
	NodeID, Offset uint64
	Size, Padding  uint32
}

// NotifyRetrieveOut is the body of NOTIFY_RETRIEVE.
type NotifyRetrieveOut struct {
	NotifyUnique, NodeID, Offset uint64
	Size, Padding                uint32
}

// NotifyPruneOut begins NOTIFY_PRUNE; Count node ids follow.
type NotifyPruneOut struct {
	Count, Padding uint32
	Spare          uint64
}
