// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What one guest does another one of the same export sees, although the host can't watch its file system.
func TestTwoGuests(t *testing.T) {
	r := newRig(t, 0)
	r.blind()
	host, _ := r.told("", "")
	host.await("changes on the host are not pushed")
	other := filepath.Join(r.dir, "other")
	r.start("transfused", "--server", r.address("h"), "--socket", "none", "--mount", "code="+other)
	r.mounted(other)
	host.awaitTimes("msg=mounted", 2)
	const within = 200 * time.Millisecond
	var lags []time.Duration
	for i, step := range []string{
		"echo a >file", "echo bb >>file", "chmod 600 file", "mv file new", "echo c >temp; mv temp new", "ln new link", "rm new", "echo ddd >link",
		"mkdir dir", "ln -s x dir/link", "mv dir folder", "truncate -s 9 link", "rm -r folder", "touch -d @99 link", "rm link",
	} {
		from, to := r.mnt, other
		if i%2 == 1 {
			from, to = to, from
		}
		view(to) // it is in the cache, and would be believed for a second
		script(t, from, step)
		done := time.Now()
		for want := view(r.export); ; {
			begin := time.Now()
			if got := view(to); fmt.Sprint(got) == fmt.Sprint(want) {
				lags = append(lags, max(0, begin.Sub(done)))
				break
			} else if begin.Sub(done) > within {
				t.Errorf("%s is not seen after %v:\n%v\nwant\n%v", step, within, got, want)
				break
			}
		}
	}
	t.Logf("seen after %s", distribution(lags))

	// The twin: what the host does nobody is told, and a file in the cache is what it was.
	for range 10 {
		script(t, r.export, "echo a >file")
		begin := time.Now()
		for st, err := os.Stat(filepath.Join(r.mnt, "file")); (err != nil || st.Size() != 2) && time.Since(begin) < 2*stale; {
			st, err = os.Stat(filepath.Join(r.mnt, "file"))
		}
		cached := time.Now() // or up to a second before: then it is tried again
		script(t, r.export, "echo bb >>file")
		for st, err := os.Stat(filepath.Join(r.mnt, "file")); err == nil && st.Size() == 2; {
			if time.Since(cached) > within {
				return
			}
			st, err = os.Stat(filepath.Join(r.mnt, "file"))
		}
	}
	t.Error("the host's own changes are always seen soon")
}

