// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// listName is the file in StateDir that has the mounts which are kept in the store, for CleanUp. It ends with the boot, as they do.
const listName = "mounts.json"

// lockName is a file in StateDir that a daemon with a store has locked while it runs.
const lockName = "lock"

// lockState locks that file: shared for a daemon, which waits for a CleanUp under way; exclusively, and without waiting, for CleanUp. The lock ends
// when the file is closed.
func lockState(stateDir string, how int) (*os.File, error) {
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(stateDir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return f, nil
		}
		if err != unix.EINTR {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
	}
}

// listed is a mount in that file.
type listed struct {
	Dir   string
	Mount mountID
}

// list writes what is mounted by now.
func (d *Daemon) list() {
	d.listing.Lock()
	defer d.listing.Unlock()
	if err := d.writeList(); err != nil {
		d.log.Error("list the mounts for a stop that fails", "error", err)
	}
}

// writeList is list's. Precondition: d.listing is held.
func (d *Daemon) writeList() error {
	all := []listed{}
	d.mu.Lock()
	for _, m := range d.mounts {
		if m.recordFile != nil && !m.e.nowhere {
			all = append(all, listed{m.dir, m.attached})
		}
	}
	d.mu.Unlock()
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d.c.StateDir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(d.c.StateDir, listName)
	if err := os.WriteFile(name+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// CleanUp detaches the mounts that a daemon has left behind whose store is emptied: it was killed while it
// was stopping. Of what is mounted elsewhere or by others nothing is touched; and nothing at all, which is an error, while a daemon runs.
func CleanUp(stateDir string) error {
	lock, err := lockState(stateDir, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errors.New("a daemon runs, and serves its mounts: nothing is detached")
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	name := filepath.Join(stateDir, listName)
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var all []listed
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	// The outer ones first: the way to an inner one leads through them, and nobody answers there any more. With it the inner one goes.
	slices.SortFunc(all, func(a, b listed) int { return strings.Compare(a.Dir, b.Dir) })
	var errs []error
	for _, l := range all {
		p, err := holdPoint(l.Dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p.id = l.Mount
		errs = append(errs, p.unmount("", howForce))
		p.close()
	}
	errs = append(errs, os.Remove(name))
	return errors.Join(errs...)
}
