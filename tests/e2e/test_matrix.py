"""Real frames both ways over every kind of ring that QEMU's device has: the format, how it interrupts, and whether a
frame may span buffers; and each ring feature turned off by itself. One guest serves for all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import pytest

from netbridge.virtio.features import RING_RESET
from qemu.command import Nic
from qemu.guest import Guest
from qemu.session import Session
from tests.e2e import testbed
from tests.e2e.account import counters
from tests.e2e.traffic import BURST, Generator, reflected

REPLY_SECONDS = 10.0
JAM_SECONDS = 60.0
JAM, JAM_BYTES = 240, 1400  # the wire holds some 90 of this length, and its reader up to 64
RING_FEATURES = ("EVENT_IDX", "INDIRECT_DESC", "RING_RESET")

FORMATS = {"packed": (), "split": ("RING_PACKED",)}
MERGING = {"merging": (), "one-buffer": ("MRG_RXBUF",)}
MATRIX = [
    pytest.param(irq, (*FORMATS[ring], *MERGING[merge]), id=f"{ring}-{irq}-{merge}")
    for ring, irq, merge in itertools.product(FORMATS, ("msix", "intx"), MERGING)
]
WITHOUT_ONE = [
    pytest.param("msix", (*FORMATS[ring], *off), id=f"{ring}-without-{'-'.join(off)}")
    for ring in FORMATS
    for off in (*((feature,) for feature in RING_FEATURES), RING_FEATURES)
]


@pytest.fixture(scope="module")
def packing(guests: Session) -> Iterator[Guest]:
    """A guest whose NIC has every ring feature that QEMU knows, and queues of more entries than usual."""
    nic = Nic(properties={"packed": "on"}, rx_queue_size=512)
    with guests.boot("matrix", nics=[nic]) as guest:
        yield guest


def agreed(guest: Guest) -> str:
    """The features that the device was told of, in QEMU's words. Version 7.2 has none for RING_RESET."""
    path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
    told = guest.qmp("x-query-virtio-status", path=path)["guest-features"]
    nameless = told.get("unknown-dev-features", 0)
    return f"{told}{' RING_RESET' if nameless & RING_RESET.mask else ''}"


def line_of(guest: Guest, irq: str) -> str:
    """What the manifest says of the interrupt."""
    if irq == "msix":
        return irq
    address = testbed.nics(guest)[0][0]
    return str(int(guest.run(["od", "-An", "-tu1", "-j60", "-N1", f"/sys/bus/pci/devices/{address}/config"]).stdout))


@pytest.mark.parametrize(("irq", "off"), MATRIX + WITHOUT_ONE)
def test_every_frame_comes_back_over_this_ring(packing: Guest, irq: str, off: Sequence[str]) -> None:
    wire = packing.wire
    before = wire.sent, wire.received
    options = [word for feature in off for word in ("--without", feature)]
    with testbed.running(packing, irq=line_of(packing, irq), options=options) as bed:
        words = agreed(packing)
        for feature in ("RING_PACKED", "MRG_RXBUF", *RING_FEATURES):
            assert (feature in words) != (feature in off), words
        make = Generator(bed.mac)
        # More than two laps of the larger queue, in bursts and one at a time; then one that nothing may come before.
        for frames, window in (
            (make.raw(4 * BURST), 64),
            (make.udp(BURST), BURST),
            (make.icmp(32), 1),
            (make.raw(1), 1),
        ):
            wire.exchange(frames, reply=reflected, window=window, timeout=REPLY_SECONDS).check()
        assert not wire.drain()
        bed.stop()
    driver, echo = bed.final["driver"], bed.final["echo"]
    account = {
        "sent": wire.sent - before[0],
        "packets_rx": driver["packets_rx"],
        "echoed": echo["frames"],
        "packets_tx": driver["packets_tx"],
        "received": wire.received - before[1],
    }
    assert account == dict.fromkeys(account, 5 * BURST + 33)
    assert driver["bytes_rx"] == driver["bytes_tx"] == echo["bytes"]
    for faults in ("drops", "refused_handles", "device_faults"):
        assert not any(driver[faults].values()), driver[faults]
    assert not packing.iommu_faults()


def wait_for_a_jam(bed: testbed.Testbed, received: int) -> None:
    """Until the driver has received so many frames and QEMU holds one that its wire does not take."""
    path = f"/machine/peripheral/{bed.guest.machine.nics[0].id}/virtio-backend"
    deadline = time.monotonic() + JAM_SECONDS
    while (
        counters(bed.guest)["packets_rx"] < received
        or bed.guest.qmp("x-query-virtio-queue-status", path=path, queue=1)["inuse"] == 0
    ):
        assert time.monotonic() < deadline, f"{received} frames did not jam the wire within {JAM_SECONDS:g} s"


@pytest.mark.parametrize("off", FORMATS.values(), ids=FORMATS)
def test_a_frame_after_the_wire_was_full(packing: Guest, off: Sequence[str]) -> None:
    """QEMU asks for a notification, sends what has piled up, and on a packed ring leaves the position behind."""
    options = [word for feature in off for word in ("--without", feature)]
    with testbed.running(packing, options=options) as bed:
        make = Generator(bed.mac)
        for round_ in (1, 2):
            frames = [frame.ljust(JAM_BYTES, b"\0") for frame in make.raw(JAM)]
            with packing.wire.deaf():
                for frame in frames:
                    packing.wire.send(frame, timeout=JAM_SECONDS)
                wait_for_a_jam(bed, round_ * JAM + round_ - 1)
            packing.wire.expect([reflected(frame) for frame in frames], timeout=JAM_SECONDS)
            packing.wire.exchange(make.raw(1), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.stop()
    assert bed.final["driver"]["packets_tx"] == 2 * (JAM + 1)
    assert not packing.iommu_faults()
