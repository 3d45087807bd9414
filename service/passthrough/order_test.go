// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
	"transfused.org/transfused/service/watch"
)

// ordered is a mount that this process serves, and whose replies and notifications can be held back. What uses the mount are other
// processes.
type ordered struct {
	t        *testing.T
	fs       *FS
	dev      *os.File
	dir, mnt string

	mu      sync.Mutex
	changed sync.Cond
	ops     map[uint64]fuse.Opcode // of requests without reply
	holdOp  fuse.Opcode            // replies to these are held; 0: none
	holds   bool                   // notifications are held
	replies [][]byte               // held
	begun   int                    // notifications that were given to the kernel
	waiting int                    // notifications that are held
	came    int                    // notifications
	done    int                    // of them, that the kernel has answered
}

func newOrdered(t *testing.T, c Config) *ordered {
	t.Helper()
	o := &ordered{t: t, dir: tmpfs(t), mnt: t.TempDir(), ops: map[uint64]fuse.Opcode{}}
	o.changed.L = &o.mu
	o.fs = newFS(t, o.dir, c)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("/dev/fuse: %v (as root: modprobe fuse)", err)
	}
	if err := unix.Mount("transfused-test", o.mnt, "fuse.transfused-test", unix.MS_NOSUID|unix.MS_NODEV,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", fd)); err != nil {
		unix.Close(fd)
		t.Fatalf("mount: %v (these tests need root)", err)
	}
	o.dev = os.NewFile(uintptr(fd), "/dev/fuse") // blocking: its waits have threads of their own
	conn := serve(t, o.fs)
	var wg sync.WaitGroup
	wg.Go(func() { o.requests(conn) })
	wg.Go(func() { o.relayReplies(conn) })
	guest, host := pair(t)
	o.fs.Notify(host)
	o.fs.Watched(true)
	wg.Go(func() { o.notifications(guest) })
	// Who waits for a lock that the user of the mount holds can't be killed: the connection is aborted where something went wrong.
	abort := abortFUSE(t, o.mnt)
	late := time.AfterFunc(20*time.Second, abort)
	t.Cleanup(func() {
		late.Stop()
		o.hold(0, false)
		if t.Failed() {
			abort()
		}
		if err := unix.Unmount(o.mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(o.mnt, unix.MNT_DETACH)
		}
		conn.Close()
		guest.Close()
		wg.Wait()
		o.dev.Close()
	})
	return o
}

// abortFUSE returns a function that ends a mount's connection in the kernel.
func abortFUSE(t *testing.T, mnt string) func() {
	t.Helper()
	control := t.TempDir() // where /sys/fs/fuse/connections is not mounted, too
	if err := unix.Mount("fusectl", control, "fusectl", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(control, unix.MNT_DETACH)
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == mnt {
			_, minor, _ := strings.Cut(f[2], ":")
			file, err := os.OpenFile(filepath.Join(control, minor, "abort"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { file.Close() })
			return func() { file.WriteString("1") }
		}
	}
	t.Fatalf("%s is not mounted", mnt)
	return nil
}

func (o *ordered) requests(conn io.Writer) {
	b := make([]byte, maxRequest)
	for {
		n, err := o.dev.Read(b)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return // unmounted
		}
		var h fuse.InHeader
		fuse.Decode(&h, b[:n])
		o.mu.Lock()
		if !h.Opcode.NoReply() {
			o.ops[h.Unique] = h.Opcode
		}
		o.mu.Unlock()
		if _, err := conn.Write(b[:n]); err != nil {
			return
		}
	}
}

func (o *ordered) relayReplies(conn io.Reader) {
	b := make([]byte, maxRequest)
	for {
		h, n, err := readReply(conn, b)
		if err != nil {
			return
		}
		o.mu.Lock()
		op := o.ops[h.Unique]
		delete(o.ops, h.Unique)
		if o.holdOp != 0 && op == o.holdOp {
			o.replies = append(o.replies, append([]byte(nil), b[:n]...))
			o.changed.Broadcast()
		} else {
			o.dev.Write(b[:n]) // nobody may wait for it any more
		}
		o.mu.Unlock()
	}
}

