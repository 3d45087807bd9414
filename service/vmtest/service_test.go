// SPDX-License-Identifier: Apache-2.0

//go:build vm

package vmtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// credential is what the VMM hands the guest at boot: a mount, and where the token is.
const credential = `
token-file = "/etc/transfuse/token"
[mount.cred]
dir = "/mnt/cred"
`

// packages makes the packages, once for all tests, and returns the folder that they are in.
var packages = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "transfused-packages-")
	if err != nil {
		return "", err
	}
	packagesDir = dir
	cmd := exec.Command("make", "-C", "../..", "deb", "DIST="+dir)
	cmd.Env = append(os.Environ(), "DEB_BUILD_OPTIONS=nocheck")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make deb: %w\n%s", err, lastLines(out, 40))
	}
	return dir, nil
})

var packagesDir string // of packages, once it was called

func TestMain(m *testing.M) {
	code := m.Run()
	if packagesDir != "" {
		os.RemoveAll(packagesDir)
	}
	os.Exit(code)
}

// debs returns the files of the packages of these names.
func debs(t *testing.T, dir string, names ...string) (files []string) {
	t.Helper()
	for _, name := range names {
		found, err := filepath.Glob(filepath.Join(dir, name+"_*.deb"))
		if err != nil || len(found) != 1 {
			t.Fatalf("package %s in %s: %v, %v", name, dir, found, err)
		}
		files = append(files, found[0])
	}
	return files
}

