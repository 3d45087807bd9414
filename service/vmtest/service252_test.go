// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"os"
	"path/filepath"
	"testing"
)

// TestService252 has what TestService has, where the oldest systemd that is supported can do it. Its kernel 6.1 can't send requests again
// (FUSE_NOTIFY_RESEND, 6.9): nobody uses a mount at the moment at which its daemon is killed.
func TestService252(t *testing.T) {
	newServiceRig(t, Bookworm).run(t, []serviceTest{
		{"install", test252Install},
		{"activation", testActivation},
		{"configuration", testConfiguration},
		{"mount", testMountHelper},
		{"restart", test252Restart},
		{"killed", testServiceKilled},
		{"stop", testServiceStop},
		{"boot", test252Boot},
		{"host", testHostPackage},
		{"purge", testPurge},
	})
}

func test252Install(t *testing.T, r *serviceRig) {
	r.has(t, "systemctl --version", "systemd 252 ")
	r.has(t, "uname -r", "6.1.")
	testInstall(t, r)
}

// test252Restart is about the descriptor store of a manager that does not tell its size (FDSTORE, 254).
func test252Restart(t *testing.T, r *serviceRig) {
	r.want(t, "", `tr '\0' '\n' </proc/$(systemctl show -P MainPID transfused)/environ | grep ^FDSTORE= || true`)
	r.want(t, "2", "systemctl show -P NFileDescriptorStore transfused")
	r.guest(t, `id=$(stat -c %d /mnt/cred); exec 3>/mnt/cred/held; flock -x 3
		go_on() { mounted /mnt/cred; test $(stat -c %d /mnt/cred) = $id; echo $1 >&3; if flock -n /mnt/cred/held true; then echo "the lock is lost after $1"; exit 1; fi; }
		for i in 1 2 3; do systemctl restart transfused; go_on $i; done
		systemctl daemon-reexec; systemctl restart transfused; go_on reexec`)
	r.guest(t, "flock -w 60 /mnt/cred/held true")
	if b, err := os.ReadFile(filepath.Join(r.dirs["cred"], "held")); err != nil || string(b) != "1\n2\n3\nreexec\n" {
		t.Errorf("the host has %q, %v", b, err)
	}
	r.status(t, "1 mount, host connected")
	r.want(t, "2", "systemctl show -P NFileDescriptorStore transfused")
}

// test252Boot has all mounts there after a boot.
func test252Boot(t *testing.T, r *serviceRig) {
	r.bootMounts(t)
	r.reboot(t)
	r.booted(t)
	r.noBootMounts(t)
}