// Changes that come faster than the kernel keeps them are lost, and then the guest believes nothing that it knew.
func TestOverflow(t *testing.T) {
	const limit = "/proc/sys/fs/fanotify/max_queued_events"
	was, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(limit, was, 0o644); err != nil {
			t.Error(err)
		}
	})
	// The queue has the limit of when it is made.
	if err := os.WriteFile(limit, []byte("64"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, 0)
	const files = 500
	for i := range files {
		if err := os.WriteFile(filepath.Join(r.export, fmt.Sprint("f", i)), []byte("before"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	host, _ := r.told("", "")
	for round := range 5 {
		r.agrees(time.Now(), stale)
		made := func(i int) string { return fmt.Sprint("f", i, "new", round) }
		for i := 3; i < files; i += 4 {
			if _, err := os.Lstat(filepath.Join(r.mnt, made(i))); err == nil {
				t.Fatalf("%s is there", made(i))
			}
		}
		// Nobody reads the queue meanwhile.
		if err := unix.Kill(host.cmd.Process.Pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		for i := range files {
			name := filepath.Join(r.export, fmt.Sprint("f", i))
			text := strings.Repeat("x", round+1)
			switch i % 4 {
			case 0:
				err = os.WriteFile(name, []byte(text), 0o644)
			case 1:
				err = os.Rename(name, name+"x")
				if err == nil {
					err = os.WriteFile(name, []byte(text), 0o600)
				}
			case 2:
				if err = os.Remove(name); err == nil {
					err = os.Mkdir(name, 0o755)
				}
				if err == nil {
					err = os.Remove(name)
				}
				if err == nil {
					err = os.WriteFile(name, []byte(text), 0o644)
				}
			case 3:
				err = os.WriteFile(filepath.Join(r.export, made(i)), nil, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Kill(host.cmd.Process.Pid, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for i := 3; i < files; i += 4 {
			for _, err := os.Lstat(filepath.Join(r.mnt, made(i))); err != nil; _, err = os.Lstat(filepath.Join(r.mnt, made(i))) {
				if time.Since(begin) > 5*stale {
					t.Fatalf("%s is not there: %v", made(i), err)
				}
			}
		}
		lag, _ := r.agrees(time.Now(), stale)
		t.Logf("after %d changes the views agree after %v", files, lag)
	}
	if !strings.Contains(host.text(), "changes of the host's files were lost") {
		t.Error("nothing was lost")
	}
}

// More changes than anybody acts: they are merged, or lost, and the guest sees what is there in the end.
func TestStorm(t *testing.T) {
	r := newRig(t, 0)
	r.told("", "")
	w := watchTree(t, r.mnt)
	view(r.mnt)
	const n = 10_000 // each is several events
	begin := time.Now()
	for i := range n {
		name := filepath.Join(r.export, fmt.Sprint("f", i%1000))
		if err := os.WriteFile(name, []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	made := time.Now()
	lag, _ := r.agrees(made, stale)
	w.mu.Lock()
	seen := len(w.events)
	w.mu.Unlock()
	t.Logf("%d changes in %v; the views agree after %v, and inotify has shown %d events", n, made.Sub(begin), lag, seen)
	if seen == 0 {
		t.Error("inotify shows nothing")
	}
}

// A daemon that is killed while its helper's thread is in an acted call, and a notification waits, ends at once. The next one has the mount, and the
// call, which comes again, is not taken for one that the guest wants.
func TestKilledInEvent(t *testing.T) {
	r := newRig(t, 0)
	for _, name := range []string{"keep", "dir/keep"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(r.export, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(r.export, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	host := r.host("")
	m := r.newManager("transfused", "g")
	args := []string{"--server", r.address("h"), "--mount", "code=" + r.mnt}
	guest := m.start(args...)
	r.mounted(r.mnt)
	host.await("msg=mounted")
	worker, helper := host.child(), guest.child()
	t.Cleanup(func() { unix.Kill(worker, unix.SIGCONT) }) // or who waits for it could not end
	for round := range 5 {
		view(r.mnt)
		// Events go on for as long as it takes for the worker to stand still while one is acted.
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := filepath.Join(r.export, fmt.Sprint("n", i%50))
				os.WriteFile(name, []byte("x"), 0o644)
				os.Rename(name, name+"r")
				os.Remove(name + "r")
			}
		}()
		blocked := false
		for deadline := time.Now().Add(patience); !blocked && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond) // for another moment to be met
			if err := unix.Kill(worker, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond) // for who waits to be waiting
			if blocked = inFUSE(helper); !blocked {
				if err := unix.Kill(worker, unix.SIGCONT); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !blocked {
			t.Error("no thread of the helper waited for the host")
		}
		begin := time.Now()
		if err := guest.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		// Its output ends later, with its helper, which has it too.
		for dead := false; !dead; {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", guest.cmd.Process.Pid))
			dead = err != nil || strings.Contains(string(b), ") Z ")
			if time.Since(begin) > 2*time.Second {
				t.Error("the daemon is killed, and is still there after two seconds")
				break
			}
		}
		t.Logf("round %d: it was dead after %v", round, time.Since(begin))
		if err := unix.Kill(worker, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		dead := guest
		guest = m.start(args...)
		m.await("STATUS=1 mount, host connected, protocol 2")
		dead.awaitEnd() // and now its helper's thread has its answer
		t.Logf("round %d: it was back after %v", round, time.Since(begin))
		close(stop)
		<-stopped
		helper, worker = guest.child(), host.child()
		host.awaitTimes("msg=mounted", 1)
		name := filepath.Join(r.mnt, fmt.Sprint("round", round))
		if err := os.WriteFile(name, []byte("x"), 0o644); err != nil {
			t.Error(err)
		}
		if _, ok := r.agrees(time.Now(), stale); !ok {
			break
		}
		for _, name := range []string{"keep", "dir/keep"} {
			if b, err := os.ReadFile(filepath.Join(r.export, name)); err != nil || string(b) != name {
				t.Errorf("the host has %q, %v", b, err)
			}
		}
	}
	if err := unix.Unmount(r.mnt, 0); err != nil {
		t.Error(err)
	}
	m.await("STATUS=0 mounts, host connected, protocol 2")
	guest.stop(unix.SIGTERM)
	host.stop(unix.SIGTERM)
}

// inFUSE tells whether a thread of a process waits for an answer of a FUSE mount.
func inFUSE(pid int) bool {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", pid))
	for _, f := range files {
		if b, _ := os.ReadFile(f); strings.Contains(string(b), "request_wait_answer") || strings.Contains(string(b), "fuse_simple_request") || strings.Contains(string(b), "__fuse_request") {
			return true
		}
	}
	return false
}

// A guest that changes names before it has heard what the host has done to them changes what is there now, and then sees it: not what was there
// before under a new name, nor a directory as removed that has only moved.
func TestStaleNames(t *testing.T) {
	for _, c := range []struct{ name, prepare, host, guest, look string }{
		{"rmdir", "mkdir x x/sub", "mv x z; mkdir x", "rmdir x", ""},
		{"rename", "echo older >x", "mv x z; echo new >x", "mv x y", "y"},
		{"rename of a directory", "mkdir x x/old", "mv x z; mkdir x x/new", "mv x y", "y/new"},
		{"rename over a directory", "mkdir x s", "mv x z; touch z/f", "mv -T s x", ""},
		{"rename over another directory", "mkdir x s", "mv x z; touch z/f; mkdir x", "mv -T s x", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 0)
			script(t, r.export, c.prepare)
			host, _ := r.told("", "")
			for range 3 { // for what was looked at during a change is not believed for long
				view(r.mnt)
			}
			// Who has it open keeps the kernel's inode.
			fd, err := unix.Open(filepath.Join(r.mnt, "x"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			r.stopped(host.cmd.Process.Pid, func() {
				script(t, r.export, c.host)
				script(t, r.mnt, c.guest)
				// To list the directory would have the kernel compare its names.
				for begin := time.Now(); c.look != ""; time.Sleep(time.Millisecond) {
					want, err := os.Lstat(filepath.Join(r.export, c.look))
					if err != nil {
						t.Fatal(err)
					}
					got, err := os.Lstat(filepath.Join(r.mnt, c.look))
					if err == nil && got.Size() == want.Size() {
						break
					}
					if time.Since(begin) > stale {
						t.Errorf("%s is %v, %v", c.look, got, err)
						break
					}
				}
			})
			r.agrees(time.Now(), stale)
		})
	}
}

// stopped calls f while a process stands still.
func (r *rig) stopped(pid int, f func()) {
	r.t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		r.t.Fatal(err)
	}
	defer unix.Kill(pid, unix.SIGCONT)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if strings.Contains(string(b), ") T ") {
			break
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("process %d does not stop", pid)
		}
	}
	f()
}
