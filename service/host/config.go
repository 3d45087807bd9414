// SPDX-License-Identifier: Apache-2.0

package host

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
)

// Config is what a host serves, and to whom.
type Config struct {
	Exports []Export
	Listen  []transport.Addr
	// Guests are those at which this host asks for mounts.
	Guests []Guest
	// Token proves the two ends to each other where the transport does not;
	// nil for none.
	Token []byte
	// AllowUnprivileged lets in guests' processes that are not root, or may
	// not be.
	AllowUnprivileged bool
	Spin              transport.Spin // how long a worker looks for a stream's next request before it sleeps
	Software          string         // program and version, for the guests' logs
	Version           string         // for the administrator
	Log               *slog.Logger   // nil for none

	// Inherited are sockets that this process was started with, beside those
	// of Listen. Run closes them.
	Inherited []*transport.Listener
	// Watchdog looks at the server's loops; nil: nobody does.
	Watchdog *watchdog.Watchdog
	// Ready is called when the server serves, and again whenever a Reload is over; Reloading when one begins. Nil: not.
	Ready, Reloading func()
	// Reread reads the configuration again, from where this one came; nil: it can't be.
	Reread func() (Config, error)
	// Taken is called when Reconfigure has taken this configuration; nil: not.
	Taken  func()
	Status func(string) // called with how the server does, in words, when that changes; must not wait; nil: not
}

// addresses are all that is listened on.
func (c *Config) addresses() []transport.Addr {
	all := slices.Clone(c.Listen)
	for _, l := range c.Inherited {
		if !slices.Contains(all, l.Addr()) {
			all = append(all, l.Addr())
		}
	}
	return all
}

// Guest is a guest whose mounts the host asks for, by the address that the
// guest listens on.
type Guest struct {
	Addr   transport.Addr
	Mounts []GuestMount
}

// GuestMount is an export that the host asks a guest to mount.
type GuestMount struct {
	Tag     string
	Dir     string // absolute, in the guest
	Options []string
}

// ParseGuestMount parses TAG=GUESTDIR[,option…], with the escapes of
// ParseExport.
func ParseGuestMount(s string) (GuestMount, error) {
	fields := splitCommas(s)
	tag, dir, ok := strings.Cut(fields[0], "=")
	if !ok || tag == "" || !filepath.IsAbs(dir) {
		return GuestMount{}, fmt.Errorf("mount %q: give TAG=GUESTDIR[,option…], the directory absolute, such as code=/mnt/code", s)
	}
	return GuestMount{Tag: tag, Dir: filepath.Clean(dir), Options: fields[1:]}, nil
}

// Check finds mistakes before anything is started. New and Reconfigure call it too.
func (c *Config) Check() error {
	if len(c.addresses()) == 0 {
		return errors.New("no address to listen on: give --listen ADDR")
	}
	if len(c.Exports) == 0 {
		return errors.New("nothing to export: give --export TAG=DIR")
	}
	seen := map[transport.Addr]bool{}
	for _, a := range c.Listen {
		if seen[a] {
			return fmt.Errorf("listen %s: given twice; leave one out", a)
		}
		seen[a] = true
	}
	tags := map[string]string{}
	for i := range c.Exports {
		e := &c.Exports[i]
		if err := e.check(); err != nil {
			return fmt.Errorf("export %s: %w", e.Tag, err)
		}
		if dir, ok := tags[e.Tag]; ok {
			return fmt.Errorf("tag %s: given twice, for %s and for %s; choose another for one of them", e.Tag, dir, e.Dir)
		}
		tags[e.Tag] = e.Dir
		if err := checkDir(e.Dir); err != nil {
			return fmt.Errorf("export %s: %w", e.Tag, err)
		}
	}
	addrs := map[transport.Addr]bool{}
	for _, g := range c.Guests {
		if len(g.Mounts) == 0 {
			return fmt.Errorf("guest %s: nothing to mount there; give --mount TAG=GUESTDIR behind it", g.Addr)
		}
		if addrs[g.Addr] {
			return fmt.Errorf("guest %s: given twice; give all of its mounts at one", g.Addr)
		}
		addrs[g.Addr] = true
		dirs := map[string]bool{}
		for _, m := range g.Mounts {
			if _, ok := tags[m.Tag]; !ok {
				return fmt.Errorf("guest %s: mount %s=%s: no export has the tag %s; give --export %[2]s=DIR", g.Addr, m.Tag, m.Dir, m.Tag)
			}
			if dirs[m.Dir] {
				return fmt.Errorf("guest %s: two mounts at %s; choose another directory", g.Addr, m.Dir)
			}
			dirs[m.Dir] = true
		}
	}
	return nil
}

func checkDir(dir string) error {
	if err := checkHidden(dir); err != nil {
		return err
	}
	fi, err := os.Stat(dir)
	var pe *os.PathError
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s does not exist: make it or correct the path", dir)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s: permission denied: run as a user who may read it", dir)
	case errors.As(err, &pe):
		return fmt.Errorf("%s: %w", dir, pe.Err)
	case err != nil:
		return err
	case !fi.IsDir():
		return fmt.Errorf("%s is not a directory: export the directory that it is in", dir)
	}
	return nil
}
