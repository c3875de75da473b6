"""A function's configuration space, and the lists of capabilities in it.

Sources: PCI Local Bus Specification 3.0 §6.7, PCI Express Base Specification §7.9.1, <linux/pci_regs.h>. VFIO shows
part of it through a filter of its own: the BARs cannot be moved, and some capabilities are hidden.
"""

from __future__ import annotations

import errno
import os

from vfio import _abi
from vfio._record import NamedTuple
from vfio.errors import DeviceGone, Malformed, VfioError

# Each standard capability takes at least four bytes behind the header; each extended one four behind the first 256.
_MOST_CAPABILITIES = (_abi.PCI_CFG_SPACE_SIZE - _abi.PCI_STD_HEADER_SIZEOF) // 4
_MOST_EXTENDED = (_abi.PCI_CFG_SPACE_EXP_SIZE - _abi.PCI_CFG_SPACE_SIZE) // 4


class Capability(NamedTuple):
    """A standard capability: its id, where its header is in configuration space, and, for the vendor-specific ones
    (id 9) that say so, its length in bytes, else 0."""

    id: int
    offset: int
    length: int = 0


class ExtendedCapability(NamedTuple):
    """A PCI Express extended capability: id, version, and where its header is in configuration space (0x100 and up)."""

    id: int
    version: int
    offset: int


