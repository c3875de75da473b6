"""Virtio over PCI, modern layout (virtio 1.3 §4.1), on a function opened through VFIO.

The device tells in vendor capabilities which BAR holds which structure. Nothing it says there is believed: every length
and offset is held against the BAR before it is used, and of each structure the first capability that holds together is
taken (§4.1.4.1). Registers are accessed with their exact width, one access each (§4.1.3.1): VFIO hands out the real
registers, and a status byte written twice, or wider than it is, is a different command.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import vfio
from netbridge.virtio.errors import Misbehaved
from netbridge.virtio.identity import require_virtio_net
from netbridge.virtio.transport import RESET_DEADLINE_S, QueueSetup, await_queue_reset, await_reset
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

CAP_VENDOR = 0x09
CAP_MSIX = 0x11
CAPABILITY_BYTES = 16  # struct virtio_pci_cap
NOTIFY_CAPABILITY_BYTES = 20  # and notify_off_multiplier
CONFIG_HEADER_BYTES, CONFIG_BYTES = 64, 256  # capabilities of the list lie between the two
BARS = 6

# struct virtio_pci_common_cfg (§4.1.4.3): offset and width in bytes.
COMMON = {
    "device_feature_select": (0x00, 4),
    "device_feature": (0x04, 4),
    "driver_feature_select": (0x08, 4),
    "driver_feature": (0x0C, 4),
    "config_msix_vector": (0x10, 2),
    "num_queues": (0x12, 2),
    "device_status": (0x14, 1),
    "config_generation": (0x15, 1),
    "queue_select": (0x16, 2),
    "queue_size": (0x18, 2),
    "queue_msix_vector": (0x1A, 2),
    "queue_enable": (0x1C, 2),
    "queue_notify_off": (0x1E, 2),
    "queue_desc_low": (0x20, 4),
    "queue_desc_high": (0x24, 4),
    "queue_driver_low": (0x28, 4),
    "queue_driver_high": (0x2C, 4),
    "queue_device_low": (0x30, 4),
    "queue_device_high": (0x34, 4),
    # Beyond what every device has; there with RING_RESET.
    "queue_reset": (0x3A, 2),
}
COMMON_BYTES = 0x38


# What is relied on of vfio.Device, so that a test can stand in for it.


class ConfigSpace(Protocol):
    def read8(self, offset: int) -> int: ...
    def read16(self, offset: int) -> int: ...
    def read32(self, offset: int) -> int: ...
    def capabilities(self) -> Sequence[ListedCapability]: ...


class ListedCapability(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def offset(self) -> int: ...


class Bar(Protocol):
    @property
    def size(self) -> int: ...
    def read8(self, offset: int) -> int: ...
    def read16(self, offset: int) -> int: ...
    def read32(self, offset: int) -> int: ...
    def write8(self, offset: int, value: int) -> None: ...
    def write16(self, offset: int, value: int) -> None: ...
    def write32(self, offset: int, value: int) -> None: ...
    def address(self, offset: int, length: int = 1) -> int: ...
    def close(self) -> None: ...


class Irqs(Protocol):
    def enable_msix(self, eventfds: Sequence[int]) -> object: ...
    def enable_intx(self, eventfd: int) -> object: ...
    def set_intx_unmask(self, eventfd: int) -> object: ...
    def disable_msix(self) -> object: ...
    def disable_intx(self) -> object: ...


class PciDevice(Protocol):
    @property
    def address(self) -> object: ...
    @property
    def config(self) -> ConfigSpace: ...
    @property
    def irqs(self) -> Irqs: ...
    def bar(self, index: int) -> Bar: ...
    def set_bus_master(self, on: bool) -> object: ...
    def set_intx_disable(self, disable: bool) -> object: ...


class Kind(IntEnum):
    """cfg_type of a capability (§4.1.4), as far as this driver has a use for it."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4


