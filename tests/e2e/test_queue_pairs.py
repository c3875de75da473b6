"""Several queue pairs on QEMU's device: flows are spread over them, and every frame comes back.

QEMU's datagram wire has one queue, so here the NIC is on a TAP device of the host with as many, which takes root.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qemu.command import Nic
from qemu.guest import Guest
from qemu.session import Session
from tests.e2e import testbed
from tests.e2e.traffic import GUEST_IP, HOST_IP, HOST_MAC

FLOWS = 64
ETH_P_ALL = 3
ANSWER_SECONDS = 30.0

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="a TAP device takes root and /dev/net/tun"
    ),
]


class Tap:
    """A TAP device that QEMU makes, with several queues."""

    def __init__(self, name: str, queues: int) -> None:
        self.name, self._queues = name, queues

    def netdev(self, ident: str) -> str:
        return f"tap,id={ident},ifname={self.name},queues={self._queues},script=no,downscript=no,vhost=off"

    def fds(self) -> Sequence[int]:
        return ()

    def attached(self) -> None:
        pass


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
def guest(guests: Session, pairs: int) -> Iterator[Guest]:
    tap = Tap(f"nb-mq{os.getpid() % 100000}", pairs)
    nic = Nic(wire=tap, properties={"mq": "on", "vectors": 2 * pairs + 2})
    with guests.boot(f"pairs-{pairs}", nics=[nic], snapshot=False) as made:
        yield made


def test_flows_are_spread_and_every_frame_comes_back(guest: Guest, pairs: int) -> None:
    tap = guest.machine.nics[0].wire
    assert isinstance(tap, Tap)
    # The host has nothing to say on it by itself.
    Path(f"/proc/sys/net/ipv6/conf/{tap.name}/disable_ipv6").write_text("1")
    Path(f"/sys/class/net/{tap.name}/flags").write_text("0x1103")  # up, promiscuous
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.bind((tap.name, 0))
        wire.settimeout(ANSWER_SECONDS)
        with testbed.running(guest, options=["--queue-pairs", str(pairs)]) as bed:
            for _ in range(4):
                wanted = set()
                for flow in range(FLOWS):
                    frame = udp(bed.mac, flow)
                    wanted.add(frame[6:12] + frame[:6] + frame[12:])
                    wire.send(frame)
                deadline = time.monotonic() + ANSWER_SECONDS
                while wanted and time.monotonic() < deadline:
                    wanted.discard(wire.recv(65536))
                assert not wanted, f"{len(wanted)} of {FLOWS} frames did not come back"
            path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
            used = [
                guest.qmp("x-query-virtio-queue-status", path=path, queue=queue)["used-idx"]
                for queue in range(2 * pairs)
            ]
            counters = bed.counters()
            bed.stop()
    assert sum(used[0::2]) == counters["packets_rx"]
    assert sum(used[1::2]) == counters["packets_tx"]
    assert sum(1 for queue in used[0::2] if queue) > 1, f"all frames came on one queue: {used}"
