// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"transfused.org/transfused/service/admin"
	"transfused.org/transfused/service/admin/admintest"
	"transfused.org/transfused/service/transport"
)

// wellFiles are those of a machine with which nothing is wrong.
var wellFiles = map[string]string{
	"proc/sys/kernel/osrelease":              "6.12.5-arch1\n",
	"proc/filesystems":                       "nodev\tsysfs\n\text4\nnodev\tfuse\nnodev\tfusectl\n",
	"dev/fuse":                               "",
	"dev/vhost-vsock":                        "",
	"sys/bus/virtio/devices/virtio3/device":  "0x0013\n",
	"sys/bus/virtio/devices/virtio1/device":  "0x0001\n",
	"proc/sys/fs/fuse/max_pages_limit":       "256\n",
	"proc/sys/fs/inotify/max_user_watches":   "100000\n",
	"proc/sys/fs/inotify/max_user_instances": "128\n",
	"proc/sys/fs/fuse/max_request_timeout":   "0\n",
	"run/systemd/system/.keep":               "",
	"proc/123/limits":                        "Limit                     Soft Limit           Hard Limit           Units\nMax open files            1024                 524288               files\n",
	"etc/os-release":                         "NAME=Test\nPRETTY_NAME=\"Test 1\"\n",
	"lib/modules/6.12.5-arch1/modules.dep":   "kernel/fs/fuse/fuse.ko.zst:\nkernel/net/vmw_vsock/vsock.ko.zst:\nkernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko.zst: x.ko\n",
	"proc/self/mountinfo":                    "36 25 0:31 / /mnt/code rw - fuse.transfuse code rw\n37 25 0:32 / /tmp rw - tmpfs secret rw\n",
}

// testMachine is a machine of files, where systemd and all of our units run. A file is a link where its text begins with ->.
func testMachine(t *testing.T, files map[string]string) machine {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return machine{
		root:     root,
		socket:   func() error { return nil },
		cid:      func() (uint32, error) { return 7, nil },
		lookPath: func(name string) (string, error) { return "/usr/bin/" + name, nil },
		run: func(_ context.Context, name string, args ...string) (string, error) {
			switch {
			case name == "journalctl":
				return "2026-01-02T03:04:05+00:00 vm transfused[123]: mounted\x1b[2J code\n", nil
			case args[0] == "--version":
				return "systemd 257 (257.1)\n+PAM\n", nil
			}
			return "LoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\nResult=success\nMainPID=123\nNRestarts=0\n", nil
		},
	}
}

// serveFake serves g until the test ends, and returns the app that talks to it.
func serveFake(t *testing.T, g *admintest.Guest, h *admintest.Host) *app {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := transport.Listen(transport.Addr{Family: transport.Unix, Path: socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		if h != nil {
			done <- admin.ServeHost(ctx, l, h, version, nil)
			return
		}
		done <- admin.ServeGuest(ctx, l, g, version, nil)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		os.RemoveAll(dir)
	})
	return &app{socket: socket, host: h != nil}
}

// well is a guest's daemon with which nothing is wrong.
func well() *admintest.Guest {
	g := newGuest()
	g.State.Version = version
	g.Initial = g.Initial[:1]
	return g
}

