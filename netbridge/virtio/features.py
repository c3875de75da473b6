"""Feature bits as data: every feature a network device can have, in one table, and what this driver can be asked for.

What becomes of them is in negotiation.py. A bit is used as a mask through `Feature.mask` only, so that number and mask
cannot be taken for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from netbridge.errors import UsageError
from vfio._record import NamedTuple

LARGEST_BIT = 63  # the transports read 64 bits; virtio 1.3 has no feature of a network device beyond them


class Feature(NamedTuple):
    """One feature bit. `requires` lists what else must be agreed: all of the groups, and of each group any one."""

    name: str
    bit: int
    section: str  # of virtio 1.3
    meaning: str
    requires: tuple[tuple[str, ...], ...] = ()
    refused: str = ""  # why this driver never accepts it; empty for what it supports

    @property
    def mask(self) -> int:
        return 1 << self.bit

    def __str__(self) -> str:
        return self.name


_CONTROL = (("CTRL_VQ",),)
_NEVER_LEGACY = "only a legacy device uses it"
_NEVER_UFO = "Linux has given it up, and USO does what it was for"
_NEVER_COALESCED = "the pump polls while frames come, and asks for an interrupt only before it sleeps"
_NEVER_HASHED = "the port has no place for a frame's hash"

FEATURES: tuple[Feature, ...] = (
    Feature("CSUM", 0, "5.1.3", "the device completes partial checksums"),
    Feature("GUEST_CSUM", 1, "5.1.3", "the driver takes frames with partial checksums"),
    Feature("CTRL_GUEST_OFFLOADS", 2, "5.1.3", "receive offloads change at run time", _CONTROL),
    Feature("MTU", 3, "5.1.3", "the device tells the largest MTU"),
    Feature("MAC", 5, "5.1.3", "the device has a MAC address"),
    Feature("GSO", 6, "5.1.3.2", "any segmentation offload", refused=_NEVER_LEGACY),
    Feature("GUEST_TSO4", 7, "5.1.3", "the driver takes unsegmented TCP over IPv4", (("GUEST_CSUM",),)),
    Feature("GUEST_TSO6", 8, "5.1.3", "the driver takes unsegmented TCP over IPv6", (("GUEST_CSUM",),)),
    Feature("GUEST_ECN", 9, "5.1.3", "the driver takes unsegmented TCP with ECN", (("GUEST_TSO4", "GUEST_TSO6"),)),
    Feature("GUEST_UFO", 10, "5.1.3", "the driver takes unfragmented UDP", (("GUEST_CSUM",),), _NEVER_UFO),
    Feature("HOST_TSO4", 11, "5.1.3", "the device segments TCP over IPv4", (("CSUM",),)),
    Feature("HOST_TSO6", 12, "5.1.3", "the device segments TCP over IPv6", (("CSUM",),)),
    Feature("HOST_ECN", 13, "5.1.3", "the device segments TCP with ECN", (("HOST_TSO4", "HOST_TSO6"),)),
    Feature("HOST_UFO", 14, "5.1.3", "the device fragments UDP", (("CSUM",),), _NEVER_UFO),
    Feature("MRG_RXBUF", 15, "5.1.3", "a received frame may span several buffers"),
    Feature("STATUS", 16, "5.1.3", "the device tells whether the link is up"),
    Feature("CTRL_VQ", 17, "5.1.3", "there is a control queue"),
    Feature("CTRL_RX", 18, "5.1.3", "receive modes (promiscuous, all multicast)", _CONTROL),
    Feature("CTRL_VLAN", 19, "5.1.3", "VLAN filtering", _CONTROL),
    Feature("CTRL_RX_EXTRA", 20, "5.1.3", "more receive modes (no unicast, no broadcast)", _CONTROL),
    Feature("GUEST_ANNOUNCE", 21, "5.1.3", "the driver announces itself when asked to", _CONTROL),
    Feature("MQ", 22, "5.1.3", "several queue pairs, steered by flow", _CONTROL),
    Feature("CTRL_MAC_ADDR", 23, "5.1.3", "the MAC address can be set", _CONTROL),
    Feature("NOTIFY_ON_EMPTY", 24, "6.3", "an interrupt when a queue runs empty", refused=_NEVER_LEGACY),
    Feature("ANY_LAYOUT", 27, "6.3", "no assumption about message framing", refused=_NEVER_LEGACY),
    Feature("INDIRECT_DESC", 28, "6", "descriptor tables in memory of their own"),
    Feature("EVENT_IDX", 29, "6", "each side says at which index it wants to be woken"),
    Feature("VERSION_1", 32, "6", "the device follows virtio 1.0 or later"),
    Feature("ACCESS_PLATFORM", 33, "6", "the device's memory accesses go through the IOMMU"),
    Feature("RING_PACKED", 34, "6", "packed virtqueues"),
    Feature("IN_ORDER", 35, "6", "buffers are used in the order they were made available"),
    Feature(
        "ORDER_PLATFORM",
        36,
        "6",
        "memory accesses are ordered as the platform orders them",
        refused="the rings' fences are those between processors, which is what other devices ask for",
    ),
    Feature("SR_IOV", 37, "6", "virtual functions", refused="this driver makes no functions besides its own"),
    Feature("NOTIFICATION_DATA", 38, "6", "a notification carries the ring's position"),
    Feature(
        "NOTIF_CONFIG_DATA",
        39,
        "6",
        "a notification carries a number the device chose",
        refused="queues are notified by their own numbers",
    ),
    Feature("RING_RESET", 40, "6", "one queue can be reset alone"),
    Feature(
        "ADMIN_VQ",
        41,
        "6",
        "there is an administration queue",
        refused="it is for whoever manages a group of functions; this driver has one",
    ),
    Feature(
        "HASH_TUNNEL",
        51,
        "5.1.3",
        "hashes of inner headers",
        (("CTRL_VQ",), ("RSS", "HASH_REPORT")),
        "flows are told apart by their outer headers",
    ),
    Feature("VQ_NOTF_COAL", 52, "5.1.3", "coalesced interrupts, set for each queue", _CONTROL, _NEVER_COALESCED),
    Feature("NOTF_COAL", 53, "5.1.3", "coalesced interrupts", _CONTROL, _NEVER_COALESCED),
    Feature("GUEST_USO4", 54, "5.1.3", "the driver takes unsegmented UDP over IPv4", (("GUEST_CSUM",),)),
    Feature("GUEST_USO6", 55, "5.1.3", "the driver takes unsegmented UDP over IPv6", (("GUEST_CSUM",),)),
    Feature("HOST_USO", 56, "5.1.3", "the device segments UDP", (("CSUM",),)),
    Feature("HASH_REPORT", 57, "5.1.3", "every received frame carries its hash", _CONTROL, _NEVER_HASHED),
    Feature(
        "GUEST_HDRLEN",
        59,
        "5.1.3",
        "the driver tells the exact header length",
        refused="the header is the client's, and its length is not vouched for",
    ),
    Feature("RSS", 60, "5.1.3", "receive-side scaling with a configurable hash", _CONTROL),
    Feature(
        "RSC_EXT",
        61,
        "5.1.3",
        "counts of coalesced segments",
        (("HOST_TSO4", "HOST_TSO6"),),
        "the port has no place for the counts",
    ),
    Feature(
        "STANDBY",
        62,
        "5.1.3",
        "stands by for a primary device of the same MAC address",
        refused="this driver owns its device alone and never fails over",
    ),
    Feature("SPEED_DUPLEX", 63, "5.1.3", "the device tells speed and duplex"),
)

_BY_NAME = {feature.name: feature for feature in FEATURES}
BY_BIT = {feature.bit: feature for feature in FEATURES}

# What frames may leave undone, agreed on as far as the client of a session can take it. Their bits are the port's too
# (docs/port.md).
OFFLOADS: tuple[Feature, ...] = tuple(
    _BY_NAME[name]
    for name in (
        *("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO"),
        *("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6"),
    )
)
# What this driver implements, and so accepts wherever it is offered; the offloads if a client asks for them.
SUPPORTED: tuple[Feature, ...] = tuple(item for item in FEATURES if not item.refused)
# What it cannot work without: the modern layout, and a device whose DMA the IOMMU translates.
REQUIRED: tuple[Feature, ...] = (_BY_NAME["VERSION_1"], _BY_NAME["ACCESS_PLATFORM"])

VERSION_1 = _BY_NAME["VERSION_1"]
ACCESS_PLATFORM = _BY_NAME["ACCESS_PLATFORM"]
RING_PACKED = _BY_NAME["RING_PACKED"]
EVENT_IDX = _BY_NAME["EVENT_IDX"]
INDIRECT_DESC = _BY_NAME["INDIRECT_DESC"]
IN_ORDER = _BY_NAME["IN_ORDER"]
NOTIFICATION_DATA = _BY_NAME["NOTIFICATION_DATA"]
RING_RESET = _BY_NAME["RING_RESET"]
MAC = _BY_NAME["MAC"]
MTU = _BY_NAME["MTU"]
STATUS = _BY_NAME["STATUS"]
MRG_RXBUF = _BY_NAME["MRG_RXBUF"]
SPEED_DUPLEX = _BY_NAME["SPEED_DUPLEX"]
CTRL_VQ = _BY_NAME["CTRL_VQ"]
CTRL_RX = _BY_NAME["CTRL_RX"]
CTRL_RX_EXTRA = _BY_NAME["CTRL_RX_EXTRA"]
CTRL_VLAN = _BY_NAME["CTRL_VLAN"]
CTRL_MAC_ADDR = _BY_NAME["CTRL_MAC_ADDR"]
CTRL_GUEST_OFFLOADS = _BY_NAME["CTRL_GUEST_OFFLOADS"]
GUEST_ANNOUNCE = _BY_NAME["GUEST_ANNOUNCE"]
MQ = _BY_NAME["MQ"]
RSS = _BY_NAME["RSS"]

OFFLOAD_MASK = sum(item.mask for item in OFFLOADS)
# Steering frames needs somewhere to steer them to.
STEERING: tuple[Feature, ...] = (MQ, RSS)
# With one of these a received frame can be as long as an IP packet.
RX_SEGMENTATION: tuple[Feature, ...] = tuple(
    _BY_NAME[name] for name in ("GUEST_TSO4", "GUEST_TSO6", "GUEST_USO4", "GUEST_USO6")
)


def feature(name: str) -> Feature:
    """The feature of that name, in any case, with or without VIRTIO_F_ or VIRTIO_NET_F_.

    Raises UsageError for a name that no feature has.
    """
    plain = name.strip().upper().removeprefix("VIRTIO_NET_F_").removeprefix("VIRTIO_F_").removeprefix("VIRTIO_RING_F_")
    plain = plain.removeprefix("VIRTIO_")
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    from difflib import get_close_matches  # here, because only a mistake needs it

    close = get_close_matches(plain, _BY_NAME, n=1)
    hint = f"did you mean {close[0]}?" if close else f"this driver knows {listing(FEATURES)}"
    raise UsageError(f"there is no virtio feature called {name!r}; {hint}")


def select(off: Iterable[str] = ()) -> tuple[Feature, ...]:
    """Everything this driver supports except what is turned off by name.

    Raises UsageError for an unknown name, for a required feature, and for one that is never on anyway.
    """
    turned_off = {feature(name) for name in off}
    for unwanted in sorted(turned_off, key=lambda item: item.bit):
        if unwanted in REQUIRED:
            raise UsageError(f"{unwanted} cannot be turned off: the driver does not work without {listing(REQUIRED)}")
        if unwanted not in SUPPORTED:
            choice = listing(item for item in SUPPORTED if item not in REQUIRED)
            raise UsageError(f"{unwanted} is never on: {unwanted.refused}; what can be turned off is {choice}")
    return tuple(item for item in SUPPORTED if item not in turned_off)


def use(item: Feature) -> str:
    """When this driver accepts a feature that a device offers, in a few words."""
    if item.refused:
        return "never"
    if item in REQUIRED:
        return "required"
    if item in OFFLOADS:
        return "if a client asks"
    return "with several pairs" if item in STEERING else "yes"


def known_table() -> str:
    """Every feature and what this driver makes of it, for people."""
    rows = [("bit", "feature", "accepted", "meaning, or why it is not accepted")]
    rows += [(str(item.bit), item.name, use(item), item.refused or item.meaning) for item in FEATURES]
    return columns(rows)


def known_as_dict() -> list[dict[str, object]]:
    """The same for machines."""
    keys = ("name", "bit", "section", "meaning")
    return [
        {**{key: getattr(item, key) for key in keys}, "accepted": use(item), "refused": item.refused or None}
        for item in FEATURES
    ]


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """A table for people, each column as wide as its longest cell."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def mask_of(items: Iterable[Feature]) -> int:
    """The bits of all of them."""
    mask = 0
    for item in items:
        mask |= item.mask
    return mask


def listing(items: Iterable[Feature]) -> str:
    """Their names, for a message."""
    return ", ".join(item.name for item in items)
