"""Handing out I/O virtual addresses: pure arithmetic on the ranges that the kernel says the IOMMU can translate."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from vfio._record import NamedTuple
from vfio.errors import IovaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SPACE = 1 << 64


class IovaRange(NamedTuple):
    """Addresses that a device may use, from `start` to `last`, both included (bytes)."""

    start: int
    last: int

    @property
    def size(self) -> int:
        """Number of addresses, which are bytes."""
        return self.last - self.start + 1

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.last:#x}"


class IovaAllocator:
    """Keeps account of which addresses are taken. The lowest free place that fits is given, but never address 0,
    which too many devices and drivers take for "none".

    `ranges` are those of the kernel; `granule` is the smallest page of the IOMMU in bytes, to which everything is
    aligned.
    """

    def __init__(self, ranges: Iterable[IovaRange], granule: int) -> None:
        self.granule = granule
        # Both are lists of (start, end past it), sorted, never overlapping. With free space kept as well, tens of
        # thousands of mappings side by side cost the next one nothing.
        self._taken: list[tuple[int, int]] = []
        self._free: list[tuple[int, int]] = []
        self.ranges: tuple[IovaRange, ...] = ()
        self.set_ranges(ranges)

    def set_ranges(self, ranges: Iterable[IovaRange]) -> None:
        """Take over new ranges, which change when a device joins or leaves the address space."""
        self.ranges = tuple(sorted(ranges))
        self._free = []
        for found in self.ranges:
            start = found.start
            for taken, end in self.taken(found.start, found.size):
                if start < taken:
                    self._free.append((start, taken))
                start = end
            if start <= found.last:
                self._free.append((start, found.last + 1))

    def taken(self, iova: int, size: int) -> list[tuple[int, int]]:
        """The pieces that are taken, wholly or in part, of `size` bytes from `iova`: (start, end past it), in order."""
        first = bisect_left(self._taken, (iova, 0))
        if first and self._taken[first - 1][1] > iova:
            first -= 1
        return self._taken[first : bisect_left(self._taken, (iova + size, 0))]

    def allocate(self, size: int, align: int | None = None, below: int | None = None) -> int:
        """Take `size` bytes at an address that is a multiple of `align` (a power of two, the granule by default), all
        of them below `below` if that is given (1 << 32 for a device with 32-bit addressing). Raises `IovaError`."""
        if align is not None and (align < 1 or align & (align - 1)):
            raise IovaError(f"an alignment must be a power of two, not {align:#x}")
        align = max(align or 0, self.granule)
        self._check_size(size)
        for i, (free, end) in enumerate(self._free):
            start = _round_up(max(free, self.granule), align)
            if start + size <= (end if below is None else min(end, below)):
                self._take(i, start, size)
                return start
        limit = "" if below is None else f" below {below:#x}"
        raise IovaError(
            f"no {size:#x} free bytes aligned to {align:#x}{limit} are left",
            cause=f"the IOMMU translates {self._describe()}; {sum(e - s for s, e in self._taken):#x} bytes are mapped",
            fix="unmap something, or map less at once",
        )

    def reserve(self, iova: int, size: int) -> None:
        """Take exactly `size` bytes at `iova`. Raises `IovaError` when they are misaligned, out of range or taken."""
        self._check_size(size)
        if iova < 0 or iova + size > _SPACE:
            raise IovaError(f"{size:#x} bytes at IOVA {iova:#x} go past the end of 64-bit addresses")
        if iova % self.granule:
            raise IovaError(f"IOVA {iova:#x} is not a multiple of the IOMMU's page size, {self.granule:#x}")
        if not any(r.start <= iova and iova + size - 1 <= r.last for r in self.ranges):
            raise IovaError(
                f"IOVA {iova:#x}-{iova + size - 1:#x} is outside what the IOMMU translates for this device",
                cause=f"which is {self._describe()}",
                fix="leave iova out to have one chosen",
            )
        for start, end in self.taken(iova, size):
            raise IovaError(
                f"IOVA {iova:#x}-{iova + size - 1:#x} overlaps {start:#x}-{end - 1:#x}, which is mapped",
                fix="unmap that first, or leave iova out to have one chosen",
            )
        self._take(bisect_right(self._free, (iova, _SPACE)) - 1, iova, size)

    def release(self, iova: int, size: int) -> None:
        """Give back what `allocate` or `reserve` took, all of one piece; ValueError for anything else."""
        piece = (iova, iova + size)
        i = bisect_left(self._taken, piece)
        if self._taken[i : i + 1] != [piece]:
            raise ValueError(f"{size:#x} bytes at IOVA {iova:#x} were not taken")
        del self._taken[i]
        for found in self.ranges:  # which may have changed meanwhile
            start, end = max(iova, found.start), min(iova + size, found.last + 1)
            if start < end:
                self._give(start, end, found)

    def _take(self, i: int, start: int, size: int) -> None:
        free, end = self._free[i]
        self._free[i : i + 1] = [gap for gap in ((free, start), (start + size, end)) if gap[0] < gap[1]]
        insort(self._taken, (start, start + size))

    def _give(self, start: int, end: int, found: IovaRange) -> None:
        i = bisect_left(self._free, (start, end))
        before, behind = self._free[i - 1 : i], self._free[i : i + 1]
        if before and before[0][1] == start and start > found.start:
            start, i = before[0][0], i - 1
        else:
            before = []
        if behind and behind[0][0] == end and end <= found.last:
            end = behind[0][1]
        else:
            behind = []
        self._free[i : i + len(before) + len(behind)] = [(start, end)]

    def _check_size(self, size: int) -> None:
        if size <= 0:
            raise IovaError(f"a mapping cannot have {size} bytes")
        if size % self.granule:
            raise IovaError(
                f"a mapping of {size:#x} bytes is not a multiple of the IOMMU's page size, {self.granule:#x}"
            )

    def _describe(self) -> str:
        return ", ".join(str(r) for r in self.ranges) or "nothing"


def _round_up(value: int, align: int) -> int:
    return (value + align - 1) & ~(align - 1)
