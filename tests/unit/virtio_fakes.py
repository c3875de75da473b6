"""A virtio network device that does not exist, for tests of the driver's control path.

`NetModel` is the device: its status, features, queues and configuration, a record of what was done to it, and switches
that make it misbehave. It is reached in two ways: `FakeTransport` hands it to the driver directly, `FakePciFunction`
lays it out as registers in a BAR behind a real configuration space, and fails a test that accesses a register in any
width but its own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from netbridge.virtio import features, identity, pci
from netbridge.virtio.features import SUPPORTED
from netbridge.virtio.transport import NO_VECTOR, RESET_DEADLINE_S, QueueSetup, Status, await_reset
from vfio import ConfigSpace, Memory, Unsupported

MAC = bytes.fromhex("525400123456")
IOVA = 0x5_0000_0000  # above 4 GiB, so that a lost upper half shows


# What a device offers that is not told otherwise. Few have packed rings.
USUAL = sum(item.mask for item in SUPPORTED if item.name != "RING_PACKED")


def mask_of(*names: str) -> int:
    """The bits of features by name, any of the table's."""
    from netbridge.virtio.features import feature

    return sum(feature(name).mask for name in names)


ALL_SUPPORTED = sum(item.mask for item in SUPPORTED)


@dataclass
class Queue:
    """One virtqueue as the device has it."""

    largest: int = 256
    size: int = 256
    descriptors: int = 0
    driver_area: int = 0
    device_area: int = 0
    vector: int = NO_VECTOR
    enabled: bool = False
    notify_off: int = 0
    resetting: int = 0  # what queue_reset reads


@dataclass
class NetModel:
    """The device. Switches first, then its state."""

    offered: int = USUAL
    queue_sizes: tuple[int, ...] = (256, 256, 64)
    vectors: int = 4
    mac: bytes = MAC
    link: int = 1
    pairs: int = 1
    mtu: int = 1500
    speed: int = 0xFFFFFFFF
    duplex: int = 0xFF
    key_bytes: int = 40
    table_entries: int = 128
    hash_types: int = 0x3F
    refuses_features: bool = False
    refused_vectors: tuple[int, ...] = ()
    reset_reads: int = 0  # how often the status reads as before after a reset, -1: for ever
    generation_changes: int = 0  # how often the configuration changes while it is read, -1: for ever
    needs_reset_on: Status | None = None  # asks for a reset when this bit is set
    ignores_driver_ok: bool = False
    stays_enabled: bool = False  # queues survive a reset
    never_resets_queues: bool = False
    stays_enabled_alone: bool = False  # a queue survives its own reset
    gone: bool = False

    status: int = 0
    accepted: int = 0
    generation: int = 7
    config_vector: int = NO_VECTOR
    queues: list[Queue] = field(default_factory=list)
    notified: list[int] = field(default_factory=list)
    log: list[tuple[object, ...]] = field(default_factory=list)
    _pending_reset: int | None = None
    _status_before: int = 0

    def __post_init__(self) -> None:
        self._wipe()

    def _wipe(self) -> None:
        self.accepted = 0
        self.config_vector = NO_VECTOR
        self.queues = [
            Queue(largest=size, size=size, notify_off=index, enabled=self.stays_enabled)
            for index, size in enumerate(self.queue_sizes)
        ]

    def config(self) -> bytes:
        """struct virtio_net_config."""
        return struct.pack(
            "<6sHHHIBBHII",
            *(self.mac, self.link, self.pairs, self.mtu, self.speed, self.duplex),
            *(self.key_bytes, self.table_entries, self.hash_types, 0),
        )

    # ---- What a driver can do to it

    def read_status(self) -> int:
        if self.gone:
            return 0xFF
        if self._pending_reset is not None:
            if self._pending_reset:
                self._pending_reset -= 1
                return self._status_before
            self._pending_reset = None
        return self.status

    def write_status(self, value: int) -> None:
        self.log.append(("status", value))
        if value == 0:
            self._status_before, self._pending_reset = self.status or Status.FAILED, self.reset_reads
            self.status = 0
            self._wipe()
            return
        assert value & self.status == self.status & ~Status.NEEDS_RESET, "a driver never clears a status bit"
        if self.refuses_features:
            value &= ~Status.FEATURES_OK
        if self.ignores_driver_ok:
            value &= ~Status.DRIVER_OK
        if self.needs_reset_on is not None and value & self.needs_reset_on:
            value |= Status.NEEDS_RESET
        self.status = value

    def write_features(self, value: int) -> None:
        assert not self.status & Status.FEATURES_OK, "features are written before FEATURES_OK"
        self.log.append(("features", value))
        self.accepted = value

    def read_generation(self) -> int:
        now = self.generation
        if self.generation_changes:
            self.generation_changes -= 1
            self.generation = (self.generation + 1) % 256
        return now

    def read_config(self, offset: int, width: int) -> int:
        self.log.append(("config", offset, width))
        return int.from_bytes(self.config()[offset : offset + width], "little")

    def grant(self, vector: int) -> int:
        return NO_VECTOR if vector in self.refused_vectors or vector >= self.vectors else vector

    def set_config_vector(self, vector: int) -> None:
        self.log.append(("config vector", vector))
        self.config_vector = self.grant(vector)

    def enable(self, index: int) -> None:
        self.log.append(("enable", index))
        self.queues[index].enabled = True

    def reset_queue(self, index: int) -> None:
        assert self.accepted & features.RING_RESET.mask, "nothing resets a queue that was not agreed to be"
        self.log.append(("reset queue", index))
        before = self.queues[index]
        fresh = Queue(largest=before.largest, size=before.largest, notify_off=before.notify_off)
        self.queues[index] = fresh
        fresh.resetting, fresh.enabled = int(self.never_resets_queues), self.stays_enabled_alone

    def notify(self, index: int, data: int | None = None) -> None:
        assert self.status & Status.DRIVER_OK, "no notification before DRIVER_OK"
        with_data = bool(self.accepted & features.NOTIFICATION_DATA.mask)
        assert with_data == (data is not None), "how a notification looks is agreed on"
        self.log.append(("notify", index))
        self.notified.append(index)


