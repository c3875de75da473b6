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
        self._taken: list[tuple[int, int]] = []  # (start, end past it), sorted, never overlapping
        self.ranges: tuple[IovaRange, ...] = ()
        self.set_ranges(ranges)

    def set_ranges(self, ranges: Iterable[IovaRange]) -> None:
        """Take over new ranges, which change when a device joins or leaves the address space."""
        self.ranges = tuple(sorted(ranges))

    def allocate(self, size: int, align: int | None = None, below: int | None = None) -> int:
        """Take `size` bytes at an address that is a multiple of `align` (a power of two, the granule by default), all
        of them below `below` if that is given (1 << 32 for a device with 32-bit addressing). Raises `IovaError`."""
        align = max(align or 0, self.granule)
        if align & (align - 1):
            raise IovaError(f"an alignment must be a power of two, not {align:#x}")
        self._check_size(size)
        for found in self.ranges:
            last = found.last if below is None else min(found.last, below - 1)
            start = _round_up(max(found.start, self.granule), align)
            while start + size - 1 <= last:
                # The first taken piece that ends behind `start` is the only one that can be in the way first.
                i = bisect_right(self._taken, (start, _SPACE))
                if i and self._taken[i - 1][1] > start:
                    start = _round_up(self._taken[i - 1][1], align)
                elif i < len(self._taken) and self._taken[i][0] < start + size:
                    start = _round_up(self._taken[i][1], align)
                else:
                    insort(self._taken, (start, start + size))
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
        i = bisect_left(self._taken, (iova, 0))
        for other in self._taken[max(0, i - 1) : i + 1]:
            if other[0] < iova + size and iova < other[1]:
                raise IovaError(
                    f"IOVA {iova:#x}-{iova + size - 1:#x} overlaps {other[0]:#x}-{other[1] - 1:#x}, which is mapped",
                    fix="unmap that first, or leave iova out to have one chosen",
                )
        insort(self._taken, (iova, iova + size))

    def release(self, iova: int, size: int) -> None:
        """Give back what `allocate` or `reserve` took."""
        self._taken.remove((iova, iova + size))

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
