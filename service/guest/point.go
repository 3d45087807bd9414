// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// point is a mount point, held by its parent: nobody can exchange a directory above it, and nothing on the
// mount is held that would make its unmounting fail. The helper owns it.
type point struct {
	dir  string // absolute and clean
	name string
	id   mountID // of what we mounted there

	mu     sync.RWMutex // held for reading while parent is used, so that close waits
	parent *os.File
}

// mountID tells one mount from another. Before Linux 5.8 Mnt is 0 and the device alone decides.
type mountID struct {
	Mnt        uint64
	Dev1, Dev2 uint32
}

func mountIDOf(fd int) (mountID, error) {
	var st unix.Statx_t
	// DONT_SYNC: the file system may be ours, and its server may be gone.
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return mountID{}, os.NewSyscallError("statx", err)
	}
	return mountID{st.Mnt_id, st.Dev_major, st.Dev_minor}, nil
}

const noLinks = unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// openat2 retries what the kernel gives up when names move meanwhile.
func openat2(dir int, name string, flags int, resolve uint64) (int, error) {
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(dir, name, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: resolve})
		if err == unix.EINTR || err == unix.EAGAIN && tries < 100 {
			continue
		}
		return fd, err
	}
}

// checkPoint says whether dir may be a mount point at all: absolute, clean, and below one of roots.
func checkPoint(dir string, roots []string) error {
	switch {
	case !strings.HasPrefix(dir, "/") || strings.ContainsRune(dir, 0) || len(dir) > 4095:
		return fmt.Errorf("mount point %q: an absolute path is wanted", dir)
	case slices.Contains(strings.Split(dir, "/"), ".."):
		return fmt.Errorf("mount point %q: .. is not allowed", dir)
	case filepath.Clean(dir) == "/":
		return errors.New("mount point /: it can't be mounted over")
	}
	if len(roots) == 0 {
		return nil
	}
	for _, r := range roots {
		if below(filepath.Clean(dir), r) {
			return nil
		}
	}
	return fmt.Errorf("mount point %s: %w: it is not below %s: choose a directory there, or give transfused another --mount-root", dir, unix.EPERM, strings.Join(roots, " or "))
}

// below says whether path is strictly below root; both are clean.
func below(path, root string) bool {
	return root == "/" && path != "/" || strings.HasPrefix(path, root+"/")
}

// preparePoint returns dir as a mount point and an O_PATH descriptor of the directory: missing ones are made, mode
// 0700, and one that exists must be empty. No symbolic link is followed.
func preparePoint(dir string, roots []string) (*point, *os.File, error) {
	if err := checkPoint(dir, roots); err != nil {
		return nil, nil, err
	}
	dir = filepath.Clean(dir)
	names := strings.Split(dir[1:], "/")
	at, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/", Err: err}
	}
	for i, name := range names {
		next, err := stepInto(at, name, i == len(names)-1)
		if err != nil {
			unix.Close(at)
			return nil, nil, pointError(dir, "/"+strings.Join(names[:i+1], "/"), err)
		}
		if i < len(names)-1 {
			unix.Close(at)
			at = next
			continue
		}
		target := os.NewFile(uintptr(next), dir)
		p := &point{dir: dir, parent: os.NewFile(uintptr(at), filepath.Dir(dir)), name: name}
		err = checkEmpty(next)
		if errors.Is(err, unix.ENOTCONN) && p.detachStale() == nil {
			// A daemon before us was killed, and its mount is still here.
			target.Close()
			if next, err = stepInto(at, name, true); err == nil {
				target = os.NewFile(uintptr(next), dir)
				err = checkEmpty(next)
			}
		}
		if err != nil {
			target.Close()
			p.close()
			return nil, nil, pointError(dir, dir, err)
		}
		return p, target, nil
	}
	panic("unreachable: a clean path that is not / has a name")
}

// stepInto opens the directory name in at, and makes it first where it is missing. The last one may be a trap of autofs, set for the very mount
// that is being made: who opened it as a directory would wait for that.
func stepInto(at int, name string, last bool) (int, error) {
	flags := unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW
	if last {
		flags &^= unix.O_DIRECTORY
	}
	fd, err := openat2(at, name, flags, unix.RESOLVE_BENEATH|noLinks)
	if err == unix.ENOENT {
		if err := unix.Mkdirat(at, name, 0o700); err != nil && err != unix.EEXIST {
			return -1, err
		}
		fd, err = openat2(at, name, flags, unix.RESOLVE_BENEATH|noLinks)
	}
	if err != nil || !last {
		return fd, err
	}
	var st unix.Statx_t
	// DONT_SYNC: a mount whose server is gone may be there.
	if err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// checkEmpty returns ENOTEMPTY for a directory with entries.
func checkEmpty(at int) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(at, &fs); err == nil && fs.Type == unix.AUTOFS_SUPER_MAGIC {
		return nil // a trap has no entries
	}
	fd, err := openat2(at, ".", unix.O_RDONLY|unix.O_DIRECTORY, noLinks)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "mount point")
	defer f.Close()
	switch _, err := f.Readdirnames(1); {
	case err == nil:
		return unix.ENOTEMPTY
	case errors.Is(err, io.EOF):
		return nil
	default:
		return err
	}
}

