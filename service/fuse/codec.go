// SPDX-License-Identifier: Apache-2.0

package fuse

import (
	"bytes"
	"unsafe"
)

// Sizes of the headers, in bytes.
const (
	InHeaderSize  = int(unsafe.Sizeof(InHeader{}))
	OutHeaderSize = int(unsafe.Sizeof(OutHeader{}))
	DirentSize    = int(unsafe.Sizeof(Dirent{}))
	AttrOutSize   = int(unsafe.Sizeof(AttrOut{}))
	AheadOutSize  = int(unsafe.Sizeof(AheadOut{}))
	EndOutSize    = int(unsafe.Sizeof(EndOut{}))
	EntryOutSize  = int(unsafe.Sizeof(EntryOut{}))
	// WriteHead is what a WRITE has before its data: InHeader and WriteIn.
	WriteHead = InHeaderSize + int(unsafe.Sizeof(WriteIn{}))
)

// Struct is the closed set of the kernel's structures: fixed size, no pointers, no hidden padding.
type Struct interface {
	InHeader | OutHeader | Attr | SxTime | Statx | Kstatfs | FileLock | EntryOut | ForgetIn | ForgetOne | BatchForgetIn |
		GetattrIn | AttrOut | AheadOut | EndOut | StatxIn | StatxOut | MknodIn | MkdirIn | RenameIn | Rename2In | LinkIn | SetattrIn |
		OpenIn | CreateIn | OpenOut | ReleaseIn | FlushIn | ReadIn | WriteIn | WriteOut | FsyncIn | SetxattrIn |
		SetxattrInCompat | GetxattrIn | GetxattrOut | LkIn | LkOut | AccessIn | InitIn | InitInCompat | InitOut |
		InterruptIn | IoctlIn | IoctlOut | PollIn | PollOut | FallocateIn | LseekIn | LseekOut | CopyFileRangeIn |
		CopyFileRangeOut | SyncfsIn | ExtHeader | SuppGroups | Dirent | NotifyPollWakeupOut | NotifyInvalInodeOut |
		NotifyInvalEntryOut | NotifyDeleteOut | NotifyStoreOut | NotifyRetrieveOut | NotifyPruneOut
}

// Decode fills v from the beginning of b and returns what follows it; ok is false, and v untouched, if b is
// too short. It copies: v does not alias b.
func Decode[T Struct](v *T, b []byte) (rest []byte, ok bool) {
	n := int(unsafe.Sizeof(*v))
	if len(b) < n {
		return nil, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(v)), n), b)
	return b[n:], true
}

// Append appends v to b.
func Append[T Struct](b []byte, v *T) []byte {
	return append(b, unsafe.Slice((*byte)(unsafe.Pointer(v)), int(unsafe.Sizeof(*v)))...)
}

// Put writes v over the beginning of b, which must be long enough: the caller made room for it.
func Put[T Struct](b []byte, v *T) {
	n := int(unsafe.Sizeof(*v))
	copy(b[:n], unsafe.Slice((*byte)(unsafe.Pointer(v)), n))
}

// DecodeInitIn decodes INIT's body of any minor version: before 7.36 it ends after Flags. Without
// INIT_EXT in Flags, Flags2 is 0.
func DecodeInitIn(b []byte) (v InitIn, ok bool) {
	if _, ok := Decode(&v, b); ok {
		if uint64(v.Flags)&INIT_EXT == 0 {
			v.Flags2 = 0
		}
		return v, true
	}
	var c InitInCompat
	if _, ok := Decode(&c, b); !ok {
		return v, false
	}
	return InitIn{Major: c.Major, Minor: c.Minor, MaxReadahead: c.MaxReadahead, Flags: c.Flags &^ uint32(INIT_EXT)}, true
}

// Features are InitIn's flags as one number.
func (v *InitIn) Features() uint64 { return uint64(v.Flags) | uint64(v.Flags2)<<32 }

// Features are InitOut's flags as one number.
func (v *InitOut) Features() uint64 { return uint64(v.Flags) | uint64(v.Flags2)<<32 }

// SetFeatures sets both words of flags. The high one counts only if f has INIT_EXT.
func (v *InitOut) SetFeatures(f uint64) { v.Flags, v.Flags2 = uint32(f), uint32(f>>32) }

// Name takes a NUL-terminated string from the beginning of b: what is before the NUL, and what is after it. ok is
// false if there is no NUL. Both alias b. The name is not judged: it may be empty or hold any other byte.
func Name(b []byte) (name, rest []byte, ok bool) {
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return nil, nil, false
	}
	return b[:i], b[i+1:], true
}

// Groups takes the supplementary group out of a request's extensions (CREATE_SUPP_GROUP: the kernel sends at most
// one, that of the directory). body is all that follows the header; it returns the body without the extensions. has
// tells whether there was a group; ok is false if the extensions do not fit the body, or are malformed.
func (h *InHeader) Groups(body []byte) (rest []byte, gid uint32, has, ok bool) {
	n := int(h.TotalExtlen) * 8
	if n == 0 {
		return body, 0, false, true
	}
	if n > len(body) {
		return nil, 0, false, false
	}
	rest, ext := body[:len(body)-n], body[len(body)-n:]
	for len(ext) > 0 {
		var x ExtHeader
		if _, ok := Decode(&x, ext); !ok {
			return nil, 0, false, false
		}
		// Sizes are in bytes, and each extension is padded to 8 (FUSE_REC_ALIGN).
		if x.Size < 8 || int64(x.Size) > int64(len(ext)) || x.Size%8 != 0 {
			return nil, 0, false, false
		}
		if x.Type == EXT_GROUPS {
			var g SuppGroups
			gids, ok := Decode(&g, ext[8:x.Size])
			if !ok || uint64(g.NrGroups)*4 > uint64(len(gids)) {
				return nil, 0, false, false
			}
			if g.NrGroups > 0 {
				var one SuppGroups // a gid is a uint32 too
				Decode(&one, gids)
				gid, has = one.NrGroups, true
			}
		}
		ext = ext[x.Size:]
	}
	return rest, gid, has, true
}

// AppendDirent appends an entry of READDIR, padded. typ is the DT_ value.
func AppendDirent(b []byte, ino, off uint64, typ uint32, name []byte) []byte {
	b = Append(b, &Dirent{Ino: ino, Off: off, Namelen: uint32(len(name)), Type: typ})
	b = append(b, name...)
	return append(b, zeros[:-len(name)&7]...)
}

var zeros [8]byte

// DirentLen is the space that AppendDirent takes for a name of n bytes.
func DirentLen(n int) int { return (DirentSize + n + 7) &^ 7 }

// NextDirent takes an entry of READDIR from the beginning of b, with the name (aliasing b) and what follows it.
func NextDirent(b []byte) (d Dirent, name, rest []byte, ok bool) {
	tail, ok := Decode(&d, b)
	if !ok || uint64(d.Namelen) > uint64(len(tail)) || DirentLen(int(d.Namelen)) > len(b) {
		return d, nil, nil, false
	}
	return d, tail[:d.Namelen], b[DirentLen(int(d.Namelen)):], true
}

// AppendError appends a whole reply without a body: errno 0 is success.
func AppendError(b []byte, unique uint64, errno Errno) []byte {
	return Append(b, &OutHeader{Len: uint32(OutHeaderSize), Error: -int32(errno), Unique: unique})
}
