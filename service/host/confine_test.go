// SPDX-License-Identifier: Apache-2.0

package host

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// attempt is what came of something that a worker tried.
type attempt struct{ Name, Result string }

// probe tries from within a worker what one must not do, and reports the
// results as log lines.
func probe(w *worker, procFD *os.File) {
	try := func(name string, err error) {
		result := "done"
		var errno syscall.Errno
		if err != nil {
			result = err.Error()
		}
		if e, ok := err.(syscall.Errno); ok {
			errno = e
			result = unix.ErrnoName(errno)
		}
		b, _ := json.Marshal(attempt{name, result})
		w.conn.Send(report{Log: &logReport{slog.LevelInfo, "probe " + string(b)}})
	}
	call := func(name string, nr uintptr, args ...uintptr) {
		var a [6]uintptr
		copy(a[:], args)
		_, _, errno := unix.Syscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno == 0 {
			try(name, nil)
		} else {
			try(name, errno)
		}
	}
	open := func(name string, dirfd int, path string) {
		fd, err := unix.Openat(dirfd, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		try(name, err)
	}
	str := func(s string) uintptr { return uintptr(unsafe.Pointer(unsafe.StringData(s + "\x00"))) }

	open("open /etc/passwd", unix.AT_FDCWD, "/etc/passwd")
	open("open above /", unix.AT_FDCWD, "../../../../etc/passwd")
	open("open above /proc/self/fd", int(procFD.Fd()), "../mem")
	open("open above /proc/self/fd twice", int(procFD.Fd()), "../../1/root/etc/passwd")
	open("open /proc/self/mem", unix.AT_FDCWD, "/proc/self/mem")
	open("open through /proc/self/fd", int(procFD.Fd()), fmt.Sprint(procFD.Fd(), "/../../etc/passwd"))
	if root, err := unix.Open("/", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		try("list /", err)
	} else {
		names, err := os.NewFile(uintptr(root), "/").Readdirnames(-1)
		if err == nil {
			err = fmt.Errorf("%q", names)
		}
		try("list /", err)
	}
	call("write to /", unix.SYS_MKDIRAT, ^uintptr(99), str("/x"), 0o755) // AT_FDCWD is -100
	argv := [2]uintptr{str("/proc/self/exe"), 0}
	call("execve", unix.SYS_EXECVE, str("/proc/self/exe"), uintptr(unsafe.Pointer(&argv)), 0)
	call("execveat", unix.SYS_EXECVEAT, 0, str(""), uintptr(unsafe.Pointer(&argv)), 0, unix.AT_EMPTY_PATH)
	call("fork", unix.SYS_CLONE, uintptr(unix.SIGCHLD))
	call("unshare", unix.SYS_UNSHARE, unix.CLONE_NEWUSER)
	call("setns", unix.SYS_SETNS, 0, 0)
	call("socket unix", unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM)
	call("socket inet", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM)
	call("socket vsock", unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)
	call("ptrace", unix.SYS_PTRACE, unix.PTRACE_TRACEME)
	call("mount", unix.SYS_MOUNT, 0, str("/"), 0, unix.MS_REMOUNT|unix.MS_BIND)
	call("umount2", unix.SYS_UMOUNT2, str("/proc/self/fd"), unix.MNT_DETACH)
	call("open_tree", unix.SYS_OPEN_TREE, ^uintptr(99), str("/"), unix.OPEN_TREE_CLONE)
	call("pivot_root", unix.SYS_PIVOT_ROOT, str("/"), str("/"))
	call("chroot", unix.SYS_CHROOT, str("/"))
	call("init_module", unix.SYS_INIT_MODULE, 0, 0, str(""))
	call("finit_module", unix.SYS_FINIT_MODULE, 0, str(""), 0)
	call("bpf", unix.SYS_BPF, 0, 0, 0)
	call("keyctl", unix.SYS_KEYCTL, 0)
	call("io_uring_setup", unix.SYS_IO_URING_SETUP, 1, 0)
	call("userfaultfd", unix.SYS_USERFAULTFD, 0)
	call("process_vm_readv", unix.SYS_PROCESS_VM_READV, uintptr(os.Getppid()), 0, 0, 0, 0)
	call("kill the parent", unix.SYS_KILL, uintptr(os.Getppid()), 0)
	call("tgkill another", unix.SYS_TGKILL, uintptr(os.Getpid()+1), uintptr(os.Getpid()+1), 0)
	call("executable memory", unix.SYS_MMAP, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON, ^uintptr(0))
	call("type into the terminal", unix.SYS_IOCTL, 2, unix.TIOCSTI, str("x"))
	call("become another uid", unix.SYS_SETRESUID, 1, 1, 1)
	call("a limit of the parent", unix.SYS_PRLIMIT64, uintptr(os.Getppid()), unix.RLIMIT_NOFILE, 0, 0)
	call("no seccomp more", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 0)
	_, err := net.Dial("unix", "/run/dbus/system_bus_socket")
	try("dial", unix.Errno(errnoOf(err)))
	_, err = os.StartProcess("/proc/self/exe", []string{"x"}, &os.ProcAttr{})
	try("start a process", unix.Errno(errnoOf(err)))
	try("end", nil)
}

// probed starts a worker that probes, and returns what came of it with the
// worker's pid.
func probed(t *testing.T) (map[string]string, int) {
	t.Setenv(hookEnv, "probe")
	h := startHost(t, Config{Exports: []Export{exportDir(t, "code")}})
	g := newGuest(t, h.addr, 1).connect()
	f, _ := g.mount("code")
	if got := f.read("hello"); got != "hello from code" {
		t.Errorf("read %q in a confined worker", got)
	}
	got := map[string]string{}
	for _, line := range h.logs.all() {
		m := regexp.MustCompile(`probe (.*?\})`).FindStringSubmatch(line)
		if m == nil {
			continue
		}
		// Quoted by the text handler, and perhaps by quote before it.
		text := m[1]
		for strings.Contains(text, `\`) && !json.Valid([]byte(text)) {
			u, err := strconv.Unquote(`"` + text + `"`)
			if err != nil {
				break
			}
			text = u
		}
		var a attempt
		if err := json.Unmarshal([]byte(text), &a); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		got[a.Name] = a.Result
	}
	return got, h.workerPids()[0]
}

// workerPids are the workers' processes.
func (h *testHost) workerPids() (pids []int) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	for ss := range h.s.sessions {
		ss.mu.Lock()
		if ss.worker != nil {
			pids = append(pids, ss.worker.proc.Pid())
		}
		ss.mu.Unlock()
	}
	return pids
}

// status reads fields of /proc/PID/status; of each thread, which must agree.
func status(t *testing.T, pid int, fields ...string) map[string]string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %v", pid, err)
	}
	all := map[string]string{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // a thread may end
		}
		for _, line := range strings.Split(string(b), "\n") {
			k, v, _ := strings.Cut(line, ":")
			v = strings.TrimSpace(v)
			for _, want := range fields {
				if k == want {
					if old, ok := all[k]; ok && old != v {
						t.Errorf("%s: %s is %q, %q in another thread", f, k, v, old)
					}
					all[k] = v
				}
			}
		}
	}
	return all
}

func TestConfinement(t *testing.T) {
	if !canNamespace() {
		t.Fatal("run the tests as root: sudo -E go test ./...")
	}
	got, pid := probed(t)
	want := map[string]string{
		"open /etc/passwd": "ENOENT", "open above /": "ENOENT", "open above /proc/self/fd": "ENOENT",
		"open above /proc/self/fd twice": "ENOENT", "open /proc/self/mem": "ENOENT", "open through /proc/self/fd": "ENOENT",
		"list /": `["proc"]`, "write to /": "EROFS",
		"execve": "EPERM", "execveat": "EPERM", "fork": "EPERM", "unshare": "EPERM", "setns": "EPERM",
		"socket unix": "EPERM", "socket inet": "EPERM", "socket vsock": "EPERM", "ptrace": "EPERM",
		"mount": "EPERM", "umount2": "EPERM", "open_tree": "EPERM", "pivot_root": "EPERM", "chroot": "EPERM",
		"init_module": "EPERM", "finit_module": "EPERM", "bpf": "EPERM", "keyctl": "EPERM", "io_uring_setup": "EPERM",
		"userfaultfd": "EPERM", "process_vm_readv": "EPERM", "kill the parent": "EPERM", "tgkill another": "EPERM",
		"executable memory": "EPERM", "type into the terminal": "EPERM", "become another uid": "EPERM",
		"a limit of the parent": "done", "no seccomp more": "EPERM", "dial": "EPERM", "start a process": "EPERM", "end": "done",
	}
	// The parent of a namespace's first process is 0, which here means itself.
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what a worker tried (-want +got):\n%s", diff)
	}

	bits := func(caps ...uint) string {
		var n uint64
		for _, c := range caps {
			n |= 1 << c
		}
		return fmt.Sprintf("%016x", n)
	}
	permitted := []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_SETUID, unix.CAP_SETGID}
	wantStatus := map[string]string{
		"CapInh": bits(), "CapAmb": bits(), "CapEff": bits(permitted...),
		"CapPrm": bits(append(permitted, unix.CAP_FSETID)...), "CapBnd": bits(append(permitted, unix.CAP_FSETID)...),
		"NoNewPrivs": "1", "Seccomp": "2", "Groups": "",
	}
	fields := slices.Sorted(maps.Keys(wantStatus))
	if raceEnabled {
		t.Log("NOT RUN: capabilities of all threads: the race detector's build cannot drop them; go test without -race does")
		fields = slices.DeleteFunc(fields, func(f string) bool { return strings.HasPrefix(f, "Cap") })
		maps.DeleteFunc(wantStatus, func(f, _ string) bool { return strings.HasPrefix(f, "Cap") })
	}
	if diff := cmp.Diff(wantStatus, status(t, pid, fields...)); diff != "" {
		t.Errorf("status of the worker (-want +got):\n%s", diff)
	}
	for _, ns := range []string{"mnt", "pid", "net", "ipc"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err1 != nil || err2 != nil || ours == theirs {
			t.Errorf("namespace %s: %s %v, ours %s %v", ns, theirs, err2, ours, err1)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil || strings.Count(string(mounts), "\n") != 2 {
		t.Errorf("mounts of the worker: %v\n%s", err, mounts)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil || !regexp.MustCompile(`Max core file size +0 +0`).Match(limits) ||
		!raceEnabled && !regexp.MustCompile(fmt.Sprintf(`Max data size +%d +%[1]d`, workerHardMemory)).Match(limits) {
		t.Errorf("limits of the worker: %v\n%s", err, limits)
	}
	// Nothing of the parent's: standard streams, the pair, the poller's two,
	// /proc/self/fd, and the export's and its stream's.
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil || len(fds) > 24 {
		t.Errorf("the worker has %d descriptors, %v", len(fds), err)
	}
	for _, fd := range fds {
		l, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if strings.HasPrefix(l, "/etc") || strings.HasPrefix(l, "/home") || strings.Contains(l, "h.sock") {
			t.Errorf("the worker has %s", l)
		}
	}
}

// An ordinary user's worker is kept to its exports by Landlock.
func TestConfinementOfAUser(t *testing.T) {
	if os.Getenv("TRANSFUSE_TEST_USER") == "" {
		asUser(t)
		return
	}
	got, pid := probed(t)
	for name, want := range map[string]string{
		"open /etc/passwd": "EACCES", "open above /": "EACCES", "execve": "EPERM", "socket inet": "EPERM", "ptrace": "EPERM",
		"mount": "EPERM", "init_module": "EPERM", "start a process": "EPERM", "end": "done",
	} {
		if got[name] != want {
			t.Errorf("%s: %s, want %s", name, got[name], want)
		}
	}
	if diff := cmp.Diff(map[string]string{"CapEff": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"},
		status(t, pid, "CapEff", "NoNewPrivs", "Seccomp")); diff != "" {
		t.Errorf("status of the worker (-want +got):\n%s", diff)
	}
}

// asUser runs the calling test again as nobody.
func asUser(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "transfuse-user")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	const nobody = 65534
	bin := filepath.Join(dir, "test")
	exe, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(bin, exe, 0o755)
	}
	if err == nil {
		err = os.Chown(dir, nobody, nobody)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TRANSFUSE_TEST_USER=1", "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}