// newServiceRig boots a guest of that Debian release, which gets the packages and a credential, and starts the host's server here.
func newServiceRig(t *testing.T, suite string) *serviceRig {
	t.Helper()
	images, err := Build(t.Context(), os.Stderr, suite)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{bin: t.TempDir(), built: make(chan error, 1)}
	go func() { // while the VM boots
		_, err := packages()
		l.built <- errors.Join(err, l.build(t.Context()))
	}()
	config, credentials := Config{Reboots: true}, map[string]string{"transfused.toml": credential}
	if suite == Bookworm {
		config.Credentials = credentials
	} else {
		config.CommandLine = credentials // as Firecracker's guests get it; systemd 252 does not know that
	}
	if l.vm, err = Boot(t.Context(), images, config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close(t) })
	if err := <-l.built; err != nil {
		t.Fatal(err)
	}
	dir, _ := packages() // its error was in the one above

	s := l.sides()[0]
	if err := os.WriteFile(s.token, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &serviceRig{lab: l, side: s, dirs: map[string]string{}}
	var exports []string
	for _, tag := range []string{"code", "cred", "fst", "auto", "conf"} {
		r.dirs[tag] = s.dir(t)
		if err := os.WriteFile(filepath.Join(r.dirs[tag], "tag"), []byte(tag+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		exports = append(exports, tag+"="+r.dirs[tag])
	}
	r.exports = exports
	r.host = serve(t, s, exports)

	l.guest(t, "mkdir -p /etc/transfuse; umask 077; printf %s "+Quote(token)+" >/etc/transfuse/token")
	for _, f := range debs(t, dir, "transfused", "transfuse-tools", "transfuse-host") {
		if err := l.vm.Push(t.Context(), f, "/root/"+strings.SplitN(filepath.Base(f), "_", 2)[0]+".deb"); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestService has the packages installed in a VM whose systemd runs them, and the host's server here.
func TestService(t *testing.T) {
	newServiceRig(t, Trixie).run(t, []serviceTest{
		{"install", testInstall},
		{"activation", testActivation},
		{"configuration", testConfiguration},
		{"tools", testTools},
		{"watched", testWatched},
		{"bus", testBus},
		{"journal", testJournal},
		{"mount", testMountHelper},
		{"restart", testServiceRestart},
		{"killed", testServiceKilled},
		{"watchdog", testWatchdog},
		{"stop", testServiceStop},
		{"upgrade", testUpgrade},
		{"boot", testBootMounts},
		{"host", testHostPackage},
		{"purge", testPurge},
	})
}

// serviceRig is the VM with the packages, and the host's server here.
type serviceRig struct {
	*lab
	side    side
	exports []string
	host    daemon
	dirs    map[string]string // of the exports, by tag
}

// serviceTest is a test that finds the guest as the one before it left it.
type serviceTest struct {
	name string
	run  func(t *testing.T, r *serviceRig)
}

// run runs tests in their order, none of them if the first fails.
func (r *serviceRig) run(t *testing.T, tests []serviceTest) {
	for i, c := range tests {
		if !t.Run(c.name, func(t *testing.T) { c.run(t, r) }) && i == 0 {
			t.FailNow()
		}
	}
}

// want fails the test unless out is what the guest's script prints.
func (r *serviceRig) want(t *testing.T, want, script string) {
	t.Helper()
	if out := r.guest(t, script); out != want {
		t.Errorf("%s printed\n%s\nwant\n%s", script, out, want)
	}
}

// has fails the test unless the guest's script prints each of want.
func (r *serviceRig) has(t *testing.T, script string, want ...string) string {
	t.Helper()
	out := r.guest(t, script)
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s printed\n%s\nwithout %q", script, out, w)
		}
	}
	return out
}

// status waits until systemctl shows text as the service's status.
func (r *serviceRig) status(t *testing.T, text string) {
	t.Helper()
	r.guest(t, fmt.Sprintf(`for i in $(seq 600); do s=$(systemctl show -P StatusText transfused); case $s in *%s*) exit 0;; esac; sleep 0.1; done; echo "the status is $s"; exit 1`, Quote(text)))
}

func testInstall(t *testing.T, r *serviceRig) {
	r.guest(t, "dpkg -i /root/transfuse-tools.deb /root/transfused.deb")
	r.want(t, "active\nactive\nactive", "systemctl is-active transfused.service transfused.socket transfused-control.socket")
	r.want(t, "enabled\nenabled\nenabled", "systemctl is-enabled transfused.service transfused.socket transfused-control.socket")
	// The credential's mount.
	r.guest(t, "await mounted /mnt/cred")
	r.want(t, "cred", "cat /mnt/cred/tag")
	r.status(t, "1 mount, host connected, protocol 2")
	r.has(t, "systemctl status transfused | cat", "Status: \"1 mount, host connected, protocol 2\"")
	r.want(t, "fuse.transfuse cred", "findmnt -n -o FSTYPE,SOURCE /mnt/cred | tr -s ' '")
	// All see its mounts, because it is in the namespace of PID 1.
	r.guest(t, "test $(readlink /proc/$(systemctl show -P MainPID transfused)/ns/mnt) = $(readlink /proc/1/ns/mnt)")
	r.verifyUnits(t)
	// It is confined all the same.
	r.exposure(t, "transfused.service", 4.5)
}

// verifyUnits fails the test if systemd has anything to say about the units of the packages that are installed.
func (r *serviceRig) verifyUnits(t *testing.T) {
	t.Helper()
	r.want(t, "", "systemd-analyze verify --man=no /usr/lib/systemd/system/transfuse*.service /usr/lib/systemd/system/transfuse*.socket 2>&1 || true")
}

// exposure fails the test if systemd finds the unit more exposed than that.
func (r *serviceRig) exposure(t *testing.T, unit string, most float64) {
	t.Helper()
	out := r.guest(t, "systemd-analyze security "+unit+" | sed -n 's/.*Overall exposure level for "+unit+": \\([0-9.]*\\).*/\\1/p'")
	got, err := strconv.ParseFloat(out, 64)
	if err != nil || got > most {
		t.Errorf("the exposure of %s is %q (%v), more than %g", unit, out, err, most)
	}
	t.Logf("exposure of %s: %s", unit, out)
}

func testActivation(t *testing.T, r *serviceRig) {
	r.guest(t, "systemctl stop transfused.service")
	r.want(t, "inactive", "systemctl is-active transfused.service || true")
	r.noMounts(t)
	c, err := r.vm.Dial(t.Context(), 1525)
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("x")) // it is refused, and has woken the daemon
	c.Close()
	r.guest(t, "await mounted /mnt/cred; systemctl is-active transfused.service")
	// And so does whoever asks.
	r.guest(t, "systemctl stop transfused.service; transfusectl mounts >/dev/null; systemctl is-active transfused.service; await mounted /mnt/cred")
}

func testConfiguration(t *testing.T, r *serviceRig) {
	const dropIn = "/etc/transfuse/transfused.toml.d/10-conf.toml"
	r.guest(t, "mkdir -p ${d:=/etc/transfuse/transfused.toml.d}; printf '[mount.conf]\\ndir = \"/mnt/conf\"\\n' >"+dropIn+"; systemctl reload transfused; await mounted /mnt/conf")
	id := r.guest(t, "stat -c %d /mnt/cred")
	// A mistake changes nothing, and is told with its line to who asked.
	r.guest(t, "printf '[mount.conf]\\ndir = \"/mnt/conf\"\\nfast = 1\\n' >"+dropIn)
	r.has(t, "systemctl reload transfused 2>&1 && exit 1; transfusectl reload 2>&1 || true; journalctl -u transfused -n 20 -o cat", dropIn+":3: unknown key mount.conf.fast")
	r.guest(t, "mounted /mnt/conf; systemctl is-active transfused")
	r.guest(t, "rm "+dropIn+"; systemctl reload transfused; unmounted /mnt/conf; mounted /mnt/cred")
	r.want(t, id, "stat -c %d /mnt/cred")
	r.has(t, "transfusectl cat-config", "/mnt/cred")
}

func testTools(t *testing.T, r *serviceRig) {
	r.has(t, "transfusectl status; echo exit $?", "cred", "exit 0")
	r.has(t, "transfusectl mounts --json=short", `"tag":"cred"`, `"state":"active"`)
	r.has(t, "transfusectl exports", "code", "fst")
	r.guest(t, "transfusectl mount code /mnt/code; mounted /mnt/code; cat /mnt/code/tag; transfusectl unmount /mnt/code; unmounted /mnt/code")
	r.has(t, "transfusectl mount nothing /mnt/nothing 2>&1 && exit 1 || true", "nothing")
	r.has(t, "(while sleep 0.02; do stat /mnt/cred/tag; cat /mnt/cred/tag; done) >/dev/null & transfusectl top --iterations 2 | cat; kill %1", "cred")
	r.has(t, "transfusectl doctor || true", "vsock")
	r.has(t, "varlinkctl introspect /run/transfuse/control.sock org.transfused.Guest", "method Mount")
	r.has(t, "varlinkctl call /run/transfuse/control.sock org.transfused.Guest.Mounts '{}'", "/mnt/cred")
	// Who is not root may look, and no more.
	r.has(t, "runuser -u nobody -- transfusectl mounts", "/mnt/cred")
	r.has(t, "runuser -u nobody -- transfusectl unmount /mnt/cred 2>&1 && exit 1; mounted /mnt/cred; echo still", "still")
	r.has(t, "(cd /mnt/cred; transfusectl unmount /mnt/cred 2>&1) && exit 1; mounted /mnt/cred; echo still", "resource busy", "still")
}

func testBus(t *testing.T, r *serviceRig) {
	r.has(t, "busctl tree org.transfused1", "/org/transfused1/mount/")
	r.has(t, "busctl introspect org.transfused1 /org/transfused1", "org.transfused1.Manager", ".Mount ", "InterfacesAdded")
	r.guest(t, "systemd-run --quiet --unit=monitor -p StandardOutput=file:/run/monitor busctl monitor --match=\"type='signal',path_namespace='/org/transfused1'\"; sleep 1")
	path := r.guest(t, `busctl call org.transfused1 /org/transfused1 org.transfused1.Manager Mount ssas code /mnt/code 0 | sed 's/o "\(.*\)"/\1/'`)
	r.want(t, `s "active"`, "mounted /mnt/code; busctl get-property org.transfused1 "+path+" org.transfused1.Mount State")
	r.has(t, "busctl call org.transfused1 "+path+" org.transfused1.Mount GetStatistics", "Requests")
	r.has(t, "runuser -u nobody -- busctl call org.transfused1 "+path+" org.transfused1.Mount Unmount u 0 2>&1 || true; mounted /mnt/code && echo still", "still", "enied")
	r.guest(t, "busctl call org.transfused1 "+path+" org.transfused1.Mount Unmount u 0; unmounted /mnt/code; "+
		"for i in $(seq 100); do grep -q InterfacesRemoved /run/monitor && break; sleep 0.1; done; systemctl stop monitor")
	r.has(t, "cat /run/monitor", "InterfacesAdded", "InterfacesRemoved", path)
	// The bus starts it.
	r.guest(t, "systemctl stop transfused.service; busctl get-property org.transfused1 /org/transfused1 org.transfused1.Manager Version; await mounted /mnt/cred")
}

// testWatched has the host make much where the guest has looked. It is acted for who watches, and for nobody.
func testWatched(t *testing.T, r *serviceRig) {
	const (
		files   = 1000
		socket  = "/run/transfuse/control.sock"
		watched = "/mnt/cred/watched"
	)
	dir := filepath.Join(r.dirs["cred"], "watched")
	r.side.run(t, "mkdir "+dir)
	for _, c := range []struct {
		name string
		to   string // what is watched
	}{{"a", "/tmp"}, {"b", watched}} {
		r.guest(t, fmt.Sprintf("find %s; systemd-run --quiet --unit=watch-%[2]s sh -c 'exec inotifywait -m -e create --format %%f %[3]s >/run/watch-%[2]s 2>/run/watch-%[2]s.err'; until grep -q established /run/watch-%[2]s.err; do sleep 0.1; done", watched, c.name, c.to))
		before := r.requests(t, socket, "/mnt/cred")
		r.side.run(t, fmt.Sprintf("cd %s; for i in $(seq %d); do >%s$i; done", dir, files, c.name))
		// What comes last is acted last, and for who has begun to watch by then.
		r.guest(t, fmt.Sprintf("systemd-run --quiet --unit=last-%[1]s sh -c 'exec inotifywait -e create %s --include last-%[1]s 2>/run/last-%[1]s'; until grep -q established /run/last-%[1]s; do sleep 0.1; done", c.name, watched))
		r.side.run(t, ">"+dir+"/last-"+c.name)
		r.guest(t, "while systemctl is-active --quiet last-"+c.name+"; do sleep 0.1; done")
		asked := since(before, r.requests(t, socket, "/mnt/cred"))
		seen := r.guest(t, "grep -c '^"+c.name+"' /run/watch-"+c.name+" || true; systemctl stop watch-"+c.name)
		t.Logf("with a watch on %s: %s seen, of %d; asked for %v", c.to, seen, files, asked)
		if all := c.to == watched; all && seen != fmt.Sprint(files) || !all && asked["MKNOD"] > files/2 {
			t.Errorf("with a watch on %s %s of %d files are seen, and the guest acts %d", c.to, seen, files, asked["MKNOD"])
		}
	}
}

func testJournal(t *testing.T, r *serviceRig) {
	r.has(t, "journalctl -u transfused -o json MESSAGE_ID=d1b5b6a4a0f84e0db0f24c7c5f0d7a03 | tail -n 1",
		`"TRANSFUSED_DIR":"/mnt/cred"`, `"TRANSFUSED_TAG":"cred"`, `"CODE_FILE":`, `"CODE_LINE":`)
	r.has(t, "journalctl -x -u transfused MESSAGE_ID=d1b5b6a4a0f84e0db0f24c7c5f0d7a03 | cat", "░░")
}

func testMountHelper(t *testing.T, r *serviceRig) {
	r.guest(t, "mkdir -p /mnt/m; mount -t transfuse code /mnt/m; cat /mnt/m/tag; mount -o remount,ro /mnt/m; ! touch /mnt/m/x; mount -o remount,rw /mnt/m; touch /mnt/m/x; rm /mnt/m/x; umount /mnt/m; await unmounted /mnt/m")
	// In a namespace of its own, where nobody else sees it.
	r.want(t, "code", "unshare -m --propagation private sh -c 'mount -t transfuse code /mnt/m && cat /mnt/m/tag'; unmounted /mnt/m")
	r.has(t, "mount -t transfuse nothing /mnt/m 2>&1 && exit 1; echo exit $?", "nothing")
	r.guest(t, "for i in $(seq 100); do [ $(transfusectl mounts --json=short | grep -c '\"tag\":\"code\"') = 0 ] && exit 0; sleep 0.1; done; transfusectl mounts; exit 1")
}

// fioJob reads and writes and looks at every byte again.
const fioJob = "fio --name=v --directory=/mnt/cred --rw=randrw --bs=4k --size=4M --verify=crc32c --verify_fatal=1 --time_based --runtime=%d --group_reporting --output=/run/fio"

func testServiceRestart(t *testing.T, r *serviceRig) {
	r.guest(t, "systemd-run --quiet --unit=verify -p Type=exec "+fmt.Sprintf(fioJob, 20))
	r.guest(t, "exec 3>/mnt/cred/held; flock -x 3; for i in 1 2 3 4 5; do systemctl restart transfused; mounted /mnt/cred; echo $i >&3; done")
	r.guest(t, "systemctl daemon-reexec; systemctl restart transfused; systemctl kill -s TERM --kill-whom=main transfused; stat /mnt/cred/tag")
	r.has(t, "for i in $(seq 1200); do systemctl is-active --quiet verify || break; sleep 0.1; done; systemctl show -P Result verify; cat /run/fio", "success", "err= 0")
	if b, err := os.ReadFile(filepath.Join(r.dirs["cred"], "held")); err != nil || string(b) != "1\n2\n3\n4\n5\n" {
		t.Errorf("the host has %q, %v", b, err)
	}
	r.status(t, "1 mount, host connected")
	r.want(t, "2", "systemctl show -P NFileDescriptorStore transfused")
	// One mount in another is found again when that is served again, and nobody waits for it before.
	r.guest(t, `mkdir /mnt/cred/in; transfusectl mount code /mnt/cred/in; systemctl restart transfused; cat /mnt/cred/in/tag
		transfusectl unmount /mnt/cred/in; unmounted /mnt/cred/in; rmdir /mnt/cred/in`)
	r.want(t, "", "journalctl -u transfused -o cat | grep -F 'be reached' || true")
}

func testServiceKilled(t *testing.T, r *serviceRig) {
	r.guest(t, `exec 3>/mnt/cred/held; for i in $(seq 20); do systemctl kill -s KILL --kill-whom=main transfused; sleep 0.5; done
		systemctl is-active transfused; echo killed >&3; cat /mnt/cred/tag; mounted /mnt/cred; test $(findmnt -n /mnt/cred | wc -l) = 1`)
	if b, err := os.ReadFile(filepath.Join(r.dirs["cred"], "held")); err != nil || string(b) != "killed\n" {
		t.Errorf("the host has %q, %v", b, err)
	}
	r.status(t, "1 mount, host connected")
}

func testWatchdog(t *testing.T, r *serviceRig) {
	r.guest(t, "mkdir -p /run/systemd/system/transfused.service.d; printf '[Service]\\nWatchdogSec=4\\nTimeoutAbortSec=2\\n' >/run/systemd/system/transfused.service.d/w.conf; systemctl daemon-reload; systemctl restart transfused; await mounted /mnt/cred; cat /mnt/cred/tag")
	// A host that stands still is no fault of the daemon, for several times its time; who uses the mount waits.
	before := r.guest(t, "systemctl show -P NRestarts transfused")
	var pid int
	fmt.Sscan(r.host.pid(t), &pid)
	var workers []int
	for _, f := range strings.Fields(local(t, fmt.Sprintf("cat /proc/%d/task/*/children", pid))) {
		var w int
		fmt.Sscan(f, &w)
		workers = append(workers, w)
	}
	stop := func(sig syscall.Signal) {
		for _, p := range append(workers, pid) {
			syscall.Kill(p, sig)
		}
	}
	stop(syscall.SIGSTOP)
	defer stop(syscall.SIGCONT)
	// In a unit: who waits for a host that does not answer can't be killed, and the end of a script waits for what it has started.
	r.guest(t, "systemd-run --quiet --unit=waits -p StandardOutput=file:/run/waited cat /mnt/cred/tag; sleep 15")
	stop(syscall.SIGCONT)
	r.want(t, before, "systemctl show -P NRestarts transfused")
	r.want(t, "cred", "for i in $(seq 300); do systemctl is-active --quiet waits || break; sleep 0.1; done; cat /run/waited")
	// One that does nothing any more is.
	r.guest(t, "kill -STOP $(systemctl show -P MainPID transfused); for i in $(seq 300); do [ $(systemctl show -P NRestarts transfused) != "+before+" ] && break; sleep 0.1; done; cat /mnt/cred/tag; test $(systemctl show -P NRestarts transfused) != "+before)
	r.guest(t, "rm /run/systemd/system/transfused.service.d/w.conf; systemctl daemon-reload; systemctl restart transfused")
}

func testServiceStop(t *testing.T, r *serviceRig) {
	// Files that are open don't keep it from stopping, and what was written is there.
	r.guest(t, "await mounted /mnt/cred; exec 3>/mnt/cred/open; echo written >&3; systemctl stop transfused.service; unmounted /mnt/cred; ! echo more >&3; exec 3>&- || true")
	if b, err := os.ReadFile(filepath.Join(r.dirs["cred"], "open")); err != nil || string(b) != "written\n" {
		t.Errorf("the host has %q, %v", b, err)
	}
	r.want(t, "0", "systemctl show -P NFileDescriptorStore transfused")
	r.want(t, "", "pgrep -a transfused || true")
	r.guest(t, "systemctl start transfused; await mounted /mnt/cred")
	// A daemon that does not stop is killed, and what it leaves is detached.
	r.guest(t, "mkdir -p /run/systemd/system/transfused.service.d; printf '[Service]\\nTimeoutStopSec=2\\n' >/run/systemd/system/transfused.service.d/w.conf; systemctl daemon-reload; kill -STOP $(systemctl show -P MainPID transfused); systemctl stop transfused.service; await unmounted /mnt/cred; rm /run/systemd/system/transfused.service.d/w.conf; systemctl daemon-reload")
	r.guest(t, "systemctl reset-failed transfused; systemctl start transfused; await mounted /mnt/cred; cat /mnt/cred/tag")
}

// upgrades is how often the package is installed over itself: $TRANSFUSED_UPGRADES, for releases 20. An emulated CPU takes 15 s for each.
func upgrades(t *testing.T) int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("TRANSFUSED_UPGRADES"), "2"))
	if err != nil {
		t.Fatalf("TRANSFUSED_UPGRADES: %v", err)
	}
	return n
}