class FakeTransport:
    """The model as a Transport, with nothing in between."""

    name = "fake"

    def __init__(self, model: NetModel) -> None:
        self.model = model
        self.dma = False
        self.eventfds: tuple[int, ...] = ()
        self.intx: tuple[int, int] | None = None
        self.closed = False
        self.fail_on: str | None = None  # name of the method that raises RuntimeError
        self._registers = Memory.anonymous(4096)
        self.isr_address = self._registers.address + 2048
        self.isr = self._registers.view[2048:2049]

    def _maybe_fail(self, method: str) -> None:
        if self.fail_on == method:
            raise RuntimeError(f"{method} was told to fail")

    @property
    def num_queues(self) -> int:
        return len(self.model.queues)

    @property
    def vectors(self) -> int:
        return self.model.vectors

    def read_status(self) -> int:
        return self.model.read_status()

    def write_status(self, value: int) -> None:
        self.model.write_status(value)

    def reset(self, deadline_s: float = RESET_DEADLINE_S) -> None:
        self._maybe_fail("reset")
        self.model.write_status(0)
        await_reset(self.model.read_status, self.name, deadline_s)

    def read_device_features(self) -> int:
        return self.model.offered

    def write_driver_features(self, features: int) -> None:
        self.model.write_features(features)

    def read_config(self, offset: int, width: int) -> int:
        return self.model.read_config(offset, width)

    def config_generation(self) -> int:
        return self.model.read_generation()

    def set_config_vector(self, vector: int) -> int:
        self.model.set_config_vector(vector)
        return self.model.config_vector

    def queue_max_size(self, index: int) -> int:
        return self.model.queues[index].largest

    def queue_enabled(self, index: int) -> bool:
        return self.model.queues[index].enabled

    def set_up_queue(self, index: int, setup: QueueSetup) -> int:
        self._maybe_fail("set_up_queue")
        self.model.log.append(("queue", index, setup.size))
        queue = self.model.queues[index]
        queue.size = setup.size
        queue.descriptors, queue.driver_area, queue.device_area = (
            setup.descriptors,
            setup.driver_area,
            setup.device_area,
        )
        queue.vector = self.model.grant(setup.vector)
        return queue.vector

    def enable_queue(self, index: int) -> None:
        self.model.enable(index)

    def reset_queue(self, index: int, deadline_s: float = RESET_DEADLINE_S) -> None:
        self._maybe_fail("reset_queue")
        self.model.reset_queue(index)

    answers_commands = False

    def answer(self, command: bytes) -> int:
        raise AssertionError(f"{command!r}: there is a control queue")

    def notify(self, index: int, data: int | None = None) -> None:
        self.model.notify(index, data)

    def notify_fd(self, index: int) -> int:
        return -1

    def notify_address(self, index: int, width: int = 2) -> int:
        return self._registers.address + 4 * index

    def enable_vectors(self, eventfds: Sequence[int]) -> None:
        self._maybe_fail("enable_vectors")
        assert self.dma, "an MSI-X interrupt is a write to memory"
        self.model.log.append(("vectors", len(eventfds)))
        self.eventfds = tuple(eventfds)

    def enable_intx(self, eventfd: int, unmask_eventfd: int) -> None:
        self.model.log.append(("intx",))
        self.intx = (eventfd, unmask_eventfd)

    def disable_interrupts(self) -> None:
        self._maybe_fail("disable_interrupts")
        self.eventfds, self.intx = (), None

    def allow_dma(self, allowed: bool) -> None:
        self.model.log.append(("dma", allowed))
        self.dma = allowed

    def close(self) -> None:
        self.closed = True
        self.isr.release()
        self._registers.close()


