"""The core as Python makes it (through cffi), a device and a client written in `struct`, and a model of who owns what.

Nothing here shares a definition with the C code: offsets are those of the virtio specification and of docs/port.md. One
thread does everything; `pump` runs the core until it is idle.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from netbridge.datapath._core import ffi, lib

RX, TX = 1, 2
KIND_RX, KIND_TX, KIND_ACK = 1, 2, 3
SESSION = 0xBEEF
STRIDE, HEADROOM, HEADER = 512, 64, 12
ROOM = STRIDE - HEADROOM
RX_IOVA, TX_IOVA, HEADER_IOVA, QUEUE_IOVA = 0x4000_0000, 0x5000_0000, 0x6000_0000, 0x7000_0000

_ENTRY = struct.Struct("<QIHBB")
_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


def handle(region: int, index: int, lease: int, session: int = SESSION) -> int:
    return session << 48 | lease << 32 | region << 24 | index


@dataclass(frozen=True)
class Entry:
    """One message in a ring of the port."""

    handle: int
    length: int
    kind: int
    flags: int = 0
    queue: int = 0

    @property
    def index(self) -> int:
        return self.handle & 0xFFFFFF


class Ring:
    """A port ring in memory of its own, from the client's end."""

    def __init__(self, buffers: int) -> None:
        self.slots = 1 << (buffers - 1).bit_length()
        self.memory = ffi.new("uint8_t[]", 128 + 16 * self.slots)
        self.bytes = ffi.buffer(self.memory)
        self.position = 0

    def place(self, place: Any) -> None:
        place.header = ffi.cast("struct nb_ring_header *", self.memory)
        place.slots = self.slots

    @property
    def produced(self) -> int:
        return int(struct.unpack_from("<I", self.bytes, 0)[0])

    def announce(self, produced: int) -> None:
        struct.pack_into("<I", self.bytes, 0, produced % 2**32)

    def put(self, entry: Entry) -> None:
        offset = 128 + 16 * (self.position % self.slots)
        _ENTRY.pack_into(self.bytes, offset, entry.handle, entry.length, entry.kind, entry.flags, entry.queue)
        self.position += 1
        self.announce(self.position)

    def take_all(self) -> list[Entry]:
        taken = []
        while self.position != self.produced:
            taken.append(Entry(*_ENTRY.unpack_from(self.bytes, 128 + 16 * (self.position % self.slots))))
            self.position += 1
        return taken


@dataclass(frozen=True)
class Chain:
    """What the device found in the available ring: the descriptors of one chain, as (address, length, flags)."""

    head: int
    descriptors: tuple[tuple[int, int, int], ...]


class Queue:
    """What the two formats of a virtqueue have in common, from the device's end. `indirect`: chains are in tables."""

    ring_features = 0

    def __init__(self, index: int, size: int, *, indirect: bool = False) -> None:
        layout = ffi.new("struct nb_virtqueue_layout *")
        config = ffi.new(
            "struct nb_virtqueue_config *",
            {
                "index": index,
                "size": size,
                "table_segments": 2 if indirect and size > 1 else 0,
                "features": self.ring_features,
                "iova": QUEUE_IOVA,
                "kick_fd": -1,
            },
        )
        assert lib.nb_virtqueue_layout(config, layout) == 0
        self.size = size
        self.memory = ffi.new("uint8_t[]", layout.bytes)
        self.bytes = ffi.buffer(self.memory)
        self.notify = ffi.new("uint16_t *")
        config.memory, config.notify = self.memory, self.notify
        self.core = lib.nb_virtqueue_new(config)
        # Frames in flight at most, each of a header and one buffer.
        self.frames = size if config.table_segments else size // 2
        self._descriptors, self._driver_area, self._device_area = layout.desc, layout.driver, layout.device
        self.taken: int = 0
        self.used: int = 0

    def pop_all(self) -> list[Chain]:
        """The chains that the driver has made available since the last time."""
        raise NotImplementedError

    def push(self, head: int, length: int) -> None:
        """Gives one back."""
        raise NotImplementedError

    def jump(self, in_flight: int) -> int:
        """Claims to have used more than is in flight; the fault that this is."""
        raise NotImplementedError

    def has_place_for_two(self, head: int) -> bool:
        """Whether a chain can be given back twice without the second writing over the first."""
        return True

    def _table(self, address: int, length: int) -> range:
        """Where the descriptors of a table are."""
        start = address - QUEUE_IOVA
        return range(start, start + length, 16)


