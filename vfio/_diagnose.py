"""Finding the likely cause of a failure: read-only looks at /proc and sysfs, made only after something went wrong."""

from __future__ import annotations

import errno
import os
import resource  # here and not where it is used: in a sandbox nothing can be imported once something is wrong

from vfio import _sys
from vfio.errors import (
    DeviceBusy,
    DeviceGone,
    DriverMissing,
    GroupNotViable,
    IovaError,
    LockedMemoryLimit,
    MappingLimit,
    NoIommu,
    NotPermitted,
    Unsupported,
    VfioError,
)
from vfio.pci import PciAddress, PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio.iova import IovaRange

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
                # A process calls itself what it likes.
                name = _text(f"{proc_root}/{pid}/comm") or "?"
                found.append((int(pid), "".join(c if c.isprintable() else "?" for c in name)))
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
        options = [word.partition("=")[2].split(",") for word in words if word.startswith("intel_iommu=")]
        asked_for = bool(options) and "on" in options[-1]
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


def open_iommufd(dev_root: str, sysfs_root: str) -> int:
    """Open /dev/iommu, or raise what is most likely wrong with it."""
    path = f"{dev_root}/iommu"
    if not os.path.exists(path):
        raise Unsupported(
            "this kernel has no iommufd",
            cause=f"there is no {path}",
            fix='use interface="group", or a kernel with CONFIG_IOMMUFD (modprobe iommufd)',
        )
    return open_node(path, None, sysfs_root)


def not_viable(function: PciFunction, errno_: int | None = None) -> GroupNotViable:
    """The error for a group that still has functions under kernel drivers: it names them."""
    cause = ", ".join(f"{member} is bound to {driver}" for member, driver in kernel_owned(function))
    fix = "bind every function of the group to vfio-pci (vfio.bind), or unbind it"
    return GroupNotViable(
        f"IOMMU group {function.iommu_group} is not viable",
        device=function.address,
        errno=errno_,
        cause=cause or "a member is in use",
        fix=fix,
    )


def kernel_owned(function: PciFunction) -> list[tuple[PciAddress, str]]:
    """The members of a function's group that kernel drivers use, with the drivers' names."""
    found = []
    for member in function.group_members:
        try:
            driver = PciFunction(member, sysfs_root=function.sysfs_root).driver
        except VfioError:
            continue  # unplugged just now
        if driver and not is_vfio_driver(driver) and driver not in HARMLESS_DRIVERS:
            found.append((member, driver))
    return found


def iommu_refused(function: PciFunction, error: OSError, module: str) -> VfioError:
    """The error for an IOMMU that cannot be set up for a device."""
    doing = "cannot set up the IOMMU for it"
    if error.errno == errno.EPERM:
        return NotPermitted(
            doing,
            device=function.address,
            errno=error.errno,
            cause="this machine does not remap interrupts, so the device could forge any interrupt",
            fix="turn interrupt remapping on (firmware; QEMU: intel-iommu,intremap=on and kernel-irqchip=split); "
            f"only in a throw-away guest: the module parameter {module}.allow_unsafe_interrupts=1",
        )
    cause = None
    if error.errno == errno.EADDRINUSE:
        cause = "something is mapped there already at addresses that this device cannot use"
    return VfioError(doing, device=function.address, errno=error.errno, cause=cause)


def failed(device: object, doing: str, error: OSError) -> VfioError:
    """The error for a call on an open device that failed for no particular reason."""
    if error.errno == errno.ENODEV:
        return DeviceGone(doing, device=device, errno=error.errno, cause="the device was removed")
    return VfioError(doing, device=device, errno=error.errno)


def map_failed(error: OSError, iova: int, size: int, mappings: int, ranges: Iterable[IovaRange]) -> VfioError:
    """The error for memory that cannot be mapped for DMA, while so many mappings are open and these ranges valid."""
    doing = f"cannot map {size:#x} bytes for DMA at IOVA {iova:#x}"
    code = error.errno
    if code == errno.ENOSPC:
        return MappingLimit(
            doing,
            errno=code,
            cause=f"the kernel's limit on DMA mappings is reached; {mappings} are open here",
            fix="map fewer, larger pieces, or raise vfio_iommu_type1's module parameter dma_entry_limit",
        )
    if code == errno.ENOMEM:
        used, limit, exempt = locked_memory()
        if limit is not None and not exempt and (used or 0) + size > limit:
            return LockedMemoryLimit(
                doing,
                errno=code,
                cause=f"the limit on locked memory is {_mib(limit)}, "
                f"{_mib(used or 0)} are locked already, {_mib(size)} more are needed",
                fix=f"raise it: ulimit -l {((used or 0) + size + 1023) // 1024} (in KiB), LimitMEMLOCK= in a "
                "systemd unit, memlock in /etc/security/limits.conf, or give the process CAP_IPC_LOCK",
            )
        return VfioError(doing, errno=code, cause="there is not enough memory to pin", fix="free some, or map less")
    if code == errno.EFAULT:
        return VfioError(
            doing, errno=code, cause="the memory is not mapped in this process, or not for what the device may do"
        )
    if code == errno.EEXIST:
        return IovaError(doing, errno=code, cause="another process sharing this IOMMU has something there")
    return VfioError(doing, errno=code, cause="the kernel's ranges: " + ", ".join(map(str, ranges)))


def locked_memory() -> tuple[int | None, int | None, bool]:
    """(bytes this process has locked or pinned, its RLIMIT_MEMLOCK or None for unlimited, whether it is exempt)."""
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
    # In a user namespace of its own (a rootless container) that capability does not count for the kernel.
    exempt = exempt and (_text("/proc/self/uid_map") or "").split() == ["0", "0", "4294967295"]
    return used, limit, exempt


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.4g} MiB"


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
