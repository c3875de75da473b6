"""The control messages: fixed little-endian structs, one to a packet.

`parse` takes bytes from a stranger and returns one of the message types or raises BadMessage; nothing else. The
layouts are those of docs/port.md, byte for byte.
"""

from __future__ import annotations

import struct

from netbridge.ipc import requests
from netbridge.ipc._record import NamedTuple
from netbridge.ipc.errors import BadMessage, Reason
from netbridge.ipc.form import HEADER, MAGIC, VERSION, Kind, cut, message, must, printable
from netbridge.ipc.geometry import Geometry, RegionGeometry, RingGeometry
from netbridge.ipc.offloads import ALL_OFFLOADS

LONGEST_MESSAGE = 1024
# An entry has 8 bits for the queue pair's number.
MOST_PAIRS = 256

# What WELCOME brings along as SCM_RIGHTS, in this order.
FD_NAMES = ("rings memfd", "rx memfd", "tx memfd", "client doorbell", "driver doorbell")

DEFAULT_SOCKET = "/run/netbridge/aethernet.sock"
DEFAULT_MTU = 1500
LEAST_MTU, MOST_MTU = 68, 65535

_HELLO = struct.Struct("<HHIQ32s")
_FACTS = struct.Struct("<6sHII")
_RING = struct.Struct("<QII")
_REGION = struct.Struct("<QIIII")
_WELCOME = struct.Struct("<HHIIIQQII")
_BYE = struct.Struct("<II104s")

_LINK_UP, _ANNOUNCE = 1, 2
_READ_ONLY = 1

_NAME_BYTES = 32
_NAME_ALPHABET = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

_NAME_RULE = f"wanted 1 to {_NAME_BYTES} letters, digits, '.', '_' or '-'"


class Facts(NamedTuple):
    """What a stack must know of the device, and what may change while a session lasts. `mac`: 6 bytes. `mtu`: bytes of
    payload after the Ethernet header. `speed_mbps`: 0 when it is not known. `announce`: the network is to hear of the
    station now (a gratuitous ARP, say), since it may have moved."""

    mac: bytes
    mtu: int = DEFAULT_MTU
    link_up: bool = True
    speed_mbps: int = 0
    announce: bool = False

    def check(self) -> None:
        """Raises ValueError when a value is not one that a device can have."""
        if len(self.mac) != 6:
            raise ValueError(f"a MAC address has 6 bytes, not {len(self.mac)}")
        if not LEAST_MTU <= self.mtu <= MOST_MTU:
            raise ValueError(f"MTU {self.mtu} is not between {LEAST_MTU} and {MOST_MTU}")
        if not 0 <= self.speed_mbps < 1 << 32:
            raise ValueError(f"speed {self.speed_mbps} Mbit/s is not a 32-bit number")

    def pack(self) -> bytes:
        flags = (_LINK_UP if self.link_up else 0) | (_ANNOUNCE if self.announce else 0)
        return _FACTS.pack(self.mac, flags, self.mtu, self.speed_mbps)

    @classmethod
    def unpack(cls, data: bytes) -> Facts:
        mac, flags, mtu, speed = _FACTS.unpack(data)
        must(not flags & ~(_LINK_UP | _ANNOUNCE), f"unknown link flags {flags:#x}")
        must(LEAST_MTU <= mtu <= MOST_MTU, f"MTU {mtu} is not between {LEAST_MTU} and {MOST_MTU}")
        return cls(mac, mtu, bool(flags & _LINK_UP), speed, bool(flags & _ANNOUNCE))


class Hello(NamedTuple):
    """Client to driver, first. `offloads`: a bit set of what the client can take, `Offload` and bits unknown here."""

    name: str
    version_min: int = VERSION
    version_max: int = VERSION
    offloads: int = 0

    def pack(self) -> bytes:
        """Raises ValueError for a name that no client may have."""
        name = self.name.encode()
        if not _is_name(name):
            raise ValueError(f"client name {self.name!r}: {_NAME_RULE}")
        return message(Kind.HELLO, _HELLO.pack(self.version_min, self.version_max, 0, self.offloads, name))

    @classmethod
    def _unpack(cls, body: bytes) -> Hello:
        least, most, reserved, offloads, padded = _HELLO.unpack(body)
        must(1 <= least <= most, f"version range {least} to {most}")
        must(reserved == 0, "reserved field is not zero")
        name = padded.rstrip(b"\0")
        must(_is_name(name), f"client name: {_NAME_RULE}")
        return cls(name.decode("ascii"), least, most, offloads)


