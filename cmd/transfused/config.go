// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"

	"transfused.org/transfused/service/config"
	"transfused.org/transfused/service/guest"
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
	Pidfile    *string              `toml:"pidfile"`
	Logfile    *string              `toml:"logfile"`
	Debug      *bool                `toml:"debug"`
	Mount      map[string]mountFile `toml:"mount"`
}

// mountFile is a table [mount.NAME]. NAME is the tag where tag is not given.
type mountFile struct {
	Tag     string   `toml:"tag"`
	Dir     string   `toml:"dir"`
	Options []string `toml:"options"`
}

// readConfig puts what the file says into the flags that were not given, and returns the mounts it asks for.
func (f *flags) readConfig(name string, given func(flag string) bool) ([]guest.MountSpec, error) {
	var c file
	if _, err := config.Read(name, &c); err != nil {
		return nil, err
	}
	set(given("server"), &f.server, c.Server)
	set(given("socket"), &f.socket, c.Socket)
	set(given("allow-suid"), &f.allowSuid, c.AllowSuid)
	set(given("allow-dev"), &f.allowDev, c.AllowDev)
	set(given("token-file"), &f.tokenFile, c.TokenFile)
	set(given("fusermount"), &f.fusermount, c.Fusermount)
	set(given("pidfile"), &f.pidfile, c.Pidfile)
	set(given("logfile"), &f.logfile, c.Logfile)
	set(given("debug"), &f.debug, c.Debug)
	if !given("mount-root") {
		f.mountRoots = c.MountRoot
	}
	var specs []guest.MountSpec
	for name, m := range c.Mount {
		spec := guest.MountSpec{Tag: m.Tag, Dir: m.Dir, Options: m.Options}
		if spec.Tag == "" {
			spec.Tag = name
		}
		specs = append(specs, spec)
	}
	slices.SortFunc(specs, func(a, b guest.MountSpec) int { return strings.Compare(a.Dir, b.Dir) })
	return specs, nil
}

func set[T any](given bool, to *T, from *T) {
	if !given && from != nil {
		*to = *from
	}
}
