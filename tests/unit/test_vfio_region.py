"""BARs: which parts are mapped, and that every access is one access of the right width at the right place."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vfio
from tests.descriptors import open_fds
from vfio.region import mappable_areas

PAGE = 4096
BASE = 0x10000
Area = vfio.Area


def info(size: int, **changes: Any) -> vfio.RegionInfo:
    return vfio.RegionInfo(2, size, BASE, True, True, True)._replace(**changes)


@pytest.mark.parametrize(
    ("region", "table", "expected"),
    [
        (info(0x4000), None, (Area(0, 0x4000),)),
        (info(0x4000, mappable=False), None, ()),
        (info(0), None, ()),
        (info(0x4000), Area(0x2010, 0x40), (Area(0, 0x2000), Area(0x3000, 0x1000))),
        (info(0x4000), Area(0x1FF0, 0x20), (Area(0, 0x1000), Area(0x3000, 0x1000))),
        (info(0x4000), Area(0, 0x40), (Area(0x1000, 0x3000),)),
        (info(0x1000), Area(0x800, 0x40), ()),
        (info(0x4000, msix_mappable=True), Area(0x2010, 0x40), (Area(0, 0x4000),)),
        (info(0x4000, sparse=()), None, ()),
        (
            info(0x4000, sparse=(Area(0x2000, 0x2000), Area(0, 0x1000), Area(0x1000, 0))),
            Area(0x1000, 0x40),
            (Area(0, 0x1000), Area(0x2000, 0x2000)),
        ),
    ],
)
def test_the_parts_that_can_be_mapped(
    region: vfio.RegionInfo, table: vfio.Area | None, expected: tuple[vfio.Area, ...]
) -> None:
    assert mappable_areas(region, table, PAGE) == expected


@pytest.mark.parametrize(
    "sparse", [(Area(0x800, 0x1000),), (Area(0x3000, 0x2000),), (Area(0, 0x2000), Area(0x1000, 0x1000))]
)
def test_areas_that_make_no_sense_are_refused(sparse: tuple[vfio.Area, ...]) -> None:
    with pytest.raises(vfio.Malformed, match="make no sense"):
        mappable_areas(info(0x4000, sparse=sparse), None, PAGE)


@given(st.integers(1, 40).map(lambda n: n * PAGE), st.integers(0, 40 * PAGE), st.integers(1, 3 * PAGE))
def test_the_table_is_never_in_a_mapped_part(size: int, start: int, length: int) -> None:
    areas = mappable_areas(info(size), Area(start, length), PAGE)
    assert all(area.end <= start or start + length <= area.offset for area in areas)
    assert all(area.offset % PAGE == 0 and area.end <= size for area in areas)
    if start + length <= size:
        assert sum(area.size for area in areas) >= size - (length // PAGE + 2) * PAGE


class Registers:
    """A file that stands in for a device, with its region at BASE."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(self.fd, BASE + 0x8000)

    def bar(self, size: int = 0x4000, table: vfio.Area | None = None, **changes: object) -> vfio.Bar:
        return vfio.Bar(self.fd, info(size, **changes), table, "0000:00:03.0")

    def bytes(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, BASE + offset)


@pytest.fixture
def registers(tmp_path: Path) -> Iterator[Registers]:
    made = Registers(tmp_path / "device")
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("mapped", [True, False])
def test_every_width_lands_in_place(registers: Registers, mapped: bool) -> None:
    with registers.bar(mappable=mapped) as bar:
        assert bool(bar.areas) is mapped
        bar.write64(0x08, 0x1122334455667788)
        bar.write32(0x10, 0xAABBCCDD)
        bar.write16(0x16, 0xEEFF)
        bar.write8(0x3FFF, 0x42)
        assert registers.bytes(0x08, 16) == bytes.fromhex("8877665544332211ddccbbaa0000ffee")
        assert registers.bytes(0x3FFF, 1) == b"\x42"
        assert bar.read64(0x08) == 0x1122334455667788
        assert bar.read32(0x0C) == 0x11223344
        assert bar.read16(0x16) == 0xEEFF
        assert bar.read8(0x3FFF) == 0x42


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(
    ("offset", "width"), [(0x4000, 1), (0x3FFE, 4), (-1, 1), (-8, 8), (0x0001, 2), (0x0002, 4), (0x0004, 8)]
)
def test_registers_out_of_place_are_refused(registers: Registers, mapped: bool, offset: int, width: int) -> None:
    with registers.bar(mappable=mapped) as bar:
        with pytest.raises(vfio.VfioError, match=f"no {8 * width}-bit register at"):
            getattr(bar, f"read{8 * width}")(offset)
        with pytest.raises(vfio.VfioError, match=f"no {8 * width}-bit register at"):
            getattr(bar, f"write{8 * width}")(offset, 0)


