"""Several queue pairs on QEMU's device, with every kind of ring: flows are spread over them, every frame comes back.

QEMU's datagram wire has one queue, so here the NIC is on a TAP device of the host with as many, which takes root.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from qemu.command import Nic
from qemu.guest import Guest
from qemu.interface import InterfaceWire
from qemu.session import Session
from qemu.tap import Tap
from tests.e2e import testbed
from tests.e2e.rings import every_frame_comes_back, kinds
from tests.e2e.traffic import GUEST_IP, HOST_MAC

FLOWS = 64
PACKETS = 5  # of one flow
ANSWER_SECONDS = 30.0

MOST_PAIRS = 4

pytestmark = pytest.mark.needs_root

# Either number of pairs with either format, interrupt and use of buffers; the rest is thorough.
QUICK = {"packed-msix-merging-2", "packed-intx-merging-4", "split-msix-one-buffer-4", "split-intx-one-buffer-2"}
PRODUCT = [
    pytest.param(irq, off, pairs, id=name, marks=[] if name in QUICK else pytest.mark.thorough)
    for (ring, irq, off), pairs in itertools.product(kinds(), (2, MOST_PAIRS))
    for name in [f"{ring}-{pairs}"]
]


@dataclass
class Several:
    """A guest whose NIC has four queue pairs and every ring feature that QEMU knows, and the host's end of its wire."""

    guest: Guest
    tap: Tap
    wire: InterfaceWire
    cases: Iterator[int]

    def ports(self) -> Sequence[int]:
        """Flows that no case has had: the kernel sends a flow for some seconds to the queue that it last came from."""
        first = 20000 + FLOWS * next(self.cases)
        return range(first, first + FLOWS)


@pytest.fixture(scope="module")
def several(guests: Session) -> Iterator[Several]:
    with Tap(queues=MOST_PAIRS, offloads=False, captured=False) as tap:  # the wire on it is
        nic = Nic(wire=tap, properties={"mq": "on", "packed": "on", "vectors": 2 * MOST_PAIRS + 2})
        with guests.boot("pairs", nics=[nic]) as guest:
            mac = str(guest.machine.nics[0].mac)
            wire = tap.inside(lambda: InterfaceWire(tap.name, mac, guest.artefacts / "wire.pcap"))
            yield Several(guest, tap, wire, itertools.count())
            tap.inside(wire.close)
            assert not wire.noise
            assert not tap.dropped()


@pytest.mark.parametrize(("irq", "off", "pairs"), PRODUCT)
def test_every_frame_comes_back_over_these_rings(several: Several, irq: str, off: Sequence[str], pairs: int) -> None:
    every_frame_comes_back(several.guest, several.wire, irq, off, pairs, several.ports())
    assert not several.tap.dropped()


# ---- Receive-side scaling


@dataclass
class Scaling:
    """A driver with four queue pairs and receive-side scaling."""

    guest: Guest
    tap: Tap
    bed: testbed.Testbed

    def received(self) -> list[int]:
        """Of each receive queue, how many frames."""
        path = f"/machine/peripheral/{self.guest.machine.nics[0].id}/virtio-backend"
        status = [self.guest.qmp("x-query-virtio-queue-status", path=path, queue=queue) for queue in range(0, 8, 2)]
        return [each["used-idx"] for each in status]


def exchange(tap: Tap, frames: list[bytes]) -> None:
    """Sends them and waits until all have come back."""
    wanted = set()
    for frame in frames:
        wanted.add(frame[6:12] + frame[:6] + frame[12:])
        tap.packets.send(frame)
    deadline = time.monotonic() + ANSWER_SECONDS
    while wanted and time.monotonic() < deadline:
        wanted.discard(tap.packets.recv(65536))
    assert not wanted, f"{len(wanted)} of {len(frames)} frames did not come back"


@pytest.fixture(scope="module")
def scaling(guests: Session) -> Iterator[Scaling]:
    with Tap(queues=4, offloads=False) as tap:
        tap.run(["sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{tap.name}/disable_ipv6"])
        tap.packets.settimeout(ANSWER_SECONDS)
        nic = Nic(wire=tap, properties={"mq": "on", "rss": "on", "vectors": 10})
        with (
            guests.boot("scaling", nics=[nic], snapshot=False) as guest,
            testbed.running(guest, options=["--queue-pairs", "4"]) as bed,
        ):
            yield Scaling(guest, tap, bed)
            bed.stop()


def flow(mac: str, kind: str, number: int) -> list[bytes]:
    """Frames of one flow, no two alike."""
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    head = Ether(dst=mac, src=HOST_MAC)
    if "6" in kind:
        head /= IPv6(src=f"2001:db8::{number + 1:x}", dst="2001:db8::ffff")
    else:
        head /= IP(src=f"198.51.100.{number + 1}", dst=GUEST_IP)
    port = 20000 + number
    upper = {"tcp": TCP(sport=port, dport=80), "udp": UDP(sport=port, dport=7), "ip": ICMP()}[kind.rstrip("46")]
    return [bytes(head / upper / Raw(bytes([number, packet]) * 16)) for packet in range(PACKETS)]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ip4", "tcp4", "udp4", "tcp6", "udp6"])
def test_rss_keeps_a_flow_on_one_queue_and_spreads_flows(scaling: Scaling, kind: str) -> None:
    queues = set()
    for number in range(FLOWS):
        before = scaling.received()
        exchange(scaling.tap, flow(scaling.bed.mac, kind, number))
        moved = [after - earlier for after, earlier in zip(scaling.received(), before, strict=True)]
        assert sorted(moved) == [0, 0, 0, PACKETS], f"flow {number} came on several queues: {moved}"
        queues.add(moved.index(PACKETS))
    assert len(queues) == 4, f"{FLOWS} flows came on queues {queues} only"


@pytest.mark.thorough
def test_rss_leaves_what_has_no_hash_to_the_first_queue(scaling: Scaling) -> None:
    before = scaling.received()
    head = bytes.fromhex((scaling.bed.mac + HOST_MAC).replace(":", ""))
    exchange(scaling.tap, [head + b"\x88\xb5" + bytes([number]) * 46 for number in range(FLOWS)])
    moved = [after - earlier for after, earlier in zip(scaling.received(), before, strict=True)]
    assert moved == [FLOWS, 0, 0, 0]


@pytest.mark.thorough
def test_rss_is_what_was_agreed(scaling: Scaling) -> None:
    told = json.loads(scaling.guest.run(testbed.netbridge("features", "--json")).stdout)
    assert told["queue_pairs"] == 4
    assert {"MQ", "RSS"} <= {row["name"] for row in told["features"] if row["agreed"]}