func (o *ordered) notifications(conn io.ReadWriter) {
	fd, err := unix.FcntlInt(o.dev.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		o.t.Error(err)
		return
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse") // a write through o.dev would have to wait for one of these
	defer dev.Close()
	b := make([]byte, 8192)
	for {
		_, n, err := readReply(conn, b)
		if err != nil {
			return
		}
		o.mu.Lock()
		o.came++
		o.waiting++
		o.changed.Broadcast()
		for o.holds {
			o.changed.Wait()
		}
		o.waiting--
		o.begun++
		o.changed.Broadcast()
		o.mu.Unlock()
		var answer [4]byte
		if _, err := dev.Write(b[:n]); err != nil {
			var errno unix.Errno
			errors.As(err, &errno)
			binary.LittleEndian.PutUint32(answer[:], uint32(errno))
		}
		if _, err := conn.Write(answer[:]); err != nil {
			return
		}
		o.mu.Lock()
		o.done++
		o.changed.Broadcast()
		o.mu.Unlock()
	}
}

// hold has replies to op, and notifications, held from now on; what is held and is not to be goes on.
func (o *ordered) hold(op fuse.Opcode, notifications bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.holdOp, o.holds = op, notifications
	if op == 0 {
		for _, r := range o.replies {
			o.dev.Write(r)
		}
		o.replies = nil
	}
	o.changed.Broadcast()
}

// await waits until a condition holds.
func (o *ordered) await(what string, f func() bool) {
	o.t.Helper()
	late := time.AfterFunc(10*time.Second, func() { o.mu.Lock(); o.changed.Broadcast(); o.mu.Unlock() })
	defer late.Stop()
	begin := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	for !f() {
		if time.Since(begin) > 10*time.Second {
			o.t.Fatalf("waiting for %s", what)
		}
		o.changed.Wait()
	}
}

// settled waits until the kernel has answered all that it was told.
func (o *ordered) settled() {
	o.t.Helper()
	for range 2 { // an answer may cause another
		o.await("the kernel's answers", func() bool { return o.done == o.came })
		// The server has looked at the answers when it takes what comes next.
		o.mu.Lock()
		n := o.came
		o.mu.Unlock()
		o.fs.Changed([]watch.Change{{Op: watch.Attrib, Inode: o.inode("")}})
		o.await("a notification about the root", func() bool { return o.came > n && o.done == o.came })
	}
}

func (o *ordered) inode(name string) watch.Inode {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, filepath.Join(o.dir, name), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		o.t.Fatal(err)
	}
	return watch.Inode{Dev: uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), Ino: st.Ino}
}