class ConfigSpace:
    """Configuration space of a device, little-endian. `size` is 256 or 4096 bytes; offsets are bytes from its start.

    Each call is one access of exactly that width, which must be aligned to it. Raises `DeviceGone` when the device was
    unplugged, `VfioError` for an offset that is out of range or misaligned.
    """

    def __init__(self, fd: int, offset: int, size: int, device: object = None) -> None:
        self._fd = fd
        self._base = offset
        self._device = device
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`."""
        self._check(offset, length, 1)
        try:
            data = os.pread(self._fd, length, self._base + offset)
        except OSError as error:
            raise self._failed("read", offset, error) from None
        if len(data) != length:
            raise DeviceGone(
                f"configuration space at {offset:#x} gave {len(data)} bytes of {length}", device=self._device
            )
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at `offset`."""
        self._check(offset, len(data), 1)
        try:
            written = os.pwrite(self._fd, data, self._base + offset)
        except OSError as error:
            raise self._failed("write", offset, error) from None
        if written != len(data):
            raise DeviceGone(
                f"configuration space at {offset:#x} took {written} bytes of {len(data)}", device=self._device
            )

    def read8(self, offset: int) -> int:
        """Read a byte."""
        return self._read(offset, 1)

    def read16(self, offset: int) -> int:
        """Read 16 bits."""
        return self._read(offset, 2)

    def read32(self, offset: int) -> int:
        """Read 32 bits."""
        return self._read(offset, 4)

    def write8(self, offset: int, value: int) -> None:
        """Write a byte."""
        self._write(offset, value, 1)

    def write16(self, offset: int, value: int) -> None:
        """Write 16 bits."""
        self._write(offset, value, 2)

    def write32(self, offset: int, value: int) -> None:
        """Write 32 bits."""
        self._write(offset, value, 4)

    def update16(self, offset: int, clear: int, set: int) -> None:
        """Read 16 bits, clear some, set some, and write them back if that changed anything."""
        old = self.read16(offset)
        new = old & ~clear | set
        if new != old:
            self.write16(offset, new)

    @property
    def vendor_id(self) -> int:
        """PCI vendor id, 16 bits."""
        return self.read16(_abi.PCI_VENDOR_ID)

    @property
    def device_id(self) -> int:
        """PCI device id, 16 bits."""
        return self.read16(_abi.PCI_DEVICE_ID)

    @property
    def interrupt_line(self) -> int:
        """The Interrupt Line register: what firmware wrote down of the routing of INTx, on a PC the IRQ number."""
        return self.read8(_abi.PCI_INTERRUPT_LINE)

    @property
    def interrupt_pin(self) -> int:
        """The Interrupt Pin register: 1 to 4 for INTA to INTD, 0 for a function without INTx."""
        return self.read8(_abi.PCI_INTERRUPT_PIN)

    def capabilities(self) -> tuple[Capability, ...]:
        """The standard capabilities, in the order of their list. A list that leaves configuration space or runs in a
        circle raises `Malformed`, a device that answers with nothing but ones `DeviceGone`."""
        if not self.read16(_abi.PCI_STATUS) & _abi.PCI_STATUS_CAP_LIST:
            return ()
        found: list[Capability] = []
        offset = self.read8(_abi.PCI_CAPABILITY_LIST) & ~3
        seen: set[int] = set()
        while offset:
            if offset < _abi.PCI_STD_HEADER_SIZEOF or offset in seen or len(seen) >= _MOST_CAPABILITIES:
                raise Malformed(
                    f"the capability list is broken: it leads to {offset:#x} after {[hex(c.offset) for c in found]}",
                    device=self._device,
                )
            seen.add(offset)
            header = self.read16(offset)
            if header == 0xFFFF:
                raise DeviceGone(
                    f"configuration space at {offset:#x} reads as all ones",
                    device=self._device,
                    cause="it was unplugged, or is off or broken",
                )
            kind = header & 0xFF
            length = self.read8(offset + 2) if kind == _abi.PCI_CAP_ID_VNDR else 0
            found.append(Capability(kind, offset, length))
            offset = header >> 8 & ~3
        return tuple(found)

    def extended_capabilities(self) -> tuple[ExtendedCapability, ...]:
        """The PCI Express extended capabilities, in the order of their list; none on a device without them. Those that
        VFIO hides are left out. A list that runs in a circle or out of place raises `Malformed`."""
        if self.size < _abi.PCI_CFG_SPACE_EXP_SIZE:
            return ()
        found: list[ExtendedCapability] = []
        offset = _abi.PCI_CFG_SPACE_SIZE
        seen: set[int] = set()
        while offset:
            if offset < _abi.PCI_CFG_SPACE_SIZE or offset in seen or len(seen) >= _MOST_EXTENDED:
                raise Malformed(
                    f"the extended capability list is broken: it leads to {offset:#x} after "
                    f"{[hex(c.offset) for c in found]}",
                    device=self._device,
                )
            seen.add(offset)
            header = self.read32(offset)
            if header in (0, 0xFFFFFFFF):
                break
            if header & 0xFFFF:
                found.append(ExtendedCapability(header & 0xFFFF, header >> 16 & 0xF, offset))
            offset = header >> 20 & 0xFFC
        return tuple(found)

    def find(self, kind: int) -> Capability | None:
        """The first standard capability with that id (PCI_CAP_ID_… in <linux/pci_regs.h>), or None."""
        return next((c for c in self.capabilities() if c.id == kind), None)

    def find_extended(self, kind: int) -> ExtendedCapability | None:
        """The first extended capability with that id (PCI_EXT_CAP_ID_… in <linux/pci_regs.h>), or None."""
        return next((c for c in self.extended_capabilities() if c.id == kind), None)

    def _read(self, offset: int, width: int) -> int:
        self._check(offset, width, width)
        return int.from_bytes(self.read(offset, width), "little")

    def _write(self, offset: int, value: int, width: int) -> None:
        self._check(offset, width, width)
        if not 0 <= value < 1 << (8 * width):
            raise VfioError(f"{value:#x} does not fit into {8 * width} bits", device=self._device)
        self.write(offset, value.to_bytes(width, "little"))

    def _check(self, offset: int, length: int, align: int) -> None:
        if offset < 0 or length <= 0 or offset + length > self.size or offset % align:
            raise VfioError(
                f"no {length}-byte access at {offset:#x} of configuration space, which has {self.size:#x} bytes",
                device=self._device,
            )

    def _failed(self, verb: str, offset: int, error: OSError) -> VfioError:
        doing = f"cannot {verb} configuration space at {offset:#x}"
        if self._fd < 0:
            return VfioError(doing, device=self._device, cause="the device is closed")
        if error.errno in (errno.ENODEV, errno.EIO, errno.ENXIO):
            return DeviceGone(doing, device=self._device, errno=error.errno, cause="the device was removed")
        return VfioError(doing, device=self._device, errno=error.errno)
