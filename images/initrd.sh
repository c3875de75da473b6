#!/bin/busybox sh
# First program of the guest: loads what it takes to see the root disk, mounts it and hands over to images/init.
# Whatever goes wrong ends in one line on the console that begins with "initrd:", and in the guest switched off: a
# guest that cannot start must not look like one that is slow.

busybox=/usr/lib/guest/busybox

fail() {
    echo "initrd: $*" >/dev/console
    $busybox poweroff -f
}

uptime_hundredths() {
    read -r uptime _ </proc/uptime
    echo "${uptime%.*}${uptime#*.}"
}

# Disks are known by the serial that the host gave them: names such as vda depend on the order of probing.
disk_with_serial() {
    for entry in /sys/block/*; do
        serial=
        read -r serial <"$entry/serial" # says false for want of a newline, and has read it all the same
        [ "$serial" = "$1" ] && echo "/dev/${entry##*/}" && return 0
    done 2>/dev/null
    return 1
}

# The shell runs busybox's commands through /proc/self/exe, so /proc comes first, by full path.
$busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1

# shellcheck disable=SC2046 # the list is words
modprobe -a $(cat /usr/lib/guest/modules.early) || fail "a module of the initrd could not be loaded"

deadline=$(($(uptime_hundredths) + 2000))
until root=$(disk_with_serial root); do
    [ "$(uptime_hundredths)" -lt $deadline ] || fail "root disk did not appear within 20 s: no virtio-blk device with serial=root"
    usleep 20000
done
mount -t ext4 -o ro "$root" /root || fail "root disk $root does not hold an ext4 file system that can be mounted"

# Modules and init live on in the initramfs: bound into the root, they may differ while the root image stays the same.
# That is why nothing is deleted here, as switch_root would do.
mount --bind /usr/lib/modules /root/usr/lib/modules &&
    mount --bind /usr/lib/guest /root/usr/lib/guest &&
    mount --move /dev /root/dev &&
    mount --move /sys /root/sys &&
    mount --move /proc /root/proc || fail "the root image lacks a directory to mount on"
cd /root && $busybox mount --move . / && exec $busybox chroot . /usr/lib/guest/init
fail "images/init could not be started"
