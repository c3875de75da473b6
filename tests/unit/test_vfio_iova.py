"""Handing out I/O virtual addresses: inside the ranges, aligned, and never the same twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vfio

PAGE = 4096
TOP = (1 << 64) - 1
# What an emulated VT-d offers: the hole is where MSI messages go.
RANGES = (vfio.IovaRange(0, 0xFEDFFFFF), vfio.IovaRange(0xFEF00000, (1 << 39) - 1))


@pytest.fixture
def space() -> vfio.IovaAllocator:
    return vfio.IovaAllocator(RANGES, PAGE)


def test_the_lowest_place_but_never_zero(space: vfio.IovaAllocator) -> None:
    assert space.allocate(PAGE) == PAGE
    assert space.allocate(3 * PAGE) == 2 * PAGE


def test_a_hole_between_two_is_used_when_it_fits(space: vfio.IovaAllocator) -> None:
    space.reserve(0x1000, 0x1000)
    space.reserve(0x4000, 0x1000)
    assert space.allocate(0x3000) == 0x5000
    assert space.allocate(0x2000) == 0x2000
    space.release(0x2000, 0x2000)
    assert space.allocate(0x1000, align=0x1000) == 0x2000


def test_what_does_not_fit_before_the_hole_goes_behind_it(space: vfio.IovaAllocator) -> None:
    space.reserve(PAGE, 0xFEE00000 - 2 * PAGE)
    assert space.allocate(2 * PAGE) == 0xFEF00000


def test_alignment_and_limit(space: vfio.IovaAllocator) -> None:
    assert space.allocate(PAGE, align=1 << 21) == 1 << 21
    assert space.allocate(PAGE, below=1 << 32) < 1 << 32
    with pytest.raises(vfio.IovaError, match=r"below 0x10000 are left"):
        space.allocate(0x10000, below=0x10000)
    with pytest.raises(vfio.IovaError, match="power of two"):
        space.allocate(PAGE, align=3 * PAGE)


def test_a_limit_within_the_first_page(space: vfio.IovaAllocator) -> None:
    with pytest.raises(vfio.IovaError, match="are left"):
        space.allocate(PAGE, below=PAGE)


def test_the_last_page_of_all_can_be_reserved() -> None:
    space = vfio.IovaAllocator([vfio.IovaRange(0, (1 << 64) - 1)], PAGE)
    space.reserve((1 << 64) - PAGE, PAGE)
    with pytest.raises(vfio.IovaError, match="past the end of 64-bit addresses"):
        space.reserve((1 << 64) - PAGE, 2 * PAGE)


@pytest.mark.parametrize(
    ("iova", "size", "says"),
    [
        (0xFEE00000, PAGE, "outside what the IOMMU translates.*0x0-0xfedfffff, 0xfef00000-0x7fffffffff"),
        (0xFEDFF000, 2 * PAGE, "outside"),
        (1 << 39, PAGE, "outside"),
        (-PAGE, PAGE, "past the end"),
        (0x1234, PAGE, "not a multiple"),
        (0x1000, 100, "not a multiple"),
        (0x1000, 0, "cannot have 0 bytes"),
        (0x1000, -PAGE, "cannot have"),
        (0x9000, 2 * PAGE, "overlaps 0xa000-0xbfff"),
        (0xB000, PAGE, "overlaps"),
        (0x8000, 8 * PAGE, "overlaps"),
        (0xA000, 2 * PAGE, "overlaps"),
    ],
)
def test_what_cannot_be_reserved(space: vfio.IovaAllocator, iova: int, size: int, says: str) -> None:
    space.reserve(0xA000, 2 * PAGE)
    with pytest.raises(vfio.IovaError, match=says):
        space.reserve(iova, size)


def test_neighbours_do_not_overlap(space: vfio.IovaAllocator) -> None:
    space.reserve(0xA000, PAGE)
    space.reserve(0x9000, PAGE)
    space.reserve(0xB000, PAGE)


def test_an_empty_space_says_so() -> None:
    with pytest.raises(vfio.IovaError, match="translates nothing"):
        vfio.IovaAllocator([], PAGE).allocate(PAGE)


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.sampled_from([1, 2, 4, 16]), st.booleans(), st.integers(0, 400)),
        max_size=60,
    )
)
def test_never_outside_never_twice_and_all_comes_back(wishes: list[tuple[int, int, bool, int]]) -> None:
    ranges = (vfio.IovaRange(0, 99 * PAGE - 1), vfio.IovaRange(128 * PAGE, 300 * PAGE - 1))
    space = vfio.IovaAllocator(ranges, PAGE)
    held: dict[int, int] = {}
    for pages, align, chosen, where in wishes:
        size = pages * PAGE
        try:
            if chosen:
                iova = space.allocate(size, align * PAGE)
                assert iova % (align * PAGE) == 0
                assert iova != 0
            else:
                iova = where * PAGE
                space.reserve(iova, size)
        except vfio.IovaError:
            if held and pages % 3 == 0:
                freed = next(iter(held))
                space.release(freed, held.pop(freed))
            continue
        assert any(r.start <= iova and iova + size - 1 <= r.last for r in ranges)
        assert all(iova + size <= other or other + length <= iova for other, length in held.items())
        held[iova] = size
    for iova, size in held.items():
        space.release(iova, size)
    assert space.allocate(98 * PAGE) == PAGE


@given(st.lists(st.tuples(st.sampled_from(["allocate", "reserve", "release"]), st.integers(1, 40), st.integers(0, 40))))
def test_it_is_what_a_map_of_pages_says(moves: list[tuple[str, int, int]]) -> None:
    ranges = (
        vfio.IovaRange(0, 15 * PAGE - 1),
        vfio.IovaRange(15 * PAGE, 20 * PAGE - 1),
        vfio.IovaRange(30 * PAGE, TOP),
    )
    space = vfio.IovaAllocator(ranges, PAGE)
    pages = {*range(1, 20), *range(30, 100)}  # those that are free, with enough of the last range
    held: list[tuple[int, int]] = []
    for what, count, where in moves:
        if what == "release" and held:
            start, length = held.pop(where % len(held))
            space.release(start * PAGE, length * PAGE)
            pages |= set(range(start, start + length))
        elif what == "allocate":
            fits = [p for p in sorted(pages) if pages >= set(range(p, p + count)) and not (p < 15 < p + count)]
            if fits:
                assert space.allocate(count * PAGE) == fits[0] * PAGE
                held.append((fits[0], count))
                pages -= set(range(fits[0], fits[0] + count))
        elif what == "reserve" and where:
            if pages >= set(range(where, where + count)) and not (where < 15 < where + count):
                space.reserve(where * PAGE, count * PAGE)
                held.append((where, count))
                pages -= set(range(where, where + count))
            else:
                with pytest.raises(vfio.IovaError):
                    space.reserve(where * PAGE, count * PAGE)


def test_ranges_that_change_under_what_is_taken() -> None:
    space = vfio.IovaAllocator([vfio.IovaRange(0, 9 * PAGE - 1)], PAGE)
    taken = [space.allocate(2 * PAGE) for _ in range(3)]
    space.set_ranges([vfio.IovaRange(4 * PAGE, 8 * PAGE - 1)])
    assert space.allocate(PAGE) == 7 * PAGE
    for iova in taken:
        space.release(iova, 2 * PAGE)
    # What lies outside by now is not given out again.
    assert space.allocate(3 * PAGE) == 4 * PAGE
    with pytest.raises(vfio.IovaError):
        space.allocate(PAGE)


def test_tens_of_thousands_do_not_slow_it_down() -> None:
    """Minutes, when each looks at all the others."""
    space = vfio.IovaAllocator([vfio.IovaRange(0, TOP)], PAGE)
    taken = [space.allocate(PAGE) for _ in range(30_000)]
    assert taken[-1] == 30_000 * PAGE
    for iova in taken:
        space.release(iova, PAGE)
    assert space.allocate(30_000 * PAGE) == PAGE


@pytest.mark.parametrize("align", [-PAGE, 0, 3, 3 * PAGE])
def test_an_alignment_is_a_power_of_two(space: vfio.IovaAllocator, align: int) -> None:
    with pytest.raises(vfio.IovaError, match="power of two"):
        space.allocate(PAGE, align)
