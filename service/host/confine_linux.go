// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// confinement says how a worker shuts itself in.
type confinement struct {
	// Files is the limit of descriptors (RLIMIT_NOFILE), less where the
	// system allows less.
	Files uint64
	// SoftMemory is where Go's collector works harder, HardMemory where the
	// kernel refuses more and the process ends (RLIMIT_DATA); bytes, 0 for no
	// limit.
	SoftMemory, HardMemory int64
	// Caps are the capabilities that root keeps.
	Caps []uintptr
	// ReadOnly and ReadWrite are the directories that a worker without
	// namespaces may still reach. One with them reaches what it is given
	// descriptors of.
	ReadOnly, ReadWrite []string
}

// serverCaps are the capabilities of a file server. A whiteout needs no
// CAP_MKNOD (vfs_mknod of fs/namei.c, since Linux 5.8), and the immutable flag
// is not given: the host's owner of a file could not remove it.
func serverCaps(suid, dev bool) []uintptr {
	caps := []uintptr{
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER,
		unix.CAP_FSETID, unix.CAP_SETUID, unix.CAP_SETGID,
	}
	if suid {
		caps = append(caps, unix.CAP_SETFCAP) // security.capability
	}
	if dev {
		caps = append(caps, unix.CAP_MKNOD)
	}
	return caps
}

// workerAttr makes a process in namespaces of its own, where that is allowed.
func workerAttr() *syscall.SysProcAttr {
	if !canNamespace() {
		return nil
	}
	return &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
	}
}

// confine shuts this process in, for good, and returns an O_PATH descriptor
// of its /proc/self/fd. Nothing of the guest's may have been read before.
// Warnings are what this kernel lacks.
func confine(c confinement) (procFD *os.File, warnings []string, err error) {
	unix.Umask(0)
	ns := canNamespace()
	if ns {
		if err := emptyRoot(); err != nil {
			return nil, nil, fmt.Errorf("empty root: %w", err)
		}
	}
	fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("/proc/self/fd: %w", err)
	}
	procFD = os.NewFile(uintptr(fd), "/proc/self/fd")
	defer func() {
		if err != nil {
			procFD.Close()
		}
	}()
	if err := setLimits(c); err != nil {
		return nil, nil, err
	}
	if !ns {
		w, err := restrictPaths(c)
		if err != nil {
			return nil, nil, err
		}
		if w != "" {
			warnings = append(warnings, w)
		}
	}
	if os.Geteuid() == 0 {
		if err := dropCapabilities(c.Caps); err != nil {
			return nil, nil, fmt.Errorf("capabilities: %w", err)
		}
	}
	if err := allThreads("prctl PR_SET_NO_NEW_PRIVS", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, nil, err
	}
	if err := filterCalls(); err != nil {
		return nil, nil, fmt.Errorf("system call filter: %w", err)
	}
	return procFD, warnings, nil
}

