"""What guests may differ in, as a test pins it: `@pytest.mark.guest_with(machine="pc", ring="packed")`.

The dimensions are independent of each other; what is not pinned is as in the guest that most tests have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qemu.command import Nic


@dataclass(frozen=True)
class Dimensions:
    """A guest as a test wants it.

    `kernel` is the name of a recipe beside the configured one; `ring` the format of the virtqueues that the device
    offers; `place` where the NIC sits; `queue_size` applies to both directions; `nics` how many there are, each with
    `properties` as they go to QEMU; `words` go to the kernel's command line, `devices` to QEMU's, one device each.
    """

    machine: Literal["q35", "pc"] = "q35"
    kernel: str | None = None
    ring: Literal["split", "packed"] = "split"
    place: Literal["root-port", "root-bus"] = "root-port"
    queue_size: int | None = None
    nics: int = 1
    properties: Mapping[str, str | int] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    memory_mb: int = 512
    cpus: int | None = None

    def __post_init__(self) -> None:
        if self.ring not in ("split", "packed"):
            raise ValueError(f'ring is "split" or "packed", not {self.ring!r}')

    @classmethod
    def pinned(cls, pins: Iterable[Mapping[str, Any]]) -> Dimensions:
        """Of several sets of pins the first that names a dimension counts. Raises TypeError on an unknown one."""
        merged: dict[str, Any] = {}
        for pin in pins:
            merged = {**pin, **merged}
        return cls(**merged)

    def recipe(self, configured: Path) -> Path:
        return configured if self.kernel is None else configured.with_name(f"{self.kernel}.toml")

    def boot_options(self) -> dict[str, Any]:
        """The arguments of boot() that make such a guest."""
        nic = Nic(
            place=self.place,
            rx_queue_size=self.queue_size,
            tx_queue_size=self.queue_size,
            properties={**({"packed": "on"} if self.ring == "packed" else {}), **self.properties},
        )
        words = list(self.words)
        if self.machine == "pc":
            # There is no interrupt remapping there, so VFIO wants to be told that this is known.
            words.insert(0, "vfio_iommu_type1.allow_unsafe_interrupts=1")
        return {
            "machine": self.machine,
            "nics": [replace(nic, id=f"nic{n}") for n in range(self.nics)],
            "append": words,
            "extra_args": [word for line in self.devices for word in line.split()],
            "memory_mb": self.memory_mb,
            "cpus": self.cpus,
        }
