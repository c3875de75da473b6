"""What a driver can ask of a network device over the control queue (virtio 1.3 §5.1.6.5), as plain data.

A command is a class, a number in it, and bytes. Each function here makes one; `needs` is the feature that must be
agreed for it. What carries them is control.py.
"""

from __future__ import annotations

import struct

from netbridge.virtio import features
from netbridge.virtio.features import Feature
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Command(NamedTuple):
    """One command, ready to be carried."""

    name: str  # for messages
    number_of_class: int
    number: int
    data: bytes
    needs: Feature

    def pack(self) -> bytes:
        """What the device reads: class, command, data."""
        return bytes((self.number_of_class, self.number)) + self.data


# ---- Receive modes (§5.1.6.5.1)

# Of each mode: its number, and the feature that brings it.
_MODES = {
    "promiscuous": (0, features.CTRL_RX),
    "all multicast": (1, features.CTRL_RX),
    "all unicast": (2, features.CTRL_RX_EXTRA),
    "no multicast": (3, features.CTRL_RX_EXTRA),
    "no unicast": (4, features.CTRL_RX_EXTRA),
    "no broadcast": (5, features.CTRL_RX_EXTRA),
}
RECEIVE_MODES = tuple(_MODES)


def receive_mode(mode: str, on: bool) -> Command:
    """One of RECEIVE_MODES on or off."""
    number, needs = _MODES[mode]
    return Command(f"{mode} {'on' if on else 'off'}", 0, number, bytes([on]), needs)


# ---- Addresses and VLANs (§5.1.6.5.2, §5.1.6.5.3)


def mac_table(unicast: Sequence[bytes], multicast: Sequence[bytes]) -> Command:
    """Frames to these addresses are received, besides those to the device's own. Replaces the tables there were."""
    data = b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast))
    return Command(f"MAC table of {len(unicast)} + {len(multicast)}", 1, 0, data, features.CTRL_RX)


def mac_address(mac: bytes) -> Command:
    """The device's own address, in one command, so that nobody sees half of it."""
    return Command(f"MAC address {mac.hex(':')}", 1, 1, mac, features.CTRL_MAC_ADDR)


def vlan(number: int, wanted: bool) -> Command:
    """Frames of this VLAN are received, or are not any more."""
    data = struct.pack("<H", number)
    return Command(f"VLAN {number} {'on' if wanted else 'off'}", 2, 0 if wanted else 1, data, features.CTRL_VLAN)


# ---- Announcements, queue pairs, receive-side scaling (§5.1.6.5.4 to §5.1.6.5.7)


def announced() -> Command:
    """The driver has seen that it is to announce itself."""
    return Command("announcement seen", 3, 0, b"", features.GUEST_ANNOUNCE)


def queue_pairs(pairs: int) -> Command:
    """The device steers flows among so many pairs, by itself."""
    return Command(f"{pairs} queue pairs", 4, 0, struct.pack("<H", pairs), features.MQ)


# Hash types (§5.1.6.4.3.1).
HASH_IPV4, HASH_TCPV4, HASH_UDPV4, HASH_IPV6, HASH_TCPV6, HASH_UDPV6 = (1 << bit for bit in range(6))
HASH_TYPES = HASH_IPV4 | HASH_TCPV4 | HASH_UDPV4 | HASH_IPV6 | HASH_TCPV6 | HASH_UDPV6


def rss(pairs: int, hash_types: int, key: bytes, table: Sequence[int]) -> Command:
    """Received frames go to the pair that `table`, as long as a power of two, has at their hash; those without a hash
    to the first. Sets the number of pairs as well."""
    data = struct.pack(f"<IHH{len(table)}HHB", hash_types, len(table) - 1, 0, *table, pairs, len(key)) + key
    return Command(f"RSS over {pairs} queue pairs", 4, 1, data, features.RSS)


# ---- Offloads (§5.1.6.5.8)


def guest_offloads(offloads: int) -> Command:
    """The receive offloads in use, as a mask of feature bits: a subset of those agreed."""
    return Command("receive offloads", 5, 0, struct.pack("<Q", offloads), features.CTRL_GUEST_OFFLOADS)
