"""What a vhost-user back-end may reach of this process's memory: in the place of an IOMMU.

The back-end maps whole memfds, which it is handed with SET_MEM_TABLE: every time memory is mapped or unmapped here, it
gets the whole table anew. There are no rights in that table; whoever has a region can read and write it.

An address is never used a second time. A back-end compares a new table with the one it has by addresses and sizes, and
keeps what looks the same (DPDK does), though it may be another file.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import vfio
from netbridge.virtio.dma import DmaBlock, MappedBlock
from netbridge.virtio.errors import Gone
from netbridge.virtio.vhost_user.messages import MOST_REGIONS, Region

FIRST_ADDRESS = 1 << 32  # so that a back-end that cuts addresses to 32 bits is found out


class VhostMapping:
    """Memory that the back-end can reach at `iova`. `close` takes it out of its table; twice is harmless."""

    def __init__(self, owner: VhostMemory, memory: vfio.Memory, region: Region) -> None:
        self._owner: VhostMemory | None = owner
        self._memory = memory  # kept alive, not owned
        self.region = region
        self.iova = region.address
        self.size = region.size

    def close(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._unmap(self)

    def __enter__(self) -> VhostMapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VhostMemory:
    """The regions of one back-end. `changed` is called after each change, and hands the table over if there is anybody
    to hand it to; what it raises, `map` raises, and then nothing was mapped."""

    interface = "vhost-user"

    def __init__(self) -> None:
        self._mappings: list[VhostMapping] = []
        self._next = FIRST_ADDRESS
        self.changed: Callable[[], None] = lambda: None

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(mapping.region for mapping in self._mappings)

    def map(self, memory: vfio.Memory, *, read: bool = True, write: bool = True) -> VhostMapping:  # noqa: ARG002
        """Let the back-end reach `memory`, which must be a memfd. `read` and `write` are what the device may do with
        it; vhost-user cannot hold a back-end to it.

        Raises vfio.VfioError for memory without a file and beyond MOST_REGIONS regions, else a DeviceError.
        """
        if len(self._mappings) == MOST_REGIONS:
            raise vfio.VfioError(
                f"cannot map {memory!r}: vhost-user hands over {MOST_REGIONS} regions at most",
                fix="map fewer, larger pieces",
            )
        address = self._next + -self._next % memory.page_size
        mapping = VhostMapping(self, memory, Region(address, memory.size, 0, memory.fd))
        # A page that belongs to nobody in between: what runs over a region's end is found out.
        self._next = address + memory.size + mmap.PAGESIZE
        self._mappings.append(mapping)
        try:
            self.changed()
        except BaseException:
            self._mappings.remove(mapping)
            mapping._owner = None
            raise
        return mapping

    def _unmap(self, mapping: VhostMapping) -> None:
        self._mappings.remove(mapping)
        try:
            self.changed()
        except Gone:
            pass  # who is not there reaches nothing


class VhostDma:
    """Private memory that the back-end reaches too: virtqueues. A memfd, because nothing else can be handed over."""

    def __init__(self, memory: VhostMemory) -> None:
        self._memory = memory

    def allocate(self, size: int) -> DmaBlock:
        return MappedBlock(vfio.Memory.memfd(size, name="netbridge-queues"), self._memory.map)
