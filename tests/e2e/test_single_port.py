"""DPDK's single-port suites, as far as a virtio network device has what they test: docs/virtio.md has the whole list
and where each case is. One guest serves for all that are here; its NIC carries jumbo frames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import RawPcapNgReader

from qemu.command import Nic
from qemu.guest import Guest
from qemu.session import Session
from qemu.wire import Wire
from tests.e2e import kinds, testbed
from tests.e2e.account import check_spotless
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import HOST_MAC, RAW_ETHERTYPE, Generator, reflected

REPLY_SECONDS = 20.0
JUMBO_MTU = 9000
LONGEST = JUMBO_MTU + 14
LONGEST_TAGGED = LONGEST + 8  # with two VLAN tags: the longest that a client may send
RUNT = 14
BUFFER = 2048 - 64  # bytes of a frame in one receive buffer, less its headroom
WINDOW = 8


@pytest.fixture(scope="module")
def port(guests: Session) -> Iterator[Guest]:
    """A guest whose NIC has an MTU, and says how fast it is."""
    nic = Nic(properties={"host_mtu": JUMBO_MTU, "speed": 25000, "duplex": "full"})
    with guests.boot("single-port", nics=[nic]) as guest:
        yield guest
        assert not guest.iommu_faults()


@pytest.fixture
def wire(port: Guest) -> Wire:
    wire = port.wire
    wire.drain()
    return wire


def frame(mac: str, size: int, number: int) -> bytes:
    """A frame of no known protocol, unlike every other of its size."""
    head = bytes.fromhex((mac + HOST_MAC).replace(":", "")) + RAW_ETHERTYPE.to_bytes(2, "big")
    body = number.to_bytes(4, "big") + bytes(range(251)) * (size // 251 + 1)
    return (head + body)[:size]


def echoed(wire: Wire, frames: list[bytes], window: int = WINDOW) -> None:
    """All come back, once, unchanged but for their MAC addresses, in order; and nothing else does."""
    wire.exchange(frames, reply=reflected, window=window, timeout=REPLY_SECONDS).check()
    assert not wire.drain()


def used(guest: Guest, queue: int) -> int:
    """The used index of a virtqueue as QEMU has it: of a receive queue, how many buffers, modulo 65,536."""
    path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
    index: int = guest.qmp("x-query-virtio-queue-status", path=path, queue=queue)["used-idx"]
    return index


def shown(guest: Guest) -> dict[str, object]:
    """What `netbridge features` says."""
    told: dict[str, object] = json.loads(guest.run(testbed.netbridge("features", "--json")).stdout)
    return told


def agreed_by_qemu(guest: Guest) -> set[str]:
    """The features that the driver has told the device of, in QEMU's words."""
    path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
    told = guest.qmp("x-query-virtio-status", path=path)["guest-features"]
    words = " ".join(str(word) for words in told.values() if isinstance(words, list) for word in words)
    return set(re.findall(r"VIRTIO_(?:NET_|RING_)?F_(\w+)", words))


@pytest.fixture(scope="class")
def bed(port: Guest) -> Iterator[Testbed]:
    """One driver and one echo service for all the tests of a class."""
    sent, received = port.wire.sent, port.wire.received
    with testbed.running(port) as bed:
        yield bed
        bed.stop()
    driver, echo = bed.final["driver"], bed.final["echo"]
    assert driver["packets_rx"] == echo["frames"] + echo["unsendable"] == port.wire.sent - sent
    assert driver["packets_tx"] == echo["frames"] == port.wire.received - received
    assert driver["sessions"] == 1
    check_spotless(driver)


