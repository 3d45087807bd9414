// SPDX-License-Identifier: Apache-2.0

package host

import (
	"os"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// allowedCalls are those of the Go runtime and of a file server on
// descriptors. What is not here fails with EPERM: execve, socket, ptrace,
// mount, bpf, modules, namespaces, signals to others.
var allowedCalls = []string{
	// Files, by descriptor or below one.
	"close", "copy_file_range", "dup", "dup3", "faccessat", "faccessat2", "fallocate", "fchdir", "fchmod", "fchmodat", "fchown",
	"fchownat", "fcntl", "fdatasync", "fgetxattr", "flistxattr", "flock", "fremovexattr", "fsetxattr", "fstat",
	"fstatfs", "fsync", "ftruncate", "getdents64", "getxattr", "lgetxattr", "linkat", "listxattr", "llistxattr", "lremovexattr",
	"lseek", "lsetxattr", "mkdirat", "mknodat", "name_to_handle_at", "newfstatat", "open_by_handle_at", "openat", "openat2",
	"pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readlinkat", "readv", "removexattr", "renameat",
	"renameat2", "setxattr", "splice", "statx", "symlinkat", "sync_file_range", "syncfs", "unlinkat", "utimensat",
	"write", "writev",
	// The caller's ids on one thread.
	"capget", "capset", "setfsgid", "setfsuid", "setgroups", "umask",
	// Its streams and its parent: sockets that it was given.
	"getpeername", "getsockname", "getsockopt", "recvfrom", "recvmsg", "sendmsg", "sendto", "setsockopt", "shutdown",
	// The runtime: memory, threads, time, its poller.
	"brk", "clock_getres", "clock_gettime", "clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2",
	"eventfd2", "exit", "exit_group", "futex", "getegid", "geteuid", "getgid", "getgroups", "getpid", "getppid", "getrandom", "getrlimit",
	"gettid", "gettimeofday", "getuid", "madvise", "mincore", "mremap", "munmap", "nanosleep", "pipe2", "ppoll",
	"restart_syscall", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity",
	"sched_yield", "set_robust_list", "sigaltstack", "timer_create", "timer_delete", "timer_settime", "uname",
}

// File flags: the commands of FS_IOC_*, linux/fs.h. No other ioctl is for the
// guest to cause, least of all on a terminal that is our standard error.
var allowedIoctls = []uint64{unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS, fsIocFSGetXAttr, fsIocFSSetXAttr}

const (
	fsIocFSGetXAttr = 0x801c581f // _IOR('X', 31, struct fsxattr)
	fsIocFSSetXAttr = 0x401c5820 // _IOW('X', 32, struct fsxattr)
)

// filterCalls lets every thread make the allowed system calls only. It needs
// no_new_privs.
func filterCalls() error {
	return seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls:      callGroups(),
		},
	})
}

func callGroups() []seccomp.SyscallGroup {
	when := func(name string, conds ...seccomp.Condition) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{Name: name, Conditions: conds}
	}
	arg := func(n uint32, op seccomp.Operation, v uint64) seccomp.Condition {
		return seccomp.Condition{Argument: n, Operation: op, Value: v}
	}
	conditional := []seccomp.NameWithConditions{
		// A thread, never a process.
		when("clone", arg(0, seccomp.BitsSet, unix.CLONE_THREAD), arg(0, seccomp.BitsNotSet, unix.CLONE_NEWUSER)),
		// No code but that of the program file.
		when("mmap", arg(2, seccomp.BitsNotSet, unix.PROT_EXEC)),
		when("mprotect", arg(2, seccomp.BitsNotSet, unix.PROT_EXEC)),
		// The runtime names its mappings.
		when("prctl", arg(0, seccomp.Equal, unix.PR_SET_VMA)),
		// Its own limits and threads. As the first process of its namespace
		// it has pid 1; an ordinary user's has the pid that it has.
		when("prlimit64", arg(0, seccomp.Equal, 0)),
		when("tgkill", arg(0, seccomp.Equal, uint64(os.Getpid()))),
	}
	for _, cmd := range allowedIoctls {
		// The kernel looks at 32 bits of the command.
		conditional = append(conditional, when("ioctl", arg(1, seccomp.Equal, cmd)))
	}
	groups := []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: allowedCalls},
		{Action: seccomp.ActionAllow, NamesWithCondtions: conditional},
		// Callers of clone3 go on with clone when it does not exist.
		{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
	}
	return append(groups, legacyGroup()...)
}
