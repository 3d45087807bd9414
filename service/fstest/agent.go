// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// agentEnv marks a process that was re-executed as an agent.
const agentEnv = "FSTEST_AGENT"

// request is one system call that an agent makes. Paths are relative to the
// case's directory, which the agent works in by descriptor: so another user
// needs no right on what lies above it.
type request struct {
	Op          string
	Path, Path2 string
	N           [5]int64
}

type response struct {
	Errno unix.Errno
	N     [5]int64
	Text  string
}

// An agent makes all its calls in its first thread, so that it can be signalled there.
func init() {
	if os.Getenv(agentEnv) != "" {
		runtime.LockOSThread()
	}
}

// Child makes this process an agent if the suite started it as one, and then
// returns true at its end. Call it first in TestMain:
//
//	func TestMain(m *testing.M) {
//		if fstest.Child() {
//			return
//		}
//		os.Exit(m.Run())
//	}
func Child() bool {
	if os.Getenv(agentEnv) == "" {
		return false
	}
	if err := unix.Fchdir(3); err != nil {
		fmt.Fprintln(os.Stderr, "fstest agent: enter the case's directory:", err)
		return true
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q request
		if in.Decode(&q) != nil {
			return true // the suite has gone
		}
		var r response
		if err := q.do(&r); err != nil && !errors.As(err, &r.Errno) {
			r.Text, r.Errno = err.Error(), unix.EPROTO
		}
		if out.Encode(r) != nil {
			return true
		}
	}
}

func (q *request) do(r *response) (err error) {
	n := q.N
	switch q.Op {
	case "open": // flags, mode; the descriptor stays open
		var fd int
		fd, err = unix.Open(q.Path, int(n[0])|unix.O_CLOEXEC, uint32(n[1]))
		r.N[0] = int64(fd)
	case "close":
		return unix.Close(int(n[0]))
	case "pread": // fd, length, offset
		b := make([]byte, n[1])
		var m int
		m, err = unix.Pread(int(n[0]), b, n[2])
		r.Text = string(b[:max(m, 0)])
	case "pwrite": // fd, offset; Path2 is the data
		_, err = unix.Pwrite(int(n[0]), []byte(q.Path2), n[1])
	case "fallocate": // fd, mode, offset, length
		return unix.Fallocate(int(n[0]), uint32(n[1]), n[2], n[3])
	case "access":
		return unix.Faccessat2(unix.AT_FDCWD, q.Path, uint32(n[0]), unix.AT_EACCESS)
	case "stat":
		var st unix.Stat_t
		err = unix.Lstat(q.Path, &st)
		r.N = [5]int64{int64(st.Mode), int64(st.Uid), int64(st.Gid), st.Size, int64(st.Nlink)}
	case "mkdir":
		return unix.Mkdir(q.Path, uint32(n[0]))
	case "mknod":
		return unix.Mknod(q.Path, uint32(n[0]), int(n[1]))
	case "unlink":
		return unix.Unlink(q.Path)
	case "rmdir":
		return unix.Rmdir(q.Path)
	case "rename":
		return unix.Rename(q.Path, q.Path2)
	case "symlink": // to Path2
		return unix.Symlink(q.Path2, q.Path)
	case "chmod":
		return unix.Chmod(q.Path, uint32(n[0]))
	case "chown":
		return unix.Lchown(q.Path, int(n[0]), int(n[1]))
	case "truncate":
		return unix.Truncate(q.Path, n[0])
	case "utimes": // both times: nanoseconds
		ts := unix.Timespec{Nsec: n[0]}
		return unix.UtimesNanoAt(unix.AT_FDCWD, q.Path, []unix.Timespec{ts, ts}, 0)
	case "list":
		var d []os.DirEntry
		d, err = os.ReadDir(q.Path)
		r.N[0] = int64(len(d))
	case "exec":
		return exec.Command("./" + q.Path).Run()
	case "umask":
		unix.Umask(int(n[0]))
	case "lock": // fd, command, type, start, length
		l := unix.Flock_t{Type: int16(n[2]), Start: n[3], Len: n[4]}
		err = unix.FcntlFlock(uintptr(n[0]), int(n[1]), &l)
		r.N = [5]int64{int64(l.Type), l.Start, l.Len, int64(l.Pid)}
	case "flock": // fd, how
		return unix.Flock(int(n[0]), int(n[1]))
	case "catch": // SIGUSR1: 1 restarts system calls, 0 interrupts them
		return catch(n[0] == 1)
	default:
		return fmt.Errorf("unknown op %q", q.Op)
	}
	return err
}