func testUpgrade(t *testing.T, r *serviceRig) {
	// Somebody uses the mount all the time, and notes how long it took at most.
	// The shell does all of it itself: an emulated CPU takes a third of a second to start date and cat.
	// (In a file: systemd would expand what is in braces.)
	r.guest(t, `mkfifo /run/tick; cat >/run/user.sh <<'END'
		exec 3>/mnt/cred/log 4<>/run/tick; most=0; i=0
		now() { now=${EPOCHREALTIME/[.,]/}; }
		while [ ! -e /run/enough ]; do
			now; a=$now; echo $i >&3; read -r tag </mnt/cred/tag || exit 1; now; b=$(( (now - a) / 1000 ))
			[ $b -gt $most ] && most=$b; i=$((i+1)); read -r -t 0.05 -u 4
		done; echo $most >/run/most; echo $i >/run/count
END
		systemd-run --quiet --unit=user bash /run/user.sh`)
	pid := ""
	for range upgrades(t) {
		now := r.guest(t, "dpkg -i /root/transfused.deb >/run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }; systemctl is-active --quiet transfused.socket transfused.service; systemctl show -P MainPID transfused")
		if now == pid {
			t.Errorf("process %s goes on after an upgrade", pid)
		}
		pid = now
	}
	out := r.guest(t, `touch /run/enough; for i in $(seq 300); do systemctl is-active --quiet user || break; sleep 0.1; done
		systemctl show -P Result user; echo "the longest wait was $(cat /run/most) ms, of $(cat /run/count) turns"; rm /run/enough /run/tick /run/user.sh`)
	t.Log(out)
	if !strings.HasPrefix(out, "success\n") {
		t.Error(out)
	}
	var most, count int
	fmt.Sscanf(strings.TrimPrefix(out, "success\n"), "the longest wait was %d ms, of %d turns", &most, &count)
	if b, err := os.ReadFile(filepath.Join(r.dirs["cred"], "log")); err != nil || strings.Count(string(b), "\n") != count || count == 0 {
		t.Errorf("the host has %d lines of %d, %v", strings.Count(string(b), "\n"), count, err)
	}
	if most == 0 {
		t.Error("nobody waited at all: that is not so")
	}
	if most > 10000 { // two seconds are for a machine whose CPUs are not emulated
		t.Errorf("somebody waited %d ms", most)
	}
}

