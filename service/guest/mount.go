// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// subtype makes the file system's type fuse.transfuse in mount tables.
const subtype = "transfuse"

// MountOptions are what can be asked of a mount. The zero value is the safe one but for DefaultPermissions: only the
// one who mounts may enter, and set-id bits and devices do not count.
type MountOptions struct {
	Source             string // what the mount table shows as the device
	ReadOnly           bool   // of the mount, not of the superblock: events are acted through a writable clone
	Suid, Dev, NoExec  bool
	NoAtime            bool
	Sync, DirSync      bool
	AllowOther         bool
	DefaultPermissions bool   // the kernel checks modes and ACLs
	MaxRead            uint32 // bytes of one READ at most; 0 leaves it to INIT
	Streams            int    // at most; 0: the default
	NoAuto             bool   // of a configured mount: it is made when it is asked for, by mount(8) or the automounter, and not before
}

// ParseMountOptions reads options as mount(8) and fusermount(1) write them, each of which may hold several
// separated by commas. An option that is not known is an error: its meaning would be lost.
func ParseMountOptions(options []string) (MountOptions, error) {
	var o MountOptions
	automount := false
	for _, list := range options {
		for opt := range strings.SplitSeq(list, ",") {
			key, val, has := strings.Cut(opt, "=")
			switch {
			case key == "fsname" && has, key == "source" && has:
				o.Source = val
			case key == "x-systemd.automount":
				automount = true
			case key == "subtype" && has, strings.HasPrefix(key, "x-"), strings.HasPrefix(key, "X-"):
				// The subtype is always ours, and x- is for mount(8) and systemd.
			case key == "max_read" && has:
				n, err := strconv.ParseUint(val, 10, 32)
				if err != nil || n < 4096 {
					return o, fmt.Errorf("mount option %q: a number of bytes from 4096 is wanted", opt)
				}
				o.MaxRead = uint32(n)
			case key == "streams" && has:
				n, err := strconv.Atoi(val)
				if err != nil || n < 1 || n > maxStreams {
					return o, fmt.Errorf("mount option %q: a number from 1 to %d is wanted", opt, maxStreams)
				}
				o.Streams = n
			case key == "cache" && (val == "coherent" || val == "none" || val == "always"), key == "writeback" && (val == "on" || val == "off"):
				// They are the host's to know.
			case has:
				return o, unknownOption(opt)
			default:
				if err := o.set(key); err != nil {
					return o, err
				}
			}
		}
	}
	// Behind the automounter's point, auto changes nothing; and who walked there now would wait for this very mount.
	o.NoAuto = o.NoAuto || automount
	return o, nil
}

func (o *MountOptions) set(key string) error {
	switch key {
	case "", "defaults", "nofail", "_netdev":
		// The latter two are for systemd, too.
	case "noauto":
		o.NoAuto = true
	case "auto":
		o.NoAuto = false
	case "ro":
		o.ReadOnly = true
	case "rw":
		o.ReadOnly = false
	case "suid":
		o.Suid = true
	case "nosuid":
		o.Suid = false
	case "dev":
		o.Dev = true
	case "nodev":
		o.Dev = false
	case "exec":
		o.NoExec = false
	case "noexec":
		o.NoExec = true
	case "atime", "relatime":
		o.NoAtime = false
	case "noatime":
		o.NoAtime = true
	case "sync":
		o.Sync = true
	case "async":
		o.Sync = false
	case "dirsync":
		o.DirSync = true
	case "allow_other":
		o.AllowOther = true
	case "default_permissions":
		o.DefaultPermissions = true
	default:
		return unknownOption(key)
	}
	return nil
}

// knownOptions are those that ParseMountOptions takes and that have an effect.
const knownOptions = "ro, rw, suid, nosuid, dev, nodev, exec, noexec, atime, noatime, relatime, sync, async, dirsync, " +
	"allow_other, default_permissions, fsname=NAME, max_read=BYTES, streams=COUNT, cache=coherent, cache=none, cache=always, writeback=on, writeback=off"

func unknownOption(o string) error {
	return fmt.Errorf("mount option %q is not known: there are %s", o, knownOptions)
}

// hostOptions are those of a list that a host of version 2 has a say in, the last of each kind: ro or rw, cache=, writeback=. It refuses others.
func hostOptions(options []string) []string {
	last := map[string]string{}
	for _, list := range options {
		for opt := range strings.SplitSeq(list, ",") {
			switch key, _, _ := strings.Cut(opt, "="); key {
			case "ro", "rw":
				last["ro"] = opt
			case "cache", "writeback":
				last[key] = opt
			}
		}
	}
	var all []string
	for _, key := range []string{"ro", "cache", "writeback"} {
		if last[key] != "" {
			all = append(all, last[key])
		}
	}
	return all
}

