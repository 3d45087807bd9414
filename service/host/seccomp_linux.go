// SPDX-License-Identifier: Apache-2.0

package host

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// allowedCalls are those of the Go runtime and of a file server on
// descriptors, the frequent ones first. What is neither here nor in
// conditionalCalls fails with EPERM: execve, socket, ptrace, mount, bpf, modules,
// namespaces, signals to others.
var allowedCalls = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_FUTEX, unix.SYS_STATX, unix.SYS_OPENAT2, unix.SYS_OPENAT, unix.SYS_CLOSE,
	unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP,

	// Files, by descriptor or below one.
	unix.SYS_COPY_FILE_RANGE, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_FALLOCATE,
	unix.SYS_FCHDIR, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_FCNTL,
	unix.SYS_FDATASYNC, unix.SYS_FGETXATTR, unix.SYS_FLISTXATTR, unix.SYS_FLOCK, unix.SYS_FREMOVEXATTR, unix.SYS_FSETXATTR,
	unix.SYS_FSTAT, unix.SYS_FSTATFS, unix.SYS_FSYNC, unix.SYS_FTRUNCATE, unix.SYS_GETDENTS64, unix.SYS_GETXATTR,
	unix.SYS_LGETXATTR, unix.SYS_LINKAT, unix.SYS_LISTXATTR, unix.SYS_LLISTXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_LSEEK,
	unix.SYS_LSETXATTR, unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_NAME_TO_HANDLE_AT, sysNewfstatat,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_PREADV, unix.SYS_PREADV2, unix.SYS_PWRITEV, unix.SYS_PWRITEV2, unix.SYS_READLINKAT,
	unix.SYS_READV, unix.SYS_REMOVEXATTR, unix.SYS_RENAMEAT2, unix.SYS_SETXATTR, unix.SYS_SPLICE, unix.SYS_SYMLINKAT,
	unix.SYS_SYNCFS, unix.SYS_UNLINKAT, unix.SYS_UTIMENSAT, unix.SYS_WRITEV,
	sysSetxattrat, sysGetxattrat, sysListxattrat, sysRemovexattrat,

	// What changes in directories.
	unix.SYS_INOTIFY_INIT1, unix.SYS_INOTIFY_ADD_WATCH, unix.SYS_INOTIFY_RM_WATCH,

	// The caller's ids, on one thread.
	unix.SYS_CAPGET, unix.SYS_CAPSET, unix.SYS_SETFSGID, unix.SYS_SETFSUID, unix.SYS_SETGROUPS, unix.SYS_UMASK,

	// The streams and the parent: sockets that were given.
	unix.SYS_GETPEERNAME, unix.SYS_GETSOCKNAME, unix.SYS_GETSOCKOPT, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_SENDMSG,
	unix.SYS_SENDTO, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN,

	// The runtime: memory, threads, time, its poller.
	unix.SYS_BRK, unix.SYS_CLOCK_GETRES, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_EPOLL_CREATE1,
	unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT2, unix.SYS_EVENTFD2, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_GETEGID,
	unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETGROUPS, unix.SYS_GETPID, unix.SYS_GETPPID, unix.SYS_GETRANDOM,
	unix.SYS_GETTID, unix.SYS_GETTIMEOFDAY, unix.SYS_GETUID, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_MREMAP,
	unix.SYS_MUNMAP, unix.SYS_PIPE2, unix.SYS_PPOLL, unix.SYS_RESTART_SYSCALL, unix.SYS_RSEQ, unix.SYS_RT_SIGACTION,
	unix.SYS_RT_SIGPENDING, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SCHED_GETAFFINITY,
	unix.SYS_SCHED_YIELD, unix.SYS_SET_ROBUST_LIST, unix.SYS_SIGALTSTACK, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_DELETE,
	unix.SYS_TIMER_SETTIME, unix.SYS_UNAME,
}

// Newer than the tables of x/sys, and the same on all machines
// (scripts/syscall.tbl of Linux 6.13).
const (
	sysSetxattrat    = 463
	sysGetxattrat    = 464
	sysListxattrat   = 465
	sysRemovexattrat = 466
)

// File flags: the commands of linux/fs.h. No other ioctl is for a guest to
// cause, least of all on a terminal that is our standard error.
const (
	fsIocFSGetXAttr = 0x801c581f // _IOR('X', 31, struct fsxattr)
	fsIocFSSetXAttr = 0x401c5820 // _IOW('X', 32, struct fsxattr)
)

// conditionalCall is allowed if an argument, of which the kernel looks at
// the low 32 bits for these, has all bits of set and none of clear, or is one
// of equal.
type conditionalCall struct {
	nr         uint32
	arg        uint32
	set, clear uint32
	equal      []uint32
}

func conditionalCalls() []conditionalCall {
	return []conditionalCall{
		// A thread, never a process.
		{nr: unix.SYS_CLONE, arg: 0, set: unix.CLONE_THREAD, clear: unix.CLONE_NEWUSER},
		// No code but that of the program file.
		{nr: unix.SYS_MMAP, arg: 2, clear: unix.PROT_EXEC},
		{nr: unix.SYS_MPROTECT, arg: 2, clear: unix.PROT_EXEC},
		// The runtime names its mappings.
		{nr: unix.SYS_PRCTL, arg: 0, equal: []uint32{unix.PR_SET_VMA}},
		// Its own limits and threads only.
		{nr: unix.SYS_PRLIMIT64, arg: 0, equal: []uint32{0}},
		{nr: unix.SYS_TGKILL, arg: 0, equal: []uint32{uint32(os.Getpid())}},
		{nr: unix.SYS_IOCTL, arg: 1, equal: []uint32{unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS, fsIocFSGetXAttr, fsIocFSSetXAttr}},
	}
}

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

// callFilter is the filter as a program. (The library for this, go-seccomp-bpf
// 1.6.0, goes on to compare the argument of a refused call as if it were the
// number of one.)
func callFilter() []bpf.Instruction {
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	refuse := bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}
	missing := bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: dataArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		refuse,
		bpf.LoadAbsolute{Off: dataNr, Size: 4},
	}
	when := func(nr uint32, then ...bpf.Instruction) {
		prog = append(prog, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: uint8(len(then))})
		prog = append(prog, then...)
	}
	for _, nr := range append(allowedCalls, legacyCalls...) {
		when(nr, allow)
	}
	// Callers of clone3 go on with clone if it does not exist.
	when(unix.SYS_CLONE3, missing)
	for _, c := range conditionalCalls() {
		// Each ends in a verdict: the accumulator no longer holds the number.
		then := []bpf.Instruction{bpf.LoadAbsolute{Off: dataArgs + 8*c.arg + lowWord, Size: 4}}
		for _, v := range c.equal {
			then = append(then, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, allow)
		}
		if c.equal == nil {
			then = append(then,
				bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: c.clear, SkipTrue: 3},
				bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: c.set},
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: c.set, SkipTrue: 1},
				allow)
		}
		when(c.nr, append(then, refuse)...)
	}
	return append(prog, refuse)
}

// filterCalls lets every thread make the allowed system calls only. It needs
// no_new_privs on this one, and gives it to the others.
func filterCalls() error {
	raw, err := bpf.Assemble(callFilter())
	if err != nil {
		return err
	}
	insns := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		insns[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(insns)), Filter: &insns[0]}
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(insns)
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if tid != 0 {
		return fmt.Errorf("seccomp: thread %d has another filter", tid)
	}
	return nil
}