// emptyRoot makes the root of this process's mount namespace a read-only
// directory that holds /proc/self/fd and nothing else.
//
// That is a clone of the one directory, and its own root: ".." ends there, so
// neither /proc/self/mem nor another process is within reach of it.
//
// The host's mounts stay below it, out of reach, and follow what the host mounts
// and unmounts. For the kernel lets a directory be removed or renamed that is a
// mount point in other namespaces only, and takes the mounts there away or along
// (detach_mounts of fs/namespace.c): a guest could unmount what the host has
// mounted in an export. What is a mount point here too is EBUSY.
func emptyRoot() error {
	// Nothing that is mounted here may show outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make / a slave: %w", err)
	}
	procFD, err := unix.OpenTree(unix.AT_FDCWD, "/proc/self/fd", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree /proc/self/fd: %w", err)
	}
	defer unix.Close(procFD)
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen tmpfs: %w", err)
	}
	defer unix.Close(fs)
	for _, o := range [][2]string{{"size", "64k"}, {"nr_inodes", "16"}, {"mode", "0555"}} {
		if err := unix.FsconfigSetString(fs, o[0], o[1]); err != nil {
			return fmt.Errorf("fsconfig %s: %w", o[0], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("fsconfig create: %w", err)
	}
	room, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(room)
	for _, dir := range []string{"proc", "proc/self", "proc/self/fd"} {
		if err := unix.Mkdirat(room, dir, 0o555); err != nil {
			return fmt.Errorf("mkdir %s: %w", dir, err)
		}
	}
	if err := unix.MoveMount(room, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount to /: %w", err)
	}
	if err := unix.MoveMount(procFD, "", room, "proc/self/fd", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount of /proc/self/fd: %w", err)
	}
	if err := unix.Fchdir(room); err != nil {
		return fmt.Errorf("fchdir: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir /: %w", err)
	}
	ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(room, "", unix.AT_EMPTY_PATH, &ro); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

func setLimits(c confinement) error {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("getrlimit RLIMIT_NOFILE: %w", err)
	}
	files.Max = min(files.Max, c.Files)
	files.Cur = files.Max
	// syscall's, so that Go does not think of the old soft limit again.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, (*syscall.Rlimit)(&files)); err != nil {
		return fmt.Errorf("setrlimit RLIMIT_NOFILE: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("setrlimit RLIMIT_CORE: %w", err)
	}
	if c.SoftMemory > 0 {
		debug.SetMemoryLimit(c.SoftMemory)
	}
	if c.HardMemory > 0 {
		hard := unix.Rlimit{Cur: uint64(c.HardMemory), Max: uint64(c.HardMemory)}
		if err := unix.Setrlimit(unix.RLIMIT_DATA, &hard); err != nil {
			return fmt.Errorf("setrlimit RLIMIT_DATA: %w", err)
		}
	}
	return nil
}

// dropCapabilities leaves keep permitted and effective on every thread, but
// CAP_FSETID permitted only: without it in force the kernel itself takes
// set-id bits off a file that is written to, and who needs it raises it on
// his own thread.
func dropCapabilities(keep []uintptr) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if data[0].Permitted == 0 && data[1].Permitted == 0 {
		return nil // root in name only
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	var permitted uint64
	for _, c := range keep {
		permitted |= 1 << c
	}
	permitted &= uint64(data[0].Permitted) | uint64(data[1].Permitted)<<32 // a container's root may have fewer
	effective := permitted &^ (1 << unix.CAP_FSETID)
	for c := uintptr(0); ; c++ {
		if permitted&(1<<c) != 0 {
			continue
		}
		err := allThreads("prctl PR_CAPBSET_DROP", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_AUDIT_READ {
			break // past the last capability that this kernel knows
		}
		if err != nil {
			return err
		}
	}
	if err := allThreads("prctl PR_CAP_AMBIENT", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	data = [2]unix.CapUserData{
		{Effective: uint32(effective), Permitted: uint32(permitted)},
		{Effective: uint32(effective >> 32), Permitted: uint32(permitted >> 32)},
	}
	err := allThreads("capset", unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0, 0, 0)
	runtime.KeepAlive(&hdr)
	runtime.KeepAlive(&data)
	return err
}

// restrictPaths is the wall of who may make no namespaces: Landlock. The warning says where
// this kernel has none.
func restrictPaths(c confinement) (warning string, err error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return "this kernel has no Landlock (" + errno.Error() + "), so nothing but the file server's own checks keeps a guest below its exports; " +
			"enable it (lsm=landlock,…) or run the server as root", nil
	}
	if version < 3 {
		warning = fmt.Sprintf("Landlock of this kernel is version %d, which does not see truncate(2); Linux 6.2 has it", version)
	}
	err = landlock.V7.BestEffort().Restrict(
		landlock.RODirs(c.ReadOnly...).IgnoreIfMissing(),
		landlock.RWDirs(c.ReadWrite...).IgnoreIfMissing().WithRefer(),
	)
	if err != nil {
		return "", fmt.Errorf("landlock for %s: %w", strings.Join(append(c.ReadOnly, c.ReadWrite...), ", "), err)
	}
	return warning, nil
}