// softReboot restarts all of the guest but its kernel, and returns when it is up again.
func (r *serviceRig) softReboot(t *testing.T) {
	t.Helper()
	count := r.guest(t, "systemctl show -P SoftRebootsCount; systemd-run --quiet --on-active=0.5 --timer-property=AccuracySec=50ms systemctl soft-reboot")
	var n int
	fmt.Sscan(count, &n)
	deadline := time.Now().Add(scriptTime)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		out, err := r.vm.Run(ctx, fmt.Sprintf("test $(systemctl show -P SoftRebootsCount) = %d; systemctl is-system-running --wait || true", n+1))
		cancel()
		if err == nil {
			t.Logf("rebooted: %s", strings.TrimSpace(out))
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the guest does not come back: %v", err)
		}
		time.Sleep(500 * time.Millisecond) // nothing tells that its shell listens again
	}
}

// reboot restarts the guest.
func (r *serviceRig) reboot(t *testing.T) {
	t.Helper()
	const id = "cat /proc/sys/kernel/random/boot_id"
	begin, before := time.Now(), r.guest(t, id)
	if err := r.vm.Reboot(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, r.vm.Logs())
	}
	if r.guest(t, id) == before {
		t.Fatal("the guest has not restarted")
	}
	t.Logf("rebooted in %.0f s", time.Since(begin).Seconds())
}

