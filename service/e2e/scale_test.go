// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// scaleEnv is how many inodes TestScale has a guest's kernel cache.
const scaleEnv = "TRANSFUSED_SCALE"

// scaleOf is that number, at least what an ordinary go test takes.
func scaleOf(t *testing.T) int {
	n := 20_000
	if s := os.Getenv(scaleEnv); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 20_000 {
			t.Fatalf("%s=%s: %v, at least 20000", scaleEnv, s, err)
		}
	}
	return n
}

// inodeBound is what an inode may cost the host, in bytes: 1,000,000, and the programs themselves, stay below 1 GiB.
const inodeBound = 1000

// TestScale measures what each thing costs that a guest can have many of, and bounds it.
func TestScale(t *testing.T) {
	n := scaleOf(t)
	var out strings.Builder
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(table, "\t")
	for _, p := range parts {
		fmt.Fprintf(table, "%s, bytes\tfds\t", p)
	}
	fmt.Fprintln(table)
	t.Run("mounts", func(t *testing.T) { scaleMounts(newRig(t, 0), table) })
	t.Run("inodes, root", func(t *testing.T) { scaleInodes(newRig(t, 0), n, "root", table) })
	t.Run("inodes, ordinary user", func(t *testing.T) {
		openDeviceForAll(t)
		scaleInodes(newRig(t, nobody), n, "user", table)
	})
	table.Flush()
	t.Logf("what each costs, of %d inodes; resident memory\n%s", n, &out)
}

// parts are the processes of the programs by what they are for.
var parts = [...]string{"daemon", "helper", "parent", "worker"}

// usage is what they hold, all of one part together.
type usage [len(parts)]struct{ bytes, fds int }

func measure() (u usage) {
	for _, name := range []string{"transfused", "transfuse-host"} {
		pids := processes(name)
		for _, pid := range pids {
			part := 0
			if name == "transfuse-host" {
				part = 2
			}
			if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); len(b) > 0 {
				var parent int
				var state string
				_, rest, _ := strings.Cut(string(b), ") ")
				fmt.Sscan(rest, &state, &parent)
				for _, p := range pids {
					if p == parent {
						part++
						break
					}
				}
			}
			fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			u[part].bytes += resident(pid) << 10
			u[part].fds += len(fds)
		}
	}
	return u
}

func (u usage) less(v usage) usage {
	for i := range u {
		u[i].bytes -= v[i].bytes
		u[i].fds -= v[i].fds
	}
	return u
}

// host is the memory of the host's processes.
func (u usage) host() int { return u[2].bytes + u[3].bytes }

// row writes what one of n costs.
func (u usage) row(table *tabwriter.Writer, n int, format string, a ...any) {
	fmt.Fprintf(table, format+"\t", a...)
	for _, p := range u {
		fmt.Fprintf(table, "%d\t%.4g\t", p.bytes/n, float64(p.fds)/float64(n))
	}
	fmt.Fprintln(table)
}

// vms starts a host that n VMs can reach, each by a socket of its own, as those of Firecracker do. The i-th mounts export(i).
func (r *rig) vms(n int, export func(i int) string) *program {
	r.t.Helper()
	args := []string{"--allow-unprivileged-guests"}
	for i := range n {
		args = append(args, "--listen", fmt.Sprintf("hybrid:%s/vm%d.sock:1524", r.dir, i), "--export", fmt.Sprintf("code%d=%s,guests=any", i, export(i)))
	}
	host := r.start("transfuse-host", args...)
	host.awaitTimes("listening", n)
	return host
}

// vm starts the guest of VM i on these CPUs and waits for its mounts, that many, whose directories it returns.
func (r *rig) vm(i, mounts int, cpus string) (dirs []string) {
	r.t.Helper()
	args := []string{"-c", cpus, filepath.Join(bin, "transfused"), "--server", fmt.Sprintf("unix:%s/vm%d.sock_1524", r.dir, i), "--socket", "none"}
	for j := range mounts {
		dirs = append(dirs, filepath.Join(r.dir, fmt.Sprintf("mnt%d-%d", i, j)))
		args = append(args, "--mount", fmt.Sprintf("code%d=%s", i, dirs[j]))
	}
	r.startCommand("transfused", exec.Command("taskset", args...))
	for _, dir := range dirs {
		r.mounted(dir)
	}
	return dirs
}