class FakeDma:
    """DMA memory that no device reaches. `open` are the blocks that were not closed."""

    def __init__(self) -> None:
        self.open: list[FakeBlock] = []
        self.allocations = 0

    def allocate(self, size: int) -> FakeBlock:
        self.allocations += 1
        block = FakeBlock(self, size)
        self.open.append(block)
        return block


class FakeBlock:
    def __init__(self, owner: FakeDma, size: int) -> None:
        self._owner = owner
        self._memory = Memory.anonymous(size)
        self.address = self._memory.address
        self.iova = IOVA
        self.size = self._memory.size
        self.view = self._memory.view

    def close(self) -> None:
        if self in self._owner.open:
            self._owner.open.remove(self)
            self._memory.close()


# ---- The same device as a PCI function ----------------------------------------------------------------------------

COMMON_AT, ISR_AT, CONFIG_AT, NOTIFY_AT = 0x0000, 0x1000, 0x2000, 0x3000
BAR_BYTES = 0x4000
CONFIG_OFFSETS = {
    0: 1,
    1: 1,
    2: 1,
    3: 1,
    4: 1,
    5: 1,
    6: 2,
    8: 2,
    10: 2,
    12: 4,
    16: 1,
    17: 1,
    18: 2,
    20: 4,
}  # width of each field of the configuration


@dataclass
class VendorCapability:
    """struct virtio_pci_cap as the device shows it."""

    cfg_type: int
    offset: int
    length: int
    bar: int = 4
    cap_len: int | None = None
    multiplier: int | None = None  # of a notification capability

    def encode(self, following: int) -> bytes:
        body = struct.pack("<BB3xII", self.cfg_type, self.bar, self.offset, self.length)
        if self.multiplier is not None:
            body += struct.pack("<I", self.multiplier)
        length = self.cap_len if self.cap_len is not None else 3 + len(body)
        return bytes([pci.CAP_VENDOR, following, length]) + body


