// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// second is what a mount keeps for owners, extended attributes and locks.
type second struct {
	creds *creds
	names *xattrNames
	locks lockTable
	waits *lockWaits
}

func (s *second) init(fs *FS) error {
	var err error
	if s.creds, err = newCreds(); err != nil {
		return err
	}
	if err := fs.ids.init(&fs.c, s.creds); err != nil {
		return err
	}
	s.names = newXattrNames(fs.c.Xattr, fs.c.XattrMap, fs.c.ACL)
	s.locks.give = fs.giveFile
	s.waits = newLockWaits(fs.limits)
	return nil
}

// close drops all locks. All streams have ended.
func (s *second) close() {
	if s.waits == nil {
		return // init was not reached
	}
	s.waits.wait()
	s.locks.close()
}

// streamEnded ends what waits on a stream that has ended. Nothing begins to wait on it afterwards.
func (s *second) streamEnded(st *stream) { s.waits.drop(st) }

// init makes the tables for c's export; it looks at the owner of its root directory once, here.
func (m *ids) init(c *Config, creds *creds) error {
	if err := c.UIDs.Validate(); err != nil {
		return fmt.Errorf("uids: %w", err)
	}
	if err := c.GIDs.Validate(); err != nil {
		return fmt.Errorf("gids: %w", err)
	}
	*m = ids{uids: c.UIDs, gids: c.GIDs, squash: c.Squash}
	switch {
	case c.RootAs == RootTrust:
	case !creds.foreign: // all that the guest makes is this user's, and so must be what its root gives to itself
		m.root = &creds.self
	default:
		var st unix.Stat_t
		if err := unix.Fstat(int(c.Root.Fd()), &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		m.root = &Cred{st.Uid, st.Gid}
	}
	return nil
}
