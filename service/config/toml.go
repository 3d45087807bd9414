// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"
)

// Config is a configuration that was read, from one file or from several that were merged.
type Config struct {
	files  []*file // each overrides those before it
	merged map[string]any
}

type file struct {
	path, text string
	keys       map[string]any // those that count in this file, as the TOML library decodes tables
}

// Read decodes the TOML file path, and nothing else, into v, a pointer to a struct with toml tags that has a place for each
// key. With a nil v it is only parsed.
func Read(path string, v any) (*Config, error) {
	return read([]source{{path: path}}, v)
}

// read merges the files of sources, checks each by itself, and decodes what comes of it into v.
func read(sources []source, v any) (*Config, error) {
	c := &Config{merged: map[string]any{}}
	var handed map[string]any // the credential's keys
	for _, s := range sources {
		f, err := parse(s.path, v)
		if err != nil {
			return nil, err
		}
		if s.credential {
			handed = f.keys
		}
		c.files = append(c.files, f)
	}
	for i, f := range c.files {
		if sources[i].vendor {
			f.keys = without(f.keys, handed)
		}
		merge(c.merged, f.keys)
	}
	if v == nil {
		return c, nil
	}
	text, err := c.Effective()
	if err == nil {
		err = toml.Unmarshal(text, v)
	}
	if err != nil {
		// Each file by itself has the types of v, so that this is a fault of ours.
		return nil, fmt.Errorf("merged configuration: %w", err)
	}
	return c, nil
}

// parse reads one file, and finds the mistakes that it has by itself: what it says may be overridden, but is to be right.
func parse(path string, v any) (*file, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, Reason(err)
	}
	f := &file{path: path, text: string(text)}
	if _, err := toml.Decode(f.text, &f.keys); err != nil {
		return nil, f.mistake(err)
	}
	if v == nil {
		return f, nil
	}
	meta, err := toml.Decode(f.text, reflect.New(reflect.TypeOf(v).Elem()).Interface())
	if err != nil {
		return nil, f.mistake(err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return nil, fmt.Errorf("%s:%d: unknown key %s: remove it or correct its name", f.path, lineOf(f.text, unknown[0]), unknown[0])
	}
	return f, nil
}

// typeMistake is how the TOML library reports a value of a wrong type, which has no error of its own.
var typeMistake = regexp.MustCompile(`^toml: line ([0-9]+) \(last key "(.*)"\): (.*)$`)

func (f *file) mistake(err error) error {
	if pe := (toml.ParseError{}); errors.As(err, &pe) {
		return fmt.Errorf("%s:%d: %s", f.path, pe.Position.Line, pe.Message)
	}
	if m := typeMistake.FindStringSubmatch(err.Error()); m != nil {
		line, _ := strconv.Atoi(m[1]) // digits
		return fmt.Errorf("%s:%d: key %s: %s", f.path, line, m[2], m[3])
	}
	return fmt.Errorf("%s: %s", f.path, strings.TrimPrefix(err.Error(), "toml: "))
}

// merge puts the keys of from into to: tables key by key, anything else, lists too, in place of what is there.
func merge(to, from map[string]any) {
	for key, value := range from {
		table, ok := value.(map[string]any)
		if !ok {
			to[key] = value
			continue
		}
		below, ok := to[key].(map[string]any)
		if !ok {
			below = map[string]any{}
			to[key] = below
		}
		merge(below, table)
	}
}

// without returns keys less those that are in drop.
func without(keys, drop map[string]any) map[string]any {
	left := map[string]any{}
	for key, value := range keys {
		dropped, ok := drop[key]
		if !ok {
			left[key] = value
			continue
		}
		table, ok1 := value.(map[string]any)
		below, ok2 := dropped.(map[string]any)
		if ok1 && ok2 {
			left[key] = without(table, below)
		}
	}
	return left
}

// Effective is the merged configuration as one TOML document.
func (c *Config) Effective() ([]byte, error) {
	var text bytes.Buffer
	e := toml.NewEncoder(&text)
	e.Indent = ""
	if err := e.Encode(c.merged); err != nil {
		return nil, fmt.Errorf("merged configuration: %w", err)
	}
	return text.Bytes(), nil
}

// At returns "FILE:LINE" of a key, given with its tables, or of the innermost of these where the key is not found. The file
// is the one whose value counts; the TOML library tells no positions of keys.
func (c *Config) At(key ...string) string {
	f, n := c.origin(key)
	if f == nil {
		return "configuration"
	}
	return fmt.Sprintf("%s:%d", f.path, lineOf(f.text, key[:n]))
}

// Path returns the file whose value of a key, or of the innermost of its tables, counts; empty if no file was read.
func (c *Config) Path(key ...string) string {
	f, _ := c.origin(key)
	if f == nil {
		return ""
	}
	return f.path
}

// origin returns the last file that has the longest part of key, and the length of this part.
func (c *Config) origin(key []string) (*file, int) {
	for n := len(key); n >= 0; n-- {
		for i := len(c.files) - 1; i >= 0; i-- {
			if has(c.files[i].keys, key[:n]) {
				return c.files[i], n
			}
		}
	}
	return nil, 0
}

func has(keys map[string]any, key []string) bool {
	for i, k := range key {
		value, ok := keys[k]
		if !ok {
			return false
		}
		if i == len(key)-1 {
			return true
		}
		if keys, ok = value.(map[string]any); !ok {
			return false
		}
	}
	return true
}

var bare = strings.NewReplacer(" ", "", "\t", "", `"`, "", "'", "")

// lineOf returns the line of a key or table: else of what is first in this table, else of the table that it would be in.
func lineOf(text string, key []string) int {
	want := bare.Replace(strings.Join(key, "."))
	within, parent, parentLen := 0, 1, 0
	table := ""
	for i, l := range strings.Split(text, "\n") {
		l = strings.TrimSpace(l)
		var full string
		if strings.HasPrefix(l, "[") {
			table = strings.Trim(bare.Replace(strings.SplitN(l, "#", 2)[0]), "[]")
			full = table
		} else {
			name, _, ok := strings.Cut(l, "=")
			if !ok || strings.HasPrefix(l, "#") {
				continue
			}
			if full = bare.Replace(name); table != "" {
				full = table + "." + full
			}
		}
		switch {
		case full == want:
			return i + 1
		case strings.HasPrefix(full, want+".") && within == 0:
			within = i + 1
		case strings.HasPrefix(want, full+".") && len(full) > parentLen:
			parent, parentLen = i+1, len(full)
		}
	}
	if within != 0 {
		return within
	}
	return parent
}

// Reason puts the mend to an error of a file.
func Reason(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: correct the path or make it", err)
	case errors.Is(err, syscall.EISDIR):
		return fmt.Errorf("%w: name a file", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: run as a user who may read it", err)
	}
	return err
}
