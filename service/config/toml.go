// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"
)

// File is a configuration file that was read.
type File struct{ path, text string }

// Read decodes the TOML file path into v, a pointer to a struct with toml tags that has a place for each key.
func Read(path string, v any) (*File, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, Reason(err)
	}
	f := &File{path, string(text)}
	meta, err := toml.Decode(f.text, v)
	if pe := (toml.ParseError{}); errors.As(err, &pe) {
		return nil, fmt.Errorf("%s:%d: %s", path, pe.Position.Line, pe.Message)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "toml: "))
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return nil, fmt.Errorf("%s: unknown key %s: remove it or correct its name", f.At(unknown[0]...), unknown[0])
	}
	return f, nil
}

// At returns "FILE:LINE" of a key, given with its tables, or of the innermost of these where the key is not found; the
// TOML library tells no positions of keys.
func (f *File) At(key ...string) string { return fmt.Sprintf("%s:%d", f.path, lineOf(f.text, key)) }

func lineOf(text string, key []string) int {
	line, table := 1, ""
	for i, l := range strings.Split(text, "\n") {
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "[") {
			table = strings.NewReplacer(" ", "", `"`, "").Replace(strings.Trim(strings.SplitN(l, "#", 2)[0], "[] \t"))
			if strings.Join(key, ".") == table || len(key) > 1 && strings.Join(key[:len(key)-1], ".") == table {
				line = i + 1
			}
			continue
		}
		name, _, ok := strings.Cut(l, "=")
		full := strings.Trim(strings.TrimSpace(name), `"`)
		if table != "" {
			full = table + "." + full
		}
		if ok && full == strings.Join(key, ".") {
			return i + 1
		}
	}
	return line
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
