// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"strings"
	"testing"
)

// testHostPackage is about the package of the other side. Its server runs in the guest, which is a guest of its own as well: it dials
// CID 1, the loopback of vsock.
func testHostPackage(t *testing.T, r *serviceRig) {
	r.guest(t, "dpkg -i /root/transfuse-host.deb; modprobe vsock_loopback")
	// Nothing is exported yet, and nothing listens.
	r.want(t, "disabled\ndisabled\ndisabled\ninactive\ninactive", "systemctl is-enabled transfuse-host.service transfuse-host.socket transfuse-host-control.socket || true; systemctl is-active transfuse-host.service transfuse-host.socket || true")
	r.verifyUnits(t)
	r.exposure(t, "transfuse-host.service", 3.5)
	r.exposure(t, "transfuse-host@vm1.service", 3.5)
	r.exposure(t, "transfuse-host-user@alice.service", 1.0)

	t.Run("server", r.testHostServer)
	t.Run("instance", r.testHostInstance)
	t.Run("user", r.testHostUser)
	t.Run("upgrade", r.testHostUpgrade)
	r.guest(t, "systemctl stop loop loop-vm loop-user; unmounted /mnt/one; unmounted /mnt/vm; unmounted /mnt/home")
}

// loopGuest starts a guest's daemon that mounts tag at dir, as unit, and waits for the mount.
func (r *serviceRig) loopGuest(t *testing.T, unit, server, tag, dir string) {
	t.Helper()
	r.guest(t, "mkdir -p "+dir+"; systemd-run --quiet --unit="+unit+" transfused --server "+server+" --socket unix:/run/"+unit+".sock --token-file /etc/transfuse/token --mount "+tag+"="+dir+"; await mounted "+dir)
}

// goesOn waits until the guest of a server that was started again can read file.
func (r *serviceRig) goesOn(t *testing.T, file string) {
	t.Helper()
	r.guest(t, "until timeout 5 cat "+file+"; do sleep 0.2; done")
}

func (r *serviceRig) testHostServer(t *testing.T) {
	r.guest(t, `mkdir -p /srv/one /srv/two /srv/three /etc/transfuse/host.toml.d
		printf '[export.one]\ndir = "/srv/one"\nguests = [1]\n' >/etc/transfuse/host.toml
		systemctl enable --quiet --now transfuse-host; systemctl is-active transfuse-host.service transfuse-host.socket transfuse-host-control.socket`)
	r.loopGuest(t, "loop", "vsock:1:1524", "one", "/mnt/one")
	r.want(t, "from the guest\nroot", "echo from the guest >/mnt/one/file; cat /srv/one/file; stat -c %U /srv/one/file")
	r.has(t, "systemctl status transfuse-host | cat", "Status: \"exports: 1, sessions of guests: 1\"")
	r.has(t, "transfusectl --host status", "one")
	r.has(t, "transfusectl --host sessions --json=short", "vsock:local:")
	r.has(t, "busctl tree org.transfused.Host1", "/org/transfused/Host1/session/")
	r.has(t, "busctl introspect org.transfused.Host1 $(busctl tree --list org.transfused.Host1 | grep session/ | head -n 1)", "org.transfused.Host1.Session", "vsock:local:", `"one"`)
	r.has(t, "busctl call org.transfused.Host1 /org/transfused/Host1 org.transfused.Host1.Manager Exports", `"/srv/one"`)
	r.has(t, "runuser -u nobody -- busctl call org.transfused.Host1 /org/transfused/Host1 org.transfused.Host1.Manager Reload 2>&1 || true", "enied")
	// Exports come and go, and the others are not touched.
	r.guest(t, `exec 3>/mnt/one/held; printf '[export.two]\ndir = "/srv/two"\nguests = [1]\n' >/etc/transfuse/host.toml.d/two.toml; systemctl reload transfuse-host; echo held >&3
		transfusectl --host exports | grep -q /srv/two`)
	r.has(t, `printf '[export.two]\ndir = "/srv/two"\nguest = [1]\n' >/etc/transfuse/host.toml.d/two.toml; systemctl reload transfuse-host 2>&1 && exit 1; journalctl -u transfuse-host -n 20 -o cat`,
		"/etc/transfuse/host.toml.d/two.toml:3: export two: unknown option")
	r.guest(t, "transfusectl --host exports | grep -q /srv/two; rm /etc/transfuse/host.toml.d/two.toml; systemctl reload transfuse-host; ! transfusectl --host exports | grep -q /srv/two; cat /mnt/one/file")
	// What the unit hides is not exported as if it were there.
	r.has(t, `mkdir -p /run/systemd/system/transfuse-host.service.d; printf '[Service]\nTemporaryFileSystem=/srv/three\n' >/run/systemd/system/transfuse-host.service.d/hide.conf
		printf '[export.three]\ndir = "/srv/three"\nguests = [1]\n' >/etc/transfuse/host.toml.d/three.toml
		systemctl daemon-reload; systemctl restart transfuse-host || true; journalctl -u transfuse-host -n 20 -o cat`, "/srv/three is hidden from this service by its own unit")
	r.guest(t, "rm -r /run/systemd/system/transfuse-host.service.d /etc/transfuse/host.toml.d/three.toml; systemctl daemon-reload; systemctl restart transfuse-host")
	r.goesOn(t, "/mnt/one/file")
}

