// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"math"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// opFallocate reserves, punches, zeroes, inserts or collapses: what the host's file system knows of it.
func opFallocate(r *request) fuse.Errno {
	var in fuse.FallocateIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	// NO_HIDE_STALE, in kernels that have it, would show what was on the disk before.
	if in.Mode&unix.FALLOC_FL_NO_HIDE_STALE != 0 {
		return unix.EOPNOTSUPP
	}
	if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64 {
		return unix.EINVAL
	}
	r.expectFile(watch.Modify, h.node)
	for {
		if err := unix.Fallocate(h.fd, in.Mode, int64(in.Offset), int64(in.Length)); err != unix.EINTR {
			if err == nil {
				r.fs.reportFile(watch.Modify, h.node)
			}
			return errnoOf(err)
		}
	}
}

// opLseek finds holes and data; the kernel keeps the position itself and asks nothing else. It moves the position of
// the descriptor, which nothing uses: files are read and written at offsets.
func opLseek(r *request) fuse.Errno {
	var in fuse.LseekIn
	if !decode(r, &in) {
		return unix.EINVAL
	}
	h, e := r.handle(in.Fh)
	if e != 0 {
		return e
	}
	if h.isDir() || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	if in.Offset > math.MaxInt64 {
		return unix.ENXIO
	}
	off, err := unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
	if err != nil {
		return errnoOf(err)
	}
	return reply(r, &fuse.LseekOut{Offset: uint64(off)})
}

// opCopyFileRange copies within the export, on file systems that can without moving the bytes.
func opCopyFileRange(r *request) fuse.Errno {
	// What the reply can tell; the kernel's own limit of one call is below it.
	n, e := r.copyFileRange(math.MaxUint32)
	if e != 0 {
		return e
	}
	return reply(r, &fuse.WriteOut{Size: uint32(n)})
}

// opCopyFileRange64 is opCopyFileRange with a reply of 64 bits.
func opCopyFileRange64(r *request) fuse.Errno {
	n, e := r.copyFileRange(math.MaxInt64)
	if e != 0 {
		return e
	}
	return reply(r, &fuse.CopyFileRangeOut{BytesCopied: n})
}

func (r *request) copyFileRange(most uint64) (uint64, fuse.Errno) {
	var in fuse.CopyFileRangeIn
	if !decode(r, &in) || in.Flags != 0 || in.OffIn > math.MaxInt64 || in.OffOut > math.MaxInt64 {
		return 0, unix.EINVAL
	}
	from, e := r.handle(in.FhIn)
	if e != 0 {
		return 0, e
	}
	to, e := r.handleOf(in.NodeidOut, in.FhOut)
	if e != 0 {
		return 0, e
	}
	offIn, offOut := int64(in.OffIn), int64(in.OffOut)
	r.expectFile(watch.Modify, to.node)
	for {
		n, err := unix.CopyFileRange(from.fd, &offIn, to.fd, &offOut, int(min(in.Len, most, math.MaxInt64)), 0)
		if err != unix.EINTR {
			if n > 0 {
				r.fs.reportFile(watch.Modify, to.node)
			}
			return uint64(max(n, 0)), errnoOf(err)
		}
	}
}

// opStatfs tells what is free where the node is.
func opStatfs(r *request) fuse.Errno {
	_, fd, e := r.path()
	if e != 0 {
		return e
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return errnoOf(err)
	}
	return reply(r, &fuse.Kstatfs{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Namelen: uint32(min(st.Namelen, fuse.NAME_MAX)), Frsize: uint32(st.Frsize),
	})
}

// opSyncfs writes back the file system that holds the node. Guests ask for it only where they are told that the server is to be trusted with it.
func opSyncfs(r *request) fuse.Errno {
	_, fd, e := r.path()
	if e != 0 {
		return e
	}
	// syncfs(2) takes no O_PATH. Any directory of the file system will do; the kernel names the root.
	fd, e = openat(fd, dotName, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if e != 0 {
		return e
	}
	defer unix.Close(fd)
	return errnoOf(unix.Syncfs(fd))
}
