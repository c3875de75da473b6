"""Three accounts of the same frames, held against each other: the driver's counters, QEMU's view of the device's
queues, and the wire with its capture. Kept for every driver that testbed.py starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from netbridge import metrics
from qemu.guest import Guest
from qemu.views import DeviceView, Queue, WireView, advanced, device_view, wire_view
from qemu.wire import Wire

COUNTERS = "/run/netbridge/aethernet.sock.counters"
SETTLE_SECONDS = 30.0
"""How long the three may take to agree: a frame is on the wire before the driver has looked at the ring again."""
REST_SECONDS = 0.02
LONGEST = 1522
"""Bytes of a frame that never spans buffers."""
LAP = 1 << 16


def counters(guest: Guest) -> dict[str, Any]:
    """The driver's counters at this moment, by way of its page and without a process in the guest."""
    copy = guest.artefacts / "counters"
    guest.get(COUNTERS, copy)
    return metrics.read(str(copy))


class Moment(NamedTuple):
    """The three accounts at about one moment."""

    driver: dict[str, Any]
    device: DeviceView | None
    wire: WireView | None

    @property
    def came(self) -> int:
        """Frames that the driver took from the device, whatever became of them."""
        return int(self.driver["packets_rx"])

    @property
    def went(self) -> int:
        return int(self.driver["packets_tx"])


class Account:
    """What went by since `open`. The device has to be left alone by everybody else meanwhile."""

    def __init__(self, guest: Guest, driver: Callable[[], int], nic: str = "nic0"):
        """`driver` tells the pid of the process that drives the NIC."""
        self._guest, self._driver, self._nic = guest, driver, nic
        # A box of metal has a wire, and nobody to ask about the device.
        self._qemu = isinstance(guest, Guest)
        wire = {plan.id: plan.wire for plan in guest.machine.nics}[nic] if self._qemu else guest.wires[nic]
        self._wire = wire if isinstance(wire, Wire) else None
        self._before: Moment | None = None
        self._loses = self._strangers = False

    def loses(self) -> None:
        """Not every frame reaches its end: the link goes down, a filter holds frames back, someone is killed."""
        self._loses = True

    def strangers(self) -> None:
        """QEMU itself sends frames, besides those that the driver gives it."""
        self._strangers = True

    def open(self) -> None:
        """From here on, when nothing is on its way. Raises AssertionError when that moment does not come."""
        self._before = self._at_rest()

    def counters(self) -> dict[str, Any]:
        """The driver's counters when nothing is on its way. Raises AssertionError when that moment does not come."""
        return self._at_rest().driver

    def _at_rest(self) -> Moment:
        deadline = time.monotonic() + SETTLE_SECONDS
        before = None
        # Twice the same: with several processors an interrupt may be on its way to one that does not run just now.
        while (moment := self._still()) is None or (moment.came, moment.went, moment.device) != before:
            assert time.monotonic() < deadline, f"driver and device are not at rest within {SETTLE_SECONDS:g} s"
            before = (moment.came, moment.went, moment.device) if moment is not None else None
            time.sleep(REST_SECONDS)
        return moment

    def _still(self) -> Moment | None:
        """The three accounts while nobody has anything to do. The device comes first: of all that it had done by then
        the guest had its interrupt before it was asked whether the driver sleeps, and a driver that sleeps has counted
        what it was told of."""
        device = self._device()
        if self._guest.eval(f"open('/proc/{self._driver()}/stat').read().rpartition(')')[2].split()[0]") != "S":
            return None
        moment = self._look()
        at_rest = device is None or not any(queue.in_flight for queue in device.queues)
        return moment if at_rest and moment.device == device else None

    def _device(self) -> DeviceView | None:
        return device_view(self._guest, self._nic) if self._qemu else None

    def check(self, within: float = SETTLE_SECONDS) -> None:
        """Wait until the three agree. Raises AssertionError that says where they do not."""
        deadline = time.monotonic() + within
        while problems := self._problems():
            assert time.monotonic() < deadline, "driver, device and wire do not agree:\n  " + "\n  ".join(problems)
            time.sleep(0.02)

    def _look(self) -> Moment:
        wire = wire_view(self._wire) if self._wire is not None and not self._wire.closed else None
        return Moment(counters(self._guest), self._device(), wire)

    def _spans_buffers(self, device: DeviceView) -> bool:
        """Whether a frame may have taken several buffers, so that the device has used more than there were frames."""
        if "MRG_RXBUF" not in device.features:
            return False
        return self._wire.longest > LONGEST if self._wire is not None else "GUEST_TSO" in device.features

    def _problems(self) -> list[str]:
        before, now = self._before, self._look()
        assert before is not None, "the account was not opened"
        came, went = now.came - before.came, now.went - before.went
        found = []
        # A device that was reset in between has begun to count anew; a lost one has ended.
        same = now.driver["resets"] == before.driver["resets"]
        if same and before.device is not None and now.device is not None:
            packed = now.device.packed
            spread = LAP if self._spans_buffers(now.device) else 1
            into = range(came, came + spread)
            # In a packed ring a frame is one descriptor, or two when its virtio header has one of its own.
            out = range(went, 2 * went + 1) if packed else range(went, went + 1)
            found += _compare("received", into, before.device.receive, now.device.receive, packed)
            if now.driver["queue_resets"] == before.driver["queue_resets"]:  # of transmit queues only
                found += _compare("sent", out, before.device.transmit, now.device.transmit, packed)
        if now.wire is not None and before.wire is not None:
            sent, received, *captured = (later - earlier for earlier, later in zip(before.wire, now.wire, strict=True))
            if captured != [sent, received]:
                found.append(f"the wire has {sent} frames to the guest and {received} from it, its capture {captured}")
            # On a wire that others use, too, the driver hears more than this host has sent.
            if (came > sent and self._qemu) or (came < sent and not self._loses):
                found.append(f"{sent} frames went to the guest, the driver counted {came}")
            if not self._strangers and (received > went or (received != went and not self._loses)):
                found.append(f"{received} frames came from the guest, the driver counted {went}")
        return found


