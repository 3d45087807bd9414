// SPDX-License-Identifier: Apache-2.0

package passthrough

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fuse"
)

// TestAsUser runs what needs no privilege once more, with a server that has none: no file handles, no owner but
// itself.
func TestAsUser(t *testing.T) {
	needRoot(t)
	// Not below this test's own directory, whose parent is closed to others.
	dir, err := os.MkdirTemp("", "user")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const user = 1234
	if err := os.Chown(dir, user, user); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.count=1",
		"-test.run=^Test(WatchedDirs(Told|Own|Shared|Lost)|Locks|Flock|LockWaits|Xattr|Space|OrdinaryUser|Hostile(Names|Symlinks|Exchange|Numbers|Forget|Lengths|Extensions|Streams|BeforeInit|ReadOnly|OpenFiles|Nodes|Bytes))")
	cmd.Env = []string{"TMPDIR=" + dir, "PATH=" + os.Getenv("PATH"), "TRANSFUSED_AS_USER=1"}
	cmd.Dir = filepath.Clean("/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as uid %d: %v\n%s", user, err, out)
	}
}

// TestOrdinaryUser is for TestAsUser.
func TestOrdinaryUser(t *testing.T) {
	if os.Getenv("TRANSFUSED_AS_USER") == "" {
		return
	}
	g := newGuest(t, nil)
	me := uint32(os.Getuid())
	// Whoever asks, what is made is the server's.
	for _, uid := range []uint32{0, 5, me, noID} {
		g.uid, g.gid = uid, uid
		g.want(0, g.call(fuse.OpMkdir, 1, body(fuse.MkdirIn{Mode: 0o755}, "d")))
		if st := g.stat("d"); st.Uid != me {
			t.Errorf("made for %d: belongs to %d", uid, st.Uid)
		}
		g.want(0, g.call(fuse.OpRmdir, 1, body("d")))
	}
	g.write0("f", "", 0o644)
	f := g.lookup(1, "f").NodeID
	for uid, want := range map[uint32]fuse.Errno{0: 0, me: 0, 5: unix.EPERM} {
		a := g.call(fuse.OpSetattr, f, body(fuse.SetattrIn{Valid: fuse.FATTR_UID | fuse.FATTR_GID, UID: uid, GID: uid}))
		if a.errno != want {
			t.Errorf("chown to %d: %v, want %v", uid, a.errno, want)
		}
	}
	g.want(unix.EPERM, g.call(fuse.OpMknod, 1, body(fuse.MknodIn{Mode: unix.S_IFBLK, Rdev: 1}, "disk")))
	g.want(unix.EPERM, g.setxattr(f, capability, "x", 0, 0))
}
