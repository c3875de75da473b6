#!/bin/busybox sh
# First program of the guest: loads what it takes to see the root disk, mounts it with all that belongs into it, and
# hands over to images/init. Whatever goes wrong ends in one line on the console that begins with "initrd:", and in the
# guest switched off: a guest that cannot start must not look like one that is slow.
#
# Every process that is started costs an emulated guest some 30 ms, hence the shell's own means wherever they do.

busybox=/usr/lib/guest/busybox

fail() {
    echo "initrd: $*" >/dev/console
    $busybox poweroff -f
}

hundredths() {
    read -r now _ </proc/uptime
    now=${now%.*}${now#*.}
    # In the first second it begins with zeroes, and would be octal.
    now=${now#0}
    now=${now#0}
}

# Disks are known by the serial that the host gave them: names such as vda depend on the order of probing.
find_disk() {
    for entry in /sys/block/*; do
        serial=
        read -r serial <"$entry/serial" # says false for want of a newline, and has read it all the same
        [ "$serial" = "$1" ] && disk=/dev/${entry##*/} && return 0
    done 2>/dev/null
    return 1
}

# By its full path, because the shell finds its other commands through /proc.
$busybox mount -a -T /usr/lib/guest/fstab.early
exec </dev/console >/dev/console 2>&1
echo "guest: its kernel is up"
# Sets `early`, the recipe's modules. Those that are missing in this kernel were found out when the image was built.
. /usr/lib/guest/modules
# shellcheck disable=SC2086 # a list of words
modprobe -a $early || fail "a module of the initrd could not be loaded"

# Drivers may still be at it, when an IOMMU came late: a disk is waited for.
await_disk() {
    hundredths
    deadline=$((now + 800))
    until find_disk "$1"; do
        hundredths
        [ "$now" -lt $deadline ] || fail "$1 disk did not appear within 8 s: no virtio-blk device with serial=$1"
        usleep 20000
    done
}

await_disk root
mount -t ext4 -o ro "$disk" /root || fail "root disk $disk does not hold an ext4 file system that can be mounted"
# Whether there is to be a code disk is said by whoever attaches it. The agent mounts it, later: a snapshot is made before.
read -r cmdline </proc/cmdline
case " $cmdline " in
*" guest.code "*) await_disk code ;;
esac

# Modules and init live on in the initramfs: bound into the root, they may differ while the root image stays the same.
# That is why nothing is deleted here, as switch_root would do.
mount -a -T /usr/lib/guest/fstab || fail "the root image lacks a directory to mount on"
cd /root && mount --move . / && exec $busybox chroot . /usr/lib/guest/init
fail "images/init could not be started"
