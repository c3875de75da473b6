"""Feature negotiation: a device offers features, the driver wants some of them, and what both have is agreed
(virtio 1.3 §2.2).

The outcome is plain data, four masks, which travel well: the driver puts them on its counters page, and whoever reads
them there can say for every bit what became of it and why, as the driver itself could.
"""

from __future__ import annotations

from netbridge.errors import UsageError
from netbridge.virtio import features
from netbridge.virtio.errors import FeatureMissing
from netbridge.virtio.features import BY_BIT, LARGEST_BIT, REQUIRED, SUPPORTED, Feature, listing, mask_of
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# How a device comes to lack a required feature, and what makes QEMU offer it.
_WHY_MISSING = {
    "VERSION_1": "it is a legacy or transitional device; with QEMU add disable-legacy=on to its -device option",
    "ACCESS_PLATFORM": "it would bypass the IOMMU; with QEMU add iommu_platform=on to its -device option",
}


class FeatureRow(NamedTuple):
    """What became of one bit."""

    name: str
    bit: int
    section: str  # of virtio 1.3
    offered: bool
    wanted: bool
    agreed: bool
    note: str  # why it is not agreed; empty when it is
    meaning: str


class Negotiation(NamedTuple):
    """The outcome, as bit masks. `turned_off` are those that the user wants nothing of, whoever offers them."""

    offered: int
    wanted: int
    agreed: int
    turned_off: int = 0

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

    @property
    def rows(self) -> tuple[FeatureRow, ...]:
        """One for every bit that was offered or that this driver supports, in order of bits."""
        shown = self.offered | self.wanted | mask_of(SUPPORTED)
        return tuple(self._row(bit) for bit in range(LARGEST_BIT + 1) if shown >> bit & 1)

    def _row(self, bit: int) -> FeatureRow:
        offered, wanted, agreed = (bool(mask >> bit & 1) for mask in (self.offered, self.wanted, self.agreed))
        item = BY_BIT.get(bit)
        if item is None:
            return FeatureRow(f"bit {bit}", bit, "", offered, wanted, agreed, "unknown to this driver", "")
        note = "" if agreed else self._why_not(item)
        return FeatureRow(item.name, bit, item.section, offered, wanted, agreed, note, item.meaning)

    def _why_not(self, item: Feature) -> str:
        if self.wanted & item.mask:
            if not self.offered & item.mask:
                return "the device does not offer it"
            return f"depends on {' and '.join(' or '.join(group) for group in item.requires)}"
        if item.refused:
            return f"refused: {item.refused}"
        if self.turned_off & item.mask:
            return "turned off"
        if item in features.OFFLOADS:
            return "no client of the port takes it"
        return "of no use to one queue pair" if item in features.STEERING else "not wanted"

    def table(self) -> str:
        """For people: a line for each row."""
        heading = ("bit", "feature", "offered", "wanted", "agreed", "meaning, or why it is not agreed")
        cells: list[tuple[str, ...]] = [heading]
        for row in self.rows:
            flags = tuple("yes" if flag else "-" for flag in (row.offered, row.wanted, row.agreed))
            cells.append((str(row.bit), row.name, *flags, row.note or row.meaning))
        return features.columns(cells)

    def as_dict(self) -> dict[str, object]:
        """For machines: the masks as hexadecimal text (JSON numbers lose bits beyond 53), and every row."""
        return {
            **{name: f"{value:#018x}" for name, value in self._asdict().items()},
            "features": [row._asdict() for row in self.rows],
        }


def negotiate(
    offered: int,
    wanted: Iterable[Feature] = SUPPORTED,
    required: Iterable[Feature] = REQUIRED,
    *,
    turned_off: Iterable[Feature] = (),
    device: str = "the device",
) -> Negotiation:
    """What to accept of `offered` (virtio 1.3 §2.2.1): what is wanted, offered, and has what it depends on.

    `turned_off` tells what is not wanted by the user from what is not wanted this time; `device` names
    the device in errors. Raises FeatureMissing when a required feature is not offered, and UsageError when something is
    wanted that this driver never accepts.
    """
    must = tuple(required)
    wish = (*wanted, *must)
    for item in wish:
        if item.refused:
            raise UsageError(f"{item} cannot be asked for: {item.refused}; this driver supports {listing(SUPPORTED)}")

    missing = tuple(item for item in must if not offered & item.mask)
    if missing:
        reasons = "; ".join(f"{item} ({item.meaning}): {_WHY_MISSING.get(item.name, 'required')}" for item in missing)
        raise FeatureMissing(
            f"{device} does not offer {listing(missing)}, which this driver requires. {reasons}",
            tuple(item.name for item in missing),
        )
    agreed = _with_dependencies({item.name: item for item in wish if offered & item.mask})
    return Negotiation(offered, mask_of(wish), mask_of(agreed), mask_of(turned_off))


def _with_dependencies(items: dict[str, Feature]) -> Iterable[Feature]:
    """`items` less those that lack something they depend on, and what in turn depends on those."""
    while True:
        kept = {
            name: item
            for name, item in items.items()
            if all(any(one in items for one in group) for group in item.requires)
        }
        if kept.keys() == items.keys():
            return kept.values()
        items = kept