class SplitQueue(Queue):
    """Virtio 1.3 §2.7."""

    def pop_all(self) -> list[Chain]:
        chains = []
        while self.taken != struct.unpack_from("<H", self.bytes, self._driver_area + 2)[0]:
            (head,) = struct.unpack_from("<H", self.bytes, self._driver_area + 4 + 2 * (self.taken % self.size))
            chains.append(Chain(head, tuple(self._chain(self._descriptors, head))))
            self.taken = (self.taken + 1) % 65536
        return chains

    def _chain(self, table: int, number: int) -> list[tuple[int, int, int]]:
        found = []
        while True:
            address, length, flags, following = _DESCRIPTOR.unpack_from(self.bytes, table + 16 * number)
            if flags & 4:
                return self._chain(self._table(address, length).start, 0)
            found.append((address, length, flags & ~1))
            if not flags & 1:
                return found
            number = following

    def push(self, head: int, length: int) -> None:
        _USED.pack_into(self.bytes, self._device_area + 4 + 8 * (self.used % self.size), head, length)
        self.used += 1
        self._announce(self.used)

    def jump(self, in_flight: int) -> int:
        self._announce(self.used + in_flight + 1)
        return int(lib.NB_FAULT_USED_JUMP)

    def _announce(self, index: int) -> None:
        struct.pack_into("<H", self.bytes, self._device_area + 2, index % 65536)


class PackedQueue(Queue):
    """Virtio 1.3 §2.8. Positions count two laps of the ring: the wrap counter is 1 in the first."""

    ring_features: int = lib.NB_RING_PACKED

    def __init__(self, index: int, size: int, *, indirect: bool = False) -> None:
        super().__init__(index, size, indirect=indirect)
        self._lengths: dict[int, int] = {}

    def _place(self, position: int) -> int:
        return int(self._descriptors + 16 * (position % self.size))

    def _later(self, position: int, by: int) -> int:
        return int((position + by) % (2 * self.size))

    def pop_all(self) -> list[Chain]:
        chains = []
        while self._is_available(self.taken):
            found: list[tuple[int, int, int]] = []
            count, more = 0, True
            while more:
                assert self._is_available(self.taken)
                address, length, number, flags = _DESCRIPTOR.unpack_from(self.bytes, self._place(self.taken))
                rows = [self._place(self.taken)] if not flags & 4 else self._table(address, length)
                for row in rows:
                    address, length, _, row_flags = _DESCRIPTOR.unpack_from(self.bytes, row)
                    found.append((address, length, row_flags & 2))
                self.taken, count, more = self._later(self.taken, 1), count + 1, bool(flags & 1)
            assert number not in self._lengths
            self._lengths[number] = count
            chains.append(Chain(number, tuple(found)))
        return chains

    def _is_available(self, position: int) -> bool:
        flags = int(struct.unpack_from("<H", self.bytes, self._place(position) + 14)[0])
        return bool(flags & 0x80) != bool(flags & 0x8000) and bool(flags & 0x80) == (position < self.size)

    def push(self, head: int, length: int) -> None:
        flags = 0x8080 if self.used < self.size else 0
        struct.pack_into("<IHH", self.bytes, self._place(self.used) + 8, length, head, flags)
        self.used = self._later(self.used, self._lengths.pop(head, 1))

    def has_place_for_two(self, head: int) -> bool:
        return self._lengths[head] < self.size

    def jump(self, in_flight: int) -> int:
        """There is no index to jump; a descriptor that nothing is in flight for will do."""
        idle = next(number for number in range(self.size + 1) if number not in self._lengths)
        self.push(idle, 0)
        return int(lib.NB_FAULT_USED_ID if in_flight else lib.NB_FAULT_USED_JUMP)


