// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// session is what was agreed by INIT.
type session struct {
	minor    uint32
	features uint64
}

// has tells whether a feature was agreed.
func (s *session) has(feature uint64) bool { return s.features&feature != 0 }

// wanted are the features that we want, where the kernel has them. What is missing, and why: WRITEBACK_CACHE (the kernel would
// ignore the host's size and mtime), PASSTHROUGH and OVER_IO_URING (they need the device here),
// SUBMOUNTS (virtiofs alone), DAX, EXPORT_SUPPORT ("." and ".." are never looked up).
const wanted = fuse.ASYNC_READ | fuse.POSIX_LOCKS | fuse.FLOCK_LOCKS | fuse.ATOMIC_O_TRUNC | fuse.BIG_WRITES |
	fuse.AUTO_INVAL_DATA | fuse.DO_READDIRPLUS | fuse.READDIRPLUS_AUTO | fuse.ASYNC_DIO | fuse.PARALLEL_DIROPS |
	fuse.HANDLE_KILLPRIV_V2 | fuse.MAX_PAGES | fuse.SETXATTR_EXT | fuse.INIT_EXT | fuse.CREATE_SUPP_GROUP |
	fuse.HAS_EXPIRE_ONLY | fuse.DIRECT_IO_ALLOW_MMAP | fuse.HAS_IOCTL_DIR

const (
	maxBackground = 64 // read-ahead and write-back requests that the kernel sends at once
	maxReadahead  = 1 << 20
)

func opInit(r *request) fuse.Errno {
	in, ok := fuse.DecodeInitIn(r.body)
	if !ok {
		return unix.EINVAL
	}
	out := fuse.InitOut{Major: fuse.Major, Minor: min(in.Minor, fuse.Minor)}
	if in.Major > fuse.Major {
		return reply(r, &out) // the kernel asks again with our major version
	}
	if in.Major < fuse.Major || in.Minor < fuse.MinMinor {
		r.fs.log.Error("the guest's kernel is too old: FUSE 7.31 (Linux 5.4) is needed", "major", in.Major, "minor", in.Minor)
		return unix.EPROTO
	}
	var want uint64 = wanted
	if r.fs.c.ACL {
		// The host's default ACL decides about the mode of a new file, so the kernel may not apply the umask before.
		want |= fuse.POSIX_ACL | fuse.DONT_MASK
	}
	switch r.fs.c.Cache {
	case CacheCoherent:
		want |= fuse.NO_OPENDIR_SUPPORT | fuse.CACHE_SYMLINKS
	case CacheAlways:
		want |= fuse.NO_OPENDIR_SUPPORT | fuse.CACHE_SYMLINKS | fuse.EXPLICIT_INVAL_DATA
		want &^= fuse.AUTO_INVAL_DATA
		if r.fs.c.ReadOnly {
			want |= fuse.NO_OPEN_SUPPORT
			want &^= fuse.POSIX_LOCKS | fuse.FLOCK_LOCKS // of files that are not opened they are the guest's own
		}
		if r.fs.c.Writeback {
			want |= fuse.WRITEBACK_CACHE
			// With it the kernel forgets the size once more after OPEN, when somebody may have written already: the host has those
			// data, and the guest would not see them (handle_truncate in fs/namei.c).
			want &^= fuse.ATOMIC_O_TRUNC
		}
	}
	if r.fs.c.Reread {
		want &^= fuse.CACHE_SYMLINKS
	}
	agreed := in.Features() & want
	out.SetFeatures(agreed)
	out.MaxReadahead = min(in.MaxReadahead, maxReadahead)
	out.MaxBackground = maxBackground
	out.CongestionThreshold = maxBackground * 3 / 4
	out.MaxWrite = maxTransfer
	out.MaxPages = maxTransfer / 4096
	out.TimeGran = 1
	if !r.fs.session.CompareAndSwap(nil, &session{minor: out.Minor, features: agreed}) {
		return unix.EPROTO // once a mount
	}
	return reply(r, &out)
}

// opDestroy: Serve ends after it.
func opDestroy(*request) fuse.Errno { return 0 }
