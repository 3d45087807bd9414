// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"

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
	meta, err := toml.DecodeFile(name, &c)
	if err != nil {
		var parse toml.ParseError
		if errors.As(err, &parse) {
			return nil, fmt.Errorf("config %s: line %d: %s", name, parse.Position.Line, parse.Message)
		}
		if errors.As(err, new(*fs.PathError)) {
			return nil, fmt.Errorf("config: %w", err)
		}
		return nil, fmt.Errorf("config %s: %s", name, strings.TrimPrefix(err.Error(), "toml: "))
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		key := unknown[0]
		return nil, fmt.Errorf("config %s: %skey %q is not known", name, keyLine(name, key.String()), key)
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

// keyLine returns "line N: " for a key, which the decoder does not tell; nothing for one that is written in an
// unusual form.
func keyLine(name, key string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	table, n := "", 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.TrimSpace(line)
		found := ""
		if strings.HasPrefix(line, "[") {
			table = strings.Trim(strings.SplitN(line, "]", 2)[0], "[ ")
			found = table
			table += "."
		} else if k, _, ok := strings.Cut(line, "="); ok {
			found = table + strings.TrimSpace(k)
		}
		if found == key {
			return fmt.Sprintf("line %d: ", n)
		}
	}
	return ""
}

func set[T any](given bool, to *T, from *T) {
	if !given && from != nil {
		*to = *from
	}
}
