// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"os"
	"time"
)

// Control sockets of the packaged services.
const (
	GuestSocket = "/run/transfuse/control.sock"
	HostSocket  = "/run/transfuse/host.sock"
)

// Interfaces on them, in varlink's form.
const (
	GuestInterface = "org.transfused.Guest"
	HostInterface  = "org.transfused.Host"
)

// State is how a mount does.
type State string

// The states of a mount.
const (
	Mounting     State = "mounting"     // it is asked for, and the host or the kernel has not answered
	Active       State = "active"       // it works
	Reconnecting State = "reconnecting" // it stands, and waits for the host
	Draining     State = "draining"     // it is being unmounted
	Failed       State = "failed"       // it can't be made; Error says why
)

// Mount is a mount of the guest's daemon.
type Mount struct {
	ID         string    `json:"id"` // letters and digits; the same for as long as it is there, also through restarts of the daemon
	Tag        string    `json:"tag"`
	Directory  string    `json:"directory"`
	Source     string    `json:"source"` // the host's address
	Options    []string  `json:"options"`
	ReadOnly   bool      `json:"readOnly"`
	Configured bool      `json:"configured"` // by configuration or flags; others were asked for while it ran
	State      State     `json:"state"`
	Error      string    `json:"error"` // why it is not active; empty if there is nothing to say
	Since      time.Time `json:"since"` // of State
	Streams    int       `json:"streams"`
}

// GuestStatus is how the guest's daemon does.
type GuestStatus struct {
	Version   string   `json:"version"`
	Server    string   `json:"server"` // the host's address
	Connected bool     `json:"connected"`
	Protocol  int      `json:"protocol"` // that is spoken; 0 while not connected
	Host      string   `json:"host"`     // the host's program and version; empty where it doesn't tell
	Features  []string `json:"features"` // that are agreed
	Mounts    int      `json:"mounts"`   // that stand
	Text      string   `json:"text"`     // all that in words: STATUS= of sd_notify(3)
}

// MountSpec is a mount that is asked for.
type MountSpec struct {
	Tag       string   `json:"tag"`
	Directory string   `json:"directory"` // absolute
	Options   []string `json:"options,omitempty"`
	// At is the directory, O_PATH, as the caller sees it; nil: the daemon looks for Directory itself. The daemon's
	// mount namespace must be the caller's.
	At *os.File `json:"-"`
}

// Unmounting is how to unmount. The zero value refuses a mount that is in use.
type Unmounting struct {
	Force bool `json:"force,omitempty"` // fail what waits for the host, as umount -f
	Lazy  bool `json:"lazy,omitempty"`  // detach it now, and end it when nobody uses it, as umount -l
}

// Export is what can be mounted.
type Export struct {
	Tag      string `json:"tag"`
	ReadOnly bool   `json:"readOnly"`
	Text     string `json:"text"` // for people; may be empty
	// At the host alone:
	Directory string   `json:"directory,omitempty"`
	Guests    []string `json:"guests,omitempty"`  // who may mount it, as in guests=
	Options   []string `json:"options,omitempty"` // the others
}

// Latency is a distribution, from when the request was read from the kernel to when the reply was written, in nanoseconds.
type Latency struct {
	P50 uint64 `json:"p50"`
	P90 uint64 `json:"p90"`
	P99 uint64 `json:"p99"`
	Max uint64 `json:"max"`
}

// Operation counts one FUSE operation of a mount.
type Operation struct {
	Name     string  `json:"name"` // LOOKUP, READ …
	Requests uint64  `json:"requests"`
	Latency  Latency `json:"latency"`
}

// Statistics are a mount's counts since it was made, or since the daemon was started.
type Statistics struct {
	Requests     uint64      `json:"requests"`
	InFlight     uint64      `json:"inFlight"`     // read, and not yet answered
	RequestBytes uint64      `json:"requestBytes"` // from the kernel: writes
	ReplyBytes   uint64      `json:"replyBytes"`   // to the kernel: reads
	Dropped      uint64      `json:"dropped"`      // replies that nobody waited for
	Latency      Latency     `json:"latency"`
	Operations   []Operation `json:"operations"` // those that came at least once
}

