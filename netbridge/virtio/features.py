"""Feature bits as data, and their negotiation.

A device offers features, the driver wants some of them, and what both have is agreed (virtio 1.3 §2.2). Here is every
feature a network device can have, in one table; what this driver can be asked for; and `negotiate`, which says for
every bit what became of it and why. A bit is used as a mask through `Feature.mask` only, so that number and mask
cannot be taken for each other.
"""

from __future__ import annotations

from collections.abc import Iterable

from netbridge.errors import UsageError
from netbridge.virtio.errors import FeatureMissing
from vfio._record import NamedTuple

LARGEST_BIT = 63  # the transports read 64 bits; virtio 1.3 has no feature of a network device beyond them


class Feature(NamedTuple):
    """One feature bit. `requires` lists what else must be agreed: all of the groups, and of each group any one."""

    name: str
    bit: int
    section: str  # of virtio 1.3
    meaning: str
    requires: tuple[tuple[str, ...], ...] = ()
    refused: str | None = None  # why this driver never accepts it

    @property
    def mask(self) -> int:
        return 1 << self.bit

    def __str__(self) -> str:
        return self.name


_CONTROL = (("CTRL_VQ",),)
_NEVER_LEGACY = "only a legacy device uses it"

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
    Feature("GUEST_UFO", 10, "5.1.3", "the driver takes unfragmented UDP", (("GUEST_CSUM",),)),
    Feature("HOST_TSO4", 11, "5.1.3", "the device segments TCP over IPv4", (("CSUM",),)),
    Feature("HOST_TSO6", 12, "5.1.3", "the device segments TCP over IPv6", (("CSUM",),)),
    Feature("HOST_ECN", 13, "5.1.3", "the device segments TCP with ECN", (("HOST_TSO4", "HOST_TSO6"),)),
    Feature("HOST_UFO", 14, "5.1.3", "the device fragments UDP", (("CSUM",),)),
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
    Feature("ORDER_PLATFORM", 36, "6", "memory accesses are ordered as the platform orders them"),
    Feature("SR_IOV", 37, "6", "virtual functions"),
    Feature("NOTIFICATION_DATA", 38, "6", "a notification carries the ring's position"),
    Feature("NOTIF_CONFIG_DATA", 39, "6", "a notification carries a number the device chose"),
    Feature("RING_RESET", 40, "6", "one queue can be reset alone"),
    Feature("ADMIN_VQ", 41, "6", "there is an administration queue"),
    Feature("HASH_TUNNEL", 51, "5.1.3", "hashes of inner headers", (("CTRL_VQ",), ("RSS", "HASH_REPORT"))),
    Feature("VQ_NOTF_COAL", 52, "5.1.3", "coalesced interrupts, set for each queue", _CONTROL),
    Feature("NOTF_COAL", 53, "5.1.3", "coalesced interrupts", _CONTROL),
    Feature("GUEST_USO4", 54, "5.1.3", "the driver takes unsegmented UDP over IPv4", (("GUEST_CSUM",),)),
    Feature("GUEST_USO6", 55, "5.1.3", "the driver takes unsegmented UDP over IPv6", (("GUEST_CSUM",),)),
    Feature("HOST_USO", 56, "5.1.3", "the device segments UDP", (("CSUM",),)),
    Feature("HASH_REPORT", 57, "5.1.3", "every received frame carries its hash", _CONTROL),
    Feature("GUEST_HDRLEN", 59, "5.1.3", "the driver tells the exact header length"),
    Feature("RSS", 60, "5.1.3", "receive-side scaling with a configurable hash", _CONTROL),
    Feature("RSC_EXT", 61, "5.1.3", "counts of coalesced segments", (("HOST_TSO4", "HOST_TSO6"),)),
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
_BY_BIT = {feature.bit: feature for feature in FEATURES}

