// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Whose number x/sys does not have.
const (
	gfs2Magic     = 0x01161970
	lustreMagic   = 0x0bd00bd0
	gpfsMagic     = 0x47504653
	beegfsMagic   = 0x19830326
	orangefsMagic = 0x20030528
	vboxsfMagic   = 0x786f4256
	configfsMagic = 0x62656570
	fusectlMagic  = 0x65735543
	mqueueMagic   = 0x19800202
	zfsMagic      = 0x2fc12fc1
)

const (
	elsewhere = "what changes elsewhere is not told by this kernel"
	kernels   = "what the kernel changes is not told"
)

// fsTypes has file systems by statfs's f_type: their name, and why their changes can't all be told, if so.
var fsTypes = map[uint32]struct{ name, why string }{
	unix.NFS_SUPER_MAGIC:    {"nfs", elsewhere},
	unix.CIFS_SUPER_MAGIC:   {"cifs", elsewhere},
	unix.SMB2_SUPER_MAGIC:   {"smb", elsewhere},
	unix.SMB_SUPER_MAGIC:    {"smb", elsewhere},
	unix.V9FS_MAGIC:         {"9p", elsewhere},
	unix.FUSE_SUPER_MAGIC:   {"fuse", elsewhere},
	unix.CEPH_SUPER_MAGIC:   {"ceph", elsewhere},
	unix.AFS_SUPER_MAGIC:    {"afs", elsewhere},
	unix.AFS_FS_MAGIC:       {"afs", elsewhere},
	unix.CODA_SUPER_MAGIC:   {"coda", elsewhere},
	unix.NCP_SUPER_MAGIC:    {"ncpfs", elsewhere},
	unix.OCFS2_SUPER_MAGIC:  {"ocfs2", elsewhere},
	unix.HOSTFS_SUPER_MAGIC: {"hostfs", elsewhere},
	gfs2Magic:               {"gfs2", elsewhere},
	lustreMagic:             {"lustre", elsewhere},
	gpfsMagic:               {"gpfs", elsewhere},
	beegfsMagic:             {"beegfs", elsewhere},
	orangefsMagic:           {"orangefs", elsewhere},
	vboxsfMagic:             {"vboxsf", elsewhere},

	unix.PROC_SUPER_MAGIC:     {"proc", kernels},
	unix.SYSFS_MAGIC:          {"sysfs", kernels},
	unix.CGROUP_SUPER_MAGIC:   {"cgroup", kernels},
	unix.CGROUP2_SUPER_MAGIC:  {"cgroup2", kernels},
	unix.DEBUGFS_MAGIC:        {"debugfs", kernels},
	unix.TRACEFS_MAGIC:        {"tracefs", kernels},
	unix.SECURITYFS_MAGIC:     {"securityfs", kernels},
	unix.SELINUX_MAGIC:        {"selinuxfs", kernels},
	unix.SMACK_MAGIC:          {"smackfs", kernels},
	unix.BPF_FS_MAGIC:         {"bpf", kernels},
	unix.DEVPTS_SUPER_MAGIC:   {"devpts", kernels},
	unix.PSTOREFS_MAGIC:       {"pstore", kernels},
	unix.EFIVARFS_MAGIC:       {"efivarfs", kernels},
	unix.BINFMTFS_MAGIC:       {"binfmt_misc", kernels},
	unix.RDTGROUP_SUPER_MAGIC: {"resctrl", kernels},
	unix.AUTOFS_SUPER_MAGIC:   {"autofs", kernels},
	configfsMagic:             {"configfs", kernels},
	fusectlMagic:              {"fusectl", kernels},
	mqueueMagic:               {"mqueue", kernels},

	unix.BTRFS_SUPER_MAGIC:     {"btrfs", ""},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", ""},
	unix.ECRYPTFS_SUPER_MAGIC:  {"ecryptfs", ""},
	unix.MSDOS_SUPER_MAGIC:     {"vfat", ""},
	unix.EXFAT_SUPER_MAGIC:     {"exfat", ""},
	unix.SQUASHFS_MAGIC:        {"squashfs", ""},
	unix.ISOFS_SUPER_MAGIC:     {"iso9660", ""},
	unix.EXT4_SUPER_MAGIC:      {"ext4", ""},
	unix.XFS_SUPER_MAGIC:       {"xfs", ""},
	unix.F2FS_SUPER_MAGIC:      {"f2fs", ""},
	unix.BCACHEFS_SUPER_MAGIC:  {"bcachefs", ""},
	unix.TMPFS_MAGIC:           {"tmpfs", ""},
	unix.RAMFS_MAGIC:           {"ramfs", ""},
	unix.HUGETLBFS_MAGIC:       {"hugetlbfs", ""},
	zfsMagic:                   {"zfs", ""},
}

// CheckFS says why the changes of the file system that fd (which may be an O_PATH descriptor) is of can't all be told, judged by its
// type. [Watcher.Add] asks it itself; [Dirs.Add] does not, as who adds many directories has to ask once for each file system.
func CheckFS(fd int) error {
	_, _, err := fileSystem(fd)
	return err
}

// fileSystem is the type and more of the file system that fd is of, if its changes can be told.
func fileSystem(fd int) (kind string, st unix.Statfs_t, err error) {
	if err := unix.Fstatfs(fd, &st); err != nil {
		return "", st, os.NewSyscallError("fstatfs", err)
	}
	t, ok := fsTypes[uint32(st.Type)]
	switch {
	case !ok:
		t.name = fmt.Sprintf("file system of type %#x", uint32(st.Type))
	case t.why != "":
		return t.name, st, fmt.Errorf("%s: %s", t.name, t.why)
	}
	return t.name, st, nil
}