// scaleMounts finds out what guests cost, from some with one mount and some with many.
func scaleMounts(r *rig, table *tabwriter.Writer) {
	const guests, mounts = 8, 8
	host := r.vms(2*guests, func(int) string { return r.export })
	begin := measure()
	for i := range guests {
		r.vm(i, 1, "0-1023")
	}
	host.awaitTimes("msg=mounted", guests)
	few := measure().less(begin)
	for i := range guests {
		r.vm(guests+i, 1+mounts, "0-1023")
	}
	host.awaitTimes("msg=mounted", guests*(2+mounts))
	each := measure().less(begin).less(few).less(few)
	few.row(table, guests, "a guest: session, worker, first mount")
	each.row(table, guests*mounts, "a mount more, with its stream")
	// A mount has a buffer of max_write, 1 MiB, in the daemon.
	for i, most := range [...]struct{ guest, mount int }{{32 << 20, 2 << 20}, {32 << 20, 256 << 10}, {1 << 20, 64 << 10}, {32 << 20, 512 << 10}} {
		if n := few[i].bytes / guests; n > most.guest {
			r.t.Errorf("a guest costs %d bytes of a %s", n, parts[i])
		}
		if n := each[i].bytes / guests / mounts; n > most.mount {
			r.t.Errorf("a mount costs %d bytes of a %s", n, parts[i])
		}
		if n := few[i].fds / guests; n > 32 {
			r.t.Errorf("a guest costs %d descriptors of a %s", n, parts[i])
		}
		if n := each[i].fds / guests / mounts; n > 8 {
			r.t.Errorf("a mount costs %d descriptors of a %s", n, parts[i])
		}
	}
}

// memory has the export in memory, with as many inodes as one likes.
func (r *rig) memory() {
	r.t.Helper()
	options := "nr_inodes=0,size=2g,mode=755"
	if cred := r.attr.Credential; cred != nil {
		options += fmt.Sprintf(",uid=%d,gid=%d", cred.Uid, cred.Gid)
	}
	if err := unix.Mount("tmpfs", r.export, "tmpfs", 0, options); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := unix.Unmount(r.export, 0); err != nil {
			r.t.Error(err)
		}
	})
}

const (
	perDir       = 1000 // files in a directory of scaleInodes
	scaleThreads = 4    // that use them
)

// scaleName is the path of the i-th file in dir.
func scaleName(root, dir string, i int) string {
	return filepath.Join(root, dir, fmt.Sprintf("%04d", i/perDir), fmt.Sprintf("file%06d", i))
}

