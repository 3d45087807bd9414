// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var lockCases = []testCase{
	{"lock/posix", false, lockPosix},
	{"lock/posix-ranges", false, lockPosixRanges},
	{"lock/posix-close", false, lockPosixClose},
	{"lock/getlk", false, lockGetlk},
	{"lock/getlk-pid", false, lockGetlkPid},
	{"lock/errors", false, lockErrors},
	{"lock/wait", false, lockWait},
	{"lock/wait-interrupted", false, lockWaitInterrupted},
	{"lock/wait-restarted", false, lockWaitRestarted},
	{"lock/wait-killed", false, lockWaitKilled},
	{"lock/cycle", false, lockCycle},
	{"lock/crowd", false, lockCrowd},
	{"lock/ofd", false, lockOFD},
	{"lock/ofd-close", false, lockOFDClose},
	{"lock/ofd-against-posix", false, lockOFDAgainstPosix},
	{"lock/flock", false, lockFlock},
	{"lock/flock-processes", false, lockFlockProcesses},
	{"lock/flock-wait-interrupted", false, lockFlockWaitInterrupted},
	{"lock/holder-dies", false, lockHolderDies},
	{"lock/unlinked", false, lockUnlinked},
}

// lock makes a lock call of this process. Length 0 reaches to the end of all files.
func lock(fd, cmd int, typ int16, start, length int64) error {
	return unix.FcntlFlock(uintptr(fd), cmd, &unix.Flock_t{Type: typ, Start: start, Len: length})
}

// lock makes a lock call of the agent.
func (a *agent) lock(fd int64, cmd int, typ int16, start, length int64) error {
	a.e.Helper()
	return a.call("lock", "", "", fd, int64(cmd), int64(typ), start, length)
}

// lockPair opens a new file in this process and in another.
func lockPair(e *env) (mine int, p *agent, theirs int64) {
	e.Helper()
	e.file("f", "0123456789")
	p = e.agent()
	return e.open("f", unix.O_RDWR, 0), p, p.mustOpen("f")
}

func lockPosix(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	e.errno(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "lock by another")
	e.errno(p.lock(theirs, unix.F_SETLK, unix.F_RDLCK, 5, 1), unix.EAGAIN, "lock for reading by another")
	e.ok(lock(mine, unix.F_SETLK, unix.F_RDLCK, 0, 0), "downgrade")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_RDLCK, 0, 0), "share")
	e.errno(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "upgrade what is shared")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock by another")
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "upgrade")
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock what was unlocked")
}

func lockPosixRanges(e *env) {
	mine, p, theirs := lockPair(e)
	try := func(start, length int64, want error) {
		e.Helper()
		if err := p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, start, length); err != want {
			e.Fatalf("lock of %d+%d by another: got %v, want %v", start, length, err, want)
		}
		e.ok(p.lock(theirs, unix.F_SETLK, unix.F_UNLCK, start, length), "unlock")
	}
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 100, 100), "lock")
	try(0, 100, nil)
	try(200, 0, nil)
	try(99, 2, unix.EAGAIN)
	try(199, 1, unix.EAGAIN)
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 140, 20), "split")
	try(140, 20, nil)
	try(139, 2, unix.EAGAIN)
	try(159, 2, unix.EAGAIN)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 130, 40), "merge")
	try(150, 1, unix.EAGAIN)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 1<<40, 0), "lock far beyond the end")
	try(1<<50, 1, unix.EAGAIN)
	try(200, 1<<40-200, nil)
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock everything")
	try(0, 0, nil)
}

// lockPosixClose: closing any descriptor of the file drops the process's locks.
func lockPosixClose(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	e.errno(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "lock by another")
	e.ok(e.tryOpen("f", unix.O_RDONLY, 0), "open and close")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock after a close")
}

func lockGetlk(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 10, 20), "lock by another")
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: 0, Len: 0}
	e.ok(unix.FcntlFlock(uintptr(mine), unix.F_GETLK, &l), "F_GETLK")
	e.eq([]int64{int64(l.Type), l.Start, l.Len}, []int64{unix.F_WRLCK, 10, 20}, "the lock in the way")
	l = unix.Flock_t{Type: unix.F_WRLCK, Start: 0, Len: 10}
	e.ok(unix.FcntlFlock(uintptr(mine), unix.F_GETLK, &l), "F_GETLK")
	e.eq(l.Type, int16(unix.F_UNLCK), "type where nothing is in the way")
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 100, 1), "lock")
	l = unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 1}
	e.ok(unix.FcntlFlock(uintptr(mine), unix.F_GETLK, &l), "F_GETLK")
	e.eq(l.Type, int16(unix.F_UNLCK), "type where one's own lock is")
}

