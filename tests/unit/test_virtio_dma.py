"""Private DMA memory: dealt out by pages, and freed whatever happens."""

from types import SimpleNamespace
from typing import Any

import pytest

import vfio
from netbridge.virtio.dma import Pieces, VfioDma
from tests.unit.virtio_fakes import IOVA, FakeDma

PAGE = 4096


class FakeIommu:
    """Maps nothing, and keeps account of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: list[vfio.Memory] = []
        self.mapped: list[vfio.Memory] = []

    def map(self, memory: vfio.Memory) -> Any:
        self.seen.append(memory)
        if self.error is not None:
            raise self.error
        self.mapped.append(memory)

        def unmap() -> None:
            assert not memory.closed, "unmapped from the device before it is freed"
            self.mapped.remove(memory)

        return SimpleNamespace(iova=IOVA, close=unmap)


def test_a_block_is_mapped_while_it_is_open() -> None:
    iommu = FakeIommu()
    block = VfioDma(iommu).allocate(5000)  # type: ignore[arg-type]
    assert (block.size, block.iova) == (2 * PAGE, IOVA)
    assert not any(block.view)
    block.view[0] = 1
    assert iommu.mapped == iommu.seen
    block.close()
    assert not iommu.mapped
    assert iommu.seen[0].closed


def test_memory_that_cannot_be_mapped_is_freed() -> None:
    iommu = FakeIommu(vfio.LockedMemoryLimit("cannot map"))
    with pytest.raises(vfio.LockedMemoryLimit):
        VfioDma(iommu).allocate(PAGE)  # type: ignore[arg-type]
    assert iommu.seen[0].closed


def test_it_has_no_file_by_which_it_could_be_shared() -> None:
    iommu = FakeIommu()
    block = VfioDma(iommu).allocate(PAGE)  # type: ignore[arg-type]
    with pytest.raises(vfio.VfioError):
        _ = iommu.seen[0].fd
    block.close()


def test_pieces_start_on_pages_and_follow_each_other() -> None:
    block = FakeDma().allocate(4 * PAGE)
    pieces = Pieces(block)
    taken = [pieces.take(size) for size in (12, PAGE + 1, PAGE)]
    assert [piece.iova - IOVA for piece in taken] == [0, PAGE, 3 * PAGE]
    assert [piece.address - block.address for piece in taken] == [0, PAGE, 3 * PAGE]
    with pytest.raises(ValueError, match="16384 bytes of DMA memory are not enough"):
        pieces.take(1)
    block.close()