// scaleInodes finds out what inodes cost, of which a guest knows n, and how much of that is given back.
func scaleInodes(r *rig, n int, who string, table *tabwriter.Writer) {
	t := r.t
	r.memory()
	dirs, files, opened := n/50, n, n/200
	many := func(root, dir string, count int, each func(path string) error) {
		t.Helper()
		var all sync.WaitGroup
		for first := range scaleThreads {
			all.Go(func() {
				r.as(func() {
					for i := first; i < count && !t.Failed(); i += scaleThreads {
						if err := each(scaleName(root, dir, i)); err != nil {
							t.Error(err)
						}
					}
				})
			})
		}
		if all.Wait(); t.Failed() {
			t.FailNow()
		}
	}
	many(r.export, "d", dirs, func(path string) error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return unix.Mkdir(path, 0o755)
	})
	many(r.export, "f", files, func(path string) error {
		err := unix.Mknod(path, unix.S_IFREG|0o644, 0)
		if err == unix.ENOENT {
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
				err = unix.Mknod(path, unix.S_IFREG|0o644, 0)
			}
		}
		return err
	})

	// A fiftieth of the inodes can have a descriptor, more can't.
	limit := n / 50
	args := []string{"-c", `ulimit -n ` + fmt.Sprint(limit) + `; exec "$0" "$@"`, filepath.Join(bin, "transfuse-host"), "--listen", r.address("h"), "--export", "code=" + r.export}
	host := r.startCommand("transfuse-host", exec.Command("/bin/sh", args...))
	host.await("listening")
	r.guest("--mount", "code="+r.mnt)
	r.mounted(r.mnt)
	host.await("msg=mounted")

	begin := measure()
	last := begin
	begun := time.Now()
	step := func(count int, format string, a ...any) usage {
		now := measure()
		grown := now.less(last)
		grown.row(table, count, format+", %s", append(a, who)...)
		t.Logf("%v: %v; host %d MiB, worker's descriptors %d", fmt.Sprintf(format, a...), time.Since(begun), now.host()>>20, now[3].fds)
		if now[3].fds > limit {
			t.Errorf("%d descriptors, of %d", now[3].fds, limit)
		}
		last, begun = now, time.Now()
		return grown
	}
	release := r.hold("f", opened, unix.O_RDONLY)
	step(opened, "an open file, with its inode")
	release()
	many(r.mnt, "d", dirs, func(path string) error {
		_, err := os.ReadDir(path)
		return err
	})
	step(dirs, "a directory that was looked into")
	// To look is all that O_PATH does, and what somebody holds the kernel does not forget when it is short of memory.
	release = r.hold("f", files, unix.O_PATH)
	step(files, "a cached inode")
	// An attribute that is not there needs a descriptor of the inode, and costs one request.
	many(r.mnt, "f", files, func(path string) error {
		if _, err := unix.Lgetxattr(path, "user.none", nil); err != unix.ENODATA {
			return fmt.Errorf("getxattr %s: %v", path, err)
		}
		return nil
	})
	step(files, "and a cached inode, once all were used")
	grown := last.less(begin)
	if each := grown.host() / (dirs + files); each > inodeBound {
		t.Errorf("an inode costs the host %d bytes", each)
	}

	release()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
	var left usage
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		left = measure().less(begin)
		if left.host() < grown.host()/4 && left[3].fds < 16 || time.Now().After(deadline) {
			break
		}
	}
	step(files, "left of it, forgotten")
	if left.host() >= grown.host()/4 || left[3].fds >= 16 {
		t.Errorf("once they are forgotten the host still has %d bytes of %d, and %d descriptors", left.host(), grown.host(), left[3].fds)
	}
}

// hold opens n files of dir in the mount, until release is called. They are more than a process may have: each thread of those that do it has
// descriptors of its own.
func (r *rig) hold(dir string, n, flags int) (release func()) {
	r.t.Helper()
	const most = 10_000 // of a thread
	var opened, closed sync.WaitGroup
	turns, end := make(chan bool, scaleThreads), make(chan bool)
	for first := 0; first < n; first += most {
		opened.Add(1)
		closed.Go(func() {
			r.as(func() {
				turns <- true
				var fds []int
				err := unix.Unshare(unix.CLONE_FILES)
				for i := first; err == nil && i < min(first+most, n); i++ {
					var fd int
					if fd, err = unix.Open(scaleName(r.mnt, dir, i), flags|unix.O_CLOEXEC, 0); err == nil {
						fds = append(fds, fd)
					}
				}
				if err != nil {
					r.t.Error(err)
				}
				<-turns
				opened.Done()
				<-end
				for _, fd := range fds {
					unix.Close(fd)
				}
			})
		})
	}
	opened.Wait()
	release = sync.OnceFunc(func() { close(end); closed.Wait() })
	r.t.Cleanup(release)
	if r.t.Failed() {
		r.t.FailNow()
	}
	return release
}

// as runs f as the rig's user, on a thread of its own.
func (r *rig) as(f func()) {
	aside(func() {
		cred := r.attr.Credential
		if cred == nil {
			f()
			return
		}
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := syscall.RawSyscall(call, uintptr(cred.Uid), uintptr(cred.Uid), uintptr(cred.Uid)); errno != 0 {
				r.t.Error(errno)
				return
			}
		}
		f()
	})
}

// aside runs f on a thread that ends with it. That is not the process's first one, which would go on with what f did to it.
func aside(f func()) {
	done := make(chan bool)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f()
			return
		}
		aside(f)
		runtime.UnlockOSThread()
	}()
	<-done
}
