"""Real frames both ways over every kind of ring that QEMU's device has: the format, how it interrupts, and whether a
frame may span buffers; and each ring feature turned off by itself. One guest serves for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from qemu.command import Nic
from qemu.guest import Guest
from qemu.session import Session
from tests.e2e import testbed
from tests.e2e.account import counters
from tests.e2e.rings import FORMATS, REPLY_SECONDS, RING_FEATURES, every_frame_comes_back, kinds, without
from tests.e2e.traffic import Generator, reflected

JAM_SECONDS = 60.0
JAM, JAM_BYTES = 240, 1400  # the wire holds some 90 of this length, and its reader up to 64

MATRIX = [pytest.param(irq, off, id=name) for name, irq, off in kinds()]
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


@pytest.mark.parametrize(("irq", "off"), MATRIX + WITHOUT_ONE)
def test_every_frame_comes_back_over_this_ring(packing: Guest, irq: str, off: Sequence[str]) -> None:
    every_frame_comes_back(packing, packing.wire, irq, off)


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
    with testbed.running(packing, options=without(off)) as bed:
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
