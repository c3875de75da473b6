"""The I/O address space of one or more devices: what of this process's memory they can reach, and at which addresses.

Mappings are kept account of here, so that whatever the kernel calls a bare EINVAL can be said in words.

A fork shares the open files, and so the address space, between two processes. What one of them made, the other one's
closing does not undo: hence the process ids here.
"""

from __future__ import annotations

import errno
import os

from vfio import _diagnose, _iommufd
from vfio._backend import Backend, DeviceFds, IommuInfo
from vfio._iommufd import Ioas
from vfio._type1 import KINDS, Type1
from vfio.errors import IovaError, Malformed, Unsupported, VfioError
from vfio.iova import IovaAllocator, IovaRange
from vfio.memory import HUGE_1G, HUGE_2M, Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio.pci import PciFunction

INTERFACES = ("auto", "iommufd", *KINDS)


class DmaMapping:
    """Memory that the devices of an `Iommu` can reach. A context manager; `close()` unmaps it.

    - `iova`: the address to give to the device
    - `size`: bytes
    - `address`: where the memory is in this process
    - `readable`, `writable`: what the device may do

    It keeps the `Memory` object it was made from alive, but does not own it. The `Iommu` keeps it in turn: memory that
    a device may be writing to is not unmapped because a variable went out of scope.
    """

    def __init__(
        self, iommu: Iommu, memory: Memory | None, address: int, iova: int, size: int, read: bool, write: bool
    ) -> None:
        self._iommu: Iommu | None = iommu
        self._memory = memory
        self._pid = os.getpid()
        self.address = address
        self.iova = iova
        self.size = size
        self.readable = read
        self.writable = write

    @property
    def closed(self) -> bool:
        """Whether it was unmapped, by itself or along with a range or everything."""
        return self._iommu is None

    def close(self) -> None:
        """Unmap it. The device must not use it any more: an access from now on is an IOMMU fault. Doing it twice is
        harmless. A forked child does not unmap what its parent mapped."""
        if self._iommu is not None and self._pid == os.getpid():
            self._iommu.unmap_range(self.iova, self.size)

    def _closed(self) -> None:
        self._iommu = None
        self._memory = None

    def __enter__(self) -> DmaMapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rights = ("r" if self.readable else "-") + ("w" if self.writable else "-")
        return f"<DmaMapping {self.iova:#x}-{self.iova + self.size - 1:#x} {rights}{' closed' if self.closed else ''}>"


