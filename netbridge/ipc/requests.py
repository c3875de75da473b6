"""What a client may ask for while its session runs, and the answer: which frames it wants, and the MAC address.

A request carries a number, which the answer repeats. There is one at a time. The layouts are those of docs/port.md.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from netbridge.ipc._record import NamedTuple
from netbridge.ipc.form import Kind, cut, message, must, printable

MAC_BYTES = 6
MOST_ADDRESSES = 64
VLANS = 4095  # ids 0 to 4094; 4095 is reserved (IEEE 802.1Q)

_FILTER = struct.Struct("<IHBB384s512s")
_MAC = struct.Struct("<I6sHI")
_ANSWER = struct.Struct("<IHH104s")


class Verdict(IntEnum):
    """What became of a request."""

    DONE = 0
    NOT_OFFERED = 1  # the device lacks what it takes
    INVALID = 2  # what was asked for can never be
    REFUSED = 3  # the device said no
    FAILED = 4  # the device did not answer, or wrongly; it is being reset


class Filter(NamedTuple):
    """Client to driver: which frames it wants, all of it, in the place of what it wanted before. Addresses are of 6
    bytes, MOST_ADDRESSES in all; `vlans` are ids. At first a client gets every frame (`promiscuous`)."""

    request: int = 0
    promiscuous: bool = False
    all_multicast: bool = False
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: tuple[bytes, ...] = ()  # besides the device's own
    multicast: tuple[bytes, ...] = ()
    vlans: frozenset[int] = frozenset()

    @property
    def modes(self) -> tuple[bool, ...]:
        """The six receive modes, in the order of virtio 1.3 §5.1.6.5.1."""
        return tuple(self[1:7])

    def why_invalid(self) -> str:
        """What cannot be wanted; empty when all is well."""
        for address in (*self.unicast, *self.multicast):
            if len(address) != MAC_BYTES:
                return f"a MAC address has {MAC_BYTES} bytes, not {len(address)}"
        for address in self.unicast:
            if not is_station(address):
                return f"{address.hex(':')} is no station's address"
        for address in self.multicast:
            if not address[0] & 1:
                return f"{address.hex(':')} is no multicast address"
        for vlan in self.vlans:
            if not 0 <= vlan < VLANS:
                return f"VLAN {vlan} is not from 0 to {VLANS - 1}"
        return ""

    def pack(self) -> bytes:
        """Raises ValueError for what does not fit the message."""
        addresses = (*self.unicast, *self.multicast)
        if len(addresses) > MOST_ADDRESSES:
            raise ValueError(f"{len(addresses)} addresses: {MOST_ADDRESSES} at most")
        if any(len(address) != MAC_BYTES for address in addresses):
            raise ValueError(self.why_invalid())
        if any(not 0 <= vlan <= VLANS for vlan in self.vlans):
            raise ValueError(self.why_invalid())
        flags = sum(on << bit for bit, on in enumerate(self.modes))
        bits = sum(1 << vlan for vlan in self.vlans).to_bytes(512, "little")
        counts = (len(self.unicast), len(self.multicast))
        return message(Kind.FILTER, _FILTER.pack(self.request, flags, *counts, b"".join(addresses), bits))

    @classmethod
    def _unpack(cls, body: bytes) -> Filter:
        request, flags, unicast, multicast, packed, bits = _FILTER.unpack(body)
        must(not flags >> 6, f"unknown receive modes {flags:#x}")
        count = unicast + multicast
        must(count <= MOST_ADDRESSES, f"{count} addresses, {MOST_ADDRESSES} at most")
        must(not any(packed[count * MAC_BYTES :]), "the place of an address that is not there is not zero")
        addresses = tuple(packed[at : at + MAC_BYTES] for at in range(0, count * MAC_BYTES, MAC_BYTES))
        vlans = frozenset(
            8 * place + bit for place, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1
        )
        promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast = (
            bool(flags >> bit & 1) for bit in range(6)
        )
        return cls(
            request,
            *(promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast),
            unicast=addresses[:unicast],
            multicast=addresses[unicast:],
            vlans=vlans,
        )


class Mac(NamedTuple):
    """Client to driver: the device shall have this MAC address from now on."""

    request: int
    mac: bytes

    def pack(self) -> bytes:
        """Raises ValueError unless the address has 6 bytes."""
        if len(self.mac) != MAC_BYTES:
            raise ValueError(f"a MAC address has {MAC_BYTES} bytes, not {len(self.mac)}")
        return message(Kind.MAC, _MAC.pack(self.request, self.mac, 0, 0))

    @classmethod
    def _unpack(cls, body: bytes) -> Mac:
        request, mac, *reserved = _MAC.unpack(body)
        must(not any(reserved), "reserved field is not zero")
        return cls(request, mac)


class Answer(NamedTuple):
    """Driver to client: what became of request number `request`. `text`: a few words for a person."""

    request: int
    verdict: Verdict
    text: str = ""

    def pack(self) -> bytes:
        return message(Kind.ANSWER, _ANSWER.pack(self.request, self.verdict, 0, cut(self.text, 104)))

    @classmethod
    def _unpack(cls, body: bytes) -> Answer:
        request, verdict, reserved, padded = _ANSWER.unpack(body)
        must(reserved == 0, "reserved field is not zero")
        must(verdict in Verdict._value2member_map_, f"unknown verdict {verdict}")
        return cls(request, Verdict(verdict), printable(padded))


def is_station(address: bytes) -> bool:
    """Whether this is the address of one station: neither a group's nor none."""
    return not address[0] & 1 and any(address)


# What may come, and how long its body is.
BODIES: dict[int, tuple[type[Filter | Mac | Answer], int]] = {
    Kind.FILTER: (Filter, _FILTER.size),
    Kind.MAC: (Mac, _MAC.size),
    Kind.ANSWER: (Answer, _ANSWER.size),
}
