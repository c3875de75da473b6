"""Frames of every kind that DPDK's suites for packet types, tunnels, VLANs and QinQ know, and some more.

To the driver they are all one kind, which is what is to be shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from scapy.contrib.geneve import GENEVE
from scapy.contrib.lldp import LLDPDU, LLDPDUChassisID, LLDPDUEndOfLLDPDU, LLDPDUPortID, LLDPDUTimeToLive
from scapy.contrib.mpls import MPLS
from scapy.contrib.nsh import NSH
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, GRE, LLC, SNAP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.layers.sctp import SCTP
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from tests.e2e.traffic import HOST_MAC, RAW_ETHERTYPE

V4 = IP(src="192.0.2.1", dst="192.0.2.2")
V6 = IPv6(src="2001:db8::1", dst="2001:db8::2")
INNER = Ether(dst="52:54:00:00:00:0b", src="52:54:00:00:00:0a")
UDP_4, UDP_6 = V4 / UDP(sport=4000, dport=7), V6 / UDP(sport=4000, dport=7)
TCP_4, TCP_6 = V4 / TCP(sport=4000, dport=7, flags="PA"), V6 / TCP(sport=4000, dport=7, flags="PA")

# After the Ethernet header.
PAYLOADS: dict[str, dict[str, Packet]] = {
    "L2": {
        "ARP": ARP(pdst="192.0.2.2"),
        "LLDP": LLDPDU()
        / LLDPDUChassisID(subtype=4, id=bytes(6))
        / LLDPDUPortID(subtype=3, id=bytes(6))
        / LLDPDUTimeToLive(ttl=120)
        / LLDPDUEndOfLLDPDU(),
        "MPLS": MPLS(label=16, s=0) / MPLS(label=17, s=1) / UDP_4,
    },
    "IPv4": {
        "fragment": IP(src="192.0.2.1", dst="192.0.2.2", flags="MF", frag=0) / Raw(bytes(64)),
        "last fragment": IP(src="192.0.2.1", dst="192.0.2.2", frag=185, proto=17) / Raw(bytes(64)),
        "options": IP(src="192.0.2.1", dst="192.0.2.2", options=[IPOption_Router_Alert()]) / UDP(dport=7),
        "ICMP": V4 / ICMP(),
        "UDP": UDP_4,
        "UDP, checksum 0": V4 / UDP(dport=7, chksum=0),
        "TCP": TCP_4,
        "TCP SYN": V4 / TCP(flags="S", options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0))]),
        "SCTP": V4 / SCTP(sport=4000, dport=7),
        "no such protocol": IP(src="192.0.2.1", dst="192.0.2.2", proto=253),
        "a wrong checksum": IP(src="192.0.2.1", dst="192.0.2.2", chksum=0xBAD) / UDP(dport=7, chksum=0xBAD),
        "a wrong length": IP(src="192.0.2.1", dst="192.0.2.2", len=0xFFFF) / UDP(dport=7, len=0xFFFF),
    },
    "IPv6": {
        "UDP": UDP_6,
        "TCP": TCP_6,
        "SCTP": V6 / SCTP(sport=4000, dport=7),
        "ICMP": V6 / ICMPv6EchoRequest(),
        "neighbour": V6 / ICMPv6ND_NS(tgt="2001:db8::2"),
        "fragment": V6 / IPv6ExtHdrFragment(m=1) / UDP(dport=7),
        "extension headers": V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting() / TCP(dport=7),
    },
    "tunnels": {
        "IPv4 in IPv4": V4 / UDP_4,
        "IPv6 in IPv4": V4 / UDP_6,
        "IPv4 in IPv6": V6 / UDP_4,
        "IPv6 in IPv6": V6 / TCP_6,
        "GENEVE": V4 / UDP(dport=6081) / GENEVE(vni=7) / INNER / UDP_4,
    },
    "GRE": {
        "IPv4": V4 / GRE() / UDP_4,
        "IPv6": V6 / GRE() / TCP_6,
        "key, checksum, sequence number": V4
        / GRE(key_present=1, key=7, chksum_present=1, seqnum_present=1, sequence_number=9)
        / UDP_4,
        "Ethernet": V4 / GRE(proto=0x6558) / INNER / UDP_6,
        "NVGRE": V4 / GRE(proto=0x6558, key_present=1, key=0x1234500) / INNER / TCP_4,
    },
    "NSH": {
        "IPv4": NSH(mdtype=1, nextproto=1, spi=42, si=255) / UDP_4,
        "IPv6": NSH(mdtype=1, nextproto=2, spi=42, si=255) / UDP_6,
        "Ethernet": NSH(mdtype=1, nextproto=3, spi=42, si=255) / INNER / TCP_4,
    },
    "VXLAN": {
        "IPv4": V4 / UDP(dport=4789) / VXLAN(vni=7) / INNER / UDP_4,
        "IPv6": V6 / UDP(dport=4789) / VXLAN(vni=7) / INNER / TCP_6,
        "with a VLAN inside": V4 / UDP(dport=4789) / VXLAN(vni=7) / INNER / Dot1Q(vlan=3) / UDP_4,
        "GPE with NSH": V4
        / UDP(dport=4790)
        / VXLAN(flags="NextProtocol+Instance", vni=7, NextProtocol=4)
        / NSH()
        / UDP_4,
    },
    "VLAN": {
        "priority only": Dot1Q(vlan=0, prio=5) / UDP_4,
        "one tag": Dot1Q(vlan=100) / TCP_4,
        "the last VLAN": Dot1Q(vlan=4094, prio=7, dei=1) / UDP_6,
        "reserved": Dot1Q(vlan=4095) / UDP_4,
    },
    "dual VLAN": {
        "802.1Q twice": Dot1Q(vlan=100) / Dot1Q(vlan=200) / UDP_4,
        "QinQ": Dot1AD(vlan=100) / Dot1Q(vlan=200) / UDP_6,
        "802.1ad twice": Dot1AD(vlan=100) / Dot1AD(vlan=200) / TCP_4,
        "three tags": Dot1AD(vlan=100) / Dot1Q(vlan=200) / Dot1Q(vlan=300) / TCP_6,
    },
}
KINDS = tuple(PAYLOADS)
QINQ_9100 = 0x9100  # the EtherType of a second tag before 802.1ad


def frames(kind: str, mac: str, longest: int) -> Iterator[bytes]:
    """Frames of this kind to `mac`, each short, of some length, and of `longest` bytes; no two alike."""
    numbers = itertools.count(1)
    for payload in _frames(kind, mac):
        for size in (len(payload) + 4, 1000, longest):
            filling = next(numbers).to_bytes(4, "big") + bytes(range(256)) * (size // 256 + 1)
            yield (payload + filling)[: max(size, len(payload) + 4)]


def _frames(kind: str, mac: str) -> Iterator[bytes]:
    ether = Ether(dst=mac, src=HOST_MAC)
    for payload in PAYLOADS[kind].values():
        yield bytes(ether / payload)
    if kind == "L2":
        yield bytes(Ether(dst=mac, src=HOST_MAC, type=RAW_ETHERTYPE))
        yield bytes(Dot3(dst=mac, src=HOST_MAC) / LLC(dsap=0x42, ssap=0x42, ctrl=3))
        yield bytes(Dot3(dst=mac, src=HOST_MAC) / LLC() / SNAP(OUI=0, code=0x0800) / UDP_4)
        yield bytes(Ether(dst=mac, src=HOST_MAC, type=0))
    if kind == "dual VLAN":
        tag = (100).to_bytes(2, "big") + (0x8100).to_bytes(2, "big") + (200).to_bytes(2, "big") + b"\x08\x00"
        yield bytes(Ether(dst=mac, src=HOST_MAC, type=QINQ_9100)) + tag + bytes(UDP_4)
