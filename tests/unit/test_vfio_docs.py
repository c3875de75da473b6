"""docs/vfio.md shows the example as it is, and names nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import vfio
from vfio import errors

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "vfio.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "vfio" / "examples" / "nvme_identify.py").read_text(encoding="utf-8")


def test_the_example_is_shown_as_it_is_and_is_short() -> None:
    assert f"```python\n{EXAMPLE}```" in GUIDE
    assert len(EXAMPLE.splitlines()) < 60


def test_every_error_is_in_the_guide() -> None:
    family = [
        name for name, thing in vars(errors).items() if isinstance(thing, type) and thing.__module__ == "vfio.errors"
    ]
    assert len(family) > 10
    for name in family:
        assert f"`{name}`" in GUIDE
        assert name in vfio.__all__


def test_every_interface_is_in_the_guide() -> None:
    for interface in vfio.INTERFACES:
        assert f'`"{interface}"`' in GUIDE


def test_what_the_guide_names_is_there() -> None:
    for module, name in re.findall(r"\b(vfio)\.([A-Za-z_]+)", GUIDE):
        if name not in ("h", "rst"):
            assert hasattr(vfio, name), f"{module}.{name}"
    for method in re.findall(r"`device\.([a-z_]+)", GUIDE):
        assert hasattr(vfio.Device, method) or method in ("config", "irqs", "iommu"), method
    for method in re.findall(r"`((?:enable|disable|set|unmask|trigger)_[a-z]+)\(", GUIDE):
        assert hasattr(vfio.Irqs, method) or hasattr(vfio.Device, method), method
