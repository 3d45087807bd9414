// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// dirMask is what is asked of inotify. IN_EXCL_UNLINK: a file without a name is not told by the name it had.
const dirMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE |
	unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

const (
	dirReadSize = 64 << 10
	// pairWait is for the second half of a move, that the kernel queues right after the first.
	pairWait = time.Millisecond
)

// DirChange is one thing that happened in a directory that Dirs watches.
type DirChange struct {
	Op      Op // as in Change. A Rename is between two directories that are watched
	Dir     uint64
	Name    string // empty: the directory itself; then Delete says that it is gone and is watched no more
	NewDir  uint64 // of a Rename
	NewName string
}

// Dirs tells what changes in directories, each of which is added: by inotify, which needs no privilege. It does not know who did it.
// Its methods may be called from any goroutine.
//
// It owns the inotify instance, and a goroutine that reads it and calls its function.
type Dirs struct {
	log     *slog.Logger
	f       func([]DirChange)
	file    *os.File // the inotify instance
	done    chan struct{}
	end     chan struct{}
	readErr time.Duration // pause after an error of a read

	// mu guards what follows. It is not held while f is called.
	mu     sync.Mutex
	closed bool
	fd     int // file's, until closed
	ids    map[int32]uint64
	wds    map[uint64]int32
	more   map[int32][]uint64 // of directories that were added under several ids: all but the one in ids

	scratch []uint64
}

// NewDirs makes a Dirs. f is called by one goroutine with changes in their order; the slice is Dirs's again when it returns. It must not
// block for long, or changes are lost. A nil log is none.
func NewDirs(log *slog.Logger, f func([]DirChange)) (*Dirs, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		why := ""
		if err == unix.EMFILE {
			why = limit("instances")
		}
		return nil, fmt.Errorf("inotify: %w%s", os.NewSyscallError("inotify_init1", err), why)
	}
	d := &Dirs{
		log:     log,
		f:       f,
		file:    os.NewFile(uintptr(fd), "inotify"),
		done:    make(chan struct{}),
		end:     make(chan struct{}),
		readErr: time.Second,
		fd:      fd,
		ids:     make(map[int32]uint64),
		wds:     make(map[uint64]int32),
		more:    make(map[int32][]uint64),
	}
	go d.run()
	return d, nil
}

// limit names the sysctl that limits watches or instances, and its value: the user namespace's, if that is lower.
func limit(what string) string {
	read := func(file string) (int, string) {
		b, err := os.ReadFile("/proc/sys/" + file)
		if err != nil {
			return 1 << 62, "unknown"
		}
		s := strings.TrimSpace(string(b))
		n, err := strconv.Atoi(s)
		if err != nil {
			return 1 << 62, s
		}
		return n, s
	}
	n, value := read("fs/inotify/max_user_" + what)
	if value == "unknown" { // a worker can't see it
		return fmt.Sprintf(" (see fs.inotify.max_user_%s)", what)
	}
	if n2, value2 := read("user/max_inotify_" + what); n2 < n {
		return fmt.Sprintf(" (user.max_inotify_%s is %s)", what, value2)
	}
	return fmt.Sprintf(" (fs.inotify.max_user_%s is %s)", what, value)
}

// Add watches the directory that fd, which may be an O_PATH descriptor, is of; its changes are told with id. What happens after Add has
// returned is told. One directory may have several ids; an id has one directory, and adding another one takes it away from the first. The
// descriptor is not needed any more when Add returns. The process needs read permission on the directory, and /proc.
func (d *Dirs) Add(fd int, id uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	n, err := unix.InotifyAddWatch(d.fd, "/proc/self/fd/"+strconv.Itoa(fd), dirMask)
	if err != nil {
		why := ""
		if err == unix.ENOSPC {
			why = limit("watches")
		}
		return fmt.Errorf("inotify: %w%s", os.NewSyscallError("inotify_add_watch", err), why)
	}
	wd := int32(n)
	if old, ok := d.wds[id]; ok {
		if old == wd {
			return nil
		}
		d.remove(id)
	}
	d.wds[id] = wd
	if _, ok := d.ids[wd]; ok {
		d.more[wd] = append(d.more[wd], id)
	} else {
		d.ids[wd] = id
	}
	return nil
}

// Remove ends the watch of what was added as id, if it is there. A change that was read before may still be told.
func (d *Dirs) Remove(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.remove(id)
	}
}

func (d *Dirs) remove(id uint64) {
	wd, ok := d.wds[id]
	if !ok {
		return
	}
	delete(d.wds, id)
	others := d.more[wd]
	if len(others) == 0 {
		delete(d.ids, wd)
		unix.InotifyRmWatch(d.fd, uint32(wd)) // fails if the directory is gone already
		return
	}
	if d.ids[wd] == id {
		d.ids[wd] = others[0]
		id = others[0]
	}
	others = slices.DeleteFunc(others, func(o uint64) bool { return o == id })
	if d.more[wd] = others; len(others) == 0 {
		delete(d.more, wd)
	}
}

// Close ends all watches: the function runs no more when it returns, and must not call it.
func (d *Dirs) Close() {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		close(d.end)
		d.file.Close()
	}
	d.mu.Unlock()
	<-d.done
}