// list is what fusermount3 is told.
func (o *MountOptions) list() string {
	l := []string{"subtype=" + subtype}
	for _, f := range []struct {
		on   bool
		name string
	}{
		{o.ReadOnly, "ro"}, {o.Suid, "suid"}, {o.Dev, "dev"}, {o.NoExec, "noexec"}, {o.NoAtime, "noatime"},
		{o.Sync, "sync"}, {o.DirSync, "dirsync"}, {o.AllowOther, "allow_other"},
		{o.DefaultPermissions, "default_permissions"},
		{o.Source != "", "fsname=" + strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(o.Source)},
		{o.MaxRead != 0, "max_read=" + strconv.FormatUint(uint64(o.MaxRead), 10)},
	} {
		if f.on {
			l = append(l, f.name)
		}
	}
	return strings.Join(l, ",")
}

// Mount mounts a new FUSE file system over dir, and needs CAP_SYS_ADMIN. It returns the device, ready for
// NewPump; the caller owns it.
func Mount(dir string, o MountOptions) (*os.File, error) {
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "mount over", Path: dir, Err: err}
	}
	defer unix.Close(at)
	return mountAt(at, o)
}

// mountAt is Mount over an O_PATH descriptor of a directory: nobody can exchange what was checked.
func mountAt(at int, o MountOptions) (*os.File, error) {
	dev, mnt, err := makeMount(o)
	if err != nil {
		return nil, err
	}
	defer mnt.Close()
	if err := attach(mnt, at); err != nil {
		dev.Close()
		return nil, err
	}
	return dev, nil
}

// attach puts a mount that is nowhere yet over the directory at.
func attach(mnt *os.File, at int) error {
	if err := unix.MoveMount(int(mnt.Fd()), "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return mountError("move_mount", -1, err)
	}
	return nil
}

// makeMount makes a mount that is nowhere yet, so that it is never seen with other attributes than those asked for, nor before its
// device is where it is to be. The caller owns both files.
func makeMount(o MountOptions) (dev, mount *os.File, err error) {
	fd, err := openDevice()
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, nil, mountError("fsopen", fs, err)
	}
	defer unix.Close(fs)
	set := func(key, val string) {
		if err == nil {
			if err = unix.FsconfigSetString(fs, key, val); err != nil {
				err = mountError("fsconfig "+key, fs, err)
			}
		}
	}
	flag := func(on bool, key string) {
		if on && err == nil {
			if err = unix.FsconfigSetFlag(fs, key); err != nil {
				err = mountError("fsconfig "+key, fs, err)
			}
		}
	}
	source := o.Source
	if source == "" {
		source = subtype
	}
	set("source", source)
	set("subtype", subtype)
	set("fd", strconv.Itoa(fd))
	set("rootmode", "40000")
	set("user_id", strconv.Itoa(os.Geteuid()))
	set("group_id", strconv.Itoa(os.Getegid()))
	if o.MaxRead != 0 {
		set("max_read", strconv.FormatUint(uint64(o.MaxRead), 10))
	}
	flag(o.AllowOther, "allow_other")
	flag(o.DefaultPermissions, "default_permissions")
	flag(o.Sync, "sync")
	flag(o.DirSync, "dirsync")
	if err != nil {
		return nil, nil, err
	}
	if err = unix.FsconfigCreate(fs); err != nil {
		return nil, nil, mountError("fsconfig create", fs, err)
	}
	attrs := 0
	for _, f := range []struct {
		on   bool
		attr int
	}{
		{o.ReadOnly, unix.MOUNT_ATTR_RDONLY}, {!o.Suid, unix.MOUNT_ATTR_NOSUID}, {!o.Dev, unix.MOUNT_ATTR_NODEV},
		{o.NoExec, unix.MOUNT_ATTR_NOEXEC}, {o.NoAtime, unix.MOUNT_ATTR_NOATIME},
	} {
		if f.on {
			attrs |= f.attr
		}
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, nil, mountError("fsmount", fs, err)
	}
	if dev, err = deviceFile(fd); err != nil {
		unix.Close(mnt)
		return nil, nil, err
	}
	return dev, os.NewFile(uintptr(mnt), "mount"), nil
}

// openDevice opens /dev/fuse for a mount. It must not be in the poller yet: before the mount, joining it would hang.
func openDevice() (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
		return fd, nil
	case unix.ENOENT, unix.ENODEV, unix.ENXIO:
		return -1, fmt.Errorf("open /dev/fuse: %w: load the kernel's module with modprobe fuse", err)
	case unix.EACCES, unix.EPERM:
		return -1, fmt.Errorf("open /dev/fuse: %w: run as root, or give this user access to the device", err)
	}
	return -1, fmt.Errorf("open /dev/fuse: %w", err)
}

// deviceFile puts the device of a finished mount into the runtime's poller. It owns fd unless it fails.
func deviceFile(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// mountError adds what the kernel wrote into the file system context, its own words for the cause.
func mountError(call string, fs int, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: %w: mounting needs CAP_SYS_ADMIN; an ordinary user mounts by fusermount3 (package fuse3)", call, err)
	}
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s: %w: the kernel has no FUSE; load it with modprobe fuse", call, err)
	}
	if fs >= 0 {
		buf := make([]byte, 512)
		if n, rerr := unix.Read(fs, buf); rerr == nil && n > 2 {
			return fmt.Errorf("%s: %w: %s", call, err, strings.TrimSpace(string(buf[2:n])))
		}
	}
	return fmt.Errorf("%s: %w", call, err)
}