// Request is one request that passed a mount, for tracing.
type Request struct {
	Mount     string        `json:"mount"` // its ID
	Time      time.Time     `json:"time"`  // when it was read from the kernel
	Operation string        `json:"operation"`
	Unique    uint64        `json:"unique"`
	NodeID    uint64        `json:"nodeid"`
	PID       uint32        `json:"pid"`      // who caused it
	Length    uint32        `json:"length"`   // in bytes
	Reply     uint32        `json:"reply"`    // length of the reply
	Errno     int           `json:"errno"`    // of the reply
	Duration  time.Duration `json:"duration"` // until the reply was written, in ns
}

// TraceFilter says which requests are wanted; empty fields want all.
type TraceFilter struct {
	Mount     string `json:"mount,omitempty"`     // an ID
	Operation string `json:"operation,omitempty"` // as Request has it, in any case
}

// Change is something that happened to a daemon's mounts or connection.
type Change struct {
	Kind  ChangeKind `json:"kind"`
	Mount Mount      `json:"mount"` // as it is now; as it was for Removed; zero for StatusChanged
}

// ChangeKind tells what a Change is.
type ChangeKind string

// Kinds of changes.
const (
	Added         ChangeKind = "added"
	Removed       ChangeKind = "removed"
	Changed       ChangeKind = "changed" // State, Error, Streams
	StatusChanged ChangeKind = "status"  // GuestStatus or HostStatus
)

// Guest is a running guest daemon. Every method may be called from any goroutine, and none waits for a mount's file system.
type Guest interface {
	Status() GuestStatus
	// Mounts are all that the daemon has or wants, by ID.
	Mounts() []Mount
	// Mount mounts an export and returns when it stands, or when the host or the kernel has refused it. It waits for the host until ctx ends.
	Mount(ctx context.Context, spec MountSpec) (Mount, error)
	// Detached makes a mount that is nowhere yet, for a caller whose mount namespace is another: move_mount(2) of the descriptor puts
	// it at spec.Directory there. If it is closed before, the mount ends.
	Detached(ctx context.Context, spec MountSpec) (*os.File, Mount, error)
	// Unmount ends a mount. A configured mount stays unmounted until the configuration is read again.
	Unmount(ctx context.Context, id string, how Unmounting) error
	// Remount makes a mount read-only, or writable where the host lets it.
	Remount(ctx context.Context, id string, readOnly bool) error
	// Exports are what the host offers this guest.
	Exports(ctx context.Context) ([]Export, error)
	// Reload reads the configuration again. A bad one changes nothing.
	Reload(ctx context.Context) error
	// Wait returns when the host is connected, or ctx ends.
	Wait(ctx context.Context) error
	Statistics(id string) (Statistics, error)
	// Trace calls f for each request until ctx ends; f must not wait long: what comes meanwhile is left out. The error is ctx's.
	Trace(ctx context.Context, filter TraceFilter, f func(Request)) error
	// Watch returns the mounts as they are, and every change from then on until ctx ends, when the channel is closed. Who doesn't read
	// misses changes, but never the last one of a mount.
	Watch(ctx context.Context) ([]Mount, <-chan Change)
}

// HostStatus is how the host's server does.
type HostStatus struct {
	Version  string   `json:"version"`
	Listen   []string `json:"listen"`
	Exports  int      `json:"exports"`
	Sessions int      `json:"sessions"`
	Text     string   `json:"text"` // all that in words
}

// Session is one guest's daemon at the host.
type Session struct {
	ID       string        `json:"id"`   // letters and digits; of this session alone
	Peer     string        `json:"peer"` // its address
	Guest    string        `json:"guest"`
	Kernel   string        `json:"kernel"`
	Protocol int           `json:"protocol"`
	Since    time.Time     `json:"since"`
	Lost     bool          `json:"lost"` // its control channel is lost
	Worker   int           `json:"worker"`
	Mounts   []GuestsMount `json:"mounts"`
}

// GuestsMount is a mount as the host knows it.
type GuestsMount struct {
	Tag       string `json:"tag"`
	Directory string `json:"directory"` // in the guest, in its words
	ReadOnly  bool   `json:"readOnly"`
	Streams   int    `json:"streams"`           // 0: it waits for the guest to come back
	Watched   string `json:"watched,omitempty"` // how changes on the host are seen, for people; empty: they need not be
}

// Host is a running host server.
type Host interface {
	Status() HostStatus
	Exports() []Export
	Sessions() []Session
	// Reload reads the configuration again. A bad one changes nothing.
	Reload(ctx context.Context) error
	// Watch returns a channel that has a value after something changed, until ctx ends, when it is closed.
	Watch(ctx context.Context) <-chan struct{}
}