// pointError says what at, a part of dir, lacks to be a mount point.
func pointError(dir, at string, err error) error {
	mend := ""
	switch {
	case errors.Is(err, unix.ENOTEMPTY):
		mend = ": mount over an empty directory, or one that does not exist"
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		// The last name may be a link and be reported as no directory.
		var st unix.Stat_t
		if unix.Lstat(at, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			mend = ": " + at + " is a symbolic link; name the directory that it leads to"
		} else {
			mend = ": " + at + " is a file; name a directory, or a path that does not exist"
		}
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		mend = ": make " + at + " for this user, or run as root"
	case errors.Is(err, unix.ENOTCONN):
		mend = ": the mount there is dead; unmount it by umount -l " + at
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		err = errno
	}
	return fmt.Errorf("mount point %s: %w%s", dir, err, mend)
}

// detachStale detaches a mount of a transfused that is gone.
func (p *point) detachStale() error {
	stale, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != p.dir || m.FSType != "fuse."+subtype, false
	})
	if err != nil || len(stale) == 0 {
		return unix.ENOTCONN
	}
	if os.Geteuid() != 0 {
		return unmountUser("", p.dir, true)
	}
	return unix.Unmount(p.path(), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// path names the mount point for calls that take no descriptor.
func (p *point) path() string { return fmt.Sprintf("/proc/self/fd/%d/%s", p.parent.Fd(), p.name) }

// root opens the root of our mount, O_PATH, and refuses what else may be there by now. It is held no longer than it is
// used, or umount would find the mount busy. Precondition: mu is held for reading.
func (p *point) root() (int, error) {
	fd, err := openat2(int(p.parent.Fd()), p.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|noLinks)
	if err != nil {
		return -1, err
	}
	if id, err := mountIDOf(fd); err != nil || id != p.id {
		unix.Close(fd)
		return -1, unix.ENODEV
	}
	return fd, nil
}

// How to unmount.
const (
	howBusy   = iota // not at all, if it is in use
	howDetach        // what is in use is detached, after it was written back
	howForce         // requests fail first, and then it is detached
)

// unmount unmounts what we mounted. Not forced it writes back, and may wait for the host.
func (p *point) unmount(fusermount string, how int) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	fd, err := p.root()
	if err != nil {
		return nil // it is gone already
	}
	unix.Close(fd)
	if os.Geteuid() != 0 {
		if how != howForce {
			if err := unmountUser(fusermount, p.dir, false); err == nil || how == howBusy {
				return err
			}
		}
		return unmountUser(fusermount, p.dir, true)
	}
	flags := unix.UMOUNT_NOFOLLOW
	if how == howForce {
		flags |= unix.MNT_FORCE | unix.MNT_DETACH
	}
	err = unix.Unmount(p.path(), flags)
	if err == unix.EBUSY && how == howDetach {
		p.writeBack()
		err = unix.Unmount(p.path(), flags|unix.MNT_DETACH)
	}
	if err != nil {
		return &os.PathError{Op: "umount", Path: p.dir, Err: err}
	}
	return nil
}

// writeBack has the kernel write what was changed in memory, as umount does, while files are open. Precondition: mu is held for reading.
func (p *point) writeBack() {
	fd, err := openat2(int(p.parent.Fd()), p.name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|noLinks)
	if err != nil {
		return // nothing can be written there
	}
	defer unix.Close(fd)
	if id, err := mountIDOf(fd); err == nil && id == p.id {
		_ = unix.Syncfs(fd) // what it can't write is lost, and the detaching goes on
	}
}

// look learns what is mounted at p by now.
func (p *point) look() error {
	fd, err := openat2(int(p.parent.Fd()), p.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, unix.RESOLVE_BENEATH|noLinks)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	raiseReadAhead(fd)
	p.id, err = mountIDOf(fd)
	return err
}

// holdPoint holds the mount point at dir without a look at what is there.
func holdPoint(dir string) (*point, error) {
	parent, name := filepath.Split(filepath.Clean(dir))
	at, err := openat2(unix.AT_FDCWD, parent, unix.O_PATH|unix.O_DIRECTORY, noLinks)
	if err != nil {
		return nil, pointError(dir, parent, err)
	}
	return &point{dir: filepath.Clean(dir), name: name, parent: os.NewFile(uintptr(at), parent)}, nil
}

func (p *point) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parent.Close()
}

// suits answers a suitability request of version 1: a path suits a mount when it is missing, an export also when it
// is an empty directory.
func suits(path string, export bool) bool {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return errors.Is(err, unix.ENOENT)
	}
	if !export || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return checkEmpty(fd) == nil
}