def usual_capabilities(multiplier: int = 4) -> list[VendorCapability]:
    """What QEMU shows."""
    return [
        VendorCapability(1, COMMON_AT, 0x1000),
        VendorCapability(3, ISR_AT, 0x1000),
        VendorCapability(4, CONFIG_AT, 0x1000),
        VendorCapability(2, NOTIFY_AT, 0x1000, multiplier=multiplier),
    ]


class FakePciFunction:
    """Stands in for vfio.Device, as far as VirtioPci uses it. `capabilities` may be anything a device can claim."""

    def __init__(
        self,
        model: NetModel,
        *,
        capabilities: Sequence[VendorCapability] | None = None,
        vendor: int = identity.VIRTIO_VENDOR,
        device: int = identity.NETWORK_MODERN,
        class_code: int = 0x020000,
        loop_to: int | None = None,  # the last capability leads there
        msix_vectors: int | None = None,
        bar_sizes: dict[int, int] | None = None,
        mapped: bool = True,
    ) -> None:
        self.address = "0000:01:00.0"
        self.model = model
        self.bus_master = False
        self.intx_disabled = True
        self.irqs = FakeIrqs()
        self.mapped = mapped
        self.bars: list[FakeBar] = []
        self._bar_sizes = bar_sizes or {4: BAR_BYTES}
        self._file = os.memfd_create("configuration space")
        space = bytearray(256)
        struct.pack_into("<HH", space, 0x00, vendor, device)
        struct.pack_into("<H", space, 0x06, 0x10)  # status: there is a capability list
        struct.pack_into("<I", space, 0x08, class_code << 8 | 1)
        at = 0x40
        space[0x34] = at
        listed = list(usual_capabilities() if capabilities is None else capabilities)
        vectors = model.vectors if msix_vectors is None else msix_vectors
        end = at + 12 if vectors else at
        if vectors:
            struct.pack_into("<BBH", space, at, pci.CAP_MSIX, end if listed else loop_to or 0, vectors - 1)
        for number, capability in enumerate(listed):
            start = end
            end = start + 24
            data = capability.encode(end if number + 1 < len(listed) else loop_to or 0)
            space[start : start + len(data)] = data
        assert len(space) == 256, "too many capabilities for a configuration space"
        os.write(self._file, bytes(space))
        self.config = ConfigSpace(self._file, 0, 256, self.address)

    def bar(self, index: int) -> FakeBar:
        if index not in self._bar_sizes:
            raise Unsupported(f"BAR {index} is not implemented", device=self.address)
        bar = FakeBar(self, self._bar_sizes[index])
        self.bars.append(bar)
        return bar

    def set_bus_master(self, on: bool) -> None:
        self.bus_master = on

    def set_intx_disable(self, disable: bool) -> None:
        self.intx_disabled = disable

    def close(self) -> None:
        os.close(self._file)

    @property
    def open_bars(self) -> list[FakeBar]:
        return [bar for bar in self.bars if not bar.closed]


class FakeIrqs:
    """Records what is enabled."""

    def __init__(self) -> None:
        self.msix: list[int] = []
        self.intx: int | None = None
        self.unmask: int | None = None

    def enable_msix(self, eventfds: Sequence[int]) -> None:
        assert self.intx is None
        self.msix = list(eventfds)

    def enable_intx(self, eventfd: int) -> None:
        assert not self.msix
        self.intx = eventfd

    def set_intx_unmask(self, eventfd: int) -> None:
        assert self.intx is not None
        self.unmask = eventfd

    def disable_msix(self) -> None:
        self.msix = []

    def disable_intx(self) -> None:
        self.intx = self.unmask = None


