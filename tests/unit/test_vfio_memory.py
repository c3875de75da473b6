"""Memory for DMA: what it is made of, who can share it, and that nothing is left behind. On the real kernel."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import re
from pathlib import Path

import pytest

import vfio
from tests.descriptors import open_fds

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def mapped_at(address: int) -> str | None:
    """The line of /proc/self/maps that covers an address."""
    with Path("/proc/self/maps").open(encoding="ascii") as maps:
        for line in maps:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if first <= address < last:
                return line
    return None


def test_a_memfd_is_sealed_and_shared() -> None:
    before = open_fds()
    with vfio.Memory.memfd(5000, name="rx") as memory:
        assert memory.size == 8192
        assert memory.page_size == mmap.PAGESIZE
        assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) == SEALS
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(memory.fd, 4096)
        memory.view[0:4] = b"ping"
        line = mapped_at(memory.address)
        assert line is not None
        assert re.search(r"rw-s .*/memfd:rx", line)
        with vfio.Memory.from_fd(os.dup(memory.fd), require_seals=True) as other:
            assert other.size == 8192
            assert other.address != memory.address
            assert bytes(other.view[0:4]) == b"ping"
            other.view[4] = 0x21
        assert memory.view[4] == 0x21
    assert open_fds() == before
    assert mapped_at(memory.address) is None
    memory.close()


def test_without_seals_it_can_be_cut_and_is_refused_where_that_matters() -> None:
    before = open_fds()
    with vfio.Memory.memfd(8192, seal=False) as memory:
        with pytest.raises(vfio.VfioError, match="F_SEAL_SHRINK is refused: whoever sent it could shrink"):
            vfio.Memory.from_fd(os.dup(memory.fd), require_seals=True)
        vfio.Memory.from_fd(os.dup(memory.fd)).close()
    assert open_fds() == before


@pytest.mark.parametrize("size", [0, -4096, 100, 3 * 8192])
def test_from_fd_refuses_what_is_not_there_and_closes_it(size: int) -> None:
    with vfio.Memory.memfd(8192) as memory:
        before = open_fds()
        with pytest.raises(vfio.VfioError, match="of shared memory that has 8192"):
            vfio.Memory.from_fd(os.dup(memory.fd), size)
        assert open_fds() == before


def test_part_of_an_fd() -> None:
    with vfio.Memory.memfd(8192) as memory, vfio.Memory.from_fd(os.dup(memory.fd), 4096) as part:
        assert part.size == 4096


def test_from_fd_refuses_what_has_no_seals_to_ask_for() -> None:
    before = open_fds()
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(vfio.VfioError):
        vfio.Memory.from_fd(read, 4096, require_seals=True)
    assert open_fds() == before


def test_anonymous_memory_is_not_inherited_and_has_no_fd() -> None:
    with vfio.Memory.anonymous(3 * 4096) as memory:
        assert memory.size == 3 * 4096
        memory.view[8191] = 9
        with pytest.raises(vfio.VfioError, match=r"use Memory.memfd"):
            _ = memory.fd
        child = os.fork()
        if child == 0:
            os._exit(0 if mapped_at(memory.address) is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("size", [0, -1])
def test_no_memory_makes_no_sense(size: int) -> None:
    for make in (vfio.Memory.memfd, vfio.Memory.anonymous):
        with pytest.raises(vfio.VfioError, match="makes no sense"):
            make(size)


def test_a_view_that_is_still_in_use_keeps_the_memory() -> None:
    memory = vfio.Memory.memfd(4096)
    part = memory.view[0:8]
    memory.close()
    assert memory.closed
    part[0] = 1
    assert mapped_at(memory.address) is not None
    part.release()
    gc.collect()
    assert mapped_at(memory.address) is None


def test_forgotten_memory_is_given_back() -> None:
    before = open_fds()
    vfio.Memory.memfd(4096)
    gc.collect()
    assert open_fds() == before


def test_too_much_memory_leaks_nothing() -> None:
    before = open_fds()
    for make in (vfio.Memory.memfd, vfio.Memory.anonymous):
        with pytest.raises(vfio.VfioError, match="to be had: E"):
            make(1 << 60)
    assert open_fds() == before


def test_a_huge_page_size_that_does_not_exist() -> None:
    with pytest.raises(vfio.VfioError, match="no huge pages of 12345 bytes; give True"):
        vfio.Memory.memfd(4096, huge=12345)


@pytest.mark.parametrize("make", [vfio.Memory.hugetlb, lambda size: vfio.Memory.anonymous(size, huge=True)])
def test_huge_pages_that_are_not_reserved_are_explained(make: object) -> None:
    before = open_fds()
    with pytest.raises(vfio.VfioError, match=r"huge page|no pages of that size") as caught:
        make(1 << 45)  # type: ignore[operator]
    assert open_fds() == before
    if Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        assert "16777216 huge pages are needed" in str(caught.value)
        assert "echo 16777216 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages" in str(caught.value)


@pytest.mark.parametrize("size", [1 << 63, (1 << 63) - 1, 1 << 64])
def test_sizes_beyond_all_bounds(size: int) -> None:
    before = open_fds()
    for make in (vfio.Memory.memfd, vfio.Memory.anonymous, vfio.Memory.hugetlb):
        with pytest.raises(vfio.VfioError, match="makes no sense"):
            make(size)
    assert open_fds() == before


def test_an_interrupted_making_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_fds()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vfio.memory.fcntl.fcntl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vfio.Memory.memfd(4096)
    assert open_fds() == before


def test_from_fd_of_what_is_no_file() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    for fd in (-1, read):
        with pytest.raises(vfio.VfioError, match=r"is not a file descriptor|EBADF"):
            vfio.Memory.from_fd(fd)