// bootMounts configures mounts for the next boots, beside the credential's.
func (r *serviceRig) bootMounts(t *testing.T) {
	t.Helper()
	r.guest(t, `mkdir -p /mnt/fst /mnt/auto /etc/transfuse/transfused.toml.d
		printf 'fst /mnt/fst transfuse defaults 0 0\n' >>/etc/fstab
		printf '[mount.auto]\ndir = "/mnt/auto"\noptions = ["x-systemd.automount"]\n' >/etc/transfuse/transfused.toml.d/20-auto.toml`)
}

// booted fails the test unless the mounts of the credential, fstab and configuration are there.
func (r *serviceRig) booted(t *testing.T) {
	t.Helper()
	r.guest(t, "await mounted /mnt/cred; await mounted /mnt/fst; cat /mnt/cred/tag /mnt/fst/tag")
	r.want(t, "active\nactive", "systemctl is-active mnt-fst.mount mnt-cred.mount")
	r.want(t, "autofs\nauto\nfuse.transfuse", "findmnt -n -o FSTYPE /mnt/auto; timeout 60 cat /mnt/auto/tag; findmnt -n -o FSTYPE /mnt/auto | tail -n 1")
	r.want(t, "", "systemctl list-units --failed --no-legend --plain 'transfuse*' 'mnt-*'")
}