class Iommu:
    """One I/O address space. `Device.iommu` is the one a device is in; several devices can share one: make it with
    `Iommu.open`, and give it to `open_device` for each. Not for use from several threads at once.

    - `interface`: the way in: "type1v2", "type1", "iommufd", "iommufd-compat-type1v2", … or "noiommu"
    """

    def __init__(self, backend: Backend) -> None:
        self._closed = False
        self._pid = os.getpid()
        self._backend = backend
        self._allocator: IovaAllocator | None = None
        self._ranges_changed = False  # a device came or went since they were asked for
        self._mappings: dict[int, DmaMapping] = {}
        self.interface = backend.interface

    @classmethod
    def open(cls, interface: str = "auto", *, dev_root: str = "/dev", sysfs_root: str = "/sys") -> Iommu:
        """Make an empty address space. `interface` as for `open_device`; bind the devices first, because "auto" takes
        iommufd when there are character devices of VFIO's that may be used. Raises `Unsupported`, `NotPermitted`,
        `DriverMissing`."""
        if interface == "auto":
            interface = "iommufd" if _iommufd.offered(dev_root) else "group"
        if interface == "iommufd":
            return cls(Ioas.open(dev_root, sysfs_root))
        if interface in KINDS:
            return cls(Type1.open(interface, dev_root, sysfs_root))
        raise Unsupported(f"there is no interface {interface!r}", fix=f"give one of {', '.join(INTERFACES)}")

    @classmethod
    def from_fds(cls, fds: DeviceFds) -> Iommu:
        """An address space that another process opened. Takes ownership of `fds.iommu`, unless it fails."""
        if fds.interface == "iommufd":
            return cls(Ioas.adopt(fds.iommu, fds.ioas_id))
        if fds.interface in KINDS:
            return cls(Type1.adopt(fds.iommu, fds.interface))
        raise Unsupported(f"there is no interface {fds.interface!r}", fix=f"give one of {', '.join(INTERFACES[1:])}")

    # What the kernel allows

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """The addresses that the IOMMU can translate for all the devices in it, in order. A range ends with `last`,
        which is still part of it."""
        return self._account().ranges

    @property
    def page_size(self) -> int:
        """Smallest page of the IOMMU in bytes: addresses and sizes of mappings are multiples of it."""
        return self._account().granule

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Page sizes the kernel tells of, in bytes. iommufd tells only the smallest."""
        return self._info().page_sizes

    @property
    def dma_avail(self) -> int | None:
        """How many more mappings the kernel allows (type1's `dma_entry_limit`), or None where it does not tell."""
        return self._info().dma_avail

    @property
    def mappings(self) -> tuple[DmaMapping, ...]:
        """The mappings that are open now, by IOVA."""
        return tuple(self._mappings[iova] for iova in sorted(self._mappings))

    # Mapping

    def map(
        self,
        memory: Memory,
        iova: int | None = None,
        *,
        offset: int = 0,
        size: int | None = None,
        read: bool = True,
        write: bool = True,
        align: int | None = None,
        below: int | None = None,
    ) -> DmaMapping:
        """Let the devices reach `memory`, or `size` bytes of it from `offset`. Pins the pages.

        `iova` is the address the device is to use, or None to have one chosen (never 0), a multiple of `align` and
        entirely below `below` (1 << 32 for a device that only has 32-bit addresses). `read` and `write` are what the
        device may do. All in bytes.

        Raises `IovaError` (misaligned, out of range, overlapping), `LockedMemoryLimit`, `MappingLimit`, or `VfioError`.
        """
        if memory.closed:
            raise VfioError(f"cannot map {memory!r}: it is closed")
        wanted = memory.size - offset if size is None else size
        if offset < 0 or wanted <= 0 or offset + wanted > memory.size:
            raise VfioError(f"bytes {offset:#x} to {offset + wanted:#x} are not all inside {memory!r}")
        return self._map(memory, memory.address + offset, wanted, iova, read, write, align, below, memory.page_size)

    def map_address(
        self,
        address: int,
        size: int,
        iova: int | None = None,
        *,
        read: bool = True,
        write: bool = True,
        align: int | None = None,
        below: int | None = None,
    ) -> DmaMapping:
        """As `map`, for memory of this process that is not a `Memory`: the caller sees to it that it stays there."""
        return self._map(None, address, size, iova, read, write, align, below, 1)

    def _map(
        self,
        memory: Memory | None,
        address: int,
        size: int,
        iova: int | None,
        read: bool,
        write: bool,
        align: int | None,
        below: int | None,
        page_size: int,
    ) -> DmaMapping:
        self._check_open()
        if self.interface == "noiommu":
            raise Unsupported(
                "without an IOMMU nothing can be mapped",
                cause="the device uses physical addresses, from which nothing protects the machine",
            )
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise IovaError(f"there is no memory of {size:#x} bytes at {address:#x}")
        account = self._account()
        if address % account.granule:
            raise IovaError(f"memory at {address:#x} does not start on a page of {account.granule:#x} bytes")
        if not (read or write):
            raise VfioError("a mapping that the device may neither read nor write is of no use")
        if iova is None:
            iova = self._choose(account, size, align, below, page_size)
        else:
            account.reserve(iova, size)
        mapping = DmaMapping(self, memory, address, iova, size, read, write)
        try:
            self._backend.map(address, iova, size, read, write)
            self._mappings[iova] = mapping
        except OSError as error:
            account.release(iova, size)
            raise _diagnose.map_failed(error, iova, size, len(self._mappings), account.ranges) from None
        except BaseException:
            # A signal's, most likely. The kernel may or may not have done it.
            try:
                self._backend.unmap(iova, size)
            except OSError:
                pass
            self._mappings.pop(iova, None)
            account.release(iova, size)
            raise
        return mapping

    @staticmethod
    def _choose(account: IovaAllocator, size: int, align: int | None, below: int | None, page_size: int) -> int:
        if align is None:
            # Large pages of the IOMMU can only be used when both addresses are aligned to them.
            wish = HUGE_1G if page_size == HUGE_1G else HUGE_2M
            if size >= wish:
                try:
                    return account.allocate(size, wish, below)
                except IovaError:
                    pass  # crowded: anywhere will do
        return account.allocate(size, align, below)

    def unmap_range(self, iova: int, size: int) -> int:
        """Unmap every mapping that lies within `size` bytes from `iova`; the number of bytes that were mapped.
        Raises `IovaError` for a range that would cut a mapping in two."""
        if iova < 0 or size <= 0 or iova + size > 1 << 64:
            raise IovaError(f"there are no {size:#x} bytes at IOVA {iova:#x}")
        if self._allocator is None:  # nothing was ever mapped
            return 0
        inside = [self._mappings[start] for start, _ in self._allocator.taken(iova, size)]
        for mapping in inside:
            if mapping.iova < iova or iova + size < mapping.iova + mapping.size:
                raise IovaError(
                    f"unmapping {iova:#x}-{iova + size - 1:#x} would cut {mapping!r} in two",
                    fix="unmap whole mappings",
                )
        if not inside:
            return 0
        expected = sum(mapping.size for mapping in inside)
        try:
            freed = self._backend.unmap(iova, size)
        except OSError as error:
            raise VfioError(f"cannot unmap IOVA {iova:#x}-{iova + size - 1:#x}", errno=error.errno) from None
        self._forget(inside)
        if freed != expected:
            raise Malformed(f"the kernel unmapped {freed:#x} bytes at IOVA {iova:#x} where {expected:#x} were mapped")
        return freed

    def unmap_all(self) -> int:
        """Unmap everything; the number of bytes that were mapped."""
        if not self._mappings:
            return 0
        try:
            freed = self._backend.unmap_all()
        except OSError as error:
            raise VfioError("cannot unmap everything", errno=error.errno) from None
        if freed is None:  # a kernel without VFIO_DMA_UNMAP_FLAG_ALL
            return sum(self.unmap_range(mapping.iova, mapping.size) for mapping in self.mappings)
        self._forget(self.mappings)
        return freed

    def _forget(self, mappings: Iterable[DmaMapping]) -> None:
        for mapping in mappings:
            del self._mappings[mapping.iova]
            if self._allocator is not None:
                self._allocator.release(mapping.iova, mapping.size)
            mapping._closed()

    # Devices coming and going; called by Device

    def _attach(self, function: PciFunction, dev_root: str) -> tuple[int, int]:
        self._check_open()
        unguarded = function.noiommu
        if unguarded != (self.interface == "noiommu"):
            raise Unsupported(
                "it is bound without an IOMMU" if unguarded else "it sits behind an IOMMU",
                device=function.address,
                cause="nothing would protect the machine from it" if unguarded else None,
                fix='such a device is opened by name only: interface="noiommu"'
                if unguarded
                else 'interface="noiommu" is for those that do not',
            )
        self._ranges_changed = True
        return self._backend.attach(function, dev_root)

    def _detach(self, group_fd: int) -> None:
        if self._closed:
            return
        self._ranges_changed = True
        try:
            if self._backend.empties(group_fd):
                self._unmap_own()
                self._allocator = None
        finally:
            self._backend.detach(group_fd)

    def _unmap_own(self) -> None:
        """Unmap what this process mapped, and forget the rest. Other processes may hold the same files, so that closing
        ours might unmap nothing."""
        try:
            if self._pid == os.getpid():
                self.unmap_all()
            else:
                for mapping in self.mappings:
                    mapping.close()
        except VfioError:
            pass  # the device is gone, and its mappings with it
        finally:
            self._forget(self.mappings)

    def _check_open(self) -> None:
        if self._closed:
            raise VfioError("the I/O address space is closed")

    def _info(self) -> IommuInfo:
        self._check_open()
        try:
            return self._backend.info()
        except OSError as error:
            raise VfioError(
                "the kernel does not tell what the IOMMU can do",
                errno=error.errno,
                cause="no device is in this address space yet" if error.errno in (errno.ENODEV, errno.EINVAL) else None,
            ) from None

    def _account(self) -> IovaAllocator:
        if self._allocator is None:
            info = self._info()
            self._allocator = IovaAllocator(info.ranges, min(info.page_sizes))
        elif self._ranges_changed:
            self._allocator.set_ranges(self._info().ranges)
        self._ranges_changed = False
        return self._allocator

    def close(self) -> None:
        """Unmap everything and close the files. Devices in it should be closed first. Doing it twice is harmless.
        In a forked child it unmaps only what the child mapped."""
        if self._closed:
            return
        try:
            self._unmap_own()
        finally:
            self._closed = True
            self._allocator = None
            self._backend.close()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Iommu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Iommu {self.interface}{' closed' if self._closed else ''} {len(self._mappings)} mappings>"


def is_of(interface: str, wanted: str) -> bool:
    """Whether the interface of an address space is what somebody asked for."""
    return wanted in ("auto", interface) or (wanted == "group" and interface in KINDS["group"][0])


def open_for(function: PciFunction, interface: str, dev_root: str) -> Iommu:
    """A new address space for a function; "auto" takes iommufd where kernel and permissions offer it."""
    if interface == "auto":
        interface = "iommufd" if _iommufd.available(function, dev_root) else "group"
    return Iommu.open(interface, dev_root=dev_root, sysfs_root=function.sysfs_root)
