// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// The value of system.posix_acl_access and _default (linux/posix_acl_xattr.h): a version, then entries of
// tag and permissions, 16 bits each, and an id. Always little-endian.
const (
	aclVersion   = 2
	aclHeader    = 4
	aclEntry     = 8
	aclUserTag   = 0x02 // ACL_USER: the id is a uid
	aclGroupTag  = 0x08 // ACL_GROUP: the id is a gid
	aclIDInEntry = 4
)

// mapACL translates the owners in an ACL in place. An id that uid or gid does not know is EINVAL, as is a
// value that is no ACL.
func mapACL(v []byte, uid, gid func(uint32) (uint32, bool)) fuse.Errno {
	if len(v) < aclHeader || (len(v)-aclHeader)%aclEntry != 0 || binary.LittleEndian.Uint32(v) != aclVersion {
		return unix.EINVAL
	}
	for e := v[aclHeader:]; len(e) > 0; e = e[aclEntry:] {
		var f func(uint32) (uint32, bool)
		switch binary.LittleEndian.Uint16(e) {
		case aclUserTag:
			f = uid
		case aclGroupTag:
			f = gid
		default:
			continue
		}
		id, ok := f(binary.LittleEndian.Uint32(e[aclIDInEntry:]))
		if !ok {
			return unix.EINVAL
		}
		binary.LittleEndian.PutUint32(e[aclIDInEntry:], id)
	}
	return 0
}
