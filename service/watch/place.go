// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"encoding/binary"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxDirs  = 1 << 15 // directories known in one mount; each is about 300 bytes
	maxDepth = 4096    // levels; well below maxDirs, so that a directory and all above it are known together
)

// dir is a directory of the file system, known by its handle.
type dir struct {
	key    string
	inode  Inode
	parent *dir // nil: the mount's root, or, outside, not known
	trees  []*Tree

	// outside: the mount does not show what is above, as of the view's generation gen (0: look each time).
	outside bool
	gen     uint64

	newer, older *dir // of the view's list
}

// view is how a file system's directories are seen from one mount. The Watcher's mu guards it.
type view struct {
	mount uint64 // its id
	max   int    // directories to know
	fd    int    // a directory of it that was opened to be read: open_by_handle_at takes no O_PATH descriptor
	tries int    // more of them to open a handle that seems gone: an overlay looks for names, which may change meanwhile
	roots map[string][]*Tree
	dirs  map[string]*dir
	gen   uint64 // goes up when a directory from outside is moved in: it may have others below it
	err   error  // of a system call that should have worked: what was found since may not be true

	// The list of dirs by use; a parent is always newer than what is below it, so the oldest has nothing below it.
	newest, oldest *dir
}

func newView(mount uint64, fd int) *view {
	return &view{mount: mount, max: maxDirs, fd: fd, gen: 1, roots: make(map[string][]*Tree), dirs: make(map[string]*dir)}
}

// clear forgets all directories.
func (v *view) clear() {
	clear(v.dirs)
	v.newest, v.oldest = nil, nil
}

// handleFID is AT_HANDLE_FID of linux/fcntl.h.
const handleFID = 0x200

// handleOf is fd's file handle as fanotify tells it: four bytes of type, and the handle's.
func handleOf(fd int) (string, error) {
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH|handleFID)
	if err == unix.EINVAL { // before Linux 6.5, when fanotify's were the ordinary ones
		h, _, err = unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return "", err
	}
	b := binary.NativeEndian.AppendUint32(nil, uint32(h.Type()))
	return string(append(b, h.Bytes()...)), nil
}

// open opens (O_PATH) what the handle key is of. ESTALE: it is gone.
func (v *view) open(key []byte) (int, error) {
	if len(key) < 4 {
		return -1, unix.ESTALE
	}
	h := unix.NewFileHandle(int32(binary.NativeEndian.Uint32(key)), key[4:])
	fd, err := unix.OpenByHandleAt(v.fd, h, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	for try := 0; try < v.tries && err == unix.ESTALE; try++ {
		fd, err = unix.OpenByHandleAt(v.fd, h, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	}
	// ENOMEM is also what the kernel answers while it makes a new file with the inode number of the one that is gone (seen with ext4).
	for try := 0; try < 20 && err == unix.ENOMEM; try++ {
		time.Sleep(time.Duration(try) * 100 * time.Microsecond)
		fd, err = unix.OpenByHandleAt(v.fd, h, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	}
	if err != nil && err != unix.ESTALE {
		v.err = os.NewSyscallError("open_by_handle_at", err)
	}
	return fd, err
}

func statx(fd int, st *unix.Statx_t) error {
	return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_MODE|unix.STATX_NLINK|unix.STATX_INO|unix.STATX_MNT_ID, st)
}

func inodeOf(st *unix.Statx_t) Inode {
	return Inode{Dev: uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), Ino: st.Ino}
}

// lookup finds the directory with handle key, and where it is. It is nil if the directory is gone.
func (v *view) lookup(key []byte) *dir {
	d := v.dirs[string(key)]
	if d == nil {
		fd, err := v.open(key)
		if err != nil {
			return nil
		}
		d = v.learn(fd, string(key))
		if d == nil {
			return nil
		}
	} else if top := d.top(); top.outside && top.gen != v.gen {
		v.moved(top)
		if v.dirs[d.key] != d {
			return v.lookup(key) // all were forgotten
		}
	}
	v.used(d)
	return d
}

func (d *dir) top() *dir {
	for d.parent != nil {
		d = d.parent
	}
	return d
}

// learn takes fd, the directory with handle key, and makes it and what is above it known. It closes fd.
func (v *view) learn(fd int, key string) *dir {
	var first, below *dir
	for depth := 0; ; depth++ {
		var st unix.Statx_t
		if err := statx(fd, &st); err != nil {
			v.err = os.NewSyscallError("statx", err)
			unix.Close(fd)
			v.top(below, 0)
			return first
		}
		d := &dir{key: key, inode: inodeOf(&st), trees: v.roots[key]}
		v.insert(d)
		if below != nil {
			below.parent = d
		} else {
			first = d
		}
		below = d
		if depth == maxDepth {
			unix.Close(fd)
			v.top(d, v.gen)
			return first
		}
		up, upKey := v.above(d, fd, &st)
		unix.Close(fd)
		if up < 0 {
			return first
		}
		if known := v.dirs[upKey]; known != nil {
			unix.Close(up)
			d.parent = known
			return first
		}
		fd, key = up, upKey
	}
}

// top says of d that nothing above it is seen.
func (v *view) top(d *dir, gen uint64) {
	if d != nil {
		d.parent, d.outside, d.gen = nil, true, gen
	}
}

// above opens the directory that d is in, and tells its handle. It is -1 where there is none, and d says why. fd is d's
// descriptor, st its attributes.
func (v *view) above(d *dir, fd int, st *unix.Statx_t) (int, string) {
	d.parent, d.outside = nil, false
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return -1, ""
	}
	up, err := unix.Openat2(fd, "..", &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV})
	switch err {
	case nil:
	case unix.ENOENT: // not below the mount's root
		v.top(d, v.gen)
		return -1, ""
	case unix.EXDEV: // hidden by a mount, that may go
		v.top(d, 0)
		return -1, ""
	default:
		v.err = os.NewSyscallError("openat2", err)
		v.top(d, 0)
		return -1, ""
	}
	key, err := handleOf(up)
	if err != nil {
		v.err = os.NewSyscallError("name_to_handle_at", err)
	}
	if err != nil || key == d.key { // the same: this process's root directory
		unix.Close(up)
		v.top(d, 0)
		return -1, ""
	}
	return up, key
}

