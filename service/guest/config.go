// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"transfused.org/transfused/service/sd"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/watchdog"
)

// Defaults of the addresses, those of version 1.
const (
	DefaultServer = "vsock:host:1524"
	DefaultSocket = "vsock:any:1525"
)

// Config is what a daemon is told. Run does not change it.
type Config struct {
	Server     transport.Addr // of the host
	Socket     transport.Addr // to listen on, for a host that asks for mounts; the zero value: nowhere
	Mounts     []MountSpec    // what this guest asks for
	MountRoots []string       // mounts are made only below these; empty: anywhere
	AllowSuid  bool           // what a host may ask for
	AllowDev   bool
	Fusermount string         // for an ordinary user; empty: found in the path
	Spin       transport.Spin // how long a pump looks for the next message before it sleeps
	Pidfile    string         // written when the host has answered; empty: none
	StateDir   string         // what is to be remembered until the next boot; empty: StateDir()
	Token      []byte         // that proves this guest over transports that don't
	Software   string         // program and version, for the host's log
	Log        *slog.Logger   `json:"-"`

	Listener *transport.Listener    `json:"-"` // one that this process was started with, in place of Socket; Run closes it
	Ready    func()                 `json:"-"` // called once, when the daemon serves; nil: not
	Stay     bool                   `json:"-"` // go on where no mount can be made: others can ask for some
	Stored   []sd.Stored            `json:"-"` // mounts that an earlier process left in Store; Run owns them
	Store    Store                  `json:"-"` // where mounts are kept when this process ends; nil: they end with it
	Leave    func() bool            `json:"-"` // asked at the end: whether mounts are to be left in Store
	Reload   func() (Config, error) `json:"-"` // reads the configuration again
	Watchdog *watchdog.Watchdog     `json:"-"` // looks at the daemon's loops; nil: nobody does
	Status   func(string)           `json:"-"` // called with what is to be known of the daemon, in words, when that changes; must not wait; nil: not
}

// MountSpec is a mount that the guest asks for.
type MountSpec struct {
	Tag     string
	Dir     string
	Options []string
}

// ParseMountSpec reads TAG=DIR[,option…]. A comma in DIR is written `\,`.
func ParseMountSpec(s string) (MountSpec, error) {
	tag, rest, ok := strings.Cut(s, "=")
	if !ok || tag == "" || rest == "" {
		return MountSpec{}, fmt.Errorf("mount %q: TAG=DIR[,option…] is wanted", s)
	}
	var parts []string
	part := ""
	for i := 0; i < len(rest); i++ {
		switch {
		case rest[i] == '\\' && i+1 < len(rest) && (rest[i+1] == ',' || rest[i+1] == '\\'):
			i++
			part += rest[i : i+1]
		case rest[i] == ',':
			parts = append(parts, part)
			part = ""
		default:
			part += rest[i : i+1]
		}
	}
	parts = append(parts, part)
	m := MountSpec{Tag: tag, Dir: parts[0]}
	if len(parts) > 1 {
		m.Options = parts[1:]
	}
	return m, m.Check()
}

// Check says what is wrong with m by itself.
func (m MountSpec) Check() error {
	if m.Tag == "" || len(m.Tag) > 255 {
		return fmt.Errorf("mount at %s: a tag of 1 to 255 bytes is wanted", m.Dir)
	}
	if err := checkPoint(m.Dir, nil); err != nil {
		return fmt.Errorf("mount %s: %w", m.Tag, err)
	}
	if _, err := ParseMountOptions(m.Options); err != nil {
		return fmt.Errorf("mount %s: %w", m.Tag, err)
	}
	return nil
}

// Check says what is wrong with c before anything is started.
func (c *Config) Check() error {
	if c.Server.Family == transport.Hybrid {
		return fmt.Errorf("server %s: hybrid: addresses are the host's; inside the VM it is vsock:host:PORT", c.Server)
	}
	if c.Server.Family == 0 {
		return errors.New("no server: name the host by --server")
	}
	if c.Socket.Family == transport.Hybrid {
		return fmt.Errorf("socket %s: hybrid: addresses are the host's; inside the VM it is vsock:any:PORT", c.Socket)
	}
	roots, err := cleanRoots(c.MountRoots)
	if err != nil {
		return err
	}
	dirs := make(map[string]string)
	for _, m := range c.Mounts {
		if err := m.Check(); err != nil {
			return err
		}
		if err := checkPoint(m.Dir, roots); err != nil {
			return fmt.Errorf("mount %s: %w", m.Tag, err)
		}
		dir := filepath.Clean(m.Dir)
		if other, ok := dirs[dir]; ok {
			return fmt.Errorf("mount %s: mount point %s is also that of %s: give each a directory of its own", m.Tag, dir, other)
		}
		dirs[dir] = m.Tag
	}
	return nil
}

// StateDir is where an instance keeps what ends with the boot.
func StateDir() string {
	if os.Geteuid() == 0 {
		return "/run/transfuse"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "transfuse")
	}
	return ""
}