def _compare(
    what: str, chains: Sequence[int], before: tuple[Queue, ...], now: tuple[Queue, ...], packed: bool
) -> list[str]:
    """What the queues of one direction have used against what they may have used for the driver's frames."""
    moves = [advanced(*pair, packed) for pair in zip(before, now, strict=True)]
    used, lap = sum(move for move, _ in moves), min(lap for _, lap in moves)
    found = []
    if all((count - used) % lap for count in chains):
        found.append(f"{what}: the driver counted {min(chains)} frames, the device used {used} chains (modulo {lap})")
    if held := sum(queue.in_flight for queue in now):
        found.append(f"{what}: the device holds {held} chains")
    return found


def check_spotless(driver: Mapping[str, Any]) -> None:
    """Of a driver's counters: no frame was dropped, no entry of a client refused, nothing wrong with the device."""
    spots = {name: driver[name] for name in ("drops", "refused_handles", "device_faults", "recoveries")}
    assert not any(count for counts in spots.values() for count in counts.values()), spots


def check_echoed(
    count: int, wire: Wire, before: tuple[int, int], driver: Mapping[str, Any], echo: Mapping[str, Any]
) -> None:
    """So many frames went there and back, and nothing else: by the counters at the end of driver and echo service, and
    by those of the wire, which were `before` at the beginning (sent, received)."""
    account = {
        "sent": wire.sent - before[0],
        "packets_rx": driver["packets_rx"],
        "echoed": echo["frames"],
        "packets_tx": driver["packets_tx"],
        "received": wire.received - before[1],
    }
    assert account == dict.fromkeys(account, count)
    assert driver["bytes_rx"] == driver["bytes_tx"] == echo["bytes"]
    check_spotless(driver)
