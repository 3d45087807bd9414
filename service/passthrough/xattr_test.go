// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

func (g *guest) setxattr(node uint64, name, value string, flags, more uint32) answer {
	g.t.Helper()
	return g.call(fuse.OpSetxattr, node, body(fuse.SetxattrIn{Size: uint32(len(value)), Flags: flags, SetxattrFlags: more}, name, []byte(value)))
}

func (g *guest) getxattr(node uint64, name string, size uint32) answer {
	g.t.Helper()
	return g.call(fuse.OpGetxattr, node, body(fuse.GetxattrIn{Size: size}, name))
}

func (g *guest) listxattr(node uint64) []string {
	g.t.Helper()
	size, _ := out[fuse.GetxattrOut](g, g.call(fuse.OpListxattr, node, body(fuse.GetxattrIn{})))
	if size.Size == 0 {
		return nil
	}
	if size.Size > 1 {
		g.want(unix.ERANGE, g.call(fuse.OpListxattr, node, body(fuse.GetxattrIn{Size: size.Size - 1})))
	}
	l := g.want(0, g.call(fuse.OpListxattr, node, body(fuse.GetxattrIn{Size: size.Size}))).body
	names := strings.Split(strings.TrimSuffix(string(l), "\x00"), "\x00")
	slices.Sort(names)
	return names
}

func hostXattr(path, name string) (string, error) {
	b := make([]byte, xattrSizeMax)
	n, err := unix.Lgetxattr(path, name, b)
	return string(b[:max(n, 0)]), err
}

func TestXattr(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID

	g.want(unix.ENODATA, g.getxattr(a, "user.x", 0))
	g.want(unix.ENODATA, g.setxattr(a, "user.x", "1", unix.XATTR_REPLACE, 0))
	g.want(0, g.setxattr(a, "user.x", "value", unix.XATTR_CREATE, 0))
	g.want(unix.EEXIST, g.setxattr(a, "user.x", "1", unix.XATTR_CREATE, 0))
	g.want(unix.EINVAL, g.setxattr(a, "user.x", "1", 0xff, 0))
	if size, _ := out[fuse.GetxattrOut](g, g.getxattr(a, "user.x", 0)); size.Size != 5 {
		t.Errorf("size %d", size.Size)
	}
	g.want(unix.ERANGE, g.getxattr(a, "user.x", 4))
	if v := g.want(0, g.getxattr(a, "user.x", 5)).body; string(v) != "value" {
		t.Errorf("value %q", v)
	}
	g.want(0, g.setxattr(a, "user.empty", "", 0, 0))
	if v := g.want(0, g.getxattr(a, "user.empty", 10)).body; len(v) != 0 {
		t.Errorf("value %q", v)
	}

	// What the guest's kernel trusts, the host's must not, and the guest's users not reach.
	g.want(0, g.setxattr(a, "trusted.overlay.opaque", "y", 0, 0))
	if v, err := hostXattr(g.host("a"), "user.transfuse.trusted.overlay.opaque"); v != "y" || err != nil {
		t.Errorf("on the host: %q, %v", v, err)
	}
	if _, err := hostXattr(g.host("a"), "trusted.overlay.opaque"); err != unix.ENODATA {
		t.Errorf("on the host: %v", err)
	}
	g.want(unix.EPERM, g.setxattr(a, "user.transfuse.trusted.overlay.opaque", "n", 0, 0))
	g.want(unix.ENODATA, g.getxattr(a, "user.transfuse.trusted.overlay.opaque", 10))
	g.want(unix.ENODATA, g.call(fuse.OpRemovexattr, a, body("user.transfuse.trusted.overlay.opaque")))
	g.want(unix.EOPNOTSUPP, g.setxattr(a, "system.posix_acl_access", "x", 0, 0))
	if d := cmp.Diff([]string{"trusted.overlay.opaque", "user.empty", "user.x"}, g.listxattr(a)); d != "" {
		t.Error("list: -want +got\n", d)
	}
	for _, name := range []string{"trusted.overlay.opaque", "user.empty", "user.x"} {
		g.want(0, g.call(fuse.OpRemovexattr, a, body(name)))
	}
	g.want(unix.ENODATA, g.call(fuse.OpRemovexattr, a, body("user.x")))
	if l := g.listxattr(a); l != nil {
		t.Errorf("list: %q", l)
	}

	// The list on the host is longer than the first buffer for it.
	var want []string
	for i := range 60 {
		name := "user." + strings.Repeat(string(rune('a'+i%26)), 20+i)
		want = append(want, name)
		if a := g.setxattr(a, name, "", 0, 0); a.errno != 0 {
			if a.errno != unix.ENOSPC {
				g.want(0, a)
			}
			want = want[:i] // the file system has no room for more
			break
		}
	}
	slices.Sort(want)
	if d := cmp.Diff(want, g.listxattr(a)); d != "" {
		t.Error("long list: -want +got\n", d)
	}
}

