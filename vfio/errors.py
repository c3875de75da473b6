"""The exception family: every message says what was being done to which device, what came of it and what to do."""

from __future__ import annotations

import errno as _errno
import os


class VfioError(Exception):
    """Something with VFIO, PCI or the IOMMU could not be done.

    `str()` gives one complete line for a person: the device, what was being done, the errno's name, the likely
    cause and the fix. The parts are kept as attributes for programs:

    - `device`: the PCI address as text, or None when no device is concerned
    - `errno`: the kernel's error number, or None when the library itself refused
    - `cause`, `fix`: the likely cause and what to do next, each text or None
    """

    device: str | None
    errno: int | None
    cause: str | None
    fix: str | None

    def __init__(
        self,
        doing: str,
        *,
        device: object = None,
        errno: int | None = None,
        cause: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.device = None if device is None else str(device)
        self.errno = errno
        self.cause = cause
        self.fix = fix
        text = f"{self.device}: {doing}" if self.device else doing
        if errno is not None:
            text += f": {_errno.errorcode.get(errno, f'errno {errno}')} ({os.strerror(errno)})"
        if cause:
            text += f": {cause}"
        if fix:
            text += f"; {fix}"
        super().__init__(text)


class BadAddress(VfioError, ValueError):
    """A text is not a PCI address."""


class DeviceNotFound(VfioError):
    """There is no PCI function at that address."""


class NotBound(VfioError):
    """The function is not bound to a VFIO driver, so it cannot be opened."""


class DriverMissing(VfioError):
    """A kernel driver that is needed (vfio-pci, or the one to give the function back to) is not loaded."""


class NoIommu(VfioError):
    """No IOMMU protects the machine from the device, or the kernel does not use it."""


class GroupNotViable(VfioError):
    """Another function of the same IOMMU group is still bound to a kernel driver."""


class DeviceBusy(VfioError):
    """Somebody holds the device, its group or its character device."""


class NotPermitted(VfioError):
    """The process may not do this."""


class LockedMemoryLimit(VfioError):
    """Mapping for DMA pins memory, and RLIMIT_MEMLOCK does not allow so much."""


class MappingLimit(VfioError):
    """The kernel's limit on the number of DMA mappings (`dma_entry_limit`) is reached."""


class IovaError(VfioError):
    """An I/O virtual address is misaligned, taken, outside what the IOMMU can translate, or none is left."""


class Unsupported(VfioError):
    """The device or this kernel does not have what was asked for."""


class DeviceGone(VfioError):
    """The device was unplugged or does not answer any more."""


class Malformed(VfioError):
    """The device or the kernel said something that cannot be true, such as a capability list that runs in a circle."""
