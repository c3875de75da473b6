"""Finding the likely cause of a failure: read-only looks at /proc and sysfs, made only after something went wrong."""

from __future__ import annotations

import errno
import os

from vfio import _sys
from vfio.errors import (
    DeviceBusy,
    DeviceGone,
    DriverMissing,
    NoIommu,
    NotPermitted,
    VfioError,
)

# Drivers that may stay bound to a member of a group without making it unviable (vfio_dev_driver_allowed in the kernel).
HARMLESS_DRIVERS = ("pci-stub", "pcieport")


def is_vfio_driver(name: str | None) -> bool:
    """Whether a driver lends its functions to user space: vfio-pci and its variants all have vfio in the name."""
    return name is not None and "vfio" in name


def holders(path: str, proc_root: str = "/proc", but_not_fd: int = -1) -> list[tuple[int, str]]:
    """Processes (pid, command) that have `path` open. Those of other users are invisible without privilege.
    `but_not_fd` is a file of this process that does not count."""
    found = []
    for pid in filter(str.isdigit, _listdir(proc_root)):
        for fd in _listdir(f"{proc_root}/{pid}/fd"):
            if int(fd) == but_not_fd and int(pid) == os.getpid():
                continue
            try:
                target = os.readlink(f"{proc_root}/{pid}/fd/{fd}")
            except OSError:
                continue
            if target == path:
                found.append((int(pid), _text(f"{proc_root}/{pid}/comm") or "?"))
                break
    return sorted(found)


def describe_holders(paths: list[str], proc_root: str = "/proc", but_not_fd: int = -1) -> str | None:
    """Words for who holds any of `paths`, or None when nobody visible does."""
    found = sorted({holder for path in paths for holder in holders(path, proc_root, but_not_fd)})
    if not found:
        return None
    return "held by " + ", ".join(
        f"process {pid} ({command}{', this process' if pid == os.getpid() else ''})" for pid, command in found
    )


def no_iommu(device: object, sysfs_root: str = "/sys", proc_root: str = "/proc") -> NoIommu:
    """The error for a function that has no IOMMU group, with the kernel parameter that is likely missing."""
    if _listdir(f"{sysfs_root}/class/iommu"):
        cause = "the kernel uses an IOMMU, but this function is not behind it"
        fix = "move it to a bus that is (under QEMU, the -device of the IOMMU comes before the others)"
    else:
        vendor = _text(f"{proc_root}/cpuinfo") or ""
        words = (_text(f"{proc_root}/cmdline") or "").split()
        # The last one counts.
        asked_for = [word for word in words if word.startswith("intel_iommu=")][-1:] == ["intel_iommu=on"]
        cause = "the kernel uses no IOMMU"
        if "GenuineIntel" in vendor and not asked_for:
            fix = "turn VT-d on in the firmware and add intel_iommu=on to the kernel command line"
        elif "AuthenticAMD" in vendor or "HygonGenuine" in vendor:
            fix = "turn AMD-Vi (IOMMU) on in the firmware, and see that the kernel command line has no amd_iommu=off"
            if not asked_for:
                fix += "; in a guest with an emulated VT-d add intel_iommu=on"
        else:
            fix = "turn it on in the firmware, or give the virtual machine one (QEMU: -device intel-iommu)"
    return NoIommu("no IOMMU group", device=device, cause=cause, fix=fix)


def open_node(path: str, device: object, sysfs_root: str = "/sys") -> int:
    """Open a node of VFIO's under /dev for reading and writing, or raise what is most likely wrong with it."""
    doing = f"cannot open {path}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        fix = "load the module (modprobe vfio-pci)"
        if os.path.isdir(f"{sysfs_root}/module/vfio"):
            fix = "see whether this /dev is the kernel's devtmpfs, and in a container pass the node in"
        raise DriverMissing(doing, device=device, errno=error.errno, cause="VFIO did not make it", fix=fix) from None
    except PermissionError as error:
        cause = None
        try:
            status = os.stat(path)
            cause = f"it belongs to uid {status.st_uid}, gid {status.st_gid}, mode {status.st_mode & 0o7777:o}"
        except OSError:
            pass
        raise NotPermitted(
            doing,
            device=device,
            errno=error.errno,
            cause=cause,
            fix="run as root, or have the node handed to this user (chown, or a udev rule)",
        ) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DeviceBusy(
                doing,
                device=device,
                errno=error.errno,
                cause=describe_holders([path]) or "held by a process this user cannot see",
                fix="stop that process first",
            ) from None
        if error.errno == errno.ENODEV:
            raise DeviceGone(doing, device=device, errno=error.errno, cause="the device was removed") from None
        raise VfioError(doing, device=device, errno=error.errno) from None


def locked_memory() -> tuple[int | None, int | None, bool]:
    """(bytes this process has locked or pinned, its RLIMIT_MEMLOCK or None for unlimited, whether it is exempt)."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = None if soft == resource.RLIM_INFINITY else soft
    used: int | None = None
    exempt = False
    for line in (_text("/proc/self/status") or "").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmLck", "VmPin"):
            used = (used or 0) + int(value.split()[0]) * 1024
        elif key == "CapEff":
            exempt = bool(int(value, 16) >> 14 & 1)  # CAP_IPC_LOCK
    return used, limit, exempt


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _text(path: str) -> str | None:
    try:
        return _sys.read_file(path)
    except OSError:
        return None