// testHostInstance has a proxy in the place of the VMM: it takes what the guest dials to the Unix socket of that VM.
func (r *serviceRig) testHostInstance(t *testing.T) {
	r.guest(t, `mkdir -p /srv/vm /etc/credstore; install -m 600 /etc/transfuse/token /etc/credstore/transfuse-host@vm1.token
		printf '[export.vm]\ndir = "/srv/vm"\nguests = ["/run/transfuse-vm/vm1.vsock"]\n' >/etc/transfuse/host@vm1.toml
		systemctl start transfuse-host@vm1.socket; systemctl is-active transfuse-host@vm1.service && exit 1
		systemd-run --quiet --unit=vmm --socket-property=ListenStream=vsock::1700 /usr/lib/systemd/systemd-socket-proxyd /run/transfuse-vm/vm1.vsock_1524`)
	r.loopGuest(t, "loop-vm", "vsock:1:1700", "vm", "/mnt/vm")
	r.want(t, "through the VMM", "echo through the VMM >/mnt/vm/file; cat /srv/vm/file")
	r.has(t, "transfusectl --host --socket /run/transfuse/host@vm1.sock sessions --json=short", "vm1.vsock")
	r.guest(t, `printf '[export.vm]\ndir = "/srv/vm"\nguests = ["/run/transfuse-vm/vm1.vsock"]\n[export.more]\ndir = "/srv/vm"\n' >/etc/transfuse/host@vm1.toml
		systemctl reload transfuse-host@vm1; transfusectl --host --socket /run/transfuse/host@vm1.sock exports | grep -q more`)
}

func (r *serviceRig) testHostUser(t *testing.T) {
	r.guest(t, `useradd -m alice; install -d -o alice /home/alice/src
		printf 'listen = ["vsock:any:5000"]\n[export.home]\ndir = "/home/alice/src"\nguests = [1]\n' >/etc/transfuse/host-user@alice.toml
		systemctl start transfuse-host-user@alice; systemctl is-active transfuse-host-user@alice`)
	r.loopGuest(t, "loop-user", "vsock:1:5000", "home", "/mnt/home")
	r.want(t, "alice\nby root", "echo by root >/mnt/home/file; stat -c %U /home/alice/src/file; cat /home/alice/src/file")
	// What is not the user's is not there.
	r.has(t, `printf 'listen = ["vsock:any:5000"]\n[export.home]\ndir = "/root"\nguests = [1]\n' >/etc/transfuse/host-user@alice.toml; systemctl restart transfuse-host-user@alice || true
		journalctl -u transfuse-host-user@alice -n 20 -o cat`, "/root is hidden from this service by its own unit")
	r.guest(t, `printf 'listen = ["vsock:any:5000"]\n[export.home]\ndir = "/home/alice/src"\nguests = [1]\n' >/etc/transfuse/host-user@alice.toml; systemctl restart transfuse-host-user@alice`)
	r.goesOn(t, "/mnt/home/file")
}

// testHostUpgrade has the package installed over itself: what ran runs again, what did not does not, and sockets go on listening.
func (r *serviceRig) testHostUpgrade(t *testing.T) {
	const pids = "systemctl show -P MainPID transfuse-host.service transfuse-host@vm1.service transfuse-host-user@alice.service"
	before := strings.Fields(r.guest(t, pids))
	listening := r.guest(t, "systemctl show -P ActiveEnterTimestampMonotonic transfuse-host.socket transfuse-host@vm1.socket")
	r.guest(t, "systemctl stop transfuse-host-user@alice; dpkg -i /root/transfuse-host.deb >/run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }")
	after := strings.Fields(r.guest(t, pids))
	if len(before) != 3 || len(after) != 3 || before[0] == after[0] || before[1] == after[1] || after[0] == "0" || after[1] == "0" || after[2] != "0" {
		t.Errorf("before the upgrade the processes were %q, and after it %q", before, after)
	}
	r.want(t, listening, "systemctl show -P ActiveEnterTimestampMonotonic transfuse-host.socket transfuse-host@vm1.socket")
	r.goesOn(t, "/mnt/one/file")
	r.goesOn(t, "/mnt/vm/file")
}