// noBootMounts takes away what bootMounts has configured.
func (r *serviceRig) noBootMounts(t *testing.T) {
	t.Helper()
	r.guest(t, "sed -i '/transfuse/d' /etc/fstab; rm /etc/transfuse/transfused.toml.d/20-auto.toml; systemctl daemon-reload; await mounted /mnt/cred")
}

func testBootMounts(t *testing.T, r *serviceRig) {
	r.has(t, "cat /proc/cmdline", " systemd.set_credential_binary=transfused.toml:")
	r.bootMounts(t)
	r.softReboot(t)
	r.booted(t)
	// A shutdown writes back what was changed in memory, and does not hang.
	r.guest(t, "fio --name=m --filename=/mnt/fst/mapped --ioengine=mmap --rw=write --bs=64k --size=2M --buffer_pattern=0x5a --end_fsync=0 --output=/run/fio")
	// Without D-Bus and without a network.
	r.guest(t, "systemctl mask dbus.service dbus.socket systemd-networkd.service systemd-networkd.socket >/dev/null 2>&1")
	r.reboot(t)
	if out := local(t, "tr -d 'Z' <"+r.dirs["fst"]+"/mapped | wc -c; stat -c %s "+r.dirs["fst"]+"/mapped"); out != "0\n2097152" {
		t.Errorf("the file that was mapped has, but for what was written, and in all: %s", out)
	}
	r.booted(t)
	r.guest(t, "systemctl unmask dbus.service dbus.socket systemd-networkd.service systemd-networkd.socket >/dev/null 2>&1; systemctl start dbus.socket")
	// With a host that is gone, a shutdown ends in time, and what needs no mount comes up.
	r.guest(t, "sed -i 's/transfuse defaults/transfuse nofail/' /etc/fstab")
	r.host.stop(t)
	r.reboot(t)
	r.host = serve(t, r.side, r.exports)
	r.noBootMounts(t)
}

func testPurge(t *testing.T, r *serviceRig) {
	r.guest(t, "dpkg --purge transfused transfuse-host transfuse-tools >/run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }")
	r.noMounts(t)
	r.want(t, "", "pgrep -a transfuse || true; systemctl list-units --all --no-legend --plain 'transfuse*'; ls -d /run/transfuse /usr/bin/transfus* /usr/lib/systemd/system/transfuse* /etc/systemd/system/*/transfuse* 2>/dev/null || true; find /etc/transfuse ! -name token ! -name transfuse 2>/dev/null || true")
}
