"""Private memory that the device reaches: virtqueues, and the header in front of every sent frame.

It is kept apart from the regions that hold frames. No client ever maps it, so a client cannot aim the device.
"""

from __future__ import annotations

import mmap

import vfio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol
else:
    Protocol = object


class Mapping(Protocol):
    """What makes memory known to a device."""

    @property
    def iova(self) -> int:
        """Where the device sees it."""

    def close(self) -> None:
        """Take it away from the device. Doing it twice is harmless."""


class DmaBlock(Protocol):
    """Memory of this process that the device reaches too. Starts on a page."""

    @property
    def address(self) -> int:
        """Where it is in this process."""

    @property
    def iova(self) -> int:
        """Where the device sees it."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def view(self) -> memoryview: ...

    def close(self) -> None:
        """Take it away from the device, then free it. Doing it twice is harmless."""


class DmaAllocator(Protocol):
    """Gives out DMA memory."""

    def allocate(self, size: int) -> DmaBlock:
        """`size` bytes or more, zeroed, owned by the caller."""


class VfioDma:
    """DMA memory through a VFIO device's I/O address space. `iommu` is `vfio.Device.iommu` and stays the caller's."""

    def __init__(self, iommu: vfio.Iommu) -> None:
        self._iommu = iommu

    def allocate(self, size: int) -> DmaBlock:
        """Raises vfio.VfioError when there is no memory, no room, or too little that may be locked."""
        # Anonymous: there is no file descriptor by which it could reach another process, and no fork inherits it.
        return MappedBlock(vfio.Memory.anonymous(size), self._iommu.map)


class MappedBlock:
    """A DmaBlock of `memory`, which it owns from here on. `map_` makes it known to the device; when it raises, so does
    this, and the memory is freed."""

    def __init__(self, memory: vfio.Memory, map_: Callable[[vfio.Memory], Mapping]) -> None:
        self._memory = memory
        try:
            self._mapping = map_(memory)
        except BaseException:
            memory.close()
            raise
        self.address = self._memory.address
        self.iova = self._mapping.iova
        self.size = self._memory.size
        self.view = self._memory.view

    def close(self) -> None:
        self._mapping.close()
        self._memory.close()


class Pieces:
    """Deals out a block from its start, every piece on a page of its own. Keeps nothing alive."""

    def __init__(self, block: DmaBlock) -> None:
        self._block = block
        self._taken = 0

    def take(self, size: int) -> Piece:
        start = self._taken
        self._taken += whole_pages(size)
        if self._taken > self._block.size:
            raise ValueError(f"{self._block.size} bytes of DMA memory are not enough for {self._taken}")
        return Piece(self._block.address + start, self._block.iova + start, size)


class Piece:
    """A part of a block: where it is here, where the device sees it, and its bytes."""

    __slots__ = ("address", "iova", "size")

    def __init__(self, address: int, iova: int, size: int) -> None:
        self.address = address
        self.iova = iova
        self.size = size


def whole_pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