// catch installs a handler of SIGUSR1. Go's handlers restart system calls, so
// to see EINTR the flag is taken out of the one that Go installed.
func catch(restart bool) error {
	signal.Notify(make(chan os.Signal, 8), unix.SIGUSR1)
	var action [4]uint64 // of the kernel: handler, flags, restorer, mask
	const saRestart = 0x10000000
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGUSR1), 0, uintptr(unsafe.Pointer(&action)), 8, 0, 0); e != 0 {
		return e
	}
	action[1] &^= saRestart
	if restart {
		action[1] |= saRestart
	}
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGUSR1), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0); e != 0 {
		return e
	}
	return nil
}

// agent is another process that works in the case's directory. Not for
// concurrent use.
type agent struct {
	e   *env
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// agent starts an agent with this process's user.
func (e *env) agent() *agent { return e.agentAs(nil) }

// user starts an agent as uid and gid with just these supplementary groups and no privilege.
func (e *env) user(uid, gid uint32, groups ...uint32) *agent {
	return e.agentAs(&syscall.Credential{Uid: uid, Gid: gid, Groups: groups})
}

func (e *env) agentAs(cred *syscall.Credential) *agent {
	e.Helper()
	dir, err := os.Open(e.dir)
	e.ok(err, "open the case's directory")
	defer dir.Close()
	// The path of the program may be closed to another user, /proc/self/exe is not.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), agentEnv+"=1", "GOMAXPROCS=1")
	cmd.ExtraFiles = []*os.File{dir}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	in, err := cmd.StdinPipe()
	e.ok(err, "pipe to an agent")
	out, err := cmd.StdoutPipe()
	e.ok(err, "pipe from an agent")
	e.ok(cmd.Start(), "start an agent (this program's TestMain must call fstest.Child)")
	a := &agent{e: e, cmd: cmd, in: in, out: json.NewDecoder(out)}
	e.Cleanup(a.kill)
	return a
}

// kill ends the agent as an accident would and waits for its end.
func (a *agent) kill() {
	if a.cmd.ProcessState != nil {
		return
	}
	a.cmd.Process.Kill()
	a.cmd.Wait()
}

// begin sends a request, end waits for its answer.
func (a *agent) begin(op, path, path2 string, n ...int64) {
	a.e.Helper()
	q := request{Op: op, Path: path, Path2: path2}
	copy(q.N[:], n)
	b, err := json.Marshal(q)
	a.e.ok(err, "encode a request")
	_, err = a.in.Write(append(b, '\n'))
	a.e.ok(err, "ask an agent")
}

func (a *agent) end() (response, error) {
	a.e.Helper()
	var r response
	a.e.within("an agent's answer", func() error { return a.out.Decode(&r) })
	if r.Errno == unix.EPROTO {
		a.e.Fatalf("agent: %s", r.Text)
	}
	if r.Errno != 0 {
		return r, r.Errno
	}
	return r, nil
}

// call is a request without answer but its errno.
func (a *agent) call(op, path, path2 string, n ...int64) error {
	a.e.Helper()
	a.begin(op, path, path2, n...)
	_, err := a.end()
	return err
}

func (a *agent) open(path string, flags int, mode uint32) (int64, error) {
	a.e.Helper()
	a.begin("open", path, "", int64(flags), int64(mode))
	r, err := a.end()
	return r.N[0], err
}

// tryOpen opens and closes.
func (a *agent) tryOpen(path string, flags int, mode uint32) error {
	a.e.Helper()
	fd, err := a.open(path, flags, mode)
	if err == nil {
		err = a.call("close", "", "", fd)
	}
	return err
}

// mustOpen opens path for reading and writing.
func (a *agent) mustOpen(path string) int64 {
	a.e.Helper()
	fd, err := a.open(path, unix.O_RDWR, 0)
	a.e.ok(err, "open "+path+" in another process")
	return fd
}

// blocked waits until the agent's thread is inside the system call trap.
func (a *agent) blocked(trap int) {
	a.e.Helper()
	pid := strconv.Itoa(a.cmd.Process.Pid)
	a.e.until("block in a system call", func() bool {
		threads, _ := os.ReadDir("/proc/" + pid + "/task")
		for _, th := range threads {
			b, _ := os.ReadFile("/proc/" + pid + "/task/" + th.Name() + "/syscall")
			if nr, _, _ := strings.Cut(string(b), " "); nr == strconv.Itoa(trap) {
				return true
			}
		}
		return false
	})
}

// signal sends SIGUSR1 to the thread that makes the calls.
func (a *agent) signal() {
	pid := a.cmd.Process.Pid
	a.e.ok(unix.Tgkill(pid, pid, unix.SIGUSR1), "signal an agent")
}
