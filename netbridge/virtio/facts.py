"""What a network device says of itself: struct virtio_net_config (virtio 1.3 §5.1.4), read and checked.

Nothing of it is believed before it was checked, and nothing is read that no agreed feature vouches for. The outcome is
plain data, `NetFacts`.
"""

from __future__ import annotations

import os

from netbridge.virtio import features
from netbridge.virtio.errors import Misbehaved
from netbridge.virtio.transport import ConfigField, Transport, read_consistently
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from netbridge.virtio.negotiation import Negotiation

HEADER_BYTES = 12  # struct virtio_net_hdr with num_buffers, as VERSION_1 always has it (§5.1.6)
ETHERNET_HEADER_BYTES = 14
DEFAULT_MTU = 1500
SMALLEST_MTU = 68  # §5.1.4.1
LONGEST_UNCUT = 65550  # a frame whose payload is a whole IP packet of 65,535 bytes, rounded up (§5.1.6.3.1)
LARGEST_PAIRS = 0x8000  # §5.1.4.1
LINK_UP, ANNOUNCE = 1, 2  # VIRTIO_NET_S_LINK_UP, VIRTIO_NET_S_ANNOUNCE
LEAST_KEY, LEAST_TABLE = 40, 128  # of receive-side scaling (§5.1.4.1)
FASTEST, UNKNOWN_SPEED, UNKNOWN_DUPLEX = 0x7FFFFFFF, 0xFFFFFFFF, 0xFF  # §5.1.4.1

MAC_FIELD = ConfigField("mac", 0, 1, 6)
STATUS_FIELD = ConfigField("status", 6, 2)
PAIRS_FIELD = ConfigField("max_virtqueue_pairs", 8, 2)
MTU_FIELD = ConfigField("mtu", 10, 2)
SPEED_FIELD = ConfigField("speed", 12, 4)
DUPLEX_FIELD = ConfigField("duplex", 16, 1)
KEY_FIELD = ConfigField("rss_max_key_size", 17, 1)
TABLE_FIELD = ConfigField("rss_max_indirection_table_length", 18, 2)
HASHES_FIELD = ConfigField("supported_hash_types", 20, 4)


class LinkState(NamedTuple):
    """What may change while the device is in service."""

    up: bool = True  # also where the device does not tell (§5.1.4.2)
    speed_mbps: int = 0  # 0: not known
    duplex: int = UNKNOWN_DUPLEX  # 0: half, 1: full, else not known
    announce: bool = False  # the driver is to announce itself, and to say that it has seen this (§5.1.6.5.4)


class RssLimits(NamedTuple):
    """What the device can do of receive-side scaling."""

    key_bytes: int
    table_entries: int
    hash_types: int


class NetFacts(NamedTuple):
    """What the device says of itself, checked, as of `configure`."""

    mac: bytes  # six bytes
    mac_is_local: bool  # the device gave none, so this one was made up (locally administered)
    mtu: int  # the device's, or 1500 where it names none
    link: LinkState
    max_queue_pairs: int
    header_bytes: int  # of the virtio header in front of every frame, both ways
    smallest_rx_buffer: int  # bytes, header included, that every receive buffer must have (§5.1.6.3.1)
    rss: RssLimits | None = None  # where RSS is agreed

    @property
    def mac_text(self) -> str:
        return self.mac.hex(":")

    @property
    def largest_frame(self) -> int:
        """Bytes of the longest untagged frame, Ethernet header included, that may be sent."""
        return self.mtu + ETHERNET_HEADER_BYTES


