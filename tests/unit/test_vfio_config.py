"""Configuration space: accesses, and capability lists, the honest ones and the others."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfio

BASE = 0x1000


class Space:
    """Configuration space in a file, at an offset as in a VFIO device."""

    def __init__(self, path: Path, size: int = 4096) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(self.fd, BASE + size)
        self.config = vfio.ConfigSpace(self.fd, BASE, size, "0000:00:03.0")

    def put(self, offset: int, value: int, width: int) -> None:
        os.pwrite(self.fd, value.to_bytes(width, "little"), BASE + offset)

    def capability(self, offset: int, kind: int, following: int, length: int = 0) -> None:
        self.put(0x06, 0x10, 2)
        self.put(offset, kind | following << 8 | length << 16, 3)

    def extended(self, offset: int, kind: int, version: int, following: int) -> None:
        self.put(offset, kind | version << 16 | following << 20, 4)


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Space]:
    made = Space(tmp_path / "config")
    yield made
    os.close(made.fd)


def test_every_width(space: Space) -> None:
    space.config.write32(0x10, 0x12345678)
    assert space.config.read32(0x10) == 0x12345678
    assert space.config.read16(0x12) == 0x1234
    assert space.config.read8(0x10) == 0x78
    space.config.write16(0x10, 0xBEEF)
    space.config.write8(0x13, 0xFF)
    assert space.config.read(0x10, 4) == bytes.fromhex("efbe34ff")


def test_update_writes_only_what_changes(space: Space) -> None:
    space.config.write16(0x04, 0x0403)
    space.config.update16(0x04, clear=0x0400, set=0x0004)
    assert space.config.read16(0x04) == 0x0007


@pytest.mark.parametrize(("offset", "width"), [(-4, 4), (4096, 1), (4094, 4), (2, 4), (1, 2)])
def test_accesses_out_of_place_are_refused(space: Space, offset: int, width: int) -> None:
    with pytest.raises(vfio.VfioError, match="of configuration space, which has 0x1000 bytes"):
        getattr(space.config, f"read{8 * width}")(offset)


def test_a_value_that_does_not_fit_is_refused(space: Space) -> None:
    with pytest.raises(vfio.VfioError, match="0x100 does not fit into 8 bits"):
        space.config.write8(0, 0x100)


def test_a_device_that_gives_too_little_is_gone(tmp_path: Path) -> None:
    space = Space(tmp_path / "config")
    os.ftruncate(space.fd, BASE + 2)
    with pytest.raises(vfio.DeviceGone, match="gave 2 bytes of 4"):
        space.config.read32(0)
    os.close(space.fd)


def test_the_list_in_its_order(space: Space) -> None:
    space.put(0x34, 0x50, 1)
    space.capability(0x50, 0x11, 0x40)
    space.capability(0x40, 0x09, 0x63, length=0x14)  # the two low bits of a pointer are reserved
    space.capability(0x60, 0x01, 0)
    assert space.config.capabilities() == (
        vfio.Capability(0x11, 0x50),
        vfio.Capability(0x09, 0x40, 0x14),
        vfio.Capability(0x01, 0x60),
    )
    assert space.config.find(0x01) == vfio.Capability(0x01, 0x60)
    assert space.config.find(0x10) is None


def test_no_list_without_the_status_bit(space: Space) -> None:
    space.put(0x34, 0x50, 1)
    assert space.config.capabilities() == ()


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ({0x34: 0x50, 0x50: 0x50}, "leads to 0x50 after"),
        ({0x34: 0x50, 0x50: 0x60, 0x60: 0x50}, "leads to 0x50 after"),
        ({0x34: 0x20}, "leads to 0x20 after"),
        ({0x34: 0x50, 0x50: 0x04}, "leads to 0x4 after"),
    ],
)
def test_a_broken_list_is_refused(space: Space, links: dict[int, int], says: str) -> None:
    space.put(0x06, 0x10, 2)
    for at, following in links.items():
        if at == 0x34:
            space.put(at, following, 1)
        else:
            space.capability(at, 0x01, following)
    with pytest.raises(vfio.Malformed, match=says):
        space.config.capabilities()


def test_extended_capabilities(space: Space) -> None:
    space.extended(0x100, 0x0001, 2, 0x148)
    space.extended(0x148, 0x0000, 0, 0x200)  # one that VFIO hides
    space.extended(0x200, 0x000D, 1, 0)
    assert space.config.find_extended(0x0B) is None
    assert space.config.extended_capabilities() == (
        vfio.ExtendedCapability(0x01, 2, 0x100),
        vfio.ExtendedCapability(0x0D, 1, 0x200),
    )


@pytest.mark.parametrize("following", [0x100, 0x80, 0x40])
def test_a_broken_extended_list_is_refused(space: Space, following: int) -> None:
    space.extended(0x100, 1, 1, 0x140)
    space.extended(0x140, 2, 1, following)
    with pytest.raises(vfio.Malformed, match="extended capability list is broken"):
        space.config.extended_capabilities()


@pytest.mark.parametrize("header", [0, 0xFFFFFFFF])
def test_no_extended_capabilities(space: Space, header: int) -> None:
    space.put(0x100, header, 4)
    assert space.config.extended_capabilities() == ()


def test_conventional_pci_has_no_extended_ones(tmp_path: Path) -> None:
    space = Space(tmp_path / "config", size=256)
    assert space.config.extended_capabilities() == ()
    os.close(space.fd)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_noise_ends(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    noise = random.Random(seed).randbytes(4096)
    space = Space(tmp_path_factory.mktemp("noise") / "config")
    try:
        os.pwrite(space.fd, noise, BASE)
        for walk in (space.config.capabilities, space.config.extended_capabilities):
            try:
                assert len(walk()) <= 960
            except vfio.Malformed:
                pass
    finally:
        os.close(space.fd)


def test_a_device_that_is_not_there_is_gone_and_not_malformed(space: Space) -> None:
    """Where nobody answers, a PC reads ones."""
    os.pwrite(space.fd, b"\xff" * 4096, BASE)
    with pytest.raises(vfio.DeviceGone, match="reads as all ones"):
        space.config.capabilities()