// Whatever the order in which replies and notifications reach the guest's kernel, it ends up with what the host has. Nothing here lives
// so short that it would do so by itself.
func TestOrder(t *testing.T) {
	write := func(o *ordered, name, text string) {
		if err := os.WriteFile(filepath.Join(o.dir, name), []byte(text), 0o644); err != nil {
			o.t.Fatal(err)
		}
	}
	modify := func(o *ordered) []watch.Change {
		write(o, "f", "new!!")
		return []watch.Change{{Op: watch.Modify, Dir: o.inode(""), Name: "f", Inode: o.inode("f"), Mode: unix.S_IFREG}}
	}
	for _, c := range []struct {
		name   string
		op     fuse.Opcode
		warm   string // what the guest does before
		forget bool   // and then has to believe nothing
		use    string // what it does when the reply is held
		change func(o *ordered) []watch.Change
		look   string // what it does in the end, and so what is compared
		seen   bool   // the change is seen though it is not told: in what is read after the reply, or by the file's times at OPEN
	}{
		{name: "first lookup", op: fuse.OpLookup, use: "stat -c %s f", change: modify, look: "stat -c %s f; cat f"},
		{name: "lookup again", op: fuse.OpLookup, warm: "cat f", forget: true, use: "stat -c %s f", change: modify, look: "stat -c %s f; cat f"},
		{name: "attributes", op: fuse.OpGetattr, warm: "cat f", forget: false, use: "cat f; stat -c %s f", change: modify, look: "stat -c %s f; cat f"},
		{name: "data", op: fuse.OpRead, use: "cat f", change: modify, look: "cat f", seen: true},
		{name: "open", op: fuse.OpOpen, warm: "cat f", use: "cat f", change: modify, look: "cat f", seen: true},
		{name: "absent name", op: fuse.OpLookup, use: "stat -c %s absent", change: func(o *ordered) []watch.Change {
			write(o, "absent", "it is there")
			return []watch.Change{{Op: watch.Create, Dir: o.inode(""), Name: "absent", Inode: o.inode("absent"), Mode: unix.S_IFREG}}
		}, look: "cat absent"},
		{name: "directory", op: fuse.OpReaddirplus, use: "ls d", change: func(o *ordered) []watch.Change {
			write(o, "d/more", "")
			return []watch.Change{{Op: watch.Create, Dir: o.inode("d"), Name: "more", Inode: o.inode("d/more"), Mode: unix.S_IFREG}}
		}, look: "ls d", seen: true},
		{name: "replaced", op: fuse.OpLookup, warm: "cat f", forget: true, use: "stat -c %s f", change: func(o *ordered) []watch.Change {
			write(o, "tmp", "another file")
			if err := os.Rename(filepath.Join(o.dir, "tmp"), filepath.Join(o.dir, "f")); err != nil {
				o.t.Fatal(err)
			}
			return []watch.Change{{Op: watch.Rename, Dir: o.inode(""), Name: "tmp", NewDir: o.inode(""), NewName: "f", Inode: o.inode("f"), Mode: unix.S_IFREG}}
		}, look: "stat -c %s f; cat f; ls tmp 2>&1 | grep -c No"},
		{name: "symbolic link", op: fuse.OpReadlink, use: "readlink l", change: func(o *ordered) []watch.Change {
			if err := errors.Join(os.Remove(filepath.Join(o.dir, "l")), os.Symlink("elsewhere", filepath.Join(o.dir, "l"))); err != nil {
				o.t.Fatal(err)
			}
			return []watch.Change{{Op: watch.Delete, Dir: o.inode(""), Name: "l"}, {Op: watch.Create, Dir: o.inode(""), Name: "l", Inode: o.inode("l"), Mode: unix.S_IFLNK}}
		}, look: "readlink l"},
		{name: "made", op: fuse.OpCreate, use: "echo guest >made", change: func(o *ordered) []watch.Change {
			if err := os.Remove(filepath.Join(o.dir, "made")); err != nil {
				o.t.Fatal(err)
			}
			return []watch.Change{{Op: watch.Delete, Dir: o.inode(""), Name: "made"}}
		}, look: "ls; cat made 2>&1", seen: true},
	} {
		for _, order := range []string{"notification first", "reply first", "untold"} {
			t.Run(c.name+"/"+order, func(t *testing.T) {
				o := newOrdered(t, Config{})
				write(o, "f", "old")
				if err := errors.Join(os.Mkdir(filepath.Join(o.dir, "d"), 0o755), os.Symlink("f", filepath.Join(o.dir, "l"))); err != nil {
					t.Fatal(err)
				}
				write(o, "d/one", "")
				sh := func(script string) *exec.Cmd {
					cmd := exec.Command("sh", "-c", "cd "+o.mnt+" && { "+script+"; }")
					return cmd
				}
				if c.warm != "" {
					if out, err := sh(c.warm).CombinedOutput(); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				}
				if c.forget {
					o.fs.distrust()
					o.settled()
				}
				if c.op == fuse.OpGetattr { // has the kernel ask
					o.fs.Changed([]watch.Change{{Op: watch.Attrib, Inode: o.inode("f")}})
					o.settled()
				}
				if out, err := sh("stat -c %i .").CombinedOutput(); err != nil { // not this is held
					t.Fatalf("%v: %s", err, out)
				}
				o.hold(c.op, true)
				cmd := sh(c.use)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				o.await("the reply", func() bool { return len(o.replies) > 0 })
				told := c.change(o)
				switch order {
				case "notification first":
					o.fs.Changed(told)
					o.hold(c.op, false)
					o.await("a notification", func() bool { return o.begun > 0 })
					o.await("notifications that are done or can't be yet", func() bool { return o.done == o.came || o.begun > o.done })
					o.hold(0, false)
					cmd.Wait()
				case "reply first":
					o.fs.Changed(told)
					o.await("a notification", func() bool { return o.waiting > 0 })
					o.hold(0, true)
					if strings.HasPrefix(c.use, "echo") || c.op == fuse.OpRead { // what it does after that may wait for what we hold
						time.AfterFunc(100*time.Millisecond, func() { o.hold(0, false) })
					}
					cmd.Wait()
					o.hold(0, false)
				default:
					o.hold(0, false)
					cmd.Wait()
				}
				o.settled()
				guest, _ := sh(c.look).CombinedOutput()
				here := exec.Command("sh", "-c", "cd "+o.dir+" && { "+c.look+"; }")
				host, _ := here.CombinedOutput()
				same := string(guest) == string(host)
				if order == "untold" {
					// The negative twin: what is not told is not seen, or this test would show nothing.
					if same && !c.seen {
						t.Errorf("the guest sees %q though nobody has told it", guest)
					}
				} else if !same {
					t.Errorf("the guest has\n%s\nand the host\n%s", guest, host)
				}
			})
		}
	}
}