// run reads events and tells them.
func (d *Dirs) run() {
	defer close(d.done)
	buf, b := make([]byte, dirReadSize), newDirBatch()
	for {
		b.reset()
		n, err := d.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		d.take(b, buf[:max(n, 0)])
		for try := 0; err == nil && b.half && try < 8; try++ {
			d.file.SetReadDeadline(time.Now().Add(pairWait))
			n, err = d.file.Read(buf)
			b.half = false
			d.take(b, buf[:max(n, 0)])
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = nil
			}
			d.file.SetReadDeadline(time.Time{})
		}
		if err != nil && !errors.Is(err, os.ErrClosed) {
			d.log.Error("changes of the host's files were lost", "err", err)
			b.lost()
		}
		if len(b.changes) > 0 {
			d.f(b.changes)
		}
		if err != nil {
			select {
			case <-d.end:
			case <-time.After(d.readErr):
			}
		}
	}
}

// dirBatch is what is told at once.
type dirBatch struct {
	changes []DirChange
	seen    map[dirName]int   // index in changes; since names last changed
	halves  map[uint32][2]int // first halves of moves by cookie: their index in changes, and how many
	half    bool              // the last event was one
}

type dirName struct {
	dir  uint64
	name string
}

func newDirBatch() *dirBatch {
	return &dirBatch{seen: make(map[dirName]int), halves: make(map[uint32][2]int)}
}

func (b *dirBatch) reset() {
	clear(b.changes)
	b.changes = b.changes[:0]
	clear(b.seen)
	clear(b.halves)
	b.half = false
}

func (b *dirBatch) lost() {
	clear(b.seen)
	b.changes = append(b.changes, DirChange{Op: Lost})
}

// touch adds a change that leaves names as they are.
func (b *dirBatch) touch(c DirChange) {
	k := dirName{c.Dir, c.Name}
	if i, ok := b.seen[k]; ok && b.changes[i].Op&IsDir == c.Op&IsDir {
		b.changes[i].Op |= c.Op
		return
	}
	b.seen[k] = len(b.changes)
	b.changes = append(b.changes, c)
}

// take adds the events of buf, which the kernel wrote, to b.
func (d *Dirs) take(b *dirBatch, buf []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	le := binary.NativeEndian
	for len(buf) >= unix.SizeofInotifyEvent {
		wd, bits, cookie, size := int32(le.Uint32(buf)), le.Uint32(buf[4:]), le.Uint32(buf[8:]), int(le.Uint32(buf[12:]))
		buf = buf[unix.SizeofInotifyEvent:]
		if size > len(buf) {
			d.log.Error("changes of the host's files were lost", "err", errEvent)
			b.lost()
			return
		}
		name := buf[:size]
		buf = buf[size:]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		b.half = false
		if bits&unix.IN_Q_OVERFLOW != 0 {
			d.log.Warn("changes of the host's files were lost: too many at once", "sysctl", "fs.inotify.max_queued_events")
			b.lost()
			continue
		}
		id, ok := d.ids[wd]
		if !ok {
			continue // was removed
		}
		ids := append(append(d.scratch[:0], id), d.more[wd]...)
		d.scratch = ids
		d.event(b, bits, cookie, string(name), ids)
		if bits&unix.IN_IGNORED != 0 {
			for _, id := range ids {
				delete(d.wds, id)
			}
			delete(d.ids, wd)
			delete(d.more, wd)
		}
	}
}

// event adds one event of the directory with these ids.
func (d *Dirs) event(b *dirBatch, bits, cookie uint32, name string, ids []uint64) {
	var op Op
	for _, m := range [...]struct {
		bit uint32
		op  Op
	}{
		{unix.IN_CREATE | unix.IN_MOVED_TO, Create}, {unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_IGNORED, Delete},
		{unix.IN_MODIFY, Modify}, {unix.IN_ATTRIB, Attrib}, {unix.IN_CLOSE_WRITE, CloseWrite},
	} {
		if bits&m.bit != 0 {
			op |= m.op
		}
	}
	if op == 0 {
		return
	}
	if bits&unix.IN_ISDIR != 0 || name == "" {
		op |= IsDir
	}
	if op&^touches == 0 {
		for _, id := range ids {
			b.touch(DirChange{Op: op, Dir: id, Name: name})
		}
		return
	}
	clear(b.seen)
	if bits&unix.IN_MOVED_TO != 0 {
		// With several ids it is not known which belong together, and it stays Delete and Create.
		if half, ok := b.halves[cookie]; ok && half[1] == 1 && len(ids) == 1 {
			delete(b.halves, cookie)
			c := &b.changes[half[0]]
			c.Op, c.NewDir, c.NewName = Rename|op&IsDir, ids[0], name
			return
		}
	}
	if bits&unix.IN_MOVED_FROM != 0 {
		b.halves[cookie] = [2]int{len(b.changes), len(ids)}
		b.half = true
	}
	for _, id := range ids {
		b.changes = append(b.changes, DirChange{Op: op, Dir: id, Name: name})
	}
}