// Each of these faults is found, alone, with what mends it; without one there is nothing to say.
func TestDoctor(t *testing.T) {
	unit := func(name, props string) func(*machine) {
		return func(m *machine) {
			run := m.run
			m.run = func(ctx context.Context, cmd string, args ...string) (string, error) {
				if args[len(args)-1] == name {
					return props, nil
				}
				return run(ctx, cmd, args...)
			}
		}
	}
	file := func(name, text string) map[string]string { return map[string]string{name: text} }
	gone := []string{"dev/vhost-vsock"} // no guest has it
	for _, tt := range []struct {
		name   string
		host   bool
		files  map[string]string
		remove []string
		change func(*machine)
		daemon func(*admintest.Guest)
		server func(*admintest.Host)
		want   []string // level, check: text / mend; all but what is ok
	}{
		{name: "guest", remove: gone},
		{name: "host", host: true, remove: []string{"dev/fuse", "proc/filesystems", "sys/bus/virtio/devices/virtio3/device"}},
		{name: "old kernel", files: file("proc/sys/kernel/osrelease", "5.4.0-1"), want: []string{"error kernel: 5.4.0-1 has no openat2(2) / boot Linux 5.6 or newer"}},
		{name: "kernel without mount_setattr", files: file("proc/sys/kernel/osrelease", "5.10.0"), want: []string{"warning kernel: 5.10.0 has no mount_setattr(2)"}},
		{name: "module not loaded", files: file("proc/filesystems", "nodev\tfusectl"), remove: []string{"dev/fuse"}, want: []string{
			"warning fuse: the module fuse is not loaded / modprobe fuse", "error /dev/fuse: it is missing / modprobe fuse"}},
		{name: "no FUSE", files: map[string]string{"proc/filesystems": "", "lib/modules/6.12.5-arch1/modules.dep": ""}, want: []string{
			"error fuse: the kernel has no FUSE / install the modules"}},
		{name: "no vsock", change: func(m *machine) { m.socket = func() error { return unix.EAFNOSUPPORT } }, want: []string{
			"error vsock: no vsock socket can be made: address family not supported by protocol / modprobe vsock"}},
		{name: "no vsock in the kernel", files: file("lib/modules/6.12.5-arch1/modules.dep", ""), change: func(m *machine) { m.socket = func() error { return unix.EAFNOSUPPORT } },
			want: []string{"error vsock: no vsock socket can be made: address family not supported by protocol / boot a kernel with CONFIG_VSOCKETS"}},
		{name: "no vsock device", remove: []string{"sys/bus/virtio/devices/virtio3/device"}, change: func(m *machine) { m.cid = func() (uint32, error) { return 0, unix.ENOENT } },
			want: []string{"error transport: the machine has no vsock device: nothing leads to a host / give the VM one: QEMU"}},
		{name: "a host by another transport", remove: []string{"sys/bus/virtio/devices/virtio3/device"}, change: func(m *machine) { m.socket = func() error { return unix.EAFNOSUPPORT } },
			daemon: func(g *admintest.Guest) { g.State.Server = "unix:/run/h.sock" }},
		{name: "no driver", change: func(m *machine) { m.cid = func() (uint32, error) { return unix.VMADDR_CID_ANY, nil } },
			want: []string{"error transport: there is a vsock device, and no driver has taken it / modprobe vmw_vsock_virtio_transport"}},
		{name: "no access", files: file("sys/bus/virtio/devices/virtio3/driver", "->../../drivers/vmw_vsock_virtio_transport"), change: func(m *machine) { m.cid = func() (uint32, error) { return 0, unix.EACCES } },
			want: []string{"warning transport: there is a vsock device, driven by vmw_vsock_virtio_transport, but the machine's CID is not known: permission denied / chmod 0644 /dev/vsock"}},
		{name: "a host", remove: []string{"sys/bus/virtio/devices/virtio3/device"}, change: func(m *machine) { m.cid = func() (uint32, error) { return 2, nil } },
			want: []string{"error transport: this machine is a host of VMs"}},
		{name: "no vhost", host: true, remove: gone, want: []string{"warning vhost: /dev/vhost-vsock is missing"}},
		{name: "sysctls", files: map[string]string{"proc/sys/fs/fuse/max_pages_limit": "32", "proc/sys/fs/fuse/max_request_timeout": "60", "proc/sys/fs/inotify/max_user_watches": "10"},
			want: []string{"warning sysctl: fs.fuse.max_pages_limit is 32: requests can't have 1 MiB of data, which slows large files down / sysctl -w fs.fuse.max_pages_limit=256",
				"warning sysctl: fs.inotify.max_user_watches is 10", "warning sysctl: fs.fuse.max_request_timeout is 60: a mount that waits for its host for so many seconds is aborted"}},
		{name: "no systemd", remove: []string{"run/systemd/system/.keep", "run/systemd/system"}, want: []string{"warning systemd: systemd does not run this machine"}},
		{name: "old systemd", change: func(m *machine) {
			run := m.run
			m.run = func(ctx context.Context, cmd string, args ...string) (string, error) {
				if args[0] == "--version" {
					return "systemd 249 (249.11)\n", nil
				}
				return run(ctx, cmd, args...)
			}
		}, want: []string{"warning systemd: systemd 249 is older"}},
		{name: "systemctl fails", change: func(m *machine) {
			m.run = func(context.Context, string, ...string) (string, error) { return "", errors.New("exit status 1") }
		},
			want: []string{"warning systemd: its version can't be told: exit status 1"}},
		{name: "failed service", change: unit("transfused.service", "LoadState=loaded\nActiveState=failed\nResult=watchdog\nMainPID=0\n"),
			want: []string{"error transfused.service: it has failed: watchdog / journalctl -xeu transfused.service; then systemctl restart"}},
		{name: "socket not started", change: unit("transfused.socket", "LoadState=loaded\nActiveState=inactive\nSubState=dead\n"),
			want: []string{"error transfused.socket: it is inactive (dead) / systemctl enable --now transfused.socket"}},
		{name: "host's socket not started", host: true, change: unit("transfuse-host.socket", "LoadState=loaded\nActiveState=inactive\nSubState=dead\n"),
			want: []string{"warning transfuse-host.socket: it is inactive (dead): no guest reaches transfuse-host by vsock / systemctl enable --now transfuse-host.socket"}},
		{name: "socket not enabled", change: unit("transfused-control.socket", "LoadState=loaded\nActiveState=active\nSubState=listening\nUnitFileState=disabled\n"),
			want: []string{"warning transfused-control.socket: it is active (listening), but will not be after the next boot / systemctl enable"}},
		{name: "masked", host: true, change: unit("transfuse-host.service", "LoadState=masked\nMainPID=0\n"), want: []string{"warning transfuse-host.service: it is masked / systemctl unmask"}},
		{name: "not installed", change: unit("transfused.service", "LoadState=not-found\nMainPID=0\n"), want: []string{"warning transfused.service: there is no such unit / install the package"}},
		{name: "no fusermount3", change: func(m *machine) { m.lookPath = func(string) (string, error) { return "", os.ErrNotExist } },
			want: []string{"warning fusermount3: it is missing: only root can mount / apt install fuse3"}},
		{name: "few files", files: file("proc/123/limits", "Max open files            512                  1024                 files\n"),
			want: []string{"warning limits: RLIMIT_NOFILE of transfused.service is 1024: too few open files for many mounts or large trees / systemctl edit transfused.service: [Service] LimitNOFILE=4096"}},
		{name: "lost host", daemon: func(g *admintest.Guest) { g.State.Connected = false }, want: []string{"error host: vsock:host:1524 is not connected / start transfuse-host there"}},
		{name: "another version", daemon: func(g *admintest.Guest) { g.State.Version = "0.9" }, want: []string{"warning version: transfused is 0.9, transfusectl unknown"}},
		{name: "mounts", daemon: func(g *admintest.Guest) {
			g.Initial = newGuest().Initial
			g.Initial[0].State, g.Initial[0].Error = "failed", "no such export"
		}, want: []string{"error mount: code on /mnt/code has failed: no such export / mend that", "warning mount: data on /mnt/data is reconnecting: the host"}},
		{name: "nothing exported", host: true, server: func(h *admintest.Host) { h.State.Exports = 0 }, want: []string{"warning exports: nothing is exported / name directories in /etc/transfuse/host.toml"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := maps.Clone(wellFiles)
			maps.Copy(files, tt.files)
			for _, name := range tt.remove {
				delete(files, name)
			}
			m := testMachine(t, files)
			if tt.change != nil {
				tt.change(&m)
			}
			g, h := well(), &admintest.Host{}
			h.State.Version, h.State.Exports = version, 1
			if tt.daemon != nil {
				tt.daemon(g)
			}
			if tt.server != nil {
				tt.server(h)
			}
			if !tt.host {
				h = nil
			}
			a := serveFake(t, g, h)
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			found := a.diagnose(ctx, m)
			var got []string
			for _, f := range found {
				if f.Level == levelOK {
					if f.Mend != "" {
						t.Errorf("%s is ok and has a mend: %s", f.Check, f.Mend)
					}
					continue
				}
				got = append(got, fmt.Sprintf("%s %s: %s / %s", f.Level, f.Check, f.Text, f.Mend))
			}
			if len(got) != len(tt.want) {
				t.Fatalf("it found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
			for i, want := range tt.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("it found\n%s\nwant\n%s", got[i], want)
				}
			}
		})
	}
}

