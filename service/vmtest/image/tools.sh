#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds $OUT/root: the VM's host side (QEMU, virtio-vsock and virtiofs devices) as a tree to chroot into.
# A tree of its own, because these programs need a newer C library than the machine has, and
# older QEMUs crash recent guests under TCG.
set -eu

# The sid script knows every suite that this machine's debootstrap may not have heard of yet.
debootstrap --variant=minbase \
	--include=qemu-system-x86,vhost-device-vsock,virtiofsd \
	forky "$OUT/root" "$MIRROR" /usr/share/debootstrap/scripts/sid

rm -rf "$OUT"/root/var/cache/apt/archives/*.deb "$OUT"/root/var/lib/apt/lists/*
# Where a VM's folders are bound (vm.go).
mkdir "$OUT/root/work" "$OUT/root/image" "$OUT/root/share"
