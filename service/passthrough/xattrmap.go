// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// XattrMode says which extended attributes the guest has.
type XattrMode int

const (
	XattrOn   XattrMode = iota // the host's, but for its labels (security.*); the guest's trusted.* are user.transfuse.trusted.* on the host
	XattrUser                  // the host's user.*; the guest's others are user.transfuse.*: for servers without privilege
	XattrOff                   // none: the guest's kernel stops asking
)

// XattrRule gives the attributes whose names begin with Guest in the guest names that begin with Host on
// the host, and back. With an empty Host the guest has none that begin with Guest.
type XattrRule struct{ Guest, Host string }

// ParseXattrRule parses GUEST:HOST, two prefixes of names.
func ParseXattrRule(s string) (XattrRule, error) {
	guest, host, ok := strings.Cut(s, ":")
	switch {
	case !ok || strings.ContainsRune(host, ':') || strings.ContainsRune(s, 0):
		return XattrRule{}, fmt.Errorf("xattr map %q: give GUEST:HOST, two prefixes of names", s)
	case len(guest) > xattrNameMax || len(host) > xattrNameMax:
		return XattrRule{}, fmt.Errorf("xattr map %q: a name has at most %d bytes", s, xattrNameMax)
	case strings.HasPrefix(host, "trusted.") || strings.HasPrefix(host, "system.") || "security.capability" == host:
		return XattrRule{}, fmt.Errorf("xattr map %q: the host's %s is not for guests; map to user.", s, host)
	}
	return XattrRule{guest, host}, nil
}

func (r XattrRule) String() string { return r.Guest + ":" + r.Host }

const (
	xattrNameMax = 255     // XATTR_NAME_MAX of linux/limits.h
	xattrSizeMax = 1 << 16 // XATTR_SIZE_MAX, and XATTR_LIST_MAX too

	aclPrefix  = "system.posix_acl_"
	capability = "security.capability"
)

// Attributes of the guest that mean something to the host's kernel are kept under other names: its trusted.* (an
// overlayfs of the host would believe them), and without privilege all that only root may set.
//
// A symbolic link can't have user.*, so setting trusted.* on one of the guest's answers EPERM, as Linux does for user.* itself.
// An overlayfs of the guest passes over EPERM when it copies a link up (since Linux 5.11); of EOPNOTSUPP it would conclude
// that its whole upper layer has no attributes, and refuse opaque directories from then on. cp -a passes over both.
//
// The labels of the host's security modules (security.selinux, security.ima) are about the host. The guest has no security.* but capabilities,
// and is told that there are none at all: ls -l asks for one of each file, until it hears that.
var (
	trustedRule = XattrRule{"trusted.", "user.transfuse.trusted."}
	onRules     = []XattrRule{trustedRule, {capability, capability}, {"security.", ""}}
	userRules   = []XattrRule{trustedRule, {"security.", "user.transfuse.security."}}
)

// xattrNames translates names. It does not change once made.
type xattrNames struct {
	rules []XattrRule // the first that fits counts
	acl   bool        // the guest's kernel knows POSIX ACLs
}

func newXattrNames(mode XattrMode, rules []XattrRule, acl bool) *xattrNames {
	own := onRules
	if mode == XattrUser {
		own = userRules
	}
	return &xattrNames{rules: slices.Concat(rules, own), acl: acl}
}

// toHost appends the host's name for one of the guest's to b. EOPNOTSUPP: there are no such attributes
// here; EPERM: the name is one that keeps another attribute of the guest; ERANGE: it is too long.
func (x *xattrNames) toHost(b, guest []byte) ([]byte, fuse.Errno) {
	if len(guest) == 0 || len(guest) > xattrNameMax {
		return nil, unix.ERANGE
	}
	start := len(b)
	b, errno := x.apply(b, guest)
	if errno != 0 {
		return nil, errno
	}
	if len(b)-start > xattrNameMax {
		return nil, unix.ERANGE
	}
	// Only names that come back the same are the guest's: it must not reach its own trusted.* by
	// their names on the host, where its kernel would not ask for CAP_SYS_ADMIN.
	var buf [2 * xattrNameMax]byte
	if back, ok := x.reverse(buf[:0], b[start:]); !ok || !bytes.Equal(back, guest) {
		return nil, unix.EPERM
	}
	return b, 0
}

// toGuest appends the guest's name for one of the host's to b; ok is false if the guest has no such attribute.
func (x *xattrNames) toGuest(b, host []byte) (_ []byte, ok bool) {
	start := len(b)
	b, ok = x.reverse(b, host)
	if !ok || len(b)-start > xattrNameMax {
		return b[:start], false
	}
	var buf [2 * xattrNameMax]byte
	if again, errno := x.apply(buf[:0], b[start:]); errno != 0 || !bytes.Equal(again, host) {
		return b[:start], false
	}
	return b, true
}

func (x *xattrNames) apply(b, guest []byte) ([]byte, fuse.Errno) {
	if bytes.HasPrefix(guest, []byte(aclPrefix)) {
		if !x.acl {
			return nil, unix.EOPNOTSUPP
		}
		return append(b, guest...), 0
	}
	for _, r := range x.rules {
		if bytes.HasPrefix(guest, []byte(r.Guest)) {
			if r.Host == "" {
				return nil, unix.EOPNOTSUPP
			}
			return append(append(b, r.Host...), guest[len(r.Guest):]...), 0
		}
	}
	// What is left of system. are other forms of ACLs (nfs4_acl, cifs_acl), with ids that we could not map.
	if bytes.HasPrefix(guest, []byte("system.")) {
		return nil, unix.EOPNOTSUPP
	}
	return append(b, guest...), 0
}

// reverse is apply backwards, by the first rule whose Host fits: whether that is the guest's own way to it is the
// caller's question.
func (x *xattrNames) reverse(b, host []byte) ([]byte, bool) {
	if bytes.HasPrefix(host, []byte("system.")) {
		return append(b, host...), x.acl && bytes.HasPrefix(host, []byte(aclPrefix))
	}
	for _, r := range x.rules {
		if r.Host != "" && bytes.HasPrefix(host, []byte(r.Host)) {
			return append(append(b, r.Guest...), host[len(r.Host):]...), true
		}
	}
	return append(b, host...), true
}
