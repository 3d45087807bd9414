// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func TestXattrNames(t *testing.T) {
	long := strings.Repeat("x", xattrNameMax-len("trusted."))
	for _, c := range []struct {
		name  string
		mode  XattrMode
		rules []XattrRule
		acl   bool
		in    map[string]any    // guest's name: host's name, or its errno
		out   map[string]string // host's name: guest's, "" if hidden
	}{
		{"on", XattrOn, nil, false,
			map[string]any{
				"user.a": "user.a", "security.selinux": unix.EOPNOTSUPP, "security.capability": "security.capability", "trusted.overlay.opaque": "user.transfuse.trusted.overlay.opaque",
				"user.transfuse.trusted.overlay.opaque": unix.EPERM, "system.posix_acl_access": unix.EOPNOTSUPP,
				"system.nfs4_acl": unix.EOPNOTSUPP, "": unix.ERANGE, "user." + strings.Repeat("x", 251): unix.ERANGE,
				"trusted." + long: unix.ERANGE,
			},
			map[string]string{
				"user.a": "user.a", "user.transfuse.trusted.b": "trusted.b", "trusted.c": "", "system.posix_acl_access": "",
				"system.nfs4_acl": "", "security.capability": "security.capability", "security.ima": "",
			}},
		{"user", XattrUser, nil, true,
			map[string]any{
				"user.a": "user.a", "security.selinux": "user.transfuse.security.selinux", "trusted.x": "user.transfuse.trusted.x",
				"user.transfuse.security.selinux": unix.EPERM, "system.posix_acl_access": "system.posix_acl_access",
			},
			map[string]string{
				"user.transfuse.security.selinux": "security.selinux", "security.selinux": "", "system.posix_acl_default": "system.posix_acl_default",
			}},
		{"rules come first", XattrOn, []XattrRule{{"user.secret.", ""}, {"user.", "user.vm."}, {"trusted.", "user.t."}, {"security.a", "security.a"}}, false,
			map[string]any{"user.secret.a": unix.EOPNOTSUPP, "user.a": "user.vm.a", "trusted.a": "user.t.a", "security.a": "security.a", "security.b": unix.EOPNOTSUPP},
			map[string]string{"user.vm.a": "user.a", "user.t.a": "trusted.a", "user.a": "", "user.vm.secret.a": "", "user.secret.a": ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newXattrNames(c.mode, c.rules, c.acl)
			for guest, want := range c.in {
				got, errno := x.toHost(nil, []byte(guest))
				if e, ok := want.(fuse.Errno); ok {
					if errno != e {
						t.Errorf("%q to host: %q, %v; want %v", guest, got, errno, e)
					}
				} else if errno != 0 || string(got) != want.(string) {
					t.Errorf("%q to host: %q, %v; want %q", guest, got, errno, want)
				}
			}
			for host, want := range c.out {
				if got, ok := x.toGuest(nil, []byte(host)); string(got) != want || ok != (want != "") {
					t.Errorf("%q to guest: %q, %v; want %q", host, got, ok, want)
				}
			}
		})
	}
}

func TestParseXattrRule(t *testing.T) {
	for in, want := range map[string]string{
		"trusted.:user.vm.trusted.": "", ":user.vm.": "", "user.secret.:": "",
		"trusted.": "GUEST:HOST", "a:b:c": "GUEST:HOST", "user.:trusted.": "not for guests", "user.:security.capability": "not for guests",
		strings.Repeat("x", 256) + ":": "at most 255",
	} {
		r, err := ParseXattrRule(in)
		if want == "" && (err != nil || r.String() != in) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, %v", in, r, err)
		}
	}
}

func TestMapACL(t *testing.T) {
	add := func(n uint32) func(uint32) (uint32, bool) {
		return func(id uint32) (uint32, bool) { return id + n, id < 1000 }
	}
	acl := func(ids ...byte) []byte {
		return []byte{2, 0, 0, 0,
			1, 0, 6, 0, 255, 255, 255, 255, // ACL_USER_OBJ
			2, 0, 4, 0, ids[0], ids[1], 0, 0,
			8, 0, 4, 0, ids[2], ids[3], 0, 0,
			0x20, 0, 4, 0, 255, 255, 255, 255} // ACL_OTHER
	}
	for _, c := range []struct {
		name     string
		in, want []byte
		errno    fuse.Errno
	}{
		{"ids", acl(5, 0, 6, 0), acl(15, 0, 26, 0), 0},
		{"unmapped", acl(5, 255, 6, 0), nil, unix.EINVAL},
		{"header only", []byte{2, 0, 0, 0}, []byte{2, 0, 0, 0}, 0},
		{"short", []byte{2, 0, 0}, nil, unix.EINVAL},
		{"half an entry", acl(1, 0, 1, 0)[:32], nil, unix.EINVAL},
		{"version", []byte{1, 0, 0, 0}, nil, unix.EINVAL},
	} {
		t.Run(c.name, func(t *testing.T) {
			if errno := mapACL(c.in, add(10), add(20)); errno != c.errno {
				t.Fatalf("%v, want %v", errno, c.errno)
			}
			if c.errno == 0 {
				if d := cmp.Diff(c.want, c.in); d != "" {
					t.Error("-want +got\n", d)
				}
			}
		})
	}
}