func TestXattrCompat(t *testing.T) {
	g := newGuest(t, nil)
	g.fs.session.Store(&session{minor: 31}) // without SETXATTR_EXT
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID
	g.want(0, g.call(fuse.OpSetxattr, a, body(fuse.SetxattrInCompat{Size: 1}, "user.x", []byte("v"))))
	if v := g.want(0, g.getxattr(a, "user.x", 10)).body; string(v) != "v" {
		t.Errorf("value %q", v)
	}
}

func TestXattrModes(t *testing.T) {
	t.Run("off", func(t *testing.T) {
		g := newGuest(t, func(c *Config) { c.Xattr = XattrOff })
		for op, b := range map[fuse.Opcode][]byte{
			fuse.OpSetxattr: body(fuse.SetxattrIn{Size: 1}, "user.x", []byte("1")), fuse.OpGetxattr: body(fuse.GetxattrIn{}, "user.x"),
			fuse.OpListxattr: body(fuse.GetxattrIn{}), fuse.OpRemovexattr: body("user.x"),
		} {
			g.want(unix.ENOSYS, g.call(op, 1, b))
		}
	})
	t.Run("user", func(t *testing.T) {
		g := newGuest(t, func(c *Config) { c.Xattr = XattrUser })
		g.want(0, g.setxattr(1, "security.selinux", "label", 0, 0))
		if v, err := hostXattr(g.dir, "user.transfuse.security.selinux"); v != "label" || err != nil {
			t.Errorf("on the host: %q, %v", v, err)
		}
		g.want(unix.EPERM, g.setxattr(1, capability, "x", 0, 0))
	})
	t.Run("map", func(t *testing.T) {
		g := newGuest(t, func(c *Config) { c.XattrMap = []XattrRule{{"user.private.", ""}, {"user.", "user.vm1."}} })
		g.want(unix.EOPNOTSUPP, g.setxattr(1, "user.private.x", "1", 0, 0))
		g.want(0, g.setxattr(1, "user.x", "1", 0, 0))
		if err := unix.Setxattr(g.dir, "user.other", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{"user.x"}, g.listxattr(1)); d != "" {
			t.Error("-want +got\n", d)
		}
	})
	t.Run("capabilities by another name", func(t *testing.T) {
		g := newGuest(t, func(c *Config) { c.XattrMap = []XattrRule{{"user.", "security."}} })
		g.want(unix.EPERM, g.setxattr(1, "user.capability", "x", 0, 0))
	})
}

// TestXattrSymlink: a path of a link's descriptor is not the link's way.
func TestXattrSymlink(t *testing.T) {
	g := newGuest(t, nil)
	g.write0("target", "", 0o644)
	if err := os.Symlink("target", g.host("link")); err != nil {
		t.Fatal(err)
	}
	l := g.lookup(1, "link").NodeID
	// Not EOPNOTSUPP, of which an overlayfs above would conclude too much: see trustedRule.
	for _, name := range []string{"user.x", "trusted.overlay.origin"} {
		g.want(unix.EPERM, g.setxattr(l, name, "1", 0, 0))
	}
	if names := g.listxattr(g.lookup(1, "target").NodeID); names != nil {
		t.Errorf("the target has %q", names)
	}
}

