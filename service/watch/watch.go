// SPDX-License-Identifier: Apache-2.0

package watch

import "strings"

// Op is what happened: bits, as the kernel joins what it can.
type Op uint32

const (
	Create     Op = 1 << iota // also a hard link, and what was moved into the tree
	Delete                    // of the name; also what was moved out of the tree
	Modify                    // write, truncate, fallocate
	Attrib                    // mode, owner, times, extended attributes, count of names
	CloseWrite                // a descriptor that could write was closed
	Rename                    // alone, or with IsDir
	IsDir                     // what is told is a directory
	Lost                      // alone: changes were lost, nothing that is cached of the tree may be believed
	Arrived                   // with Create: it was moved there from elsewhere, perhaps over another
)

var opNames = []string{"create", "delete", "modify", "attrib", "close-write", "rename", "dir", "lost", "arrived"}

func (o Op) String() string {
	var s []string
	for i, n := range opNames {
		if o&(1<<i) != 0 {
			s = append(s, n)
		}
	}
	return strings.Join(s, "|")
}

// Inode is a file of this machine: the device (major<<32 | minor) and inode number that statx tells.
type Inode struct{ Dev, Ino uint64 }

// Change is one thing that happened below a watched directory.
type Change struct {
	Op      Op
	Dir     Inode // with Name; zero where the name is not known, or the tree's own directory changed: then Inode is all there is
	Name    string
	NewDir  Inode // of a Rename
	NewName string
	Inode   Inode  // of the file; zero where it is gone
	Mode    uint32 // st_mode; 0 where it is gone, or was deleted and has no name any more
	PID     int    // of the process that did it, in the pid namespace of who calls New; 0 if it has none there
}
