"""The device's virtqueues: how large, in which memory, and made known to it (virtio 1.3 §4.1.5.1.3).

The queues are the C core's (`netbridge.datapath`), which knows how to use them. Here they get private DMA memory, one
block for all that is kept from one configuration to the next, and the device is told where they are.
"""

from __future__ import annotations

from netbridge.datapath._core import ffi, lib
from netbridge.virtio.dma import DmaAllocator, DmaBlock, Piece, Pieces, whole_pages
from netbridge.virtio.errors import Misbehaved, QueueUnusable
from netbridge.virtio.interrupts import require_vector
from netbridge.virtio.transport import QueueSetup, Transport
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LARGEST_QUEUE = 32768  # entries of a split virtqueue (§2.7)


class QueuePlan(NamedTuple):
    """A queue that is wanted."""

    number: int  # the device's, its index
    most: int  # entries, a power of two; the device may allow fewer
    vector: int  # NO_VECTOR with INTx
    irq_fd: int  # the vector's eventfd, or -1


class VirtQueue:
    """A virtqueue that the device knows of. `handle` is the C core's `struct nb_virtqueue *`, owned by the network
    device and gone after its next `reset`, `configure` or `close`: free whatever uses it before."""

    def __init__(self, plan: QueuePlan, size: int, handle: Any) -> None:
        self.index = plan.number
        self.size = size  # entries
        self.vector = plan.vector
        self.irq_fd = plan.irq_fd
        self.handle = handle


class QueuePair(NamedTuple):
    """A receive queue and the transmit queue of the same number (§5.1.2)."""

    rx: VirtQueue
    tx: VirtQueue


class QueueSet:
    """All the queues of one device, and their memory. `memory` and `transport` stay the caller's."""

    def __init__(self, transport: Transport, memory: DmaAllocator) -> None:
        self._transport = transport
        self._memory = memory
        self._block: DmaBlock | None = None
        self.queues: list[VirtQueue] = []

    def set_up(self, plans: Sequence[QueuePlan], extra: Sequence[int] = ()) -> list[Piece]:
        """Makes the queues, on zeroed memory, and tells the device of them; then enables them. Returns as many more
        pieces of private memory as `extra` names sizes, in bytes.

        Raises QueueUnusable, Misbehaved or VectorRefused; vfio.VfioError or MemoryError when there is no memory.
        """
        configs = [_config(plan.number, self._choose_size(plan)) for plan in plans]
        layouts = [_layout(config) for config in configs]
        pieces = self._provide_memory([*(layout.bytes for layout in layouts), *extra])
        for plan, config, layout in zip(plans, configs, layouts, strict=True):
            self._make(plan, config, layout, pieces.take(layout.bytes))
        rest = [pieces.take(size) for size in extra]
        for queue in self.queues:
            self._transport.enable_queue(queue.index)
        return rest

    def forget(self) -> None:
        """Frees the queues. The device must have been reset, and what uses them be gone. The memory stays."""
        while self.queues:
            lib.nb_virtqueue_free(self.queues.pop().handle)

    def close(self) -> None:
        """Frees the memory as well. Doing it twice is harmless."""
        self.forget()
        if self._block is not None:
            block, self._block = self._block, None
            block.close()

    def _choose_size(self, plan: QueuePlan) -> int:
        name, index = self._transport.name, plan.number
        queues = self._transport.num_queues
        if index >= queues:
            raise QueueUnusable(f"{name}: the device has {queues} virtqueues, so there is no queue {index}")
        largest = self._transport.queue_max_size(index)
        if largest == 0:
            raise QueueUnusable(f"{name}: the device says that queue {index} is not there (its size is 0)")
        if largest > LARGEST_QUEUE or largest & (largest - 1):
            raise QueueUnusable(
                f"{name}: queue {index} has {largest} entries; a split virtqueue has a power of two, "
                f"{LARGEST_QUEUE} at most (virtio 1.3 §2.7)"
            )
        if self._transport.queue_enabled(index):
            raise Misbehaved(f"{name}: queue {index} is enabled although the device was just reset")
        return min(largest, plan.most)

    def _make(self, plan: QueuePlan, config: Any, layout: Any, memory: Piece) -> None:
        setup = QueueSetup(
            size=config.size,
            descriptors=memory.iova + layout.desc,
            driver_area=memory.iova + layout.driver,
            device_area=memory.iova + layout.device,
            vector=plan.vector,
        )
        granted = self._transport.set_up_queue(plan.number, setup)
        require_vector(self._transport, f"queue {plan.number}", plan.vector, granted)
        config.memory = ffi.cast("void *", memory.address)
        config.iova = memory.iova
        config.notify = ffi.cast("volatile void *", self._transport.notify_address(plan.number))
        config.kick_fd = self._transport.notify_fd(plan.number)
        handle = lib.nb_virtqueue_new(config)
        if handle == ffi.NULL:
            raise MemoryError(f"{self._transport.name}: no memory for queue {plan.number} of {config.size} entries")
        self.queues.append(VirtQueue(plan, config.size, handle))

    def _provide_memory(self, sizes: Sequence[int]) -> Pieces:
        """Zeroed memory for pieces of these sizes; that of an earlier time again if it is large enough."""
        size = sum(whole_pages(size) for size in sizes)
        if self._block is not None and self._block.size < size:
            block, self._block = self._block, None
            block.close()
        if self._block is None:
            self._block = self._memory.allocate(size)
        self._block.view[:] = bytes(self._block.size)
        return Pieces(self._block)


def _config(number: int, size: int) -> Any:
    """A `struct nb_virtqueue_config`, but for what follows from where the queue's memory is."""
    return ffi.new("struct nb_virtqueue_config *", {"index": number, "size": size})


def _layout(config: Any) -> Any:
    layout = ffi.new("struct nb_virtqueue_layout *")
    if lib.nb_virtqueue_layout(config, layout):
        raise ValueError(f"a virtqueue of {config.size} entries")
    return layout
