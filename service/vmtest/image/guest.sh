#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds $OUT/vmlinuz, $OUT/initrd.img and $OUT/disk.img: a small Debian guest of $SUITE with systemd,
# whose shell answers on vsock port 2222.
set -eu
root=$OUT/root

packages=systemd,systemd-sysv,dbus,udev,kmod,procps,iproute2,linux-image-cloud-amd64,initramfs-tools,zstd,fuse3,socat
case $SUITE in
bookworm) ;; # for the service alone
*) packages=$packages,git,gcc,libc6-dev,make,attr,acl,inotify-tools,fio ;;
esac
debootstrap --variant=minbase --include="$packages" "$SUITE" "$root" "$MIRROR" /usr/share/debootstrap/scripts/sid

put() { # put FILE: the text on standard input becomes that file of the guest
	mkdir -p "$(dirname "$root$1")"
	cat >"$root$1"
}

case $SUITE in
bookworm)
	# Its systemd 252 does not know vmm.notify_socket, by which later ones tell vm.go that they are up.
	put /etc/systemd/system/notify-vmm.service <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'printf READY=1 | socat -u - VSOCK-CONNECT:2:2223'
[Install]
WantedBy=multi-user.target
UNIT
	chroot "$root" systemctl enable notify-vmm.service
	;;
*)
	# It fails in debootstrap, which has no system bus to tell.
	chroot "$root" apt-get install -q -y --no-install-recommends polkitd
	;;
esac

# One shell a connection. Whatever a script leaves running ends with its connection;
# what is to stay is started by systemd-run.
put /etc/systemd/system/shell.socket <<'UNIT'
[Socket]
ListenStream=vsock::2222
Accept=yes
MaxConnections=256
TriggerLimitBurst=0
[Install]
WantedBy=sockets.target
UNIT
put /etc/systemd/system/shell@.service <<'UNIT'
[Unit]
CollectMode=inactive-or-failed
[Service]
ExecStart=/bin/bash
StandardInput=socket
StandardError=socket
WorkingDirectory=/root
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
UNIT
put /etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf <<'UNIT'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear ttyS0 $TERM
UNIT
put /etc/systemd/journald.conf.d/volatile.conf <<'UNIT'
[Journal]
Storage=volatile
UNIT
put /etc/fstab <<'UNIT'
/dev/vda / ext4 defaults,noatime 0 1
UNIT
put /etc/hostname <<'UNIT'
guest
UNIT
chroot "$root" systemctl enable shell.socket
# Timers that would run beside the tests.
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
chroot "$root" passwd -d root

# An initrd of what finds the disk, and no more: emulated CPUs unpack slowly.
version=$(ls "$root/lib/modules")
put /etc/initramfs-tools/conf.d/vm <<'UNIT'
MODULES=list
COMPRESS=zstd
UNIT
put /etc/initramfs-tools/modules <<'UNIT'
virtio_pci
virtio_blk
ext4
UNIT
chroot "$root" mkinitramfs -o /boot/initrd.vm "$version"
mv "$root/boot/initrd.vm" "$OUT/initrd.img"
cp "$root/boot/vmlinuz-$version" "$OUT/vmlinuz"

rm -rf "$root"/boot/* "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale
mke2fs -q -t ext4 -d "$root" "$OUT/disk.img" 3G
rm -rf "$root"