class FakeBar:
    """The registers of the model, laid out as QEMU does. Every access has to fit one register exactly."""

    def __init__(self, function: FakePciFunction, size: int) -> None:
        self.size = size
        self.accesses: list[tuple[str, str, int]] = []  # "read" or "write", register, value
        self.closed = False
        self._function = function
        self._model = function.model
        self._names = {place: name for name, place in pci.COMMON.items()}
        self._select = {"device_feature_select": 0, "driver_feature_select": 0, "queue_select": 0}
        self._driver_features = [0, 0]
        self._memory = Memory.anonymous(size)

    def read8(self, offset: int) -> int:
        return self._read(offset, 1)

    def read16(self, offset: int) -> int:
        return self._read(offset, 2)

    def read32(self, offset: int) -> int:
        return self._read(offset, 4)

    def write8(self, offset: int, value: int) -> None:
        self._write(offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        self._write(offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        self._write(offset, 4, value)

    def address(self, offset: int, length: int = 1) -> int:
        if not self._function.mapped:
            raise Unsupported(f"bytes {offset:#x} cannot be mapped", device=self._function.address)
        assert offset >= 0 and offset + length <= self.size
        return self._memory.address + offset

    def close(self) -> None:
        self.closed = True
        self._memory.close()

    @property
    def _queue(self) -> Queue | None:
        number = self._select["queue_select"]
        return self._model.queues[number] if number < len(self._model.queues) else None

    def _read(self, offset: int, width: int) -> int:
        assert not self.closed
        if CONFIG_AT <= offset < CONFIG_AT + 0x1000:
            assert CONFIG_OFFSETS[offset - CONFIG_AT] == width, f"the field at {offset:#x} is not {width} wide"
            return self._model.read_config(offset - CONFIG_AT, width)
        name = self._names[(offset, width)]
        value = self._value(name)
        self.accesses.append(("read", name, value))
        return value

    def _value(self, name: str) -> int:
        model, queue = self._model, self._queue
        if name in self._select:
            return self._select[name]
        if name == "device_feature":
            return model.offered >> 32 * self._select["device_feature_select"] & 0xFFFFFFFF
        if name == "config_msix_vector":
            return model.config_vector
        if name == "num_queues":
            return len(model.queues)
        if name == "device_status":
            return model.read_status()
        if name == "config_generation":
            return model.read_generation()
        if queue is None:
            return 0
        return {
            "queue_size": queue.size,
            "queue_msix_vector": queue.vector,
            "queue_enable": int(queue.enabled),
            "queue_notify_off": queue.notify_off,
            "queue_reset": queue.resetting,
        }[name]

    def _write(self, offset: int, width: int, value: int) -> None:
        assert not self.closed
        model, queue = self._model, self._queue
        if NOTIFY_AT <= offset < NOTIFY_AT + 0x1000:
            if width == 4:
                model.notify(value & 0xFFFF, value)
            else:
                assert width == 2
                model.notify(value)
            return
        name = self._names[(offset, width)]
        self.accesses.append(("write", name, value))
        if name in self._select:
            self._select[name] = value
        elif name == "driver_feature":
            self._driver_features[self._select["driver_feature_select"]] = value
            model.write_features(self._driver_features[1] << 32 | self._driver_features[0])
        elif name == "config_msix_vector":
            model.set_config_vector(value)
        elif name == "device_status":
            model.write_status(value)
        elif name == "queue_reset":
            assert value == 1, "a driver never writes 0 to queue_reset"
            model.reset_queue(self._select["queue_select"])
        elif name == "queue_enable":
            assert value == 1, "a driver never writes 0 to queue_enable"
            model.enable(self._select["queue_select"])
        elif queue is not None:
            self._write_queue(queue, name, value)

    def _write_queue(self, queue: Queue, name: str, value: int) -> None:
        assert not queue.enabled, f"{name} written after the queue was enabled"
        if name == "queue_size":
            queue.size = value
        elif name == "queue_msix_vector":
            queue.vector = self._model.grant(value)
        else:
            part, half = name.removeprefix("queue_").rsplit("_", 1)
            attribute = {"desc": "descriptors", "driver": "driver_area", "device": "device_area"}[part]
            old = getattr(queue, attribute)
            new = old & 0xFFFFFFFF | value << 32 if half == "high" else old >> 32 << 32 | value
            setattr(queue, attribute, new)