// moved finds out where d, which is known, is now.
func (v *view) moved(d *dir) {
	fd, err := v.open([]byte(d.key))
	if err != nil {
		v.top(d, v.gen)
		return
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := statx(fd, &st); err != nil {
		v.err = os.NewSyscallError("statx", err)
		v.top(d, 0)
		return
	}
	up, key := v.above(d, fd, &st)
	if up < 0 {
		return
	}
	parent := v.dirs[key]
	if parent == nil {
		parent = v.learn(up, key)
	} else {
		unix.Close(up)
	}
	if parent == nil {
		v.top(d, 0)
		return
	}
	// What we know of the directories above may be older than what we have just seen of d, until their own moves are read.
	for p := parent; p != nil; p = p.parent {
		if p == d {
			v.clear()
			return
		}
	}
	d.parent = parent
	v.used(d)
}

// used makes d and what is above it the newest, and forgets the oldest if there are too many.
func (v *view) used(d *dir) {
	for ; d != nil; d = d.parent {
		v.unlink(d)
		v.link(d)
	}
	for len(v.dirs) > v.max {
		v.forget(v.oldest)
	}
}

// insert makes d known, whose handle was not.
func (v *view) insert(d *dir) {
	v.dirs[d.key] = d
	v.link(d)
}

// forget forgets d; nothing that is known is below it.
func (v *view) forget(d *dir) {
	v.unlink(d)
	delete(v.dirs, d.key)
}

func (v *view) link(d *dir) {
	d.older = v.newest
	if v.newest != nil {
		v.newest.newer = d
	} else {
		v.oldest = d
	}
	v.newest = d
}

func (v *view) unlink(d *dir) {
	if d.newer != nil {
		d.newer.older = d.older
	} else {
		v.newest = d.older
	}
	if d.older != nil {
		d.older.newer = d.newer
	} else {
		v.oldest = d.newer
	}
	d.newer, d.older = nil, nil
}

// treesOf appends the trees that d is below, or is the directory of.
func treesOf(s []*Tree, d *dir) []*Tree {
	for ; d != nil; d = d.parent {
		s = append(s, d.trees...)
	}
	return s
}

func (v *view) addRoot(t *Tree) {
	v.roots[t.key] = append(slices.Clip(v.roots[t.key]), t)
	v.rootsChanged(t.key)
}

func (v *view) removeRoot(t *Tree) {
	s := slices.DeleteFunc(slices.Clone(v.roots[t.key]), func(o *Tree) bool { return o == t })
	if len(s) == 0 {
		delete(v.roots, t.key)
	} else {
		v.roots[t.key] = s
	}
	v.rootsChanged(t.key)
}

func (v *view) rootsChanged(key string) {
	if d := v.dirs[key]; d != nil {
		d.trees = v.roots[key]
	}
}
