"""The frames that go through Net-Bridge end to end, and what has to come back.

Every frame is unlike every other (a sequence number is part of it), so one that comes back twice is told from two that
came back once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

SHORTEST, LONGEST = 60, 1514  # bytes of an Ethernet frame without its check sequence
BURST = 256
HOST_MAC = "52:54:00:00:00:fe"
HOST_IP, GUEST_IP = "192.0.2.1", "192.0.2.2"  # TEST-NET-1 (RFC 5737)
UDP_PORT, UDP_PROTOCOL = 40000, 17
RAW_ETHERTYPE = 0x88B5  # for local experiments (IEEE 802)


@dataclass(frozen=True)
class Phase:
    """Frames of one kind, sent with at most `window` unanswered: 1 is one at a time."""

    name: str
    frames: tuple[bytes, ...]
    window: int

    def bursts(self) -> Iterator[tuple[bytes, ...]]:
        """The frames as they are sent: whole for singles, else cut into bursts as large as the window."""
        length = len(self.frames) if self.window == 1 else self.window
        return (self.frames[start : start + length] for start in range(0, len(self.frames), length))


def reflected(frame: bytes) -> bytes:
    """What the echo service sends back for a frame: the same with its MAC addresses exchanged."""
    return frame[6:12] + frame[:6] + frame[12:]


def source_port(frame: bytes) -> bytes:
    """Which of a Generator's flows the frame belongs to: that of its UDP port, or the one of all that is not UDP."""
    return frame[34:36] if frame[12:14] == b"\x08\x00" and frame[23] == UDP_PROTOCOL else b""


def every_size() -> Iterator[int]:
    """All lengths of an untagged Ethernet frame, then from the start again."""
    return itertools.cycle(range(SHORTEST, LONGEST + 1))


class Generator:
    """Makes frames to the NIC with this MAC address."""

    def __init__(self, nic_mac: str) -> None:
        self._ether = Ether(dst=nic_mac, src=HOST_MAC)
        self._sequence = itertools.count()

    def arp(self, count: int) -> tuple[bytes, ...]:
        """ARP requests, each for another address."""
        return tuple(
            self._fill(self._ether / ARP(op="who-has", psrc=HOST_IP, hwsrc=HOST_MAC, pdst=f"198.51.{i >> 8}.{i & 255}"))
            for i in itertools.islice(self._sequence, count)
        )

    def icmp(self, count: int) -> tuple[bytes, ...]:
        """Echo requests of every size."""
        head = self._ether / IP(src=HOST_IP, dst=GUEST_IP)
        return tuple(
            self._fill(head / ICMP(id=i >> 16, seq=i & 0xFFFF), size) for i, size in self._numbered_sizes(count)
        )

    def udp(self, count: int, ports: Sequence[int] = (UDP_PORT,)) -> tuple[bytes, ...]:
        """UDP datagrams of every size, from these ports in turns."""
        heads = [self._ether / IP(src=HOST_IP, dst=GUEST_IP) / UDP(sport=port, dport=7) for port in ports]
        return tuple(
            self._fill(heads[i % len(heads)], size, i.to_bytes(4, "big")) for i, size in self._numbered_sizes(count)
        )

    def raw(self, count: int) -> tuple[bytes, ...]:
        """Frames of no known protocol, of every size."""
        head = Ether(dst=self._ether.dst, src=HOST_MAC, type=RAW_ETHERTYPE)
        return tuple(self._fill(head, size, i.to_bytes(4, "big")) for i, size in self._numbered_sizes(count))

    def _numbered_sizes(self, count: int) -> Iterator[tuple[int, int]]:
        return zip(itertools.islice(self._sequence, count), every_size(), strict=False)

    @staticmethod
    def _fill(packet: Any, size: int = SHORTEST, payload: bytes = b"") -> bytes:
        """The packet's bytes, filled up to `size` with a pattern that shows where a byte was displaced to."""
        missing = size - len(packet) - len(payload)
        pattern = bytes(itertools.islice(itertools.cycle(range(251)), max(0, missing)))
        return bytes(packet / Raw(payload + pattern)) if payload or pattern else bytes(packet)


def full_mix(nic_mac: str) -> tuple[Phase, ...]:
    """ARP, ICMP, UDP and raw frames of every size from 60 to 1514 bytes, singly and in bursts of 256."""
    make = Generator(nic_mac)
    sizes = LONGEST - SHORTEST + 1
    in_bursts = -(-sizes // BURST) * BURST
    return (
        Phase("ARP, one at a time", make.arp(64), 1),
        Phase("raw, every size, one at a time", make.raw(sizes), 1),
        Phase("ICMP echo, one at a time", make.icmp(256), 1),
        Phase("ARP, a burst of 256", make.arp(BURST), BURST),
        Phase("ICMP echo, every size, bursts of 256", make.icmp(in_bursts), BURST),
        Phase("UDP, every size, bursts of 256", make.udp(in_bursts), BURST),
        Phase("raw, every size, bursts of 256", make.raw(in_bursts), BURST),
    )
