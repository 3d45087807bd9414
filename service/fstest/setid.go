// SPDX-License-Identifier: Apache-2.0

package fstest

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// These need a file system on which set-id bits can be set at all.
var setidCases = []testCase{
	{"setid/chmod", true, setidChmod},
	{"setid/dropped", true, setidDropped},
	{"setid/chown", true, setidChown},
	{"setid/chown-by-root", true, setidChownByRoot},
	{"setid/foreign-group", true, setidForeignGroup},
	{"setid/capability", true, setidCapability},
}

func setidChmod(e *env) {
	e.file("f", "x")
	for _, m := range []uint32{0o4755, 0o2755, 0o6711, 0o7777, 0o755} {
		e.ok(unix.Chmod(e.p("f"), m), "chmod")
		e.mode("f", unix.S_IFREG|m)
	}
}

// setidDropped: whoever changes a program without privilege takes its rights away.
func setidDropped(e *env) {
	u := e.user(nobody, nobody)
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"write", func() error {
			fd := u.mustOpen("f")
			return u.call("pwrite", "", "changed", fd, 0)
		}},
		{"truncate", func() error { return u.call("truncate", "f", "", 1) }},
		{"ftruncate by O_TRUNC", func() error { return u.tryOpen("f", unix.O_RDWR|unix.O_TRUNC, 0) }},
		{"fallocate", func() error { return u.call("fallocate", "", "", u.mustOpen("f"), 0, 0, 8192) }},
	} {
		e.file("f", "program")
		e.ok(unix.Chmod(e.p("f"), 0o6777), "chmod")
		e.mode("f", unix.S_IFREG|0o6777)
		e.ok(c.do(), c.name)
		if got := e.stat("f").Mode; got != unix.S_IFREG|0o777 {
			e.Errorf("mode after %s is %#o, want %#o", c.name, got, unix.S_IFREG|0o777)
		}
		e.ok(unix.Unlink(e.p("f")), "unlink")
	}
}

func setidChown(e *env) {
	e.file("f", "x")
	e.ok(unix.Chmod(e.p("f"), 0o6755), "chmod")
	e.ok(unix.Chown(e.p("f"), 1000, 1000), "chown")
	e.mode("f", unix.S_IFREG|0o755)
	e.mkdir("d")
	e.ok(unix.Chmod(e.p("d"), 0o2755), "chmod")
	e.ok(unix.Chown(e.p("d"), 1000, 1000), "chown")
	e.mode("d", unix.S_IFDIR|0o2755)
}

// setidChownByRoot: without the right of the group to run it, the set-gid bit
// gives nothing (it was for mandatory locking), and who has CAP_FSETID keeps it.
func setidChownByRoot(e *env) {
	e.file("f", "x")
	e.ok(unix.Chown(e.p("f"), 1000, 1000), "chown")
	e.ok(unix.Chmod(e.p("f"), 0o2644), "chmod")
	e.ok(unix.Chown(e.p("f"), 0, 0), "chown")
	e.mode("f", unix.S_IFREG|0o2644)
}

func setidForeignGroup(e *env) {
	e.file("f", "x")
	e.ok(unix.Chown(e.p("f"), nobody, 4321), "chown")
	u := e.user(nobody, nobody)
	e.ok(u.call("chmod", "f", "", 0o2755), "chmod outside the group")
	e.mode("f", unix.S_IFREG|0o755)
	e.ok(e.user(nobody, nobody, 4321).call("chmod", "f", "", 0o2755), "chmod as a member")
	e.mode("f", unix.S_IFREG|0o2755)
}

func setidCapability(e *env) {
	// vfs_cap_data, revision 2: cap_net_bind_service=ep.
	c := make([]byte, 20)
	binary.LittleEndian.PutUint32(c, 0x02000001)
	binary.LittleEndian.PutUint32(c[4:], 1<<unix.CAP_NET_BIND_SERVICE)
	e.file("f", "x")
	e.ok(unix.Setxattr(e.p("f"), "security.capability", c, 0), "set a capability")
	e.eq(e.getxattr("f", "security.capability"), string(c), "capability")
	e.write(e.open("f", unix.O_RDWR, 0), "changed", 0)
	e.noxattr("f", "security.capability")
}