class Welcome(NamedTuple):
    """Driver to client, with the file descriptors of `FD_NAMES`. `session` is part of every handle; `offloads` is what
    the session has, a subset of HELLO's; `queue_pairs` is how many of them the device has."""

    session: int
    facts: Facts
    geometry: Geometry
    offloads: int = 0
    queue_pairs: int = 1

    def pack(self) -> bytes:
        geometry = self.geometry
        body = self.facts.pack()
        body += _WELCOME.pack(
            self.session,
            self.queue_pairs,
            geometry.headroom,
            geometry.continuation_offset,
            geometry.rx_limit,
            self.offloads,
            geometry.rings_size,
            geometry.tx_largest,
            geometry.tx_pieces,
        )
        for ring in geometry.rings:
            body += _RING.pack(ring.offset, ring.slots, 0)
        for region in (geometry.rx, geometry.tx):
            body += _REGION.pack(region.size, region.buffers, region.stride, _READ_ONLY if region.read_only else 0, 0)
        return message(Kind.WELCOME, body)

    @classmethod
    def _unpack(cls, body: bytes) -> Welcome:
        at = _FACTS.size
        facts = Facts.unpack(body[:at])
        session, pairs, headroom, continuation, rx_limit, offloads, rings_size, tx_largest, tx_pieces = (
            _WELCOME.unpack_from(body, at)
        )
        must(session != 0, "session number is 0")
        must(1 <= pairs <= MOST_PAIRS, f"{pairs} queue pairs, not 1 to {MOST_PAIRS}")
        must(not offloads & ~ALL_OFFLOADS, f"unknown offloads {offloads & ~ALL_OFFLOADS:#x}")
        at += _WELCOME.size
        rings = []
        for _ in range(4):
            offset, slots, reserved = _RING.unpack_from(body, at)
            must(reserved == 0, "reserved field is not zero")
            rings.append(RingGeometry(offset, slots))
            at += _RING.size
        regions = []
        for _ in range(2):
            size, buffers, stride, flags, reserved = _REGION.unpack_from(body, at)
            must(reserved == 0, "reserved field is not zero")
            must(not flags & ~_READ_ONLY, f"unknown region flags {flags:#x}")
            regions.append(RegionGeometry(size, buffers, stride, bool(flags & _READ_ONLY)))
            at += _REGION.size
        rx_active, rx_free, tx_active, tx_done = rings
        rx, tx = regions
        geometry = Geometry(
            *(rings_size, rx_active, rx_free, tx_active, tx_done, rx, tx),
            *(headroom, continuation, rx_limit, tx_largest, tx_pieces),
        )
        return cls(session, facts, geometry, offloads, pairs)


class Ready(NamedTuple):
    """Client to driver: everything is mapped and checked; frames may flow."""

    def pack(self) -> bytes:
        return message(Kind.READY, b"")

    @classmethod
    def _unpack(cls, _body: bytes) -> Ready:
        return cls()


class Link(NamedTuple):
    """Driver to client: the facts as they are now, all of them, whenever one has changed."""

    facts: Facts

    def pack(self) -> bytes:
        return message(Kind.LINK, self.facts.pack())

    @classmethod
    def _unpack(cls, body: bytes) -> Link:
        return cls(Facts.unpack(body))


class Bye(NamedTuple):
    """Either way, last. `text`: a few words for a person; cut to 104 bytes of UTF-8, and of what arrives only printable
    characters are kept."""

    reason: Reason
    text: str = ""

    def pack(self) -> bytes:
        return message(Kind.BYE, _BYE.pack(self.reason, 0, cut(self.text, 104)))

    @classmethod
    def _unpack(cls, body: bytes) -> Bye:
        reason, reserved, padded = _BYE.unpack(body)
        must(reserved == 0, "reserved field is not zero")
        return cls(Reason(reason), printable(padded))


Message = Hello | Welcome | Ready | Link | Bye | requests.Filter | requests.Mac | requests.Answer

_BODIES: dict[int, tuple[type[Message], int]] = {
    Kind.HELLO: (Hello, _HELLO.size),
    Kind.WELCOME: (Welcome, _FACTS.size + _WELCOME.size + 4 * _RING.size + 2 * _REGION.size),
    Kind.READY: (Ready, 0),
    Kind.LINK: (Link, _FACTS.size),
    Kind.BYE: (Bye, _BYE.size),
    **requests.BODIES,
}


def parse(data: bytes) -> Message:
    """The message that these bytes are. Raises BadMessage, which says what is wrong and with which reason to refuse."""
    must(len(data) >= HEADER.size, f"{len(data)} bytes are too few for a header of {HEADER.size}")
    magic, kind, version, length, reserved = HEADER.unpack_from(data)
    must(magic == MAGIC, f"magic {magic:#010x} instead of {MAGIC:#010x}")
    if version != VERSION:
        raise BadMessage(f"message of version {version}; this side speaks {VERSION}", Reason.VERSION)
    must(reserved == 0, "reserved field is not zero")
    must(kind in _BODIES, f"unknown message type {kind}")
    must(length == len(data), f"header says {length} bytes, the packet has {len(data)}")
    cls, size = _BODIES[kind]
    must(length == HEADER.size + size, f"{Kind(kind).name} of {length} bytes instead of {HEADER.size + size}")
    return cls._unpack(data[HEADER.size :])


def common_version(hello: Hello) -> int:
    """The highest version both sides speak. Raises BadMessage (Reason.VERSION) when there is none."""
    if not hello.version_min <= VERSION <= hello.version_max:
        raise BadMessage(
            f"the client speaks versions {hello.version_min} to {hello.version_max}, the driver {VERSION}",
            Reason.VERSION,
        )
    return VERSION


def _is_name(name: bytes) -> bool:
    return 1 <= len(name) <= _NAME_BYTES and _NAME_ALPHABET.issuperset(name)
