// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/api"
)

// resolveCached is RESOLVE_CACHED of linux/openat2.h, Linux 5.12: EAGAIN instead of asking a file system for a name.
const resolveCached = 0x20

// checkDirectory says whether dir can be a directory's path at all.
func checkDirectory(dir string) error {
	if !strings.HasPrefix(dir, "/") || len(dir) >= unix.PathMax {
		return api.Errorf(api.Invalid, "directory %q: an absolute path is wanted", dir)
	}
	return nil
}

// openDirectory returns the directory dir, O_PATH, without following a symbolic link; nil where only the daemon's helper can find
// or make it, which follows none either. It waits for no file system.
func openDirectory(dir string) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | resolveCached}
	// EAGAIN says that something is not cached, or that a name or mount moved meanwhile: then another try helps.
	for range 3 {
		switch fd, err := unix.Openat2(unix.AT_FDCWD, dir, &how); err {
		case nil:
			return os.NewFile(uintptr(fd), dir), nil
		case unix.EAGAIN, unix.EINTR:
		case unix.ELOOP:
			return nil, api.Errorf(api.Invalid, "directory %s: a symbolic link is on the way, and none is followed: give the path without it: %w", dir, err)
		case unix.ENOTDIR:
			return nil, api.Errorf(api.Invalid, "directory %s: %w", dir, err)
		default: // not there; or a kernel before 5.12, which doesn't know resolveCached; or what the helper will meet and name
			return nil, nil
		}
	}
	return nil, nil
}
