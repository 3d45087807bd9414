// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/passthrough"
	"transfused.org/transfused/service/wire"
)

// canNamespace says whether this process may make namespaces and mounts:
// usually, whether it is root.
func canNamespace() bool {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	return unix.Capget(&hdr, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

// openExport opens the directory of an export for a worker. Where this process
// may mount, it is a detached mount of its own, whose flags hold whatever the
// worker does, and whose root ".." does not leave.
func openExport(e *Export) (*os.File, error) {
	if !canNamespace() {
		f, err := openDir(e.Dir)
		if err != nil {
			return nil, fmt.Errorf("export %s: %w", e.Tag, err)
		}
		return f, nil
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	at := uint(unix.AT_EMPTY_PATH)
	// What is mounted below later never appears: the kernel does not spread it to a detached tree. What is unmounted
	// goes from a tree that is followed, or the export would keep that file system busy.
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID, Propagation: unix.MS_PRIVATE}
	if !e.Dev {
		attr.Attr_set |= unix.MOUNT_ATTR_NODEV
	}
	if e.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if e.Submounts == passthrough.SubmountsFollow {
		flags |= unix.AT_RECURSIVE
		at |= unix.AT_RECURSIVE
		attr.Propagation = unix.MS_SLAVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, e.Dir, flags)
	if err != nil {
		return nil, fmt.Errorf("export %s: open_tree %s: %w", e.Tag, e.Dir, err)
	}
	f := os.NewFile(uintptr(fd), e.Dir)
	if err := unix.MountSetattr(fd, "", at, &attr); err != nil {
		f.Close()
		return nil, fmt.Errorf("export %s: mount_setattr %s: %w", e.Tag, e.Dir, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("export %s: fstat %s: %w", e.Tag, e.Dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		f.Close()
		return nil, fmt.Errorf("export %s: %s is no longer a directory: %w", e.Tag, e.Dir, unix.ENOTDIR)
	}
	return f, nil
}

func openDir(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// errnoOf is the errno to tell a guest for err.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	if errors.As(err, &errno) && errno > 0 && errno <= wire.MaxErrno {
		return errno
	}
	return unix.EIO
}
