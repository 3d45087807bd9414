// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/watch"
)

// SubmountPolicy says what the guest sees where another file system is mounted below the export.
type SubmountPolicy int

const (
	// SubmountsHide: names that lead to another mount than Root's do not exist for the guest. If Root is a copy of a
	// mount without those below (OPEN_TREE_CLONE), no name does, and the directories under the mounts show.
	SubmountsHide SubmountPolicy = iota
	// SubmountsFollow: what is mounted below Root is part of the tree; inode numbers are made unique. If Root is a copy
	// (AT_RECURSIVE too), that is what was there when it was made, less what has been unmounted.
	SubmountsFollow
)

// Config describes one mount of an export.
type Config struct {
	Root *os.File // the export's directory; New takes ownership, whether it fails or not
	Name string   // the tag, for logs

	ReadOnly bool // every change answers EROFS
	Suid     bool // set-id bits and security.capability from the guest are kept
	Dev      bool // device nodes may be made
	ACL      bool // POSIX ACLs

	RootAs     RootPolicy
	UIDs, GIDs IDMap
	Squash     *Cred
	Submounts  SubmountPolicy
	Xattr      XattrMode
	XattrMap   []XattrRule

	Cache     CacheMode
	Writeback bool // the guest writes when it likes; only with CacheAlways

	Ahead   bool               // tell the attributes of a changed directory ahead (fuse.AheadOut)
	Reread  bool               // the guest's kernel asks each time where a symbolic link leads: for an Actor that is Plain
	TTL     time.Duration      // how long the guest may cache what it is not told of; 0: one second
	Changed func(watch.Change) `json:"-"` // called with each change that the guest makes, from many goroutines; must not wait; nil: not
	Heard   func() bool        `json:"-"` // whether anybody hears what Changed is called with; nil: yes
	Dirs    *DirWatches        `json:"-"` // not owned: changes on the host come by it, and not by Watched; nil: they don't
	Limits  *Limits            // shared by all mounts of one session; nil: defaults
	ProcFD  *os.File           // /proc/self/fd, not owned; nil: New opens it
	Log     *slog.Logger       // nil: silent
}

// FS is the file system behind one mount of an export. Node ids and handles are its own.
type FS struct {
	c      Config
	limits *Limits
	procFD int // c.ProcFD's
	root   *node
	log    *slog.Logger

	byHandle  bool // nodes can be opened by file handle (CAP_DAC_READ_SEARCH)
	mountFD   int  // a readable directory of the root's mount, for open_by_handle_at; -1 without byHandle
	ownProc   bool
	ids       ids
	second    second
	caching   caching
	dirs      dirs
	acting    atomic.Pointer[acting] // the call that an Actor makes
	overdue   overdue
	actedOpen atomic.Bool // a file has been opened with actedFh

	session  atomic.Pointer[session] // nil before INIT
	requests atomic.Uint64
	received atomic.Uint64 // bytes of them
	sent     atomic.Uint64 // bytes of replies

	destroyed atomic.Bool // DESTROY came

	// mu guards the tables, and every field of node and handle that says so. No system call is made under it but name_to_handle_at.
	mu      sync.Mutex
	nodes   map[uint64]*node
	keys    map[key]*node
	places  map[place]*node // who was seen there last
	lastID  uint64
	most    int         // nodes, since the maps of them were made
	freeing *time.Timer // gives back memory; nil: it has never
	handles map[uint64]*handle
	lastFh  uint64
	shared  shared
	how     unix.OpenHow // to open a name in a directory
	lru     node         // ring of nodes whose descriptor may be closed; lru.next is the latest used
	dead    []int        // descriptors to close at unlock
	closed  bool
}

// New makes a file system of c.
func New(c Config) (*FS, error) {
	fs := &FS{c: c, limits: c.Limits, log: c.Log, mountFD: -1, nodes: map[uint64]*node{}, keys: map[key]*node{}, places: map[place]*node{}, handles: map[uint64]*handle{}, lastID: 1}
	if err := fs.open(); err != nil {
		c.Root.Close()
		if fs.ownProc {
			fs.c.ProcFD.Close()
		}
		if fs.mountFD >= 0 {
			unix.Close(fs.mountFD)
		}
		return nil, fmt.Errorf("export %s: %w", c.Name, err)
	}
	return fs, nil
}

