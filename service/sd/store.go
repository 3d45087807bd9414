// SPDX-License-Identifier: Apache-2.0

package sd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"golang.org/x/sys/unix"
)

// managerTime bounds what the service manager is asked for.
const managerTime = 5 * time.Second

// Store is the file descriptor store of this service: what is in it outlives the process, and is passed to the next one. Any
// goroutine may call its methods.
type Store struct {
	max uint32

	mu    sync.Mutex     // serializes Put, since the manager's count tells whether it took what was put
	files map[string]int // how many are stored, by name
}

// OpenStore returns the store of this service, and nil where it has none: it was not started by systemd, or
// without FileDescriptorStoreMax=. Stored is what Take returned.
func OpenStore(stored []Stored) (*Store, error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, nil
	}
	s := &Store{files: map[string]int{}}
	for _, e := range stored {
		s.files[e.Name] = len(e.Files)
	}
	// Since systemd 254; empty where the unit has no store.
	if v, ok := os.LookupEnv("FDSTORE"); ok {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("FDSTORE=%q in the environment is no number", v)
		}
		s.max = uint32(n)
	} else if err := s.property("FileDescriptorStoreMax", &s.max); err != nil {
		if errors.Is(err, errNoManager) {
			return nil, nil
		}
		return nil, fmt.Errorf("descriptor store of this service: %w", err)
	}
	if s.max == 0 {
		return nil, nil
	}
	return s, nil
}

var errNoManager = errors.New("there is no service manager to ask")

// manager calls f with a connection to PID 1 over its private socket, which needs no bus, and the name of this unit.
func manager(f func(ctx context.Context, c *dbus.Conn, unit string) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), managerTime)
	defer cancel()
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoManager, err)
	}
	defer c.Close()
	unit, err := c.GetUnitNameByPID(ctx, uint32(os.Getpid()))
	if err != nil {
		return fmt.Errorf("ask PID 1 for the unit of this process: %w", err)
	}
	return f(ctx, c, unit)
}

func (s *Store) property(name string, to *uint32) error {
	return manager(func(ctx context.Context, c *dbus.Conn, unit string) error {
		p, err := c.GetUnitTypePropertyContext(ctx, unit, "Service", name)
		if err != nil {
			return fmt.Errorf("ask PID 1 for %s of %s: %w", name, unit, err)
		}
		n, ok := p.Value.Value().(uint32)
		if !ok {
			return fmt.Errorf("%s of %s is a %T", name, unit, p.Value.Value())
		}
		*to = n
		return nil
	})
}

// Put puts duplicates of files into the store under a name that is not in it yet, and returns when the manager has them. The manager does not watch
// them (FDPOLL=0): who puts them takes them out.
func (s *Store) Put(name string, files ...*os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := 0
	for _, n := range s.files {
		before += n
	}
	if before+len(files) > int(s.max) {
		return fmt.Errorf("the service's store holds %d descriptors: raise FileDescriptorStoreMax= in its unit", s.max)
	}
	fds := make([]int, len(files))
	for i, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		// Not Fd(): it would make the descriptor a blocking one.
		if err := raw.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return err
		}
	}
	if err := send("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, fds...); err != nil {
		return err
	}
	if err := s.kept(name, before, len(files)); err != nil {
		// It may have them all the same.
		_ = send("FDSTOREREMOVE=1\nFDNAME=" + name)
		return err
	}
	s.files[name] = len(files)
	return nil
}

// kept says why the manager has not kept what was put. Precondition: s.mu is held.
func (s *Store) kept(name string, before, put int) error {
	if err := barrier(); err != nil {
		return err
	}
	// Nothing answers FDSTORE: the manager's own count does.
	var now uint32
	if err := s.property("NFileDescriptorStore", &now); err != nil && !errors.Is(err, errNoManager) {
		return err
	} else if err == nil && int(now) < before+put {
		return fmt.Errorf("the service manager did not keep the descriptors of %s: it has %d, and %d were put: look at FileDescriptorStoreMax= and NotifyAccess= of the unit, and at its own log", name, now, before+put)
	}
	return nil
}

// Remove takes out what was put under name.
func (s *Store) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[name] == 0 {
		return nil
	}
	delete(s.files, name)
	if err := send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return err
	}
	return barrier()
}

// Stop says whether this service is being stopped for good. It is not while it is restarted, or was ended by somebody else's
// signal: then another process will take its place.
func Stop() (bool, error) {
	stop := false
	err := manager(func(ctx context.Context, c *dbus.Conn, unit string) error {
		jobs, err := c.ListJobsContext(ctx)
		if err != nil {
			return fmt.Errorf("ask PID 1 for its jobs: %w", err)
		}
		for _, j := range jobs {
			if j.Unit == unit && j.JobType == "stop" {
				stop = true
			}
		}
		return nil
	})
	return stop, err
}

// barrier returns when the manager has read all that was sent before (BARRIER=1).
func barrier() error {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	r := os.NewFile(uintptr(p[0]), "barrier")
	defer r.Close()
	err := send("BARRIER=1", p[1])
	unix.Close(p[1])
	if err != nil {
		return err
	}
	r.SetReadDeadline(time.Now().Add(managerTime))
	if _, err := r.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the service manager does not answer within %v", managerTime)
	}
	return nil // closed: all was read
}

// send sends an assignment, and descriptors beside it, to the service manager.
func send(state string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return errNoManager
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(fd, []byte(state), oob, &unix.SockaddrUnix{Name: path}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell the service manager: %w", os.NewSyscallError("sendmsg", err))
	}
	return nil
}
