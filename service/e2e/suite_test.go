// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/fstest"
	"transfused.org/transfused/service/transport"
	"transfused.org/transfused/service/wire"
)

// suiteEnv makes this test binary run the suites in a directory, which it has with what to leave out, and nothing else.
const suiteEnv = "TRANSFUSED_TEST_SUITE"

type suiteSpec struct {
	Dir     string
	Options fstest.Options
	Posix   map[string]string // tests of go-fuse's suite to leave out, and why
}

// notPosix are tests of go-fuse's suite that no file system of the host passes either, and why.
var notPosix = map[string]string{
	"FcntlFlockLocksFile": "it wants two POSIX locks of one process to conflict",
}

// small is for the suites that come after the first one, on an export with these options.
func small(export string) suiteSpec {
	return suiteSpec{Options: fstest.Options{Entries: 2_000, Ops: 500, Missing: Missing(export)}, Posix: notPosix}
}

func (s suiteSpec) run(t *testing.T) {
	t.Run("fstest", func(t *testing.T) { fstest.All(t, s.Dir, s.Options) })
	t.Run("posixtest", func(t *testing.T) {
		for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
			t.Run(name, func(t *testing.T) {
				if why := s.Posix[name]; why != "" {
					t.Skip("NOT RUN: " + why)
				}
				dir, err := os.MkdirTemp(s.Dir, "posix")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := os.RemoveAll(dir); err != nil {
						t.Error(err)
					}
				})
				posixtest.All[name](t, dir)
			})
		}
	})
}

// TestSuites runs the POSIX suites on each kind of mount.
func TestSuites(t *testing.T) {
	if text := os.Getenv(suiteEnv); text != "" {
		var s suiteSpec
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			t.Fatal(err)
		}
		s.run(t)
		return
	}
	const all = ",root=trust,suid,dev,acl"
	t.Run("version 2", func(t *testing.T) {
		r := newRig(t, 0)
		host, guest := r.both(all, ",suid,dev")
		r.suites(host, guest, suiteSpec{Options: fstest.Options{Entries: 10_000, Ops: 1_000, Missing: Missing(all)}, Posix: notPosix})
	})
	t.Run("default export, one stream, nobody spins", func(t *testing.T) {
		r := newRig(t, 0)
		host, guest := r.both("", ",streams=1", "--spin", "0")
		r.suites(host, guest, small(""))
	})
	for _, mode := range []string{"cache=none", "cache=always", "cache=always,writeback"} {
		t.Run(mode+", four streams", func(t *testing.T) {
			r := newRig(t, 0)
			host, guest := r.both(","+mode, ",streams=4")
			r.suites(host, guest, small(mode))
		})
	}
	t.Run("version 1", func(t *testing.T) {
		r := newRig(t, 0)
		guest := r.guest("--allow-suid", "--allow-dev")
		r.forceVersion1(guest)
		host := r.host(all, "--guest", r.address("g"), "--mount", "code="+r.mnt+",suid,dev")
		r.mounted(r.mnt)
		r.suites(host, guest, small(all))
	})
	t.Run("ordinary user", func(t *testing.T) {
		openDeviceForAll(t)
		r := newRig(t, nobody)
		host, guest := r.both("", "")
		r.suites(host, guest, small(""))
	})
}

// nobody is an ordinary user.
const nobody = 65534

// suites runs the suites on the rig's mount, as the programs' user, and looks for what they leave at the host's worker.
func (r *rig) suites(host, guest *program, s suiteSpec) {
	t := r.t
	t.Helper()
	s.Dir = filepath.Join(r.mnt, "suites")
	host.awaitTimes("msg=mounted", 1) // all channels of the mount are there
	worker := host.child()
	before := descriptors(worker)
	if cred := r.attr.Credential; cred == nil {
		if err := os.Mkdir(s.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		s.run(t)
	} else {
		text, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(r.export, "suites"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(r.export, "suites"), int(cred.Uid), int(cred.Gid)); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, "suites"), "-test.run=^TestSuites$", "-test.v")
		cmd.Dir, cmd.SysProcAttr = "/", r.attr
		cmd.Env = append(os.Environ(), suiteEnv+"="+string(text), "TMPDIR="+r.dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("as uid %d: %v\n%s", cred.Uid, err, out)
		}
	}
	// The guest's kernel forgets what was removed in its own time. The directory of the suites itself is known now, and of an ordinary
	// user's worker one or two that were removed last were seen to stay, however long the suites took.
	known := 2
	if r.attr.Credential != nil {
		known = 4
	}
	after := 0
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if after = descriptors(worker); after <= before+known || time.Now().After(deadline) {
			break
		}
	}
	if after > before+known {
		t.Errorf("the worker had %d descriptors of files before the suites and has %d after them", before, after)
		t.Log(r.run("ls", "-l", fmt.Sprintf("/proc/%d/fd", worker)))
	}
	guest.stop(unix.SIGTERM)
	r.unmounted(r.mnt)
	host.stop(unix.SIGTERM)
}

// openDeviceForAll gives /dev/fuse the mode that udev gives it; in a container it may have another.
func openDeviceForAll(t *testing.T) {
	st, err := os.Stat("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm()&0o006 == 0o006 {
		return
	}
	if err := os.Chmod("/dev/fuse", 0o666); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Chmod("/dev/fuse", st.Mode().Perm()); err != nil {
			t.Error(err)
		}
	})
}

// forceVersion1 has the guest, which is waiting for its host, find one of version 1. It remembers that.
func (r *rig) forceVersion1(guest *program) {
	t := r.t
	t.Helper()
	addr, err := transport.Parse(r.address("h"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(addr.String()))
	t.Cleanup(func() {
		// Its note would stay until the next boot, and the directory with it.
		if err := os.Remove("/run/transfuse/host-v1-" + hex.EncodeToString(sum[:8])); err != nil {
			t.Error(err)
		}
		os.Remove("/run/transfuse") // where it is not used by others
	})
	ln, err := transport.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for range 3 { // a long Init, six bytes, and a long one to make sure
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		typ, body, err := wire.NewReader(c, wire.MaxFirst).Next()
		if err != nil {
			t.Fatal(err)
		}
		m, err := wire.ToHost(typ, body)
		if err != nil {
			t.Fatal(err)
		}
		if i, ok := m.(*wire.Init); !ok {
			t.Fatalf("the guest begins with %T", m)
		} else if i.Version >= wire.Version2 {
			c.Close() // as an old host does with what it doesn't know
		} else if err := wire.Write(c, &wire.Init{Version: wire.Version1}); err != nil {
			t.Fatal(err)
		}
	}
	guest.await("version=1")
}