class TestInService:
    """What takes no more than a driver in service."""

    @pytest.mark.parametrize("kind", kinds.KINDS)
    def test_frames_of_this_kind_are_carried_unchanged(self, bed: Testbed, wire: Wire, kind: str) -> None:
        """Unified packet types; VLAN and QinQ: tags stay what and where they are."""
        echoed(wire, list(kinds.frames(kind, bed.mac, LONGEST)))

    @pytest.mark.parametrize("longest", [1514, LONGEST, LONGEST_TAGGED], ids=["standard", "jumbo", "jumbo-two-tags"])
    def test_mtu(self, bed: Testbed, wire: Wire, longest: int) -> None:
        sizes = (RUNT, 59, 60, longest - 1, longest)
        echoed(wire, [frame(bed.mac, size, number) for number, size in enumerate(sizes * 4)])

    def test_a_frame_beyond_the_mtu_is_received_and_cannot_be_sent(self, bed: Testbed, wire: Wire) -> None:
        """Between good ones, which it does no harm to."""
        good = [frame(bed.mac, LONGEST_TAGGED, number) for number in range(4)]
        long = [frame(bed.mac, size, 99) for size in (LONGEST_TAGGED + 1, LONGEST_TAGGED + 2048)]
        before = bed.counters()
        for each in (good[0], long[0], good[1], good[2], long[1], good[3]):
            wire.send(each)
        wire.expect([reflected(each) for each in good], timeout=REPLY_SECONDS)
        after = bed.counters()
        assert after["packets_rx"] - before["packets_rx"] == 6
        assert after["packets_tx"] - before["packets_tx"] == 4

    def test_buffer_scatter(self, bed: Testbed, wire: Wire, port: Guest) -> None:
        """Frames that end just before, at and just after the end of a buffer, in one to five of them, and both ways."""
        ends = [buffers * BUFFER + more for buffers in range(1, 5) for more in range(-14, 15)]
        sizes = [*ends, *range(RUNT, LONGEST, 97)]
        buffers, frames = used(port, 0), used(port, 1)
        echoed(wire, [frame(bed.mac, size, number) for number, size in enumerate(sizes)])
        assert (used(port, 1) - frames) % 65536 == len(sizes), "to the device a sent frame is one chain"
        taken = (used(port, 0) - buffers) % 65536
        # The header is in the first buffer, in front of its headroom's end or after: a boundary may be that much off.
        at_least = sum(-(-size // (BUFFER + 12)) for size in sizes)
        at_most = sum(-(-size // (BUFFER - 12)) for size in sizes)
        assert at_least <= taken <= at_most
        assert taken > 2 * len(sizes), "most of them take several"

    def test_port_statistics(self, bed: Testbed, wire: Wire, port: Guest) -> None:
        """Driver, service, device and wire say the same of the same frames."""
        make = Generator(bed.mac)
        frames = [*make.udp(100), *make.raw(100), *make.arp(50)]
        before, sent = bed.counters(), used(port, 1)
        echoed(wire, frames, window=64)
        after = bed.counters()
        moved = {name: after[name] - before[name] for name in ("packets_rx", "packets_tx", "bytes_rx", "bytes_tx")}
        length = sum(map(len, frames))
        assert moved == {"packets_rx": 250, "packets_tx": 250, "bytes_rx": length, "bytes_tx": length}
        assert (used(port, 1) - sent) % 65536 == 250
        for bursts in ("rx_bursts", "tx_bursts"):
            assert sum(after[bursts].values()) > sum(before[bursts].values())

    def test_what_was_agreed_is_shown_as_the_device_has_it(self, bed: Testbed, port: Guest) -> None:
        told = shown(port)
        facts = {"mac": bed.mac, "mtu": JUMBO_MTU, "link_up": True, "speed_mbps": 25000, "duplex": "full"}
        assert facts.items() <= told.items()
        rows = told["features"]
        assert isinstance(rows, list)
        ours = {row["name"] for row in rows if row["agreed"]}
        theirs = agreed_by_qemu(port)
        # QEMU 7.2 has no words for some, and IOMMU_PLATFORM for one.
        assert {"MRG_RXBUF", "MTU", "MAC", "STATUS", "CTRL_VQ", "EVENT_IDX"} <= ours & theirs
        assert {name for name in ours if name not in theirs} <= {"ACCESS_PLATFORM", "RING_RESET", "SPEED_DUPLEX"}


@pytest.mark.parametrize("header", ["apart", "with-frame"])
def test_jumbo_frames_in_one_buffer_each(port: Guest, wire: Wire, header: str) -> None:
    """Buffer scatter turned off, by the manifest: every receive buffer holds a whole frame. And the header of what is
    sent in either of its places."""
    device = f"device:\n  without: [MRG_RXBUF]\n  tx_header: {header}\n"
    manifest = testbed.manifest(testbed.nics(port)[0][0]) + device
    with testbed.running(port, vnode=manifest) as bed:
        rows = {row["name"]: row for row in shown(port)["features"]}  # type: ignore[attr-defined]
        assert rows["MRG_RXBUF"]["note"] == "turned off"
        assert "MRG_RXBUF" not in agreed_by_qemu(port)
        before = used(port, 0)
        frames = [
            frame(bed.mac, size, number)
            for number, size in enumerate([RUNT, 60, 192, 193, 1514, 1515, 2048, LONGEST] * 20)
        ]
        echoed(wire, frames)
        assert (used(port, 0) - before) % 65536 == len(frames), "one buffer each"
        bed.stop()


def test_port_start_stop_and_close_again_and_again(port: Guest, wire: Wire) -> None:
    """The function goes back to its driver each time, and what was configured is so again after each start."""
    agreed = set()
    for round_ in range(2):
        with testbed.running(port, options=["--without", "EVENT_IDX"]) as bed:
            told = shown(port)
            agreed.add((told["agreed"], told["mac"], told["mtu"]))
            # Stopped and started: the service goes, the device is reset, and is in service for the next.
            echoed(wire, [frame(bed.mac, 1000, number) for number in range(20)])
            bed.restart_echo()
            echoed(wire, [frame(bed.mac, LONGEST, number) for number in range(20)])
            told = shown(port)
            agreed.add((told["agreed"], told["mac"], told["mtu"]))
            bed.stop()
        assert bed.final["driver"]["sessions"] == 2
        assert testbed.nics(port)[0] == (bed.pci, "virtio-pci"), f"round {round_}"
        gone = port.run(testbed.netbridge("features"), check=False)
        assert (gone.returncode, gone.stdout) == (1, "")
        assert "is the driver running?" in gone.stderr
    assert len(agreed) == 1, "the same each time"


def test_packet_capture(port: Guest, wire: Wire, tmp_path: Path) -> None:
    """Every frame of both directions, whole and in order."""
    capture = "/tmp/capture.pcapng"
    with testbed.running(port) as bed:
        bed.restart_echo(options=["--capture", capture])
        frames = [frame(bed.mac, size, number) for number, size in enumerate([60, 1514, LONGEST] * 10)]
        echoed(wire, frames)
        bed.stop()
    local = tmp_path / "capture.pcapng"
    port.get(capture, to=local)
    with local.open("rb") as file:
        taken = [data for data, _ in RawPcapNgReader(file)]
    assert [data for data in taken if data[6:12] == bytes.fromhex(HOST_MAC.replace(":", ""))] == frames
    assert [data for data in taken if data[:6] == bytes.fromhex(HOST_MAC.replace(":", ""))] == [
        reflected(data) for data in frames
    ]
    assert len(taken) == 2 * len(frames)
