"""The capture of a tap: the test plays QEMU at its descriptor."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.utils import PcapNgReader

from qemu.capabilities import lacks_root
from qemu.capture import INBOUND, OUTBOUND, STATISTICS
from qemu.sniffer import KEPT
from qemu.tap import Tap

pytestmark = pytest.mark.skipif(bool(lacks_root()), reason=str(lacks_root()))

GUEST, HOST = "52:54:00:12:34:56", "02:00:00:00:00:01"
NO_HEADER = bytes(10)  # struct virtio_net_hdr (linux/virtio_net.h)
NEEDS_CSUM, GSO_TCPV4 = 1, 1
IP_AT, TCP_AT, CHECKSUM_AT = 14, 34, 16
MSS = 1448


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wire.pcap"


@pytest.fixture
def plain(file: Path) -> Iterator[Tap]:
    with Tap(offloads=False) as tap:
        tap.capture(file)
        yield tap


def frames(file: Path) -> list[tuple[bytes, int, int]]:
    """Of each what is kept, its length on the wire, and where it went to."""
    with PcapNgReader(str(file)) as reader:
        return [(bytes(packet.original), packet.wirelen, packet.direction) for packet in reader]


def test_frames_of_both_directions_are_kept_in_their_order(plain: Tap, file: Path) -> None:
    wanted = []
    for number in range(200):
        from_guest = bytes(Ether(src=GUEST, dst=HOST) / ARP(psrc=f"10.9.8.{number}"))
        to_guest = bytes(Ether(src=HOST, dst=GUEST, type=0x88B5) / number.to_bytes(46, "big"))
        os.write(plain._fds[0], from_guest)
        plain.packets.send(to_guest)
        wanted += [(from_guest, len(from_guest), INBOUND), (to_guest, len(to_guest), OUTBOUND)]
    assert plain.captured() == (200, 200)
    plain.close()
    assert frames(file) == wanted


def test_a_tag_is_where_it_was(plain: Tap, file: Path) -> None:
    tagged = bytes(Ether(src=GUEST, dst=HOST) / Dot1Q(vlan=7, prio=3, type=0x88B5) / bytes(46))
    os.write(plain._fds[0], tagged)
    plain.close()
    assert [data for data, *_ in frames(file)] == [tagged]


def test_a_frame_that_was_never_cut_is_kept_as_it_crosses(file: Path) -> None:
    with Tap(name="whole") as tap:
        tap.capture(file)
        payload = bytes(range(256)) * 160
        frame = bytes(Ether(src=GUEST, dst=HOST) / IP(src="10.9.8.1", dst="10.9.8.2") / TCP(flags="A") / payload)
        header = struct.pack("<BBHHHH", NEEDS_CSUM, GSO_TCPV4, len(frame) - len(payload), MSS, TCP_AT, CHECKSUM_AT)
        os.write(tap._fds[0], header + frame)
        os.write(tap._fds[0], NO_HEADER + bytes(Ether(src=GUEST, dst=HOST) / ARP()))
        assert tap.captured() == (0, 2)
    (kept, length, _), (short, *_) = frames(file)
    assert (kept, length) == (frame[:KEPT], len(frame))
    assert Ether(short).haslayer(ARP)


def test_the_file_says_how_many_frames_are_missing(plain: Tap, file: Path) -> None:
    os.write(plain._fds[0], bytes(Ether(src=GUEST, dst=HOST) / ARP()))
    plain.close()
    data = file.read_bytes()
    size = int.from_bytes(data[-4:], "little")
    block = data[-size:]
    assert int.from_bytes(block[:4], "little") == STATISTICS
    # Two options of eight bytes each, frames seen and frames missing; then the end of options.
    assert struct.unpack("<HHQHHQHH", block[20:-4]) == (4, 8, 1, 5, 8, 0, 0, 0)


def test_one_that_is_measured_is_not_captured(file: Path) -> None:
    with Tap(captured=False) as tap:
        tap.capture(file)
        assert tap.captured() is None
    assert not file.exists()
