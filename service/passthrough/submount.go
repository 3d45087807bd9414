// SPDX-License-Identifier: Apache-2.0

package passthrough

import "golang.org/x/sys/unix"

// visible tells whether the guest may see what st describes: with SubmountsHide, only what is in the root's mount.
func (fs *FS) visible(st *unix.Statx_t) bool {
	return fs.c.Submounts == SubmountsFollow || st.Mnt_id == fs.root.key.mnt
}

// guestIno is the inode number that the guest sees. The kernel shows all of the export as one device, so those of
// other devices (submounts; but btrfs and overlayfs have several in one mount, too) are made different
// from those of the root's: by hashing, in the upper half of the numbers. That needs no table, and is the same at each mount.
func (fs *FS) guestIno(k key) uint64 {
	if k.dev == fs.root.key.dev {
		return k.ino
	}
	// The finalizer of splitmix64, once for the device and once with the inode: it is one to one, so that two inodes
	// of a device do not meet (but for the bit that we set).
	mix := func(x uint64) uint64 {
		x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		return x ^ x>>31
	}
	return mix(mix(k.dev+0x9e3779b97f4a7c15)^k.ino) | 1<<63
}