func TestDoctorWithoutDaemon(t *testing.T) {
	a := &app{socket: filepath.Join(t.TempDir(), "absent")}
	f := a.diagnose(t.Context(), testMachine(t, wellFiles))
	var b bytes.Buffer
	a.writeFindings(&b, f)
	for _, want := range []string{"error    transfused   nobody listens at " + a.socket + "\n                      systemctl start transfused-control.socket\n", "\n1 error, 0 warnings.\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("there is no %q in\n%s", want, b.String())
		}
	}
}

// A report has all that was asked for, and nothing of other mounts.
func TestBugReport(t *testing.T) {
	g := newGuest()
	a := serveFake(t, g, nil)
	var b bytes.Buffer
	a.bugReport(t.Context(), &b, testMachine(t, wellFiles))
	out := b.String()
	for _, want := range []string{
		"transfusectl " + version + ", " + time.Now().UTC().Format("2006-01-02T"), "Linux 6.12.5-arch1\nTest 1\n",
		"== doctor ==\nok       kernel ", "error, 2 warnings.", "== status ==\n● transfused 1.2\n", "● data on /mnt/data",
		"== mount table ==\n36 25 0:31 / /mnt/code rw - fuse.transfuse code rw\n",
		"== transfused.service ==\nLoadState=loaded\n", "== transfused-control.socket ==\n", `transfused[123]: mounted\x1b[2J code`,
	} {
		if !strings.Contains(strings.ReplaceAll(out, "0 errors,", "0 error,"), want) {
			t.Errorf("there is no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "secret") || strings.Contains(out, "\x1b") {
		t.Errorf("it has what it must not have:\n%s", out)
	}
}