_TITLES = {
    Kind.COMMON: "common configuration",
    Kind.NOTIFY: "notification",
    Kind.ISR: "ISR status",
    Kind.DEVICE: "device configuration",
}
# Shortest useful length and alignment of each structure (§4.1.4.3 to §4.1.4.6).
_NEEDS = {Kind.COMMON: (COMMON_BYTES, 4), Kind.NOTIFY: (2, 2), Kind.ISR: (1, 1), Kind.DEVICE: (1, 4)}


class Structure(NamedTuple):
    """Where one structure lies: inside its BAR, checked."""

    kind: Kind
    bar: Bar
    bar_index: int
    offset: int
    length: int
    multiplier: int = 0  # notify_off_multiplier, of NOTIFY only


class VirtioPci:
    """A modern virtio network function, as a `Transport`.

    `device` is an open vfio.Device and stays the caller's; the BARs that are mapped here are closed by `close`.
    Raises NotVirtioNet, and Misbehaved when a structure the driver needs is nowhere to be found.
    """

    def __init__(self, device: PciDevice) -> None:
        self._device = device
        self._name = str(device.address)
        config = device.config
        require_virtio_net(self._name, config.read16(0x00), config.read16(0x02), config.read32(0x08) >> 8)
        self._bars: dict[int, Bar] = {}
        self._interrupts = ""
        try:
            self._vectors = 0
            self._structures = self._find_structures()
        except BaseException:
            self.close()
            raise
        self._common = self._structures[Kind.COMMON]

    # ---- The capability walk ------------------------------------------------------------------------------------

    def _find_structures(self) -> dict[Kind, Structure]:
        found: dict[Kind, Structure] = {}
        refused: list[str] = []
        seen: set[int] = set()
        for capability in self._device.config.capabilities():
            offset = capability.offset
            if offset in seen:
                raise Misbehaved(f"{self._name}: its list of PCI capabilities runs in a circle through {offset:#04x}")
            seen.add(offset)
            if capability.id == CAP_MSIX and offset + 4 <= CONFIG_BYTES:
                self._vectors = (self._device.config.read16(offset + 2) & 0x7FF) + 1
            if capability.id != CAP_VENDOR:
                continue
            try:
                structure = self._examine(offset, found)
            except (Misbehaved, vfio.VfioError) as error:
                refused.append(f"the capability at {offset:#04x} was refused: {error}")
                continue
            if structure is not None:
                found[structure.kind] = structure
        for kind in Kind:
            if kind not in found:
                why = "; ".join(refused) or "it has no such capability"
                raise Misbehaved(f"{self._name}: no usable {_TITLES[kind]} structure (virtio 1.3 §4.1.4): {why}")
        return found

    def _examine(self, at: int, found: dict[Kind, Structure]) -> Structure | None:
        """The structure that the capability at `at` describes; None when it is of a kind that is not needed (any more).

        Raises Misbehaved, or VfioError when its BAR cannot be mapped.
        """
        config = self._device.config
        if not CONFIG_HEADER_BYTES <= at <= CONFIG_BYTES - CAPABILITY_BYTES:
            raise Misbehaved(f"it does not fit between {CONFIG_HEADER_BYTES:#x} and {CONFIG_BYTES:#x}")
        length_of_capability = config.read8(at + 2)
        cfg_type = config.read8(at + 3)
        bar_index = config.read8(at + 4)
        # Reserved types and BARs are for drivers yet to come, and no fault (§4.1.4.1).
        if cfg_type not in tuple(Kind) or bar_index >= BARS or cfg_type in found:
            return None
        kind = Kind(cfg_type)
        needed = NOTIFY_CAPABILITY_BYTES if kind is Kind.NOTIFY else CAPABILITY_BYTES
        if length_of_capability < needed or at + length_of_capability > CONFIG_BYTES:
            raise Misbehaved(
                f"it is {length_of_capability} bytes long where a {_TITLES[kind]} capability has {needed} or more, and "
                f"configuration space ends at {CONFIG_BYTES:#x}"
            )
        offset = config.read32(at + 8)
        length = config.read32(at + 12)
        shortest, alignment = _NEEDS[kind]
        if length < shortest:
            raise Misbehaved(f"its structure is {length} bytes where {_TITLES[kind]} has at least {shortest}")
        if offset % alignment:
            raise Misbehaved(f"its structure is at {offset:#x}, which is no multiple of {alignment}")
        bar = self._bar(bar_index)
        if offset + length > bar.size:
            raise Misbehaved(
                f"its structure of {length:#x} bytes at {offset:#x} ends beyond BAR {bar_index}, "
                f"which has {bar.size:#x} bytes"
            )
        if kind in (Kind.NOTIFY, Kind.ISR):
            bar.address(offset, shortest)  # C gets at these two through memory, so an I/O BAR will not do
        multiplier = 0
        if kind is Kind.NOTIFY:
            multiplier = config.read32(at + CAPABILITY_BYTES)
            if multiplier and (multiplier & (multiplier - 1) or multiplier % 2):
                raise Misbehaved(f"its notify_off_multiplier is {multiplier}, neither 0 nor an even power of two")
        return Structure(kind, bar, bar_index, offset, length, multiplier)

    def _bar(self, index: int) -> Bar:
        if index not in self._bars:
            self._bars[index] = self._device.bar(index)
        return self._bars[index]

    # ---- Registers ----------------------------------------------------------------------------------------------

    def _read(self, structure: Structure, offset: int, width: int) -> int:
        bar = structure.bar
        at = structure.offset + offset
        if width == 1:
            return bar.read8(at)
        if width == 2:
            return bar.read16(at)
        return bar.read32(at)

    def _get(self, register: str) -> int:
        offset, width = COMMON[register]
        return self._read(self._common, offset, width)

    def _put(self, register: str, value: int) -> None:
        offset, width = COMMON[register]
        bar = self._common.bar
        at = self._common.offset + offset
        if width == 1:
            bar.write8(at, value)
        elif width == 2:
            bar.write16(at, value)
        else:
            bar.write32(at, value)

    def _put_address(self, register: str, value: int) -> None:
        """64 bits as two accesses of 32, low half first (§4.1.3)."""
        self._put(f"{register}_low", value & 0xFFFFFFFF)
        self._put(f"{register}_high", value >> 32)

    # ---- Transport ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Where the device keeps what, for the curious."""
        return tuple(self._structures[kind] for kind in Kind)

    @property
    def num_queues(self) -> int:
        return self._get("num_queues")

    @property
    def vectors(self) -> int:
        return self._vectors

    @property
    def isr_address(self) -> int:
        isr = self._structures[Kind.ISR]
        return isr.bar.address(isr.offset, 1)

    def read_status(self) -> int:
        return self._get("device_status")

    def write_status(self, value: int) -> None:
        self._put("device_status", value)

    def reset(self, deadline_s: float = RESET_DEADLINE_S) -> None:
        self.write_status(0)
        await_reset(self.read_status, self._name, deadline_s)

    def read_device_features(self) -> int:
        features = 0
        for half in (0, 1):
            self._put("device_feature_select", half)
            features |= self._get("device_feature") << 32 * half
        return features

    def write_driver_features(self, features: int) -> None:
        for half in (0, 1):
            self._put("driver_feature_select", half)
            self._put("driver_feature", features >> 32 * half & 0xFFFFFFFF)

    def read_config(self, offset: int, width: int) -> int:
        structure = self._structures[Kind.DEVICE]
        if offset + width > structure.length:
            raise Misbehaved(
                f"{self._name}: the device configuration has {structure.length} bytes, but a feature the device offers "
                f"puts a field at {offset} to {offset + width - 1}"
            )
        return self._read(structure, offset, width)

    def config_generation(self) -> int:
        return self._get("config_generation")

    def set_config_vector(self, vector: int) -> int:
        self._put("config_msix_vector", vector)
        return self._get("config_msix_vector")

    def queue_max_size(self, index: int) -> int:
        self._put("queue_select", index)
        return self._get("queue_size")

    def queue_enabled(self, index: int) -> bool:
        self._put("queue_select", index)
        return self._get("queue_enable") != 0

    def set_up_queue(self, index: int, setup: QueueSetup) -> int:
        self._put("queue_select", index)
        self._put("queue_size", setup.size)
        taken = self._get("queue_size")
        if taken != setup.size:
            raise Misbehaved(f"{self._name}: queue {index} was given {setup.size} entries and reads back {taken}")
        self._put_address("queue_desc", setup.descriptors)
        self._put_address("queue_driver", setup.driver_area)
        self._put_address("queue_device", setup.device_area)
        self._put("queue_msix_vector", setup.vector)
        return self._get("queue_msix_vector")

    def enable_queue(self, index: int) -> None:
        self._put("queue_select", index)
        self._put("queue_enable", 1)

    def reset_queue(self, index: int, deadline_s: float = RESET_DEADLINE_S) -> None:
        offset, width = COMMON["queue_reset"]
        if self._common.length < offset + width:
            raise Misbehaved(
                f"{self._name}: the device offers RING_RESET, but its common configuration ends before queue_reset, "
                f"after {self._common.length} bytes"
            )
        self._put("queue_select", index)
        self._put("queue_reset", 1)
        await_queue_reset(lambda: self._get("queue_reset"), self._name, index, deadline_s)
        if self._get("queue_enable"):
            raise Misbehaved(f"{self._name}: queue {index} is enabled although it was just reset")

    @property
    def answers_commands(self) -> bool:
        return False

    def answer(self, command: bytes) -> int:
        raise NotImplementedError(f"{self._name}: a PCI device has a control queue")

    def _notify_offset(self, index: int, width: int) -> int:
        """Offset in the BAR of a queue's notification register (§4.1.4.4)."""
        notify = self._structures[Kind.NOTIFY]
        self._put("queue_select", index)
        offset = self._get("queue_notify_off") * notify.multiplier
        if offset + width > notify.length:
            raise Misbehaved(
                f"{self._name}: queue {index} is notified at byte {offset:#x} of a notification structure of "
                f"{notify.length:#x} bytes"
            )
        at = notify.offset + offset
        if at % width:
            raise Misbehaved(
                f"{self._name}: queue {index} is notified at byte {at:#x} of BAR {notify.bar_index}, which is no "
                f"multiple of the {width} bytes that a notification has"
            )
        return at

    def notify(self, index: int, data: int | None = None) -> None:
        bar = self._structures[Kind.NOTIFY].bar
        if data is None:
            bar.write16(self._notify_offset(index, 2), index)
        else:
            bar.write32(self._notify_offset(index, 4), data)

    def notify_address(self, index: int, width: int = 2) -> int:
        return self._structures[Kind.NOTIFY].bar.address(self._notify_offset(index, width), width)

    def notify_fd(self, index: int) -> int:  # noqa: ARG002 - the protocol's
        return -1

    def enable_vectors(self, eventfds: Sequence[int]) -> None:
        self._device.irqs.enable_msix(list(eventfds))
        self._interrupts = "msix"

    def enable_intx(self, eventfd: int, unmask_eventfd: int) -> None:
        self._device.set_intx_disable(False)
        self._device.irqs.enable_intx(eventfd)
        self._interrupts = "intx"
        self._device.irqs.set_intx_unmask(unmask_eventfd)

    def disable_interrupts(self) -> None:
        mode, self._interrupts = self._interrupts, ""
        if mode == "msix":
            self._device.irqs.disable_msix()
        elif mode == "intx":
            self._device.irqs.disable_intx()

    def allow_dma(self, allowed: bool) -> None:
        self._device.set_bus_master(allowed)

    def close(self) -> None:
        while self._bars:
            self._bars.popitem()[1].close()
