// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/guest"
	"transfused.org/transfused/service/transport"
)

// file is the configuration file: the flags' long names, and a table for each mount.
type file struct {
	Server     *string              `toml:"server"`
	Socket     *string              `toml:"socket"`
	MountRoot  []string             `toml:"mount-root"`
	AllowSuid  *bool                `toml:"allow-suid"`
	AllowDev   *bool                `toml:"allow-dev"`
	TokenFile  *string              `toml:"token-file"`
	Fusermount *string              `toml:"fusermount"`
	Control    *string              `toml:"control"`
	Pidfile    *string              `toml:"pidfile"`
	Logfile    *string              `toml:"logfile"`
	Spin       *string              `toml:"spin"`
	Debug      *bool                `toml:"debug"`
	Mount      map[string]mountFile `toml:"mount"`
}

// mountFile is a table [mount.NAME]. NAME is the tag where tag is not given.
type mountFile struct {
	Tag     string   `toml:"tag"`
	Dir     string   `toml:"dir"`
	Options []string `toml:"options"`
}

// read reads the configuration: the one file that is named, else the system's.
func (f *flags) read() (v file, c *config.Config, err error) {
	if f.config != "" {
		c, err = config.Read(f.config, &v)
	} else {
		c, err = config.ReadAll(f.root, config.Guest, &v)
	}
	return v, c, err
}

// readConfig puts what the configuration says into the flags that were not given, and returns the mounts it asks for.
func (f *flags) readConfig(given func(flag string) bool) ([]guest.MountSpec, error) {
	v, c, err := f.read()
	if err != nil {
		return nil, err
	}
	set(given("server"), &f.server, v.Server)
	set(given("socket"), &f.socket, v.Socket)
	set(given("allow-suid"), &f.allowSuid, v.AllowSuid)
	set(given("allow-dev"), &f.allowDev, v.AllowDev)
	set(given("token-file"), &f.tokenFile, v.TokenFile)
	set(given("fusermount"), &f.fusermount, v.Fusermount)
	set(given("control"), &f.control, v.Control)
	set(given("pidfile"), &f.pidfile, v.Pidfile)
	set(given("logfile"), &f.logfile, v.Logfile)
	set(given("spin"), &f.spin, v.Spin)
	set(given("debug"), &f.debug, v.Debug)
	if !given("mount-root") {
		f.mountRoots = v.MountRoot
	}
	if v.Server != nil {
		if _, err := transport.Parse(*v.Server); err != nil {
			return nil, fmt.Errorf("%s: server: %w", c.At("server"), err)
		}
	}
	if v.Spin != nil {
		if _, err := transport.ParseSpin(*v.Spin); err != nil {
			return nil, fmt.Errorf("%s: spin: %w", c.At("spin"), err)
		}
	}
	if v.Socket != nil && *v.Socket != noSocket {
		if _, err := transport.Parse(*v.Socket); err != nil {
			return nil, fmt.Errorf("%s: socket: %w", c.At("socket"), err)
		}
	}
	ms, err := mountsOf(c, v.Mount)
	return specs(ms), err
}

func specs(ms []configuredMount) []guest.MountSpec {
	var specs []guest.MountSpec
	for _, m := range ms {
		specs = append(specs, m.MountSpec)
	}
	return specs
}

// configuredMount is a mount of the configuration.
type configuredMount struct {
	guest.MountSpec
	name string // of its table
	path string // the file that says where it is
}

// mountsOf returns the mounts of the tables [mount.NAME] of c, by their names.
func mountsOf(c *config.Config, tables map[string]mountFile) ([]configuredMount, error) {
	var ms []configuredMount
	dirs := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		t := tables[name]
		m := configuredMount{guest.MountSpec{Tag: t.Tag, Dir: t.Dir, Options: t.Options}, name, c.Path("mount", name, "dir")}
		if m.Tag == "" {
			m.Tag = name
		}
		if err := m.Check(); err != nil {
			key := "dir"
			if _, bad := guest.ParseMountOptions(m.Options); bad != nil {
				key = "options"
			}
			return nil, fmt.Errorf("%s: %w", c.At("mount", name, key), err)
		}
		dir := filepath.Clean(m.Dir)
		if other, ok := dirs[dir]; ok {
			return nil, fmt.Errorf("%s: mount %s: mount point %s is also that of %s: give each a directory of its own", c.At("mount", name, "dir"), name, dir, other)
		}
		dirs[dir] = name
		ms = append(ms, m)
	}
	return ms, nil
}

func set[T any](given bool, to *T, from *T) {
	if !given && from != nil {
		*to = *from
	}
}