# What frames may leave undone, agreed on as far as the client of a session can take it. Their bits are the port's too
# (docs/port.md).
OFFLOADS: tuple[Feature, ...] = tuple(
    _BY_NAME[name]
    for name in (
        *("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO"),
        *("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6"),
    )
)
# What this driver implements, and so accepts wherever it is offered; the offloads if a
# client asks for them.
SUPPORTED: tuple[Feature, ...] = tuple(
    item
    for item in FEATURES
    if item.name
    in {
        *("MTU", "MAC", "MRG_RXBUF", "STATUS", "SPEED_DUPLEX"),
        *("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "CTRL_GUEST_OFFLOADS"),
        *("GUEST_ANNOUNCE", "MQ", "RSS"),
        *("RING_PACKED", "EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "NOTIFICATION_DATA", "RING_RESET"),
        *("VERSION_1", "ACCESS_PLATFORM"),
        *(offload.name for offload in OFFLOADS),
    }
)
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
# With one of these a received frame can be as long as an IP packet.
RX_SEGMENTATION: tuple[Feature, ...] = tuple(
    _BY_NAME[name] for name in ("GUEST_TSO4", "GUEST_TSO6", "GUEST_USO4", "GUEST_USO6")
)

# How a device comes to lack a required feature, and what makes QEMU offer it.
_WHY_MISSING = {
    "VERSION_1": "it is a legacy or transitional device; with QEMU add disable-legacy=on to its -device option",
    "ACCESS_PLATFORM": "it would bypass the IOMMU; with QEMU add iommu_platform=on to its -device option",
}


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
    hint = f"did you mean {close[0]}?" if close else f"this driver knows {_names(FEATURES)}"
    raise UsageError(f"there is no virtio feature called {name!r}; {hint}")


def select(off: Iterable[str] = ()) -> tuple[Feature, ...]:
    """Everything this driver supports except what is turned off by name.

    Raises UsageError for an unknown name, for a required feature, and for one that is never on anyway.
    """
    turned_off = {feature(name) for name in off}
    for unwanted in sorted(turned_off, key=lambda item: item.bit):
        if unwanted in REQUIRED:
            raise UsageError(f"{unwanted} cannot be turned off: the driver does not work without {_names(REQUIRED)}")
        if unwanted not in SUPPORTED:
            choice = _names(item for item in SUPPORTED if item not in REQUIRED)
            raise UsageError(f"{unwanted} is never on: this driver does not use it; what can be turned off is {choice}")
    return tuple(item for item in SUPPORTED if item not in turned_off)


class FeatureRow(NamedTuple):
    """What became of one bit."""

    name: str
    bit: int
    section: str
    offered: bool
    wanted: bool
    agreed: bool
    note: str  # why it is not agreed; empty when it is
    meaning: str


class Negotiation(NamedTuple):
    """The outcome: three bit masks, and a row for every bit that was offered or wanted, in order of bits."""

    offered: int
    wanted: int
    agreed: int
    rows: tuple[FeatureRow, ...]

    def has(self, item: Feature) -> bool:
        """Whether the feature is agreed, so that the driver may rely on it."""
        return bool(self.agreed & item.mask)

    def was_offered(self, item: Feature) -> bool:
        """Whether the device has it, agreed or not: enough to read a configuration field that depends on it."""
        return bool(self.offered & item.mask)

    @property
    def names(self) -> tuple[str, ...]:
        """The agreed features, in order of bits."""
        return tuple(row.name for row in self.rows if row.agreed)

    def table(self) -> str:
        """For people: a line for each row."""
        heading = ("bit", "feature", "offered", "wanted", "agreed", "meaning, or why it is not agreed")
        cells: list[tuple[str, ...]] = [heading]
        for row in self.rows:
            flags = tuple("yes" if flag else "-" for flag in (row.offered, row.wanted, row.agreed))
            cells.append((str(row.bit), row.name, *flags, row.note or row.meaning))
        widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )

    def as_dict(self) -> dict[str, object]:
        """For machines: the masks as hexadecimal text (JSON numbers lose bits beyond 53), and every row."""
        return {
            "offered": f"{self.offered:#018x}",
            "wanted": f"{self.wanted:#018x}",
            "agreed": f"{self.agreed:#018x}",
            "features": [
                {
                    "name": row.name,
                    "bit": row.bit,
                    "section": row.section,
                    "offered": row.offered,
                    "wanted": row.wanted,
                    "agreed": row.agreed,
                    "note": row.note,
                    "meaning": row.meaning,
                }
                for row in self.rows
            ],
        }


def negotiate(
    offered: int,
    wanted: Iterable[Feature] = SUPPORTED,
    required: Iterable[Feature] = REQUIRED,
    *,
    supported: Iterable[Feature] = SUPPORTED,
    device: str = "the device",
) -> Negotiation:
    """What to accept of `offered` (virtio 1.3 §2.2.1): what is wanted, offered, and has what it depends on.

    `supported` is what the driver implements; `device` names the device in errors. Raises FeatureMissing when a
    required feature is not offered, and UsageError when something is wanted that the driver does not implement.
    """
    implemented = tuple(supported)
    wish = {item.name: item for item in wanted}
    must = {item.name: item for item in required}
    wish |= must
    for item in wish.values():
        if item.refused or item not in implemented:
            reason = item.refused or "it is not implemented"
            raise UsageError(f"{item} cannot be asked for: {reason}; this driver supports {_names(implemented)}")

    missing = tuple(item for item in must.values() if not offered & item.mask)
    if missing:
        reasons = "; ".join(f"{item} ({item.meaning}): {_WHY_MISSING.get(item.name, 'required')}" for item in missing)
        raise FeatureMissing(
            f"{device} does not offer {_names(missing)}, which this driver requires. {reasons}",
            tuple(item.name for item in missing),
        )

    agreed = _with_dependencies({item.name for item in wish.values() if offered & item.mask})
    rows = tuple(
        _row(bit, offered, wish, agreed)
        for bit in range(LARGEST_BIT + 1)
        if offered >> bit & 1 or (bit in _BY_BIT and _BY_BIT[bit].name in wish)
    )
    return Negotiation(
        offered=offered,
        wanted=_mask(wish),
        agreed=_mask(agreed),
        rows=rows,
    )


def _with_dependencies(names: set[str]) -> set[str]:
    """`names` less those that lack something they depend on, and what in turn depends on those."""
    while True:
        kept = {name for name in names if all(names & set(group) for group in _BY_NAME[name].requires)}
        if kept == names:
            return kept
        names = kept


def _row(bit: int, offered: int, wish: dict[str, Feature], agreed: set[str]) -> FeatureRow:
    is_offered = bool(offered >> bit & 1)
    item = _BY_BIT.get(bit)
    if item is None:
        return FeatureRow(f"bit {bit}", bit, "", is_offered, False, False, "unknown to this driver", "")
    is_wanted = item.name in wish
    is_agreed = item.name in agreed
    if is_agreed:
        note = ""
    elif is_wanted and not is_offered:
        note = "the device does not offer it"
    elif is_wanted:
        note = f"depends on {' and '.join(' or '.join(group) for group in item.requires)}"
    elif item.refused:
        note = f"refused: {item.refused}"
    elif item in SUPPORTED:
        note = "turned off"
    else:
        note = "not used by this driver"
    return FeatureRow(item.name, bit, item.section, is_offered, is_wanted, is_agreed, note, item.meaning)


def _mask(names: Iterable[str]) -> int:
    mask = 0
    for name in names:
        mask |= _BY_NAME[name].mask
    return mask


def _names(items: Iterable[Feature]) -> str:
    return ", ".join(item.name for item in items)
