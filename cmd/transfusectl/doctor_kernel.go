// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// release is the kernel's version.
func (m machine) release() (text string, major, minor int) {
	text = m.read("proc/sys/kernel/osrelease")
	if _, err := fmt.Sscanf(text, "%d.%d", &major, &minor); err != nil {
		return text, 0, 0
	}
	return text, major, minor
}

func (m machine) checkKernel(f *findings, host bool) {
	text, major, minor := m.release()
	at := func(a, b int) bool { return major > a || major == a && minor >= b }
	switch {
	case major == 0:
		f.warn("kernel", "see that /proc is mounted", "the version of the kernel is not known")
	case !at(5, 6):
		f.err("kernel", "boot Linux 5.6 or newer", "%s has no openat2(2)", text)
	case !at(5, 12):
		f.warn("kernel", "boot Linux 5.12 or newer", "%s has no mount_setattr(2): events on read-only mounts, and exports without set-id bits, need it", text)
	case !host && !at(6, 9):
		f.ok("kernel", "Linux %s; from 6.9 on it can repeat requests after a restart", text)
	default:
		f.ok("kernel", "Linux %s", text)
	}
}

// module tells whether the kernel has a module: loaded, built in, or to be loaded.
func (m machine) module(name string) (state string) {
	if m.exists("sys/module/" + name) {
		return "loaded"
	}
	text, _, _ := m.release()
	// The files have the module's path, and its file name may have dashes.
	re := regexp.MustCompile(`(^|[/\n])` + strings.ReplaceAll(regexp.QuoteMeta(name), "_", "[-_]") + `\.ko`)
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		if re.MatchString(m.read(filepath.Join(dir, text, "modules.builtin"))) {
			return "built in"
		}
		if re.MatchString(m.read(filepath.Join(dir, text, "modules.dep"))) {
			return "available"
		}
	}
	return ""
}

func (m machine) checkFUSE(f *findings) {
	known := regexp.MustCompile(`(?m)^(nodev)?\s*fuse$`).MatchString(m.read("proc/filesystems"))
	state := m.module("fuse")
	switch {
	case known:
		f.ok("fuse", "the kernel has FUSE")
	case state == "available":
		f.warn("fuse", "modprobe fuse, at boot by a file in /etc/modules-load.d", "the module fuse is not loaded")
	default:
		f.err("fuse", "install the modules of this kernel, or boot one with CONFIG_FUSE_FS", "the kernel has no FUSE")
	}
	fd, err := unix.Open(m.path("dev/fuse"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		unix.Close(fd)
		f.ok("/dev/fuse", "it can be opened")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		f.warn("/dev/fuse", "run doctor as root; for mounts of ordinary users: chmod 0666 /dev/fuse", "this user can't open it: %v", err)
	case errors.Is(err, unix.ENOENT):
		f.err("/dev/fuse", "modprobe fuse; in a container, pass the device in", "it is missing")
	default:
		f.err("/dev/fuse", "modprobe fuse", "it can't be opened: %v", err)
	}
}

// virtioVsock is the device id of vsock (virtio 1.2, section 5).
const virtioVsock = 19

// vsockDevice tells whether the machine has a virtio-vsock device, and its driver.
func (m machine) vsockDevice() (found bool, driver string) {
	ids, _ := filepath.Glob(m.path("sys/bus/virtio/devices/*/device")) // the pattern is well-formed
	for _, id := range ids {
		b, err := os.ReadFile(id)
		if err != nil {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32)
		if err != nil || n != virtioVsock {
			continue
		}
		link, err := os.Readlink(filepath.Join(filepath.Dir(id), "driver"))
		if err != nil {
			return true, ""
		}
		return true, filepath.Base(link)
	}
	return false, ""
}

func (m machine) checkVsock(f *findings, host bool) {
	if err := m.socket(); err != nil {
		mend := "boot a kernel with CONFIG_VSOCKETS, or install its modules"
		if m.module("vsock") == "available" {
			mend = "modprobe vsock"
		}
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			mend = "allow AF_VSOCK to this process"
		}
		f.err("vsock", mend, "no vsock socket can be made: %v", err)
		return
	}
	f.ok("vsock", "the kernel has vsock")
	if host {
		if m.exists("dev/vhost-vsock") {
			f.ok("vhost", "/dev/vhost-vsock is there, for QEMU and others")
		} else {
			f.warn("vhost", "modprobe vhost_vsock", "/dev/vhost-vsock is missing: VMs have vsock only where the VMM brings its own, as Firecracker")
		}
		return
	}
	cid, err := m.cid()
	device, driver := m.vsockDevice()
	switch {
	case err == nil && cid > 2 && cid != unix.VMADDR_CID_ANY:
		if driver == "" {
			driver = "another transport than virtio"
		}
		f.ok("transport", "this machine's CID is %d, by %s", cid, driver)
	case device && driver == "":
		mend := "boot a kernel with CONFIG_VIRTIO_VSOCKETS, or install its modules"
		if m.module("vmw_vsock_virtio_transport") == "available" {
			mend = "modprobe vmw_vsock_virtio_transport"
		}
		f.err("transport", mend, "there is a vsock device, and no driver has taken it")
	case device:
		f.warn("transport", "chmod 0644 /dev/vsock, or run doctor as root", "there is a vsock device, driven by %s, but the machine's CID is not known: %v", driver, err)
	case err == nil && cid == unix.VMADDR_CID_HOST:
		f.err("transport", "run transfused in a VM; here transfuse-host runs: see transfusectl --host doctor", "this machine is a host of VMs: it has CID 2, and no vsock device of its own")
	default:
		f.err("transport", "give the VM one: QEMU -device vhost-vsock-pci,guest-cid=N; Firecracker PUT /vsock; Cloud Hypervisor --vsock cid=N,socket=PATH",
			"the machine has no vsock device: nothing leads to a host")
	}
}

func (m machine) checkSysctls(f *findings) {
	number := func(name string) (uint64, bool) {
		n, err := strconv.ParseUint(m.read("proc/sys/"+strings.ReplaceAll(name, ".", "/")), 10, 64)
		return n, err == nil
	}
	for _, s := range []struct {
		name string
		want uint64
		why  string
	}{
		{"fs.fuse.max_pages_limit", 256, "requests can't have 1 MiB of data, which slows large files down"},
		{"fs.inotify.max_user_watches", 8192, "programs that watch many files will fail with ENOSPC"},
		{"fs.inotify.max_user_instances", 128, "programs that watch files will fail with EMFILE"},
	} {
		n, there := number(s.name)
		switch {
		case !there: // an older kernel has no such limit
		case n < s.want:
			f.warn("sysctl", fmt.Sprintf("sysctl -w %s=%d, at boot by a file in /etc/sysctl.d", s.name, s.want), "%s is %d: %s", s.name, n, s.why)
		default:
			f.ok("sysctl", "%s is %d", s.name, n)
		}
	}
	for _, name := range []string{"fs.fuse.default_request_timeout", "fs.fuse.max_request_timeout"} {
		if n, there := number(name); there && n != 0 {
			f.warn("sysctl", "sysctl -w "+name+"=0", "%s is %d: a mount that waits for its host for so many seconds is aborted for good", name, n)
		}
	}
}
