// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/api"
)

// place is the mount namespace in which something is to be mounted. The zero value is this process's.
type place struct{ ns *os.File }

// placeOf is the namespace of a process, or that a path names. The caller closes its ns.
func placeOf(name string) (place, error) {
	if pid, err := strconv.ParseUint(name, 10, 31); err == nil {
		name = fmt.Sprintf("/proc/%d/ns/mnt", pid)
	}
	ns, err := os.Open(name)
	return place{ns}, err
}

// do calls f in that namespace.
func (p place) do(f func() error) error {
	if p.ns == nil {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and not unlocked: the thread ends with this goroutine
		// setns(2) wants a thread that shares its root and working directory with no other.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- os.NewSyscallError("unshare", err)
			return
		}
		if err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNS); err != nil {
			done <- fmt.Errorf("%s: %w", p.ns.Name(), os.NewSyscallError("setns", err))
			return
		}
		done <- f()
	}()
	return <-done
}

// isOf tells whether it is the mount namespace of the process pid. Where an ordinary user can't see that, it is taken to be: such a
// user is refused by the daemon.
func (p place) isOf(pid int32) bool {
	if pid == 0 {
		return false // it is not even in our PID namespace
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return os.Geteuid() != 0
	}
	ours, err := os.Stat("/proc/self/ns/mnt")
	if p.ns != nil {
		ours, err = p.ns.Stat()
	}
	return err == nil && os.SameFile(ours, theirs)
}

// mountAt mounts: by the daemon where p is its own namespace, else it moves there what the daemon has made. A directory that is there is
// passed, so that it is the one that the caller sees.
func mountAt(ctx context.Context, g *admin.GuestClient, p place, spec api.MountSpec) (api.Mount, error) {
	peer, err := g.Peer(ctx)
	if err != nil {
		return api.Mount{}, err
	}
	var at *os.File
	err = p.do(func() error {
		// Without O_DIRECTORY, which would trigger an automount that waits for this very mount.
		fd, err := unix.Open(spec.Directory, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err == nil {
			at = os.NewFile(uintptr(fd), spec.Directory)
		}
		return err
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return api.Mount{}, &os.PathError{Op: "mount at", Path: spec.Directory, Err: err}
	}
	if at != nil {
		defer at.Close()
		if info, err := at.Stat(); err != nil || !info.IsDir() {
			return api.Mount{}, &os.PathError{Op: "mount at", Path: spec.Directory, Err: unix.ENOTDIR}
		}
	}
	if p.isOf(peer.PID) {
		spec.At = at
		return g.Mount(ctx, spec)
	}
	if at == nil {
		return api.Mount{}, fmt.Errorf("mount at %s: %w: make the directory first", spec.Directory, unix.ENOENT)
	}
	tree, m, err := g.Detached(ctx, spec)
	if err != nil {
		return m, err
	}
	// Before it is moved this ends the mount, afterwards nothing.
	defer tree.Close()
	return m, p.do(func() error {
		if err := unix.MoveMount(int(tree.Fd()), "", int(at.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
			return fmt.Errorf("move the mount of %s to %s: %w", spec.Tag, spec.Directory, os.NewSyscallError("move_mount", err))
		}
		return nil
	})
}