class World:
    """A pump with everything it needs. Close it."""

    def __init__(
        self,
        *,
        rx_size: int,
        tx_size: int,
        rx_count: int,
        tx_count: int,
        limit: int,
        burst: int,
        packed: bool = False,
        indirect: bool = False,
        session: int = SESSION,
    ) -> None:
        self.rx_count, self.tx_count = rx_count, tx_count
        kind = PackedQueue if packed else SplitQueue
        self.rx_queue: Queue = kind(0, rx_size, indirect=indirect)
        self.tx_queue: Queue = kind(1, tx_size, indirect=indirect)
        self.rx_memory = ffi.new("uint8_t[]", rx_count * STRIDE)
        self.tx_memory = ffi.new("uint8_t[]", tx_count * STRIDE)
        self.rx_bytes, self.tx_bytes = ffi.buffer(self.rx_memory), ffi.buffer(self.tx_memory)
        self.rx_active, self.rx_free = Ring(rx_count), Ring(rx_count)
        self.tx_active, self.tx_done = Ring(rx_count + tx_count), Ring(tx_count)
        self.counters = ffi.new("struct nb_counters *")
        self.rx_ledger = self._ledger(self.rx_memory, RX_IOVA, rx_count, RX, session)
        self.tx_ledger = self._ledger(self.tx_memory, TX_IOVA, tx_count, TX, session)
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(5)]
        config = ffi.new("struct nb_pump_config *")
        pair = config.pairs[0]
        config.pair_count = 1
        pair.rx_queue, pair.tx_queue = self.rx_queue.core, self.tx_queue.core
        config.rx_ledger, config.tx_ledger = self.rx_ledger, self.tx_ledger
        for name in ("rx_active", "rx_free", "tx_active", "tx_done"):
            getattr(self, name).place(getattr(config, name))
        config.tx_slots_iova, config.net_header_bytes = HEADER_IOVA, HEADER
        config.tx_max_pieces, config.tx_largest_frame = 1, ROOM
        config.rx_max_pieces, config.rx_client_limit, config.burst = 1, limit, burst
        pair.rx_irq_fd, pair.tx_irq_fd, config.client_doorbell_fd, config.driver_doorbell_fd, self.control_fd = (
            self._fds
        )
        config.control_fd = self.control_fd
        config.intx_fd = config.intx_unmask_fd = -1
        config.counters = self.counters
        self.core = lib.nb_pump_new(config)
        assert self.core != ffi.NULL
        lib.nb_pump_prime(self.core)
        os.eventfd_write(self.control_fd, 1)  # so the pump comes back instead of sleeping

    def _ledger(self, memory: Any, iova: int, count: int, region: int, session: int) -> Any:
        place = {"base": memory, "iova": iova, "count": count, "stride": STRIDE, "headroom": HEADROOM}
        return lib.nb_ledger_new(ffi.new("struct nb_region *", {**place, "session": session, "id": region}))

    def close(self) -> None:
        lib.nb_pump_free(self.core)
        for ledger in (self.rx_ledger, self.tx_ledger):
            lib.nb_ledger_free(ledger)
        for queue in (self.rx_queue, self.tx_queue):
            lib.nb_virtqueue_free(queue.core)
        for fd in self._fds:
            os.close(fd)

    def pump(self) -> tuple[int, int]:
        """Until idle or a fault: (enum nb_event, detail)."""
        result = ffi.new("struct nb_pump_result *")
        sleeps = self.counters.sleeps
        while True:
            lib.nb_pump_run(self.core, result)
            if result.event != lib.NB_EVENT_CONTROL or self.counters.sleeps != sleeps:
                return result.event, result.detail

    def owned(self, region: int) -> tuple[int, int, int]:
        """Buffers of the driver, the device and the client."""
        ledger = self.rx_ledger if region == RX else self.tx_ledger
        owners = (lib.NB_OWNER_DRIVER, lib.NB_OWNER_DEVICE, lib.NB_OWNER_CLIENT)
        driver, device, client = (lib.nb_ledger_owned(ledger, owner) for owner in owners)
        return driver, device, client
