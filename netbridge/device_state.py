"""What the driver says of its device on the counters page: what was offered, wanted and agreed, and the link.

Written whenever the device was configured or its link changed; read from outside by `netbridge features`, without
disturbing the driver and without any right but to read the page. It says what a driver has negotiated, not what is in a
register, so it takes no CAP_SYSCALL_RAW.
"""

from __future__ import annotations

from netbridge import metrics
from netbridge.datapath._core import ffi
from netbridge.errors import NetbridgeError
from netbridge.virtio.facts import LinkState
from netbridge.virtio.negotiation import Negotiation
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from netbridge.virtio.net import NetDevice

ATTEMPTS = 16
_DUPLEX = {0: "half", 1: "full"}


class NotConfigured(NetbridgeError):
    """There is a driver's page, but the driver has no device in its hands at this moment."""


class DeviceState(NamedTuple):
    """The device as its driver last saw it."""

    negotiation: Negotiation
    mac: str
    mtu: int
    queue_pairs: int  # in use
    link: LinkState

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        link = self.link
        return {
            "mac": self.mac,
            "mtu": self.mtu,
            "queue_pairs": self.queue_pairs,
            "link_up": link.up,
            "speed_mbps": link.speed_mbps or None,
            "duplex": _DUPLEX.get(link.duplex),
            **self.negotiation.as_dict(),
        }

    def __str__(self) -> str:
        """For people: a line of facts, and the table."""
        link = self.link
        words = ["up" if link.up else "down"]
        if link.speed_mbps:
            words.append(f"{link.speed_mbps:,} Mbit/s")
        if link.duplex in _DUPLEX:
            words.append(f"{_DUPLEX[link.duplex]} duplex")
        pairs = f"{self.queue_pairs} queue pair{'s' if self.queue_pairs > 1 else ''}"
        facts = f"MAC {self.mac}, MTU {self.mtu}, {pairs}, link {', '.join(words)}"
        return f"{facts}\n\n{self.negotiation.table()}"


def publish(counters: Any, net: NetDevice, link: LinkState, mac: bytes) -> None:
    """Writes down how `net` is configured. `mac` is what it goes by now, which may not be the device's own any more."""
    place, agreed = counters.device, net.negotiation
    place.features_offered = 0
    place.features_wanted, place.features_agreed = agreed.wanted, agreed.agreed
    place.features_turned_off = agreed.turned_off
    place.mtu, place.queue_pairs = min(net.facts.mtu, 0xFFFF), len(net.pairs)
    place.link_up, place.speed_mbps, place.duplex = link.up, link.speed_mbps, link.duplex
    ffi.buffer(place.mac)[:] = mac
    place.features_offered = agreed.offered


def withdraw(counters: Any) -> None:
    """The device is not configured any more."""
    counters.device.features_offered = 0


def read(path: str) -> DeviceState:
    """What the driver with this counters page says. Raises CountersUnreadable without a driver, and NotConfigured while
    it has no device in its hands."""
    before = b""
    # What was read twice alike was not being written meanwhile.
    for _ in range(ATTEMPTS):
        counters = metrics.load(path)
        device = counters.device  # a part of it, and gone with it
        data = bytes(ffi.buffer(ffi.addressof(device)))
        if data == before:
            break
        before = data
    if not device.features_offered:
        raise NotConfigured(
            f"{path}: the driver has no configured device at this moment: it is starting, its device is away, or its "
            "manifest lets it share no memory with a service; its log says which"
        )
    return DeviceState(
        Negotiation(
            device.features_offered, device.features_wanted, device.features_agreed, device.features_turned_off
        ),
        bytes(device.mac).hex(":"),
        device.mtu,
        device.queue_pairs,
        LinkState(bool(device.link_up), device.speed_mbps, device.duplex),
    )