def read_facts(transport: Transport, agreed: Negotiation, local_mac: bytes) -> NetFacts:
    """Reads the configuration as the agreed features allow. `local_mac` is for a device that has none of its own.

    Raises Misbehaved for what no device may say, ConfigUnstable when it never holds still.
    """
    name = transport.name
    fields = _link_fields(agreed)
    if agreed.has(features.MAC):
        fields.append(MAC_FIELD)
    # For this one it is enough that it is offered: it is told, not used.
    if agreed.was_offered(features.MQ) or agreed.was_offered(features.RSS):
        fields.append(PAIRS_FIELD)
    if agreed.has(features.MTU):
        fields.append(MTU_FIELD)
    if agreed.has(features.RSS):
        fields += [KEY_FIELD, TABLE_FIELD, HASHES_FIELD]
    values = read_consistently(transport, fields) if fields else {}

    (pairs,) = values.get("max_virtqueue_pairs", (1,))
    (mtu,) = values.get("mtu", (DEFAULT_MTU,))
    if not 1 <= pairs <= LARGEST_PAIRS:
        raise Misbehaved(f"{name}: max_virtqueue_pairs is {pairs}, not from 1 to {LARGEST_PAIRS}")
    if mtu < SMALLEST_MTU:
        raise Misbehaved(f"{name}: its MTU is {mtu}, less than {SMALLEST_MTU}; turn off MTU to work without it")
    mac = bytes(values["mac"]) if "mac" in values else local_mac
    if mac[0] & 1 or not any(mac):
        raise Misbehaved(
            f"{name}: its MAC address {mac.hex(':')} belongs to no single station; turn off MAC to have one made up"
        )
    frame = max(mtu, DEFAULT_MTU) + ETHERNET_HEADER_BYTES
    if any(agreed.has(item) for item in features.RX_SEGMENTATION):
        frame = max(frame, LONGEST_UNCUT)
    return NetFacts(
        mac=mac,
        mac_is_local="mac" not in values,
        mtu=mtu,
        link=_link(name, values, agreed),
        max_queue_pairs=pairs,
        header_bytes=HEADER_BYTES,
        smallest_rx_buffer=HEADER_BYTES if agreed.has(features.MRG_RXBUF) else HEADER_BYTES + frame,
        rss=_rss_limits(name, values) if agreed.has(features.RSS) else None,
    )


def read_link(transport: Transport, agreed: Negotiation) -> LinkState:
    """The link as it is now. Raises Misbehaved, ConfigUnstable."""
    fields = _link_fields(agreed)
    return _link(transport.name, read_consistently(transport, fields) if fields else {}, agreed)


def _link_fields(agreed: Negotiation) -> list[ConfigField]:
    fields = []
    if agreed.has(features.STATUS):
        fields.append(STATUS_FIELD)
    if agreed.has(features.SPEED_DUPLEX):
        fields += [SPEED_FIELD, DUPLEX_FIELD]
    return fields


def _link(name: str, values: dict[str, tuple[int, ...]], agreed: Negotiation) -> LinkState:
    (status,) = values.get("status", (LINK_UP,))
    (speed,) = values.get("speed", (UNKNOWN_SPEED,))
    if speed > FASTEST and speed != UNKNOWN_SPEED:
        raise Misbehaved(
            f"{name}: its speed is {speed:#x}, neither a number of Mbit/s nor {UNKNOWN_SPEED:#x} for not known; turn "
            "off SPEED_DUPLEX to work without it"
        )
    (duplex,) = values.get("duplex", (UNKNOWN_DUPLEX,))
    return LinkState(
        up=bool(status & LINK_UP),
        speed_mbps=0 if speed == UNKNOWN_SPEED else speed,
        duplex=duplex,
        # A wish that only an agreed feature lets it have (§5.1.4.2).
        announce=bool(status & ANNOUNCE) and agreed.has(features.GUEST_ANNOUNCE),
    )


def _rss_limits(name: str, values: dict[str, tuple[int, ...]]) -> RssLimits:
    """§5.1.4.1: a key of 40 bytes, a table of 128 entries at least."""
    (key,), (table,) = values[KEY_FIELD.name], values[TABLE_FIELD.name]
    (hashes,) = values[HASHES_FIELD.name]
    if key < LEAST_KEY or table < LEAST_TABLE:
        raise Misbehaved(
            f"{name}: its hash key has {key} bytes and its indirection table {table} entries; at least {LEAST_KEY} and "
            f"{LEAST_TABLE} are expected; turn off RSS to work without it"
        )
    return RssLimits(key, table, hashes)


def made_up_mac() -> bytes:
    """A random locally administered address of one station, for a device that has none (§5.1.4.2)."""
    random = os.urandom(6)
    return bytes([random[0] & 0xFC | 0x02]) + random[1:]
