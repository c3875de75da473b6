"""The core's virtqueues on a vhost-user back-end, with a load in C on one processor instead of pump and port."""

from __future__ import annotations

import select
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import vfio
from netbridge.datapath._core import ffi as core_ffi
from netbridge.datapath._core import lib as core
from netbridge.log import Log
from netbridge.vhost import Link
from netbridge.virtio import features
from netbridge.virtio.transport import QueueSetup, Status
from netbridge.virtio.vhost_user.memory import VhostDma, VhostMemory
from netbridge.virtio.vhost_user.transport import VhostUser
from tests.bench import native
from tests.bench.load import BUFFERS, STRIDE, Load

CORE = Path(__file__).parents[2] / "netbridge/datapath/core"
QUEUE = 256
# What the core itself is compiled with.
FLAGS = ("-fPIC", "-shared", "-fno-strict-aliasing", "-march=x86-64", f"-I{CORE}")
CONNECT_SECONDS = 20.0
_RING = {"IN_ORDER": core.NB_RING_IN_ORDER, "EVENT_IDX": core.NB_RING_EVENT_IDX, "INDIRECT_DESC": 0}


def _address(pointer: Any) -> int:
    return int(core_ffi.cast("uintptr_t", pointer))


class FrontEnd:
    """Our side of one back-end. `start` begins a load in a thread on `processor`, `stop` ends it. Raises
    DeviceError."""

    def __init__(self, path: Path, *, packed: bool, merges: bool, processor: int) -> None:
        self._processor = processor
        with ExitStack() as stack:
            memory = VhostMemory()
            self._transport = VhostUser(str(path), memory)
            stack.callback(self._transport.close)
            self._attach(path)
            wanted = features.VERSION_1.mask | (features.MRG_RXBUF.mask if merges else 0)
            wanted |= features.feature("RING_PACKED").mask if packed else 0
            # What the driver takes as well wherever it is offered, and DPDK does.
            wanted |= self._transport.read_device_features() & sum(features.feature(name).mask for name in _RING)
            self._ring_features = wanted
            self._agree(wanted)
            dma = VhostDma(memory)
            queues = [self._make_queue(index, dma, stack, packed) for index in (0, 1)]
            self._transport.enable_vectors(())
            slots = dma.allocate((1 + BUFFERS) * core.NB_TX_SLOT_BYTES)
            stack.callback(slots.close)
            buffers = stack.enter_context(vfio.Memory.memfd(BUFFERS * STRIDE))
            mapping = stack.enter_context(memory.map(buffers))
            self._tally = core_ffi.new("uint64_t *")
            self._load = Load(
                str(native.build("vhost_load", flags=FLAGS)),
                (queues[0], queues[1]),
                (buffers.address, mapping.iova),
                (slots.address, slots.iova),
                _address(self._tally),
                copied=core.NB_TX_MOST_COPIED,
                merges=merges,
                exchanges=False,
            )
            self._transport.write_status(self._transport.read_status() | Status.DRIVER_OK)
            stack.callback(self._transport.reset)
            for index in (0, 1):
                self._transport.notify(index)
            self._stack = stack.pop_all()

    def _attach(self, path: Path) -> None:
        with Link(self._transport, str(path), patience_seconds=CONNECT_SECONDS, log=Log(False)) as link:
            while not link.attend():
                select.select([link], [], [])

    def _agree(self, wanted: int) -> None:
        offered = self._transport.read_device_features()
        if wanted & ~offered:
            raise RuntimeError(f"the back-end does not offer {wanted & ~offered:#x} of the features this bench is of")
        self._transport.write_driver_features(wanted)
        self._transport.write_status(Status.ACKNOWLEDGE)
        self._transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self._transport.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)

    def _make_queue(self, index: int, dma: VhostDma, stack: ExitStack, packed: bool) -> int:
        config = core_ffi.new("struct nb_virtqueue_config *", {"index": index, "size": QUEUE})
        config.features = core.NB_RING_PACKED if packed else 0
        for name, bit in _RING.items():
            if self._ring_features & features.feature(name).mask:
                config.features |= bit
                config.table_segments = 2 if name == "INDIRECT_DESC" else config.table_segments
        layout = core_ffi.new("struct nb_virtqueue_layout *")
        if core.nb_virtqueue_layout(config, layout):
            raise RuntimeError(f"there is no layout for a queue of {QUEUE}")
        block = dma.allocate(layout.bytes)
        stack.callback(block.close)
        config.memory, config.iova = core_ffi.cast("void *", block.address), block.iova
        config.kick_fd = self._transport.notify_fd(index)
        queue = core.nb_virtqueue_new(config)
        stack.callback(core.nb_virtqueue_free, queue)
        areas = (block.iova + layout.desc, block.iova + layout.driver, block.iova + layout.device)
        self._transport.set_up_queue(index, QueueSetup(QUEUE, *areas, vector=0xFFFF))
        return _address(queue)

    def start(self, kind: str, length: int, *, header_with_frame: bool) -> None:
        """`kind`: transmit, receive or echo; `length` of the frames that are generated, bytes; `header_with_frame`:
        their header is in front of them in their buffer."""
        self._load.start(kind, length, self._processor, header_with_frame=header_with_frame)

    def stop(self) -> int:
        """Frames that the load moved. Raises RuntimeError when the back-end did what none may."""
        return self._load.stop()

    def close(self) -> None:
        self.stop()
        self._stack.close()

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