const mappedEnv = "PASSTHROUGH_TEST_MAPPED"

// TestMappedChild changes a byte of the mapped file that mappedEnv names, and writes it back when its input ends.
func TestMappedChild(t *testing.T) {
	name := os.Getenv(mappedEnv)
	if name == "" {
		t.Skip("another test runs this one, in a process of its own")
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	b, err := unix.Mmap(int(f.Fd()), 0, 3, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	b[0] = 'n'
	os.Stdout.WriteString("mapped\n")
	_, err = io.Copy(io.Discard, os.Stdin)
	must(t, err)
	must(t, unix.Msync(b, unix.MS_SYNC))
}

// What a reply tells of times is not believed if the guest has changed something since the host looked: a directory, or a file by writing back pages of it.
func TestOrderOfOwnChanges(t *testing.T) {
	for _, c := range []struct {
		what   string
		mode   CacheMode
		change func(t *testing.T, mnt string) (begin func() error)
	}{
		{"f", CacheAlways, mapped}, {"f", CacheCoherent, mapped}, {".", CacheAlways, makes}, {".", CacheCoherent, makes},
	} {
		t.Run(fmt.Sprintf("%s in mode %d", c.what, c.mode), func(t *testing.T) {
			o := newOrdered(t, Config{Cache: c.mode})
			must(t, os.WriteFile(filepath.Join(o.dir, "f"), []byte("old"), 0o644))
			change := c.change(t, o.mnt)
			o.hold(fuse.OpGetattr, false)
			look := exec.Command("stat", "--cached=never", "-c", "%y", filepath.Join(o.mnt, c.what))
			must(t, look.Start())
			o.await("the reply", func() bool { return len(o.replies) > 0 })
			o.mu.Lock()
			o.holdOp = 0 // but for this one
			o.mu.Unlock()
			must(t, change())
			o.await("a notification", func() bool { return o.came > 0 && o.done == o.came })
			o.hold(0, false)
			must(t, look.Wait())
			const times = "stat -c '%y %z' "
			here, err := exec.Command("sh", "-c", times+filepath.Join(o.dir, c.what)).Output()
			must(t, err)
			there, err := exec.Command("sh", "-c", times+filepath.Join(o.mnt, c.what)).Output()
			must(t, err)
			if string(here) != string(there) {
				t.Errorf("the host has the times %s, and the guest %s", here, there)
			}
		})
	}
}

// mapped has a process map f and change it; the change is to write that back.
func mapped(t *testing.T, mnt string) func() error {
	changer := exec.Command("/proc/self/exe", "-test.run=^TestMappedChild$")
	changer.Env = append(os.Environ(), mappedEnv+"="+filepath.Join(mnt, "f"))
	in, err := changer.StdinPipe()
	must(t, err)
	out, err := changer.StdoutPipe()
	must(t, err)
	must(t, changer.Start())
	_, err = io.ReadFull(out, make([]byte, len("mapped\n")))
	must(t, err)
	return func() error {
		in.Close()
		return changer.Wait()
	}
}

// makes has a process that makes a directory.
func makes(t *testing.T, mnt string) func() error {
	return exec.Command("mkdir", filepath.Join(mnt, "made")).Run
}
