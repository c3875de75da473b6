"""The device's virtqueues: how large, in which memory, and made known to it (virtio 1.3 §4.1.5.1.3).

The queues are the C core's (`netbridge.datapath`), which knows how to use them. Here they get private DMA memory, one
block for all that is kept from one configuration to the next, and the device is told where they are.
"""

from __future__ import annotations

from netbridge.datapath._core import ffi, lib
from netbridge.virtio import features
from netbridge.virtio.dma import DmaAllocator, DmaBlock, Piece, Pieces, whole_pages
from netbridge.virtio.errors import Misbehaved, QueueUnusable
from netbridge.virtio.interrupts import require_vector
from netbridge.virtio.negotiation import Negotiation
from netbridge.virtio.transport import QueueSetup, Transport
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

LARGEST_QUEUE = 32768  # entries of a virtqueue (§2.7, §2.8.10.1)

# What the C core is told of the agreed features; of INDIRECT_DESC, by the length of the tables.
_RING_FEATURES = (
    (features.RING_PACKED, lib.NB_RING_PACKED),
    (features.EVENT_IDX, lib.NB_RING_EVENT_IDX),
    (features.IN_ORDER, lib.NB_RING_IN_ORDER),
    (features.NOTIFICATION_DATA, lib.NB_RING_NOTIFICATION_DATA),
)


class QueuePlan(NamedTuple):
    """A queue that is wanted."""

    number: int  # the device's, its index
    most: int  # entries, a power of two; the device may allow fewer
    vector: int  # NO_VECTOR with INTx
    irq_fd: int  # the vector's eventfd, or -1
    segments: int  # of the usual chain; longer ones will do, but not in an indirect table


class VirtQueue:
    """A virtqueue that the device knows of. `handle` is the C core's `struct nb_virtqueue *`, owned by the network
    device and gone after its next `reset`, `configure` or `close`: free whatever uses it before."""

    def __init__(self, plan: QueuePlan, setup: QueueSetup, ring_features: int, handle: Any) -> None:
        self.index = plan.number
        self.size = setup.size  # entries
        self.setup = setup
        self.features = ring_features  # or-ed NB_RING_*
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

    def set_up(self, plans: Sequence[QueuePlan], agreed: Negotiation, extra: Sequence[int] = ()) -> list[Piece]:
        """Makes the queues as is `agreed`, on zeroed memory, and tells the device of them; then enables them. Returns
        as many more pieces of private memory as `extra` names sizes, in bytes.

        Raises QueueUnusable, Misbehaved or VectorRefused; vfio.VfioError or MemoryError when there is no memory.
        """
        configs = [_config(plan, self._choose_size(plan, agreed), agreed) for plan in plans]
        layouts = [_layout(config) for config in configs]
        pieces = self._provide_memory([*(layout.bytes for layout in layouts), *extra])
        for plan, config, layout in zip(plans, configs, layouts, strict=True):
            self._make(plan, config, layout, pieces.take(layout.bytes))
        rest = [pieces.take(size) for size in extra]
        for queue in self.queues:
            self._transport.enable_queue(queue.index)
        return rest

    def notify(self, queue: VirtQueue) -> None:
        """Tells the device of what is in a queue. For once: the C core does it by itself."""
        with_data = queue.features & lib.NB_RING_NOTIFICATION_DATA
        self._transport.notify(queue.index, lib.nb_virtqueue_notification(queue.handle) if with_data else None)

    def reset(self, queue: VirtQueue, empty: Callable[[Any], int], deadline_s: float) -> int:
        """Has the device forget one queue (§2.6.1), and sets it up and enables it again. In between `empty` makes the C
        core's queue as new, given its handle; what it returns is returned.

        Raises ResetTimeout, Gone or Misbehaved; VectorRefused.
        """
        self._transport.reset_queue(queue.index, deadline_s)
        chains = empty(queue.handle)
        self._tell(queue.setup, queue.index)
        self._transport.enable_queue(queue.index)
        return chains

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

    def _choose_size(self, plan: QueuePlan, agreed: Negotiation) -> int:
        name, index = self._transport.name, plan.number
        queues = self._transport.num_queues
        if index >= queues:
            raise QueueUnusable(f"{name}: the device has {queues} virtqueues, so there is no queue {index}")
        largest = self._transport.queue_max_size(index)
        if largest == 0:
            raise QueueUnusable(f"{name}: the device says that queue {index} is not there (its size is 0)")
        packed = agreed.has(features.RING_PACKED)
        if largest > LARGEST_QUEUE or (largest & (largest - 1) and not packed):
            expected = "" if packed else "a split virtqueue has a power of two, "
            raise QueueUnusable(
                f"{name}: queue {index} has {largest} entries; {expected}{LARGEST_QUEUE} at most "
                f"(virtio 1.3 {'§2.8.10.1' if packed else '§2.7'})"
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
        self._tell(setup, plan.number)
        config.memory = ffi.cast("void *", memory.address)
        config.iova = memory.iova
        width = 4 if config.features & lib.NB_RING_NOTIFICATION_DATA else 2
        config.notify = ffi.cast("volatile void *", self._transport.notify_address(plan.number, width))
        config.kick_fd = self._transport.notify_fd(plan.number)
        handle = lib.nb_virtqueue_new(config)
        if handle == ffi.NULL:
            raise MemoryError(f"{self._transport.name}: no memory for queue {plan.number} of {config.size} entries")
        self.queues.append(VirtQueue(plan, setup, config.features, handle))

    def _tell(self, setup: QueueSetup, number: int) -> None:
        granted = self._transport.set_up_queue(number, setup)
        require_vector(self._transport, f"queue {number}", setup.vector, granted)

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


def _config(plan: QueuePlan, size: int, agreed: Negotiation) -> Any:
    """A `struct nb_virtqueue_config`, but for what follows from where the queue's memory is."""
    # A table for a single segment is never used. A chain may not be longer than the queue (§2.7.5.3.1).
    tables = agreed.has(features.INDIRECT_DESC) and plan.segments > 1
    return ffi.new(
        "struct nb_virtqueue_config *",
        {
            "index": plan.number,
            "size": size,
            "table_segments": min(plan.segments, size) if tables else 0,
            "features": sum(flag for feature, flag in _RING_FEATURES if agreed.has(feature)),
        },
    )


def _layout(config: Any) -> Any:
    layout = ffi.new("struct nb_virtqueue_layout *")
    if lib.nb_virtqueue_layout(config, layout):
        raise ValueError(f"a virtqueue of {config.size} entries")
    return layout
