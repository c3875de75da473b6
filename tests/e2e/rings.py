"""Frames both ways over one kind of ring, in full: what tests over the matrix of rings do in each of its cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from netbridge.virtio.features import RING_RESET
from qemu.guest import Guest
from qemu.views import Queue, advanced, device_status, device_view
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.account import check_echoed
from tests.e2e.traffic import BURST, UDP_PORT, Generator, reflected, source_port

REPLY_SECONDS = 30.0
SPREAD = 96
"""Frames by which a queue's index cannot come round: the smallest ring has 256 entries, and a frame takes at most 2."""
ALONE = 32
RING_FEATURES = ("EVENT_IDX", "INDIRECT_DESC", "RING_RESET")

FORMATS = {"packed": (), "split": ("RING_PACKED",)}
MERGING = {"merging": (), "one-buffer": ("MRG_RXBUF",)}
INTERRUPTS = ("msix", "intx")


def kinds() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every kind of ring: its name, how it interrupts, and the features that are turned off for it."""
    for ring, irq, merge in itertools.product(FORMATS, INTERRUPTS, MERGING):
        yield f"{ring}-{irq}-{merge}", irq, (*FORMATS[ring], *MERGING[merge])


def without(features: Sequence[str]) -> list[str]:
    """The driver's options that turn these off."""
    return [word for feature in features for word in ("--without", feature)]


def line_of(guest: Guest, irq: str) -> str:
    """What the manifest says of the interrupt."""
    if irq == "msix":
        return irq
    address = testbed.nics(guest)[0][0]
    return str(int(guest.run(["od", "-An", "-tu1", "-j60", "-N1", f"/sys/bus/pci/devices/{address}/config"]).stdout))


def every_frame_comes_back(
    guest: Guest, wire: Wire, irq: str, off: Sequence[str], pairs: int = 1, ports: Sequence[int] = (UDP_PORT,)
) -> None:
    """Runs a driver that uses so many queue pairs on the guest's device, which has every ring feature that QEMU knows;
    `ports` are the flows that are to be spread over them. Raises AssertionError."""
    before = wire.sent, wire.received
    options = [*without(off), "--queue-pairs", str(pairs)]
    with testbed.running(guest, irq=line_of(guest, irq), options=options) as bed:
        _check_agreement(guest, irq, off, pairs)
        make = Generator(bed.mac)
        _exchange(wire, make.udp(SPREAD, ports), SPREAD)
        bed.counters()  # nothing is on its way
        _check_spread(guest, pairs)
        # More than two laps of the larger queue, in bursts and one at a time, when every pair has to wake the driver by
        # itself; then one that nothing may come before.
        for frames, window in (
            (make.raw(4 * BURST), 64),
            (make.udp(BURST, ports), BURST),
            (make.udp(ALONE, ports), 1),
            (make.icmp(ALONE), 1),
            (make.raw(1), 1),
        ):
            _exchange(wire, frames, window)
        assert not wire.drain()
        bed.stop()
    count = SPREAD + 5 * BURST + 2 * ALONE + 1
    check_echoed(count, wire, before, bed.final["driver"], bed.final["echo"])
    assert not guest.iommu_faults()


def _exchange(wire: Wire, frames: Sequence[bytes], window: int) -> None:
    """Each comes back once and unchanged, and in order within its flow: queues are not in step with each other."""
    wire.exchange(frames, reply=reflected, window=window, timeout=REPLY_SECONDS, flow=source_port).check()


def _check_agreement(guest: Guest, irq: str, off: Sequence[str], pairs: int) -> None:
    """What was told of the features to the device, in QEMU's words, and of the interrupts to the kernel."""
    told = device_status(guest)["guest-features"]
    # Version 7.2 has no word for RING_RESET.
    words = f"{told}{' RING_RESET' if told.get('unknown-dev-features', 0) & RING_RESET.mask else ''}"
    for feature in ("RING_PACKED", "MRG_RXBUF", *RING_FEATURES):
        assert (feature in words) != (feature in off), words
    assert ("VIRTIO_NET_F_MQ" in words) == (pairs > 1), words
    lines = guest.get("/proc/interrupts").decode()
    counts = {kind: lines.count(f"vfio-{kind}") for kind in INTERRUPTS}
    assert counts == ({"msix": 0, "intx": 1} if irq == "intx" else {"msix": 1 + 2 * pairs, "intx": 0}), lines


def _check_spread(guest: Guest, pairs: int) -> None:
    """The first so many pairs were used, all of them, each in both directions; and no other."""
    view = device_view(guest)
    for queues in (view.receive, view.transmit):
        moved = [advanced(Queue(queue.size, 0, 0), queue, view.packed)[0] for queue in queues]
        assert [bool(count) for count in moved] == [number < pairs for number in range(len(queues))], moved