func (fs *FS) open() error {
	if fs.limits == nil {
		fs.limits = &Limits{}
	}
	fs.limits.init()
	if fs.log == nil {
		fs.log = slog.New(slog.DiscardHandler)
	}
	if fs.c.TTL == 0 {
		fs.c.TTL = time.Second
	}
	fs.caching.wake.L = &fs.caching.mu
	if fs.c.ProcFD == nil {
		fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /proc/self/fd (is /proc mounted?): %w", err)
		}
		fs.c.ProcFD, fs.ownProc = os.NewFile(uintptr(fd), "/proc/self/fd"), true
	}
	fs.how = unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	if fs.c.Submounts == SubmountsHide {
		fs.how.Resolve |= unix.RESOLVE_NO_XDEV
	}
	fs.procFD = int(fs.c.ProcFD.Fd())
	fs.lru.next, fs.lru.prev = &fs.lru, &fs.lru
	rootFD := int(fs.c.Root.Fd())
	var st unix.Statx_t
	if e := statx(rootFD, emptyName, unix.AT_EMPTY_PATH, &st); e != 0 {
		return fmt.Errorf("stat its directory: %w", e)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("it is not a directory: %w", unix.ENOTDIR)
	}
	fs.root = &node{fs: fs, id: 1, key: keyOf(&st), btime: btimeOf(&st), typ: unix.S_IFDIR, ino: st.Ino, fd: rootFD, pins: 1}
	fs.nodes[1], fs.keys[fs.root.key] = fs.root, fs.root
	fs.probeHandles()
	if err := fs.second.init(fs); err != nil {
		return err
	}
	if fs.c.Dirs != nil {
		fs.dirs.types = map[uint64]bool{}
		fs.dirs.number = fs.c.Dirs.join(fs)
	}
	return nil
}

// Close closes every descriptor. All Serves must have returned.
func (fs *FS) Close() error {
	if fs.c.Dirs != nil {
		fs.c.Dirs.leave(fs)
	}
	fs.caching.close()
	fs.second.close()
	fs.mu.Lock()
	fs.closed = true
	if fs.freeing != nil {
		fs.freeing.Stop()
	}
	for _, h := range fs.handles {
		unix.Close(h.fd)
		fs.giveFile()
	}
	fs.shared.close(fs)
	for _, n := range fs.nodes {
		if n.fd >= 0 && n != fs.root {
			unix.Close(n.fd)
			fs.giveFD()
		}
	}
	fs.limits.nodes.Add(1 - int64(len(fs.nodes)))
	clear(fs.handles)
	clear(fs.nodes)
	clear(fs.keys)
	clear(fs.places)
	fs.mu.Unlock()
	if fs.mountFD >= 0 {
		unix.Close(fs.mountFD)
	}
	if fs.ownProc {
		fs.c.ProcFD.Close()
	}
	return fs.c.Root.Close()
}

// unlock gives mu back, and closes the descriptors of what was dropped under it: the last close of a removed file
// frees its blocks, which can take long.
func (fs *FS) unlock() {
	dead, drop := fs.dead, fs.dirs.drop
	fs.dead, fs.dirs.drop = nil, nil
	fs.mu.Unlock()
	for _, id := range drop {
		fs.c.Dirs.dirs.Remove(fs.dirs.number<<nodeBits | id)
	}
	for _, fd := range dead {
		unix.Close(fd)
		fs.giveFD()
	}
}

// Destroyed tells whether the guest has ended the mount (DESTROY), and not only a stream of it.
func (fs *FS) Destroyed() bool { return fs.destroyed.Load() }

// Counts are what a mount has served since New.
type Counts struct {
	Requests uint64
	Received uint64 // bytes of requests
	Sent     uint64 // bytes of replies
}

// Counts counts. It takes no lock.
func (fs *FS) Counts() Counts {
	return Counts{fs.requests.Load(), fs.received.Load(), fs.sent.Load()}
}

// Stats tell what a mount holds.
type Stats struct {
	Requests uint64 // served since New
	Nodes    int    // inodes that the guest knows
	Files    int    // open files and directories
	Paths    int    // descriptors of nodes
}

// Stats counts.
func (fs *FS) Stats() Stats {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	s := Stats{Requests: fs.requests.Load(), Nodes: len(fs.nodes), Files: len(fs.handles)}
	for _, n := range fs.nodes {
		if n.fd >= 0 {
			s.Paths++
		}
	}
	return s
}
