// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Names of the configurations.
const (
	Guest = "transfused"
	Host  = "host"
)

// directories have the configuration files, the administrator's first.
var directories = []string{"/etc/transfuse", "/run/transfuse", vendor}

const vendor = "/usr/lib/transfuse"

// systemCredentials is where systemd keeps what the VMM or the kernel's command line handed it.
const systemCredentials = "/run/credentials/@system"

// source is a file that a configuration is read from.
type source struct {
	path       string
	vendor     bool // it is below /usr/lib
	credential bool
}

// ReadAll decodes the system's configuration name into v as Read does, from the files that doc.go tells of. That there are
// none is no mistake. Root is put in front of every directory: tests have one, programs don't.
func ReadAll(root, name string, v any) (*Config, error) {
	sources, err := find(root, name)
	if err != nil {
		return nil, err
	}
	return read(sources, v)
}

// Cat returns the files that ReadAll reads, in its order, each under a comment with its path. It does not parse them.
func Cat(root, name string) ([]byte, error) {
	sources, err := find(root, name)
	if err != nil {
		return nil, err
	}
	var all bytes.Buffer
	for i, s := range sources {
		text, err := os.ReadFile(s.path)
		if err != nil {
			return nil, Reason(err)
		}
		if i > 0 {
			all.WriteByte('\n')
		}
		fmt.Fprintf(&all, "# %s\n%s", s.path, text)
		if len(text) > 0 && text[len(text)-1] != '\n' {
			all.WriteByte('\n')
		}
	}
	return all.Bytes(), nil
}

// find returns the files of the configuration name, each before those that override it.
func find(root, name string) ([]source, error) {
	var main, handed, dropIns []source
	for _, dir := range directories {
		path := filepath.Join(root, dir, name+".toml")
		found, masked, err := look(path)
		if err != nil {
			return nil, err
		}
		if !found {
			continue
		}
		if !masked {
			main = []source{{path: path, vendor: dir == vendor}}
		}
		break
	}
	if name == Guest {
		path, err := credential(root, name+".toml")
		if err != nil {
			return nil, err
		}
		if path != "" {
			handed = []source{{path: path, credential: true}}
		}
	}
	names := map[string]source{}
	for _, dir := range slices.Backward(directories) {
		below := filepath.Join(root, dir, name+".toml.d")
		entries, err := os.ReadDir(below)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, Reason(err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".toml") && !strings.HasPrefix(e.Name(), ".") {
				names[e.Name()] = source{path: filepath.Join(below, e.Name()), vendor: dir == vendor}
			}
		}
	}
	for _, n := range slices.Sorted(maps.Keys(names)) {
		_, masked, err := look(names[n].path)
		if err != nil {
			return nil, err
		}
		if !masked {
			dropIns = append(dropIns, names[n])
		}
	}
	if len(main) > 0 && main[0].vendor {
		return slices.Concat(main, handed, dropIns), nil
	}
	return slices.Concat(handed, main, dropIns), nil
}

// look says whether there is a file path, and whether it says no more than that files below it don't count: it is empty, or
// a link to /dev/null. A link that leads nowhere is an error.
func look(path string) (found, masked bool, err error) {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return false, false, nil
	}
	fi, err := os.Stat(path)
	if err != nil {
		return false, false, Reason(err)
	}
	return true, fi.Mode()&os.ModeDevice != 0 || fi.Mode().IsRegular() && fi.Size() == 0, nil
}

// credential returns the path of a credential of systemd: one that this service was given, else one of the system's; empty
// if there is none.
func credential(root, name string) (string, error) {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		path := filepath.Join(dir, name)
		if found, _, err := look(path); found || err != nil {
			return path, err
		}
	}
	path := filepath.Join(root, systemCredentials, name)
	found, _, err := look(path)
	if errors.Is(err, os.ErrPermission) {
		return "", nil // they are root's, and not meant for this user
	}
	if !found || err != nil {
		return "", err
	}
	return path, nil
}
