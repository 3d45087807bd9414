// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func TestSpace(t *testing.T) {
	g := newGuest(t, nil)
	a, fh := g.create(1, "a", 0o644)
	allocate := func(mode uint32, off, n uint64) fuse.Errno {
		return g.call(fuse.OpFallocate, a.NodeID, body(fuse.FallocateIn{Fh: fh, Offset: off, Length: n, Mode: mode})).errno
	}
	const block = 64 << 10
	if e := allocate(0, 0, 4*block); e != 0 {
		t.Fatal(e)
	}
	if st := g.stat("a"); st.Size != 4*block {
		t.Errorf("size %d", st.Size)
	}
	if e := allocate(unix.FALLOC_FL_KEEP_SIZE, 4*block, block); e != 0 || g.stat("a").Size != 4*block {
		t.Errorf("keep size: %v, size %d", e, g.stat("a").Size)
	}
	if e := allocate(unix.FALLOC_FL_NO_HIDE_STALE, 0, block); e != unix.EOPNOTSUPP {
		t.Errorf("stale blocks: %v", e)
	}
	data := bytes.Repeat([]byte("x"), 4*block)
	g.want(0, g.call(fuse.OpWrite, a.NodeID, body(fuse.WriteIn{Fh: fh, Size: 4 * block}, data)))
	if e := allocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, block, block); e == unix.EOPNOTSUPP {
		t.Log("NOT RUN: the file system of the temporary directory punches no holes")
		return
	} else if e != 0 {
		t.Fatal(e)
	}
	seek := func(off uint64, whence uint32) (uint64, fuse.Errno) {
		r := g.call(fuse.OpLseek, a.NodeID, body(fuse.LseekIn{Fh: fh, Offset: off, Whence: whence}))
		if r.errno != 0 {
			return 0, r.errno
		}
		return binary.NativeEndian.Uint64(r.body), 0
	}
	if off, e := seek(0, unix.SEEK_HOLE); off != block || e != 0 {
		t.Errorf("the hole is at %d, %v", off, e)
	}
	if off, e := seek(block, unix.SEEK_DATA); off != 2*block || e != 0 {
		t.Errorf("the data are at %d, %v", off, e)
	}
	if _, e := seek(4*block, unix.SEEK_DATA); e != unix.ENXIO {
		t.Errorf("beyond the end: %v", e)
	}

	b, fhB := g.create(1, "b", 0o644)
	for _, op := range []fuse.Opcode{fuse.OpCopyFileRange, fuse.OpCopyFileRange64} {
		r := g.want(0, g.call(op, a.NodeID, body(fuse.CopyFileRangeIn{FhIn: fh, OffIn: 3 * block, NodeidOut: b.NodeID, FhOut: fhB, OffOut: 7, Len: 1 << 40})))
		if n := binary.NativeEndian.Uint64(r.body); n != block {
			t.Errorf("%v copied %d", op, n)
		}
	}
	if got, err := os.ReadFile(g.host("b")); err != nil || !bytes.Equal(got[7:], data[:block]) {
		t.Errorf("b holds %d bytes, %v", len(got), err)
	}

	st, _ := out[fuse.Kstatfs](g, g.call(fuse.OpStatfs, 1, nil))
	if st.Blocks == 0 || st.Bsize == 0 || st.Namelen != 255 {
		t.Errorf("statfs: %+v", st)
	}
	g.want(0, g.call(fuse.OpSyncfs, 1, body(fuse.SyncfsIn{})))
	g.want(0, g.call(fuse.OpAccess, a.NodeID, body(fuse.AccessIn{Mask: unix.R_OK | unix.W_OK})))
	g.want(unix.EACCES, g.call(fuse.OpAccess, a.NodeID, body(fuse.AccessIn{Mask: unix.X_OK})))
	g.want(unix.ENOSYS, g.call(fuse.OpPoll, a.NodeID, body(fuse.PollIn{Fh: fh})))
}

func TestIoctl(t *testing.T) {
	needRoot(t)
	const noDump = 0x40 // FS_NODUMP_FL, which an owner may set
	for _, trust := range []bool{false, true} {
		t.Run(fmt.Sprint("trust=", trust), func(t *testing.T) {
			g := newGuest(t, func(c *Config) {
				if trust {
					c.RootAs = RootTrust
				}
			})
			a, fh := g.create(1, "a", 0o644)
			ioctl := func(cmd uint32, in []byte, out uint32) answer {
				return g.call(fuse.OpIoctl, a.NodeID, body(fuse.IoctlIn{Fh: fh, Cmd: cmd, InSize: uint32(len(in)), OutSize: out}, in))
			}
			r := ioctl(unix.FS_IOC_GETFLAGS, nil, 4)
			if r.errno == unix.ENOTTY || r.errno == unix.EOPNOTSUPP {
				t.Log("NOT RUN: the file system of the temporary directory has no flags")
				return
			}
			g.want(0, r)
			if len(r.body) != 16+4 { // struct fuse_ioctl_out, and exactly what was asked for
				t.Fatalf("%d bytes", len(r.body))
			}
			was := binary.NativeEndian.Uint32(r.body[16:])
			if long := g.want(0, ioctl(unix.FS_IOC_GETFLAGS, nil, 8)).body; len(long) != 16+8 || binary.NativeEndian.Uint32(long[16:]) != was {
				t.Errorf("as a long: %x", long)
			}
			g.want(0, ioctl(unix.FS_IOC_SETFLAGS, body(was|noDump), 0))
			if now := g.want(0, ioctl(unix.FS_IOC_GETFLAGS, nil, 4)).body; binary.NativeEndian.Uint32(now[16:]) != was|noDump {
				t.Errorf("flags %x", now[16:])
			}
			want := fuse.Errno(0)
			if !trust {
				want = unix.EPERM
			}
			g.want(want, ioctl(unix.FS_IOC_SETFLAGS, body(was|fsImmutableFl), 0))
			g.want(0, ioctl(unix.FS_IOC_SETFLAGS, body(was), 0))

			x := g.want(0, ioctl(fsIocFsgetxattr, nil, 28)).body[16:]
			g.want(0, ioctl(fsIocFssetxattr, x, 0))
			binary.NativeEndian.PutUint32(x, binary.NativeEndian.Uint32(x)|fsXflagAppend)
			g.want(want, ioctl(fsIocFssetxattr, x, 0))
			if trust {
				g.want(0, ioctl(unix.FS_IOC_SETFLAGS, body(was), 0))
			} else {
				binary.NativeEndian.PutUint32(x, 0)
				binary.NativeEndian.PutUint32(x[12:], 77) // the project
				g.want(unix.EPERM, ioctl(fsIocFssetxattr, x, 0))
			}
		})
	}
}