func lockGetlkPid(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock by another")
	l := unix.Flock_t{Type: unix.F_RDLCK}
	e.ok(unix.FcntlFlock(uintptr(mine), unix.F_GETLK, &l), "F_GETLK")
	e.eq(int(l.Pid), p.cmd.Process.Pid, "process that holds the lock")
}

func lockErrors(e *env) {
	e.file("f", "x")
	r, w := e.open("f", unix.O_RDONLY, 0), e.open("f", unix.O_WRONLY, 0)
	e.errno(lock(r, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EBADF, "lock for writing by a read-only descriptor")
	e.errno(lock(w, unix.F_SETLK, unix.F_RDLCK, 0, 0), unix.EBADF, "lock for reading by a write-only descriptor")
	e.errno(lock(w, unix.F_SETLK, unix.F_WRLCK, -5, 1), unix.EINVAL, "a range before the file")
	e.errno(lock(w, unix.F_SETLK, 77, 0, 1), unix.EINVAL, "a type that is none")
	e.ok(lock(r, unix.F_SETLK, unix.F_RDLCK, 0, 0), "lock for reading")
}

func lockWait(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 10), "lock")
	p.begin("lock", "", "", theirs, unix.F_SETLKW, unix.F_WRLCK, 5, 10)
	p.blocked(unix.SYS_FCNTL)
	// Meanwhile the file serves others.
	e.write(mine, "x", 0)
	e.stat("f")
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 20, 10), "another lock while somebody waits")
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 10), "unlock")
	_, err := p.end()
	e.ok(err, "wait for a lock")
	e.errno(lock(mine, unix.F_SETLK, unix.F_WRLCK, 5, 1), unix.EAGAIN, "lock what the other got")
}

func lockWaitInterrupted(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.call("catch", "", "", 0), "catch a signal")
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	p.begin("lock", "", "", theirs, unix.F_SETLKW, unix.F_WRLCK, 0, 0)
	p.blocked(unix.SYS_FCNTL)
	p.signal()
	_, err := p.end()
	e.errno(err, unix.EINTR, "wait for a lock, interrupted")
	// It does not get the lock later, behind its back.
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	time.Sleep(50 * time.Millisecond)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock again")
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	e.ok(p.lock(theirs, unix.F_SETLKW, unix.F_WRLCK, 0, 0), "lock after an interruption")
}

func lockWaitRestarted(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.call("catch", "", "", 1), "catch a signal")
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	p.begin("lock", "", "", theirs, unix.F_SETLKW, unix.F_WRLCK, 0, 0)
	p.blocked(unix.SYS_FCNTL)
	for range 3 {
		p.signal()
		p.blocked(unix.SYS_FCNTL)
	}
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	_, err := p.end()
	e.ok(err, "wait for a lock, through signals that restart")
}

