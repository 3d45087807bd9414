// SPDX-License-Identifier: Apache-2.0

// Package vmtest boots Debian virtual machines with real virtio-vsock, and tests
// transfused in them: in Debian 13 all of it, in Debian 12 that its systemd and kernel, the oldest that are supported, can do the core of it.
//
//	go test -tags vm -count 1 -parallel 4 -v ./service/vmtest
//
// TestVM has each way to mount, over virtio-vsock and vsock loopback, in the default mode of the caches; TestCaches the other modes, what a warm tree costs beside
// virtiofs and the guest's own disk, and who is woken by the host's edits; TestService and TestService252 the packages.
//
// TestBench is no test: make bench-vm runs it, and README.md tells what it found.
//
// A VM to try things in, with a root shell on its serial console (Ctrl-a x ends it):
//
//	go run ./service/vmtest/run [-share DIR] [-suite RELEASE] [PROGRAM…]
//
// It prints the VM's hybrid vsock socket, where transfuse-host listens for it and
// reaches it, and copies the programs into its /usr/local/bin.
//
// Images are built once by the scripts in image/ and cached in
// ${XDG_CACHE_HOME:-~/.cache}/transfused/vm (1.5 GB; remove it at will while no VM runs).
// That takes some minutes and needs root, and debootstrap, which make test-vm installs. Set
// TRANSFUSED_VM_MIRROR to build from another Debian archive than the one that apt uses, and
// TRANSFUSED_VM_KVM=1 where /dev/kvm works: the default is emulation, which works everywhere.
//
// Decisions:
//   - The vsock device is vhost-device-vsock, a program of ours alone: the VM's
//     host is a Unix socket in the VM's work folder, never this machine's own vsock.
//     It passes bytes in both directions, but no half-close, and the guest sees port numbers counted from 0.
//   - QEMU and the devices run in a chroot of a newer Debian, each in a mount
//     namespace of its own, and die with the program that booted them. So nothing is left to unmount or to kill.
//   - The guest's systemd itself tells that it is up, over vsock; Debian 12's can't yet, so a unit does. Nothing is slept for.
//   - Its shell answers on vsock port 2222, one process a connection; there is no network and no SSH.
//   - virtiofsd runs without a sandbox, so that it needs no user namespace: it is here to be compared with.
//   - Times are compared within one VM and one run, and nothing else is judged by its time.
//   - The disk is thrown away: a VM always starts from the image. One that restarts (Reboot) keeps it.
package vmtest