func TestACL(t *testing.T) {
	needRoot(t)
	g := newGuest(t, func(c *Config) {
		c.ACL = true
		c.UIDs = IDMap{{0, 0, 1}, {1000, 9000, 100}}
	})
	g.write0("a", "", 0o644)
	a := g.lookup(1, "a").NodeID
	acl := func(uid uint16) string {
		return string(body(uint32(2), []uint16{1, 6}, uint32(noID), []uint16{2, 4}, uint32(uid), []uint16{4, 4}, uint32(noID),
			[]uint16{0x10, 4}, uint32(noID), []uint16{0x20, 4}, uint32(noID)))
	}
	if e := g.setxattr(a, "system.posix_acl_access", acl(1005), 0, 0).errno; e == unix.EOPNOTSUPP {
		t.Log("NOT RUN: the file system of the temporary directory has no POSIX ACLs")
		return
	} else if e != 0 {
		t.Fatal(e)
	}
	if v, err := hostXattr(g.host("a"), "system.posix_acl_access"); v != acl(9005) || err != nil {
		t.Errorf("on the host: %x, %v", v, err)
	}
	if v := g.want(0, g.getxattr(a, "system.posix_acl_access", 1000)).body; !bytes.Equal(v, []byte(acl(1005))) {
		t.Errorf("back: %x", v)
	}
	g.want(unix.EINVAL, g.setxattr(a, "system.posix_acl_access", acl(5), 0, 0))
	g.want(unix.EINVAL, g.setxattr(a, "system.posix_acl_access", "text", 0, 0))
	if d := cmp.Diff([]string{"system.posix_acl_access"}, g.listxattr(a)); d != "" {
		t.Error("-want +got\n", d)
	}

	// A default ACL takes the place of the umask.
	in := fuse.MkdirIn{Mode: 0o777, Umask: 0o077}
	g.want(0, g.call(fuse.OpMkdir, 1, body(in, "masked")))
	if m := g.stat("masked").Mode & 0o7777; m != 0o700 {
		t.Errorf("masked has mode %o", m)
	}
	d := g.lookup(1, "masked").NodeID
	g.want(0, g.setxattr(d, "system.posix_acl_default", acl(1005), 0, 0))
	g.want(0, g.call(fuse.OpMkdir, d, body(in, "inside")))
	if m := g.stat("masked/inside").Mode & 0o7777; m != 0o644 {
		t.Errorf("masked/inside has mode %o, want the ACL's", m)
	}

	// The set-group-id bit of a directory goes only if the guest's kernel says so.
	if err := errors.Join(os.Mkdir(g.host("dir"), 0o755), unix.Chmod(g.host("dir"), 0o2755), unix.Chown(g.host("dir"), 0, 777)); err != nil {
		t.Fatal(err)
	}
	dir := g.lookup(1, "dir").NodeID
	g.want(0, g.setxattr(dir, "system.posix_acl_access", acl(1005), 0, 0))
	if m := g.stat("dir").Mode; m&unix.S_ISGID == 0 {
		if g.fs.second.creds.fsetid == g.fs.second.creds.base {
			t.Log("NOT RUN: a binary with cgo (-race) has dropped CAP_FSETID for good")
		} else {
			t.Errorf("dir has mode %o", m)
		}
	}
	g.want(0, g.setxattr(dir, "system.posix_acl_access", acl(1006), 0, fuse.SETXATTR_ACL_KILL_SGID))
	if m := g.stat("dir").Mode; m&unix.S_ISGID != 0 {
		t.Errorf("dir has mode %o after ACL_KILL_SGID", m)
	}
}