func lockWaitKilled(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	p.begin("lock", "", "", theirs, unix.F_SETLKW, unix.F_WRLCK, 0, 0)
	p.blocked(unix.SYS_FCNTL)
	e.within("the death of a process that waits for a lock", func() error { p.kill(); return nil })
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	q := e.agent()
	e.ok(q.lock(q.mustOpen("f"), unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock what the dead one waited for")
}

// lockCycle: two processes wait for each other. The kernel may see it (EDEADLK)
// or not; in no case may the file be stuck for others, or the waiters for ever.
func lockCycle(e *env) {
	e.file("f", "0123456789")
	a, b := e.agent(), e.agent()
	fa, fb := a.mustOpen("f"), b.mustOpen("f")
	e.ok(a.call("catch", "", "", 0), "catch a signal")
	e.ok(a.lock(fa, unix.F_SETLK, unix.F_WRLCK, 0, 1), "lock by the first")
	e.ok(b.lock(fb, unix.F_SETLK, unix.F_WRLCK, 1, 1), "lock by the second")
	a.begin("lock", "", "", fa, unix.F_SETLKW, unix.F_WRLCK, 1, 1)
	a.blocked(unix.SYS_FCNTL)
	b.begin("lock", "", "", fb, unix.F_SETLKW, unix.F_WRLCK, 0, 1)

	done := make(chan error, 1)
	go func() { _, err := b.end(); done <- err }()
	select {
	case err := <-done:
		e.errno(err, unix.EDEADLK, "the second waiter")
		e.ok(b.lock(fb, unix.F_SETLK, unix.F_UNLCK, 1, 1), "unlock by the second")
		_, err = a.end()
		e.ok(err, "the first waiter")
		return
	case <-time.After(200 * time.Millisecond):
	}
	c := e.agent()
	fc := c.mustOpen("f")
	e.ok(c.lock(fc, unix.F_SETLKW, unix.F_WRLCK, 5, 1), "lock of another range")
	e.ok(c.call("pwrite", "", "x", fc, 0), "write by a third")
	a.signal()
	_, err := a.end()
	e.errno(err, unix.EINTR, "the first waiter, interrupted")
	e.ok(a.lock(fa, unix.F_SETLK, unix.F_UNLCK, 0, 1), "unlock by the first")
	select {
	case err := <-done:
		e.ok(err, "the second waiter")
	case <-time.After(patience):
		e.Fatal("the second waiter still waits")
	}
}

// lockCrowd: many wait at once, and the file system goes on with everything else.
func lockCrowd(e *env) {
	const crowd = 50
	e.file("f", "x")
	holder := e.open("f", unix.O_RDWR, 0)
	e.ok(unix.Flock(holder, unix.LOCK_EX), "lock")
	var wg sync.WaitGroup
	got := make(chan struct{}, crowd)
	for range crowd {
		fd := e.open("f", unix.O_RDWR, 0)
		wg.Go(func() {
			for {
				if err := unix.Flock(fd, unix.LOCK_EX); err == unix.EINTR {
					continue // by a signal of the Go runtime
				} else if err != nil {
					e.Errorf("wait for a lock: %v", err)
				}
				break
			}
			got <- struct{}{}
			if err := unix.Flock(fd, unix.LOCK_UN); err != nil {
				e.Errorf("unlock: %v", err)
			}
		})
	}
	time.Sleep(50 * time.Millisecond) // let them wait; not one may come through
	e.within("work beside a crowd of waiters", func() error {
		for i := range 50 {
			if err := os.WriteFile(e.p(fmt.Sprint("g", i)), []byte("y"), 0o600); err != nil {
				return err
			}
		}
		return nil
	})
	e.eq(len(got), 0, "waiters that got the lock while it was held")
	e.ok(unix.Flock(holder, unix.LOCK_UN), "unlock")
	e.within("a crowd's turn", func() error { wg.Wait(); return nil })
	e.eq(len(got), crowd, "waiters that got the lock")
}

func lockOFD(e *env) {
	a, p, theirs := lockPair(e)
	b := e.open("f", unix.O_RDWR, 0)
	e.ok(lock(a, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 10), "lock")
	e.errno(lock(b, unix.F_OFD_SETLK, unix.F_WRLCK, 5, 10), unix.EAGAIN, "lock by another descriptor of this process")
	e.errno(p.lock(theirs, unix.F_OFD_SETLK, unix.F_RDLCK, 9, 1), unix.EAGAIN, "lock by another process")
	e.ok(lock(b, unix.F_OFD_SETLK, unix.F_WRLCK, 10, 10), "lock of another range")
	e.ok(lock(a, unix.F_OFD_SETLK, unix.F_UNLCK, 0, 10), "unlock")
	e.ok(p.lock(theirs, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 10), "lock by another process")
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: 0, Len: 5}
	e.ok(unix.FcntlFlock(uintptr(a), unix.F_OFD_GETLK, &l), "F_OFD_GETLK")
	e.eq([]int64{int64(l.Type), l.Start, l.Len, int64(l.Pid)}, []int64{unix.F_WRLCK, 0, 10, -1}, "the lock in the way")
	p.begin("lock", "", "", theirs, unix.F_OFD_SETLKW, unix.F_WRLCK, 10, 10)
	p.blocked(unix.SYS_FCNTL)
	e.ok(lock(b, unix.F_OFD_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	_, err := p.end()
	e.ok(err, "wait for a lock")
}

// lockOFDClose: an OFD lock lives as long as its open file, whatever else is closed.
func lockOFDClose(e *env) {
	e.file("f", "x")
	b := e.open("f", unix.O_RDWR, 0)
	a, err := unix.Open(e.p("f"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	e.ok(err, "open")
	e.ok(lock(a, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0), "lock")
	e.ok(e.tryOpen("f", unix.O_RDWR, 0), "open and close")
	e.errno(lock(b, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "lock after another descriptor was closed")
	d := dup(e, a)
	e.ok(unix.Close(a), "close")
	e.errno(lock(b, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "lock while a duplicate is open")
	e.ok(unix.Close(d), "close the duplicate")
	e.within("lock after the last close", func() error { return lock(b, unix.F_OFD_SETLKW, unix.F_WRLCK, 0, 0) })
}

func lockOFDAgainstPosix(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), "a POSIX lock by another")
	e.errno(lock(mine, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "an OFD lock against it")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	e.ok(lock(mine, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0), "an OFD lock")
	e.errno(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "a POSIX lock against it")
}

func lockFlock(e *env) {
	e.file("f", "x")
	a, b := e.open("f", unix.O_RDONLY, 0), e.open("f", unix.O_RDONLY, 0)
	e.ok(unix.Flock(a, unix.LOCK_SH), "share")
	e.ok(unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB), "share by another descriptor")
	e.errno(unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK, "upgrade what is shared")
	e.ok(unix.Flock(b, unix.LOCK_UN), "unlock")
	e.ok(unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB), "upgrade")
	e.errno(unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK, "share what is locked")
	d := dup(e, a)
	e.ok(unix.Close(a), "close")
	e.errno(unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK, "lock while a duplicate is open")
	e.ok(unix.Close(d), "close the duplicate")
	e.within("lock after the last close", func() error { return unix.Flock(b, unix.LOCK_EX) })
}

func lockFlockProcesses(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(unix.Flock(mine, unix.LOCK_EX), "lock")
	e.errno(p.call("flock", "", "", theirs, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK, "lock by another")
	p.begin("flock", "", "", theirs, unix.LOCK_EX)
	p.blocked(unix.SYS_FLOCK)
	e.ok(unix.Flock(mine, unix.LOCK_UN), "unlock")
	_, err := p.end()
	e.ok(err, "wait for a lock")
	e.errno(unix.Flock(mine, unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK, "share what the other got")
}

func lockFlockWaitInterrupted(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(p.call("catch", "", "", 0), "catch a signal")
	e.ok(unix.Flock(mine, unix.LOCK_EX), "lock")
	p.begin("flock", "", "", theirs, unix.LOCK_EX)
	p.blocked(unix.SYS_FLOCK)
	p.signal()
	_, err := p.end()
	e.errno(err, unix.EINTR, "wait for a lock, interrupted")
	e.ok(unix.Flock(mine, unix.LOCK_UN), "unlock")
}

func lockHolderDies(e *env) {
	e.file("f", "x")
	fd := e.open("f", unix.O_RDWR, 0)
	for name, hold := range map[string]func(p *agent, fd int64) error{
		"POSIX": func(p *agent, fd int64) error { return p.lock(fd, unix.F_SETLK, unix.F_WRLCK, 0, 0) },
		"OFD":   func(p *agent, fd int64) error { return p.lock(fd, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 0) },
		"flock": func(p *agent, fd int64) error { return p.call("flock", "", "", fd, unix.LOCK_EX) },
	} {
		p := e.agent()
		e.ok(hold(p, p.mustOpen("f")), "lock by another: "+name)
		p.kill()
		// The kernel may tell the file system of the last close a little later.
		e.within(name+" lock after its holder died", func() error {
			if name == "flock" {
				return unix.Flock(fd, unix.LOCK_EX)
			}
			return lock(fd, unix.F_OFD_SETLKW, unix.F_WRLCK, 0, 0)
		})
		e.ok(unix.Flock(fd, unix.LOCK_UN), "unlock")
		e.ok(lock(fd, unix.F_OFD_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	}
}

func lockUnlinked(e *env) {
	mine, p, theirs := lockPair(e)
	e.ok(lock(mine, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock")
	e.ok(unix.Unlink(e.p("f")), "unlink")
	e.errno(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), unix.EAGAIN, "lock of an unlinked file by another")
	e.ok(lock(mine, unix.F_SETLK, unix.F_UNLCK, 0, 0), "unlock")
	e.ok(p.lock(theirs, unix.F_SETLK, unix.F_WRLCK, 0, 0), "lock of an unlinked file")
}
