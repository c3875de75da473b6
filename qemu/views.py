"""What a NIC's device and its wire say of the frames that went by, to be held against what a driver has counted.

The device is asked through QMP (x-query-virtio-status, x-query-virtio-queue-status); nothing in the guest is believed.
Its indices begin at 0 with each reset of the device, and count modulo 65,536 in a split ring (virtio 1.3, 2.7.6) and
modulo the ring's size in a packed one (2.8.1): see `advanced`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from qemu.guest import Guest
    from qemu.wire import Wire

PACKED = "RING_PACKED"
SPLIT_LAP = 1 << 16


class Queue(NamedTuple):
    """A virtqueue as the device has it: entries it has, chains (split) or descriptors (packed) that it has used, and
    chains that it has taken and not used yet."""

    size: int
    used: int
    in_flight: int


@dataclass(frozen=True)
class DeviceView:
    """A virtio-net device. `features` are those that the driver has agreed to, in QEMU's words."""

    status: str
    features: str
    broken: bool
    queues: tuple[Queue, ...]

    @property
    def packed(self) -> bool:
        return PACKED in self.features

    @property
    def receive(self) -> tuple[Queue, ...]:
        return self._data(0)

    @property
    def transmit(self) -> tuple[Queue, ...]:
        return self._data(1)

    def _data(self, first: int) -> tuple[Queue, ...]:
        """Receive and transmit queues take turns; the control queue comes last (virtio 1.3, 5.1.2)."""
        return self.queues[first : len(self.queues) // 2 * 2 : 2]


def advanced(before: Queue, after: Queue, packed: bool) -> tuple[int, int]:
    """By how much a queue went on, and modulo what: the device was not reset in between, and no more is known."""
    lap = after.size if packed else SPLIT_LAP
    return (after.used - before.used) % lap, lap


def device_status(guest: Guest, nic: str = "nic0") -> dict[str, Any]:
    """QEMU's x-query-virtio-status of a NIC."""
    status: dict[str, Any] = guest.qmp("x-query-virtio-status", path=_path(nic))
    return status


def agreed_ring(guest: Guest, nic: str = "nic0") -> str:
    """The format of the rings that driver and device have agreed upon, as the device has it: "split" or "packed"."""
    return "packed" if PACKED in str(device_status(guest, nic)["guest-features"]) else "split"


def device_view(guest: Guest, nic: str = "nic0") -> DeviceView:
    """The device at this moment; what it is at may change between two of its queues."""
    status = device_status(guest, nic)
    queues = []
    for number in range(status["num-vqs"]):
        said = guest.qmp("x-query-virtio-queue-status", path=_path(nic), queue=number)
        queues.append(Queue(said["vring-num"], said["used-idx"], said["inuse"]))
    return DeviceView(str(status["status"]), str(status["guest-features"]), status["broken"], tuple(queues))


def _path(nic: str) -> str:
    return f"/machine/peripheral/{nic}/virtio-backend"


class WireView(NamedTuple):
    """Frames that went to a guest and came from it: as the wire has counted them, and as they are in its capture.

    Without a capture the latter two are as the former.
    """

    sent: int
    received: int
    captured_sent: int
    captured_received: int


def wire_view(wire: Wire) -> WireView:
    """The wire at this moment. Its capture is read as far as it was not read before."""
    sent, received, noise = wire.sent, wire.received, wire.noise
    captured = wire.captured()
    if captured is None:
        return WireView(sent, received, sent, received)
    return WireView(sent, received, captured[0], captured[1] - noise)
