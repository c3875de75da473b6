"""Several queue pairs on QEMU's device: flows are spread over them, and every frame comes back.

QEMU's datagram wire has one queue, so here the NIC is on a TAP device of the host with as many, which takes root.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from qemu.command import Nic
from qemu.session import Session
from qemu.tap import Tap
from tests.e2e import testbed
from tests.e2e.traffic import GUEST_IP, HOST_IP, HOST_MAC

FLOWS = 64
ANSWER_SECONDS = 30.0

pytestmark = [pytest.mark.thorough, pytest.mark.needs_root]


def udp(mac: str, flow: int) -> bytes:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    layers = Ether(dst=mac, src=HOST_MAC) / IP(src=HOST_IP, dst=GUEST_IP) / UDP(sport=20000 + flow, dport=7)
    return bytes(layers / Raw(flow.to_bytes(4, "big") * 16))


@pytest.fixture(params=[2, 4])
def pairs(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture
def tap(pairs: int) -> Iterator[Tap]:
    with Tap(queues=pairs, offloads=False) as made:
        # The host has nothing to say on it by itself.
        made.run(["sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{made.name}/disable_ipv6"])
        yield made


def test_flows_are_spread_and_every_frame_comes_back(guests: Session, tap: Tap, pairs: int) -> None:
    nic = Nic(wire=tap, properties={"mq": "on", "vectors": 2 * pairs + 2})
    with (
        guests.boot(f"pairs-{pairs}", nics=[nic], snapshot=False) as guest,
        testbed.running(guest, options=["--queue-pairs", str(pairs)]) as bed,
    ):
        tap.packets.settimeout(ANSWER_SECONDS)
        for _ in range(4):
            wanted = set()
            for flow in range(FLOWS):
                frame = udp(bed.mac, flow)
                wanted.add(frame[6:12] + frame[:6] + frame[12:])
                tap.packets.send(frame)
            deadline = time.monotonic() + ANSWER_SECONDS
            while wanted and time.monotonic() < deadline:
                wanted.discard(tap.packets.recv(65536))
            assert not wanted, f"{len(wanted)} of {FLOWS} frames did not come back"
        path = f"/machine/peripheral/{nic.id}/virtio-backend"
        used = [
            guest.qmp("x-query-virtio-queue-status", path=path, queue=queue)["used-idx"] for queue in range(2 * pairs)
        ]
        counters = bed.counters()
        bed.stop()
    assert sum(used[0::2]) == counters["packets_rx"]
    assert sum(used[1::2]) == counters["packets_tx"]
    assert sum(1 for queue in used[0::2] if queue) > 1, f"all frames came on one queue: {used}"
