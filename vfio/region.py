"""A device's regions: what the kernel says of them, and typed access to the registers of a BAR.

Source: VFIO_DEVICE_GET_REGION_INFO in <linux/vfio.h>.
"""

from __future__ import annotations

import errno
import mmap
import os

from vfio import _abi, _sys
from vfio._abi import ffi
from vfio._record import NamedTuple
from vfio.errors import DeviceGone, Malformed, Unsupported, VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Area(NamedTuple):
    """Part of a region: `offset` from its start and `size`, in bytes."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """First offset past it."""
        return self.offset + self.size


class RegionInfo(NamedTuple):
    """What the kernel says of a region.

    - `index`: 0-5 are the BARs, 6 the expansion ROM, 7 configuration space, 8 legacy VGA, 9 and up device specific
    - `size`: bytes, 0 for one that is not implemented
    - `offset`: where it starts in the device's file
    - `readable`, `writable`, `mappable`: what the file allows
    - `sparse`: the only parts that can be mapped, or None when the kernel names no parts
    - `msix_mappable`: whether the kernel allows to map the MSI-X table along with the rest
    - `type`: (type, subtype) of a device-specific region, or None
    """

    # Named as in the header; tuple.index, which nobody needs here, gives way.
    index: int  # type: ignore[assignment]
    size: int
    offset: int
    readable: bool
    writable: bool
    mappable: bool
    sparse: tuple[Area, ...] | None = None
    msix_mappable: bool = False
    type: tuple[int, int] | None = None


def query_region(fd: int, index: int) -> RegionInfo:
    """Ask the kernel about a region. OSError as the kernel says it (EINVAL: no such index)."""
    info, raw = _sys.query(fd, _abi.VFIO_DEVICE_GET_REGION_INFO, "vfio_region_info", index)
    sparse: tuple[Area, ...] | None = None
    kind: tuple[int, int] | None = None
    msix_mappable = False
    if info.flags & _abi.VFIO_REGION_INFO_FLAG_CAPS:
        for capability, offset in _sys.capabilities(raw, info.cap_offset):
            if capability == _abi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                name = "struct vfio_region_info_cap_sparse_mmap"
                count = _sys.at(name, raw, offset).nr_areas
                found = _sys.array_at("struct vfio_region_sparse_mmap_area", raw, offset + ffi.sizeof(name), count)
                sparse = tuple(Area(a.offset, a.size) for a in found)
            elif capability == _abi.VFIO_REGION_INFO_CAP_TYPE:
                found = _sys.at("struct vfio_region_info_cap_type", raw, offset)
                kind = (found.type, found.subtype)
            elif capability == _abi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE:
                msix_mappable = True
    return RegionInfo(
        index,
        info.size,
        info.offset,
        bool(info.flags & _abi.VFIO_REGION_INFO_FLAG_READ),
        bool(info.flags & _abi.VFIO_REGION_INFO_FLAG_WRITE),
        bool(info.flags & _abi.VFIO_REGION_INFO_FLAG_MMAP),
        sparse,
        msix_mappable,
        kind,
    )


def mappable_areas(info: RegionInfo, msix_table: Area | None, page: int = mmap.PAGESIZE) -> tuple[Area, ...]:
    """Which parts of a region can be mapped: the sparse areas if the kernel names some, else all of it, without the
    pages of the MSI-X table on a kernel that forbids to map those."""
    # What cannot be read is not mapped either: the processor would end the process for trying.
    if not info.mappable or not info.readable or not info.size:
        return ()
    if info.sparse is not None:
        areas = tuple(sorted(area for area in info.sparse if area.size))
        end = 0
        for area in areas:
            if area.offset < end or area.offset % page or area.size % 8 or area.end > info.size:
                raise Malformed(f"the mappable areas of region {info.index} make no sense: {areas}")
            end = area.end
        return areas
    if msix_table is None or info.msix_mappable:
        return (Area(0, info.size),) if info.size % 8 == 0 else ()
    # The device says where its table is, and may name a place that the BAR does not have.
    before = min(info.size, msix_table.offset // page * page)
    behind = min(info.size, (msix_table.end + page - 1) // page * page)
    return tuple(area for area in (Area(0, before), Area(behind, info.size - behind)) if area.size)


class _Window:
    """One mapped area. The casts are made once: indexing one reads or writes memory exactly once, in its width."""

    def __init__(self, fd: int, info: RegionInfo, area: Area) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if info.writable else 0)
        self.start = area.offset
        self.end = area.end
        self._mapping = mmap.mmap(
            fd, area.size, flags=mmap.MAP_SHARED, prot=protection, offset=info.offset + area.offset
        )
        whole = memoryview(self._mapping)
        with ffi.from_buffer(self._mapping) as start:
            self.address = int(ffi.cast("uintptr_t", start))
        self.views = {1: whole, 2: whole.cast("H"), 4: whole.cast("I"), 8: whole.cast("Q")}

    def close(self) -> None:
        for view in reversed(self.views.values()):
            view.release()
        self._mapping.close()


class Bar:
    """The registers behind a base address register (or another region), little-endian.

    Every `readN` and `writeN` is exactly one access of N bits, at `offset` bytes from the start of the BAR, which must
    be aligned to its width. Areas that can be mapped are mapped; the rest (I/O ports, holes the kernel leaves) goes
    through the device's file with the same meaning, only slower, and 64 bits as two accesses of 32 with I/O ports
    and on older kernels. Writing the MSI-X table is refused: it is the kernel's, see `Device.irqs`.

    Do not touch a BAR while the device is in a low power state or its memory decoding is off: the kernel answers an
    access to a mapped register with SIGBUS.

    Made by `Device.bar`; closed with the device at the latest. A context manager.

    - `info`: the `RegionInfo`
    - `size`: bytes
    - `areas`: the parts that are mapped
    """

    def __init__(self, fd: int, info: RegionInfo, msix_table: Area | None = None, device: object = None) -> None:
        self._fd = fd
        self._device = device
        self._table = msix_table
        self._windows: list[_Window] = []
        self._closed = False
        self.info = info
        self.size = info.size
        self.areas = mappable_areas(info, msix_table)
        try:
            for area in self.areas:
                self._windows.append(_Window(fd, info, area))
        except (OSError, OverflowError) as error:
            self.close()
            if isinstance(error, OverflowError):
                raise Malformed(f"region {info.index} cannot have {info.size:#x} bytes", device=device) from None
            raise VfioError(
                f"cannot map region {info.index}",
                device=device,
                errno=error.errno,
                cause="another driver of the host has claimed it" if error.errno == errno.EBUSY else None,
            ) from None
        except BaseException:
            self.close()
            raise

    # One method per width, so that the common path is one call, one comparison and one indexing.

    def read8(self, offset: int) -> int:
        """Read an 8-bit register."""
        return self._read(offset, 1, 0)

    def read16(self, offset: int) -> int:
        """Read a 16-bit register."""
        return self._read(offset, 2, 1)

    def read32(self, offset: int) -> int:
        """Read a 32-bit register."""
        return self._read(offset, 4, 2)

    def read64(self, offset: int) -> int:
        """Read a 64-bit register."""
        return self._read(offset, 8, 3)

    def write8(self, offset: int, value: int) -> None:
        """Write an 8-bit register."""
        self._write(offset, value, 1, 0)

    def write16(self, offset: int, value: int) -> None:
        """Write a 16-bit register."""
        self._write(offset, value, 2, 1)

    def write32(self, offset: int, value: int) -> None:
        """Write a 32-bit register."""
        self._write(offset, value, 4, 2)

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register."""
        self._write(offset, value, 8, 3)

    def address(self, offset: int, length: int = 1) -> int:
        """Where `length` bytes from `offset` are mapped in this process, for C code. The mapping lasts until `close()`.
        Raises `Unsupported` when they are not all inside one mapped area."""
        self._check_open()
        for window in self._windows:
            if window.start <= offset and offset + length <= window.end and length > 0:
                return window.address + offset - window.start
        raise Unsupported(
            f"bytes {offset:#x} to {offset + length:#x} of region {self.info.index} cannot be mapped",
            device=self._device,
            cause=f"it has {self.size:#x} bytes, of which mapped are "
            + (", ".join(f"{a.offset:#x}-{a.end - 1:#x}" for a in self.areas) or "none"),
        )

    def _read(self, offset: int, width: int, shift: int) -> int:
        for window in self._windows:
            if window.start <= offset and offset + width <= window.end and not offset & (width - 1):
                value: int = window.views[width][(offset - window.start) >> shift]
                return value
        self._check(offset, width)
        if not self.info.readable:
            raise VfioError(f"region {self.info.index} cannot be read", device=self._device)
        return int.from_bytes(self._file(offset, width, lambda at: os.pread(self._fd, width, at)), "little")

    def _write(self, offset: int, value: int, width: int, shift: int) -> None:
        table = self._table
        if table is not None and offset < table.end and table.offset < offset + width:
            raise VfioError(
                f"{offset:#x} of region {self.info.index} is in the MSI-X table, which the kernel keeps",
                device=self._device,
                fix="use Device.irqs.enable_msix",
            )
        if not self.info.writable:
            raise VfioError(f"region {self.info.index} cannot be written", device=self._device)
        if not 0 <= value < 1 << (8 * width):
            raise VfioError(f"{value:#x} does not fit into {8 * width} bits", device=self._device)
        for window in self._windows:
            if window.start <= offset and offset + width <= window.end and not offset & (width - 1):
                window.views[width][(offset - window.start) >> shift] = value
                return
        self._check(offset, width)
        data = value.to_bytes(width, "little")
        self._file(offset, width, lambda at: data[: os.pwrite(self._fd, data, at)])

    def _check_open(self) -> None:
        if self._closed:
            raise VfioError(f"region {self.info.index} is closed", device=self._device)

    def _check(self, offset: int, width: int) -> None:
        self._check_open()
        if offset < 0 or offset + width > self.size or offset % width:
            raise VfioError(
                f"there is no {8 * width}-bit register at {offset:#x} of region {self.info.index}",
                device=self._device,
                cause=f"it has {self.size:#x} bytes, and registers are aligned to their width",
            )

    def _file(self, offset: int, width: int, access: Callable[[int], bytes]) -> bytes:
        doing = f"cannot access {offset:#x} of region {self.info.index}"
        try:
            data = access(self.info.offset + offset)
        except OSError as error:
            gone = error.errno in (errno.ENODEV, errno.ENXIO)
            kind = DeviceGone if gone else VfioError
            raise kind(doing, device=self._device, errno=error.errno) from None
        if len(data) != width:
            raise VfioError(doing, device=self._device, cause=f"the kernel moved {len(data)} bytes of {width}")
        return data

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """Unmap it. Addresses given to C are invalid from now on. Doing it twice is harmless."""
        self._closed = True
        while self._windows:
            self._windows.pop().close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Bar {self.info.index} {self.size:#x} bytes{' closed' if self._closed else ''}>"
