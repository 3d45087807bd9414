// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// watched is nil if somebody watches the mount by inotify or fanotify now, or that can't be told, and ENODATA if nobody does: then there is nobody to
// act for what has happened until now.
func (m *helperMount) watched() error {
	m.point.mu.RLock()
	id := m.point.id
	m.point.mu.RUnlock()
	// Who has another view of processes does not see all who may watch (PROC_PID_INIT_INO, linux/proc_ns.h).
	var st unix.Stat_t
	if unix.Stat("/proc/self/ns/pid", &st) != nil || st.Ino != 0xEFFFFFFC {
		return nil
	}
	looking.Lock()
	defer looking.Unlock()
	w := watchers{dev: strconv.FormatUint(uint64(id.Dev1)<<20|uint64(id.Dev2), 16), until: time.Now().Add(maxLook)}
	if yes, err := w.inProcesses("/proc"); yes || err != nil {
		return nil
	}
	return unix.ENODATA
}

// maxLook is how long it may take to look: the host tells nothing else about the mount meanwhile.
const maxLook = 50 * time.Millisecond

// looking is held by the one who looks.
var looking sync.Mutex

var errTooMany = errors.New("it takes too long to look at all processes")

// watchers looks for who watches anything on one file system: the descriptors of inotify and fanotify tell (proc_pid_fdinfo(5)).
type watchers struct {
	dev   string    // as fdinfo has it: the kernel's own dev_t, in hex
	until time.Time // when to give up; zero: never
}

// inProcesses tells whether there is one among the processes in proc, or in the threads of one. An error: not all can be looked at.
func (w *watchers) inProcesses(proc string) (bool, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if !w.until.IsZero() && time.Now().After(w.until) {
			return false, errTooMany
		}
		dir := filepath.Join(proc, e.Name())
		n, yes, err := w.inDescriptors(dir)
		if yes || err != nil {
			return yes, err
		}
		// It may have none because its first thread has ended, and the others have theirs.
		if n > 0 || filepath.Base(proc) == "task" {
			continue
		}
		if yes, err := w.inProcesses(filepath.Join(dir, "task")); yes || err != nil && !gone(err) {
			return yes, err
		}
	}
	return false, nil
}

// gone tells whether a process has ended meanwhile.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// inDescriptors looks at the n descriptors of a process, or a thread, that has dir in /proc.
func (w *watchers) inDescriptors(dir string) (n int, yes bool, err error) {
	f, err := os.Open(filepath.Join(dir, "fd"))
	if err != nil {
		if gone(err) {
			err = nil
		}
		return 0, false, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil && !gone(err) {
		return 0, false, err
	}
	var buf [32]byte
	for _, name := range names {
		k, err := unix.Readlinkat(int(f.Fd()), name, buf[:])
		if err != nil {
			if gone(err) {
				continue
			}
			return 0, false, err
		}
		switch string(buf[:k]) {
		case "anon_inode:inotify", "anon_inode:[fanotify]":
			if yes, err := w.marks(filepath.Join(dir, "fdinfo", name)); yes || err != nil {
				return 0, yes, err
			}
		}
	}
	return len(names), false, nil
}

// marks tells whether a descriptor's fdinfo has a mark on the file system, or one on a mount, which may be of it.
func (w *watchers) marks(fdinfo string) (bool, error) {
	f, err := os.Open(fdinfo)
	if err != nil {
		if gone(err) {
			err = nil
		}
		return false, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); ; {
		if !s.Scan() {
			if err := s.Err(); err != nil && !gone(err) {
				return false, fmt.Errorf("%s: %w", fdinfo, err)
			}
			return false, nil
		}
		kind, rest, _ := strings.Cut(s.Text(), " ")
		if kind != "inotify" && kind != "fanotify" {
			continue
		}
		for field := range strings.FieldsSeq(rest) {
			if key, value, _ := strings.Cut(field, ":"); key == "mnt_id" || key == "sdev" && value == w.dev {
				return true, nil
			}
		}
	}
}
