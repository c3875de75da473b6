"""Geometry: what the driver plans always passes, and each number that does not fit is refused by name."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netbridge.ipc.errors import BadGeometry
from netbridge.ipc.geometry import Geometry, RegionGeometry, RingGeometry, plan_geometry
from netbridge.ipc.regions import sealed_memfd, verify_sealed
from netbridge.ipc.session import next_session

# A loaded machine is no failure.
unhurried = settings(deadline=None)

GOOD = plan_geometry(RegionGeometry(16 * 2048, 16, 2048), RegionGeometry(8 * 2048, 8, 2048))


def region(buffers: int, stride: int) -> RegionGeometry:
    return RegionGeometry(-(-buffers * stride // 4096) * 4096, buffers, stride)


@unhurried
@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from([128, 1536, 2048, 9088, 65_600, 1 << 20]))
def test_a_plan_holds_and_its_rings_take_every_buffer(rx_count: int, tx_count: int, stride: int) -> None:
    geometry = plan_geometry(region(rx_count, stride), region(tx_count, stride))
    assert 1 <= geometry.rx_limit <= rx_count
    assert rx_count <= geometry.rx_active.slots < 2 * rx_count + 1
    assert rx_count <= geometry.rx_free.slots < 2 * rx_count + 1
    # What was received can be sent from where it is.
    assert rx_count + tx_count <= geometry.tx_active.slots < 2 * (rx_count + tx_count) + 1
    assert tx_count <= geometry.tx_done.slots < 2 * tx_count + 1
    covered = sorted((ring.offset, ring.offset + 128 + 16 * ring.slots) for ring in geometry.rings)
    for (_, end), (start, _) in itertools.pairwise(covered):
        assert end <= start
    assert covered[-1][1] <= geometry.rings_size


u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
any_ring = st.builds(RingGeometry, u64, u32)
any_region = st.builds(RegionGeometry, u64, u32, u32)


@pytest.mark.thorough
@unhurried
@given(
    st.builds(Geometry, u64, any_ring, any_ring, any_ring, any_ring, any_region, any_region, u32, u32, u32, u32, u32)
)
def test_any_numbers_pass_or_are_refused(geometry: Geometry) -> None:
    try:
        geometry.check()
    except BadGeometry:
        return
    for ring in geometry.rings:
        assert ring.offset + 128 + 16 * ring.slots <= geometry.rings_size
    for part in (geometry.rx, geometry.tx):
        assert part.buffers * part.stride <= part.size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rings_size": 4095}, "rings region: size 4095"),
        ({"rings_size": 1 << 41}, "rings region: size"),
        ({"rx_active": RingGeometry(64, 16)}, "rx_active: offset 64"),
        ({"rx_active": RingGeometry(0, 24)}, "rx_active: 24 slots is no power of two"),
        ({"rx_active": RingGeometry(0, 0)}, "rx_active: 0 slots"),
        ({"rx_free": RingGeometry(512, 8)}, "rx_free: 8 slots cannot hold 16 buffers"),
        ({"tx_active": GOOD.tx_active._replace(slots=16)}, "tx_active: 16 slots cannot hold 24 buffers"),
        ({"tx_done": RingGeometry(4096, 8)}, "tx_done ends at byte 4352, beyond"),
        ({"tx_done": RingGeometry((1 << 64) - 128, 8)}, "tx_done ends at byte"),
        ({"rx_free": RingGeometry(128, 16)}, "rx_active and rx_free overlap"),
        ({"rx": RegionGeometry(1 << 15, 17, 2048)}, "rx_active: 16 slots cannot hold 17"),
        ({"rx": RegionGeometry(1 << 15, 0, 2048), "rx_limit": 1}, "rx region: 0 buffers"),
        ({"tx": RegionGeometry(4096, 8, 2048)}, "tx region: 8 buffers of 2048 bytes do not fit into 4096"),
        ({"tx": RegionGeometry(1 << 14, 8, 2047)}, "tx region: stride 2047"),
        ({"tx": RegionGeometry(1 << 14, 8, 64)}, "headroom 64 leaves no room"),
        ({"tx": RegionGeometry(1 << 14, 8, 2048, read_only=True)}, "tx region is read-only"),
        ({"headroom": 2000}, "headroom 2000 leaves no room"),
        ({"continuation_offset": 65}, "continuation_offset 65 is beyond headroom 64"),
        ({"rx_limit": 0}, "rx_limit 0"),
        ({"rx_limit": 17}, "rx_limit 17"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], says: str) -> None:
    GOOD.check()
    with pytest.raises(BadGeometry, match=says):
        GOOD._replace(**changes).check()  # type: ignore[arg-type]


def test_a_sealed_memfd_keeps_its_size() -> None:
    fd = sealed_memfd("test", 8192)
    try:
        verify_sealed(fd, 8192, "region")
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(BadGeometry, match="region: 8192 bytes instead of 4096"):
            verify_sealed(fd, 4096, "region")
    finally:
        os.close(fd)


@pytest.mark.parametrize("missing", ["F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL"])
def test_a_missing_seal_is_named(missing: str) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals & ~int(getattr(fcntl, missing)))
        with pytest.raises(BadGeometry, match=f"{missing} missing"):
            verify_sealed(fd, 4096, "region")
    finally:
        os.close(fd)


def test_what_is_no_memfd_is_refused() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(BadGeometry, match="not a memfd"):
            verify_sealed(reader, 4096, "region")
    finally:
        os.close(reader)
        os.close(writer)
    with tempfile.TemporaryFile() as file, pytest.raises(BadGeometry, match=r"not a memfd|not sealed"):
        verify_sealed(file.fileno(), 4096, "region")


def test_session_numbers_go_round_without_zero() -> None:
    assert [next_session(n) for n in (0, 1, 65534, 65535)] == [1, 2, 65535, 1]