def test_a_value_that_does_not_fit_is_refused(registers: Registers) -> None:
    with registers.bar() as bar:
        for value in (-1, 1 << 16):
            with pytest.raises(vfio.VfioError, match="does not fit into 16 bits"):
                bar.write16(0, value)


def test_the_hole_goes_through_the_file(registers: Registers) -> None:
    os.pwrite(registers.fd, b"\x01\x02\x03\x04", BASE + 0x2000)
    with registers.bar(table=Area(0x2000, 0x40)) as bar:
        assert bar.areas == (Area(0, 0x2000), Area(0x3000, 0x1000))
        assert bar.read32(0x2000) == 0x04030201
        bar.write32(0x2FF0, 7)  # behind the table, on its page
        assert registers.bytes(0x2FF0, 4) == b"\x07\0\0\0"
        with pytest.raises(vfio.Unsupported, match=r"mapped are 0x0-0x1fff, 0x3000-0x3fff"):
            bar.address(0x2000)
        with pytest.raises(vfio.Unsupported):
            bar.address(0x1FFC, 8)


@pytest.mark.parametrize("mappable", [True, False])
@pytest.mark.parametrize("offset", [0x2000, 0x203C])
def test_the_msix_table_is_the_kernels(registers: Registers, offset: int, mappable: bool) -> None:
    with registers.bar(table=Area(0x2000, 0x40), msix_mappable=mappable) as bar:
        with pytest.raises(vfio.VfioError, match=r"MSI-X table, which the kernel keeps.*enable_msix"):
            bar.write32(offset, 1)
        bar.write32(0x2040, 1)
        bar.write32(0x1FFC, 1)


def test_an_address_for_c(registers: Registers) -> None:
    with registers.bar() as bar:
        where = bar.address(0x3008)
        assert where == bar.address(0) + 0x3008
        bar.write32(0x3008, 0x5A5A5A5A)
        with Path("/proc/self/mem").open("rb", buffering=0) as memory:
            memory.seek(where)
            assert memory.read(4) == b"\x5a" * 4


def test_a_region_that_is_only_read(registers: Registers) -> None:
    with registers.bar(writable=False) as bar:
        assert bar.read32(0) == 0
        with pytest.raises(vfio.VfioError, match="cannot be written"):
            bar.write32(0, 1)


def test_closing_gives_everything_back(registers: Registers) -> None:
    before = open_fds()
    bar = registers.bar(table=Area(0x2000, 0x40))
    bar.close()
    bar.close()
    assert open_fds() == before
    with pytest.raises(vfio.VfioError, match="is closed"):
        bar.read32(0)
    with pytest.raises(vfio.VfioError, match="is closed"):
        bar.write32(0, 0)


def test_a_second_area_that_cannot_be_mapped_leaks_nothing(
    registers: Registers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    real, calls = mmap.mmap, []

    def once(*arguments: object, **named: object) -> mmap.mmap:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(16, "busy")
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("vfio.region.mmap.mmap", once)
    with pytest.raises(vfio.VfioError, match="another driver of the host has claimed it"):
        registers.bar(table=Area(0x2000, 0x40))
    assert len(calls) == 2
    assert open_fds() == before


def test_what_cannot_be_read_is_not_mapped(registers: Registers) -> None:
    """The processor would end the process for trying."""
    with registers.bar(readable=False) as bar:
        assert bar.areas == ()
        bar.write32(0, 5)
        assert registers.bytes(0, 4) == b"\5\0\0\0"
        with pytest.raises(vfio.VfioError, match="region 2 cannot be read"):
            bar.read32(0)


def test_sizes_that_no_register_fits() -> None:
    assert mappable_areas(info(0x1004), None) == ()
    with pytest.raises(vfio.Malformed, match="make no sense"):
        mappable_areas(info(0x1004, sparse=(vfio.Area(0, 0x1004),)), None)


def test_a_size_that_cannot_be(registers: Registers) -> None:
    before = open_fds()
    with pytest.raises(vfio.Malformed, match="cannot have 0x8000000000000000 bytes"):
        registers.bar(1 << 63)
    assert open_fds() == before


def test_no_address_after_the_end(registers: Registers) -> None:
    with registers.bar() as bar:
        assert bar.address(0)
    with pytest.raises(vfio.VfioError, match="region 2 is closed"):
        bar.address(0)
