"""What guests may differ in, as a test pins it: `@pytest.mark.guest_with(machine="pc", ring="packed")`.

The dimensions are independent of each other; what is not pinned is as in the guest that most tests have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from qemu.command import DEFAULT_IOMMU, Nic
from qemu.tap import MOST_QUEUES, Tap

VALUES: Mapping[str, Sequence[str]] = {
    "machine": ("q35", "pc"),
    "iommu": ("intel", "virtio"),
    "ring": ("split", "packed"),
    "irq": ("msix", "intx"),
    "place": ("root-port", "root-bus"),
}
"""The dimensions that are one of a few words."""

UNSAFE_INTERRUPTS = ("vfio_iommu_type1.allow_unsafe_interrupts=1", "iommufd.allow_unsafe_interrupts=1")
"""For the kernel of a guest whose IOMMU does not remap interrupts: VFIO, by a container or by iommufd, wants to be
told that this is known. Nobody in such a guest is to be protected from anybody."""


class UnknownDimension(ValueError):
    """A dimension, or a value of one, that there is not; the message says what is nearest."""


@dataclass(frozen=True)
class Dimensions:
    """A guest as a test wants it.

    `kernel` is the name of a recipe beside the configured one; `iommu` is intel's on the machine q35 unless it is said,
    and virtio's on pc, which has no other. Of the NIC: `ring` is the format of the virtqueues that the device offers,
    `irq` the best kind of interrupt that it has, `queue_pairs` how many it has, `offloads` whether it offers those of
    checksums and segmentation; more than one pair, and offloads, take the host's kernel at the other end, a Tap, which
    needs root. `place` is where the NIC sits; `queue_size` applies to both directions; `nics` is how many there are,
    each with `properties` as they go to QEMU. `words` go to the kernel's command line, `devices` to QEMU's, one device
    each. Raises UnknownDimension.
    """

    machine: Literal["q35", "pc"] = "q35"
    iommu: Literal["intel", "virtio"] | None = None
    kernel: str | None = None
    ring: Literal["split", "packed"] = "split"
    irq: Literal["msix", "intx"] = "msix"
    queue_pairs: int = 1
    offloads: bool = False
    place: Literal["root-port", "root-bus"] = "root-port"
    queue_size: int | None = None
    nics: int = 1
    properties: Mapping[str, str | int] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    memory_mb: int = 512
    cpus: int | None = None

    def __post_init__(self) -> None:
        for name, values in VALUES.items():
            given = getattr(self, name)
            if given not in values and not (name == "iommu" and given is None):
                raise UnknownDimension(f"{name} is {_either(values)}, not {given!r}{_nearest(str(given), values)}")
        if not (isinstance(self.queue_pairs, int) and 1 <= self.queue_pairs <= MOST_QUEUES):
            raise UnknownDimension(f"queue_pairs is a number from 1 to {MOST_QUEUES}, not {self.queue_pairs!r}")
        if not isinstance(self.offloads, bool):
            raise UnknownDimension(f"offloads is True or False, not {self.offloads!r}")
        if self.machine == "pc" and self.iommu == "intel":
            raise UnknownDimension('the machine "pc" has iommu="virtio": QEMU\'s intel-iommu does not go with it')
        if self.needs_tap and self.nics > 1:
            raise UnknownDimension("queue_pairs and offloads are for a guest with one NIC")

    @classmethod
    def pinned(cls, pins: Iterable[Mapping[str, Any]]) -> Dimensions:
        """Of several sets of pins the first that names a dimension counts. Raises UnknownDimension."""
        merged: dict[str, Any] = {}
        for pin in pins:
            merged = {**pin, **merged}
        known = [item.name for item in fields(cls)]
        for name in merged:
            if name not in known:
                raise UnknownDimension(
                    f"there is no dimension {name!r}{_nearest(name, known)}; there are: {', '.join(known)}"
                )
        return cls(**merged)

    def recipe(self, configured: Path) -> Path:
        """The recipe of the guest's image. Raises UnknownDimension for a kernel that there is none of."""
        if self.kernel is None:
            return configured
        path = configured.with_name(f"{self.kernel}.toml")
        if not path.exists():
            known = sorted(other.stem for other in configured.parent.glob("*.toml"))
            raise UnknownDimension(f"kernel is the name of a recipe, not {self.kernel!r}{_nearest(self.kernel, known)}")
        return path

    @property
    def needs_tap(self) -> bool:
        """Whether the NIC's other end has to be a Tap: see peer()."""
        return self.queue_pairs > 1 or self.offloads

    def peer(self) -> Tap | None:
        """A new other end for the NIC, when it has to be a Tap; to be closed by whoever asked for it."""
        return Tap(queues=self.queue_pairs, offloads=self.offloads) if self.needs_tap else None

    def boot_options(self, peer: Tap | None = None) -> dict[str, Any]:
        """The arguments of boot() that make such a guest."""
        properties: dict[str, str | int] = {}
        if self.ring == "packed":
            properties["packed"] = "on"
        if self.queue_pairs > 1:
            properties["mq"] = "on"
        if self.irq == "intx":
            properties["vectors"] = 0
        elif self.queue_pairs > 1:
            properties["vectors"] = 2 * self.queue_pairs + 2
        nic = Nic(
            wire=peer,
            place=self.place,
            rx_queue_size=self.queue_size,
            tx_queue_size=self.queue_size,
            properties={**properties, **self.properties},
        )
        words = list(self.words)
        if (self.iommu or DEFAULT_IOMMU[self.machine]) == "virtio":
            words = [*UNSAFE_INTERRUPTS, *words]
        return {
            "machine": self.machine,
            "iommu": self.iommu,
            "nics": [replace(nic, id=f"nic{n}") for n in range(self.nics)],
            "append": words,
            "extra_args": [word for line in self.devices for word in line.split()],
            "memory_mb": self.memory_mb,
            "cpus": self.cpus,
        }


def _either(values: Sequence[str]) -> str:
    return " or ".join(f'"{value}"' for value in values)


def _nearest(given: str, known: Iterable[str]) -> str:
    like = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {like[0]!r}?" if like else ""
