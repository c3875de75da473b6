"""Mapping memory for DMA: accounting, refusals before the kernel is asked, and the kernel's refusals in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfio
from tests.unit.test_vfio_device import Machine
from vfio import _abi, _diagnose, _sys

MAPS = {"group": _abi.VFIO_IOMMU_MAP_DMA, "iommufd": _abi.IOMMU_IOAS_MAP}
UNMAPS = {"group": _abi.VFIO_IOMMU_UNMAP_DMA, "iommufd": _abi.IOMMU_IOAS_UNMAP}
interfaces = pytest.mark.parametrize("interface", ["group", "iommufd"])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def memory() -> Iterator[vfio.Memory]:
    with vfio.Memory.memfd(4 * 4096, name="test") as made:
        yield made


@interfaces
def test_a_mapping_lives_in_its_block(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        with device.iommu.map(memory, write=False) as mapping:
            assert machine.kernel.mapped == {mapping.iova: 0x4000}
            assert (mapping.size, mapping.address) == (0x4000, memory.address)
            assert (mapping.readable, mapping.writable) == (True, False)
            assert device.iommu.mappings == (mapping,)
        assert machine.kernel.mapped == {}
        assert mapping.closed
        mapping.close()
        assert len(device.iommu.mappings) == 0


@interfaces
def test_where_it_is_put(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        iommu = device.iommu
        assert iommu.map(memory, 0x10000000).iova == 0x10000000
        assert iommu.map(memory).iova == 0x1000
        assert iommu.map(memory, offset=4096, size=8192).address == memory.address + 4096
        assert iommu.map(memory, align=1 << 30).iova == 1 << 30
        with vfio.Memory.anonymous(4 << 20) as large:
            # A large piece starts where the IOMMU can use its large pages.
            assert iommu.map(large).iova % (2 << 20) == 0
        with pytest.raises(vfio.IovaError, match="below 0x1000 are left"):
            iommu.map(memory, below=0x1000)


@interfaces
def test_what_is_refused_before_the_kernel_is_asked(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        iommu = device.iommu
        iommu.map(memory, 0x10000)
        asked = machine.kernel.calls.count(MAPS[interface])
        for arguments, says in (
            ({"iova": 0x13000}, "overlaps 0x10000-0x13fff"),
            ({"iova": 0x10001}, "not a multiple"),
            ({"iova": 0xFEE00000}, "outside what the IOMMU translates"),
            ({"iova": (1 << 64) - 0x1000}, "past the end of 64-bit"),
            ({"offset": 0x4000}, "not all inside <Memory test"),
            ({"offset": -0x1000}, "not all inside"),
            ({"size": 0x5000}, "not all inside"),
            ({"size": 100}, "not a multiple of the IOMMU's page size"),
            ({"offset": 1, "size": 4096}, "does not start on a page"),
            ({"read": False, "write": False}, "of no use"),
        ):
            with pytest.raises(vfio.VfioError, match=says):
                iommu.map(memory, **arguments)
        with vfio.Memory.memfd(4096) as gone:
            pass
        with pytest.raises(vfio.VfioError, match="it is closed"):
            iommu.map(gone)
        assert machine.kernel.calls.count(MAPS[interface]) == asked
        assert len(iommu.mappings) == 1


@interfaces
def test_unmapping_a_range(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        iommu = device.iommu
        one, two, three = (iommu.map(memory, at) for at in (0x10000, 0x20000, 0x30000))
        with pytest.raises(vfio.IovaError, match=r"would cut .*0x20000-0x23fff.* in two"):
            iommu.unmap_range(0x10000, 0x12000)
        assert iommu.unmap_range(0x50000, 0x1000) == 0
        assert iommu.unmap_range(0x10000, 0x14000) == 0x8000
        assert (one.closed, two.closed, three.closed) == (True, True, False)
        assert iommu.map(memory, 0x20000).iova == 0x20000
        for iova, size in ((0, 0), (-1, 4096), ((1 << 64) - 4096, 8192)):
            with pytest.raises(vfio.IovaError, match="there are no"):
                iommu.unmap_range(iova, size)


@interfaces
def test_unmapping_all(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        assert device.iommu.unmap_all() == 0
        made = [device.iommu.map(memory) for _ in range(5)]
        assert device.iommu.unmap_all() == 5 * 0x4000
        assert all(mapping.closed for mapping in made)
        assert machine.kernel.mapped == {}


def test_unmapping_all_on_a_kernel_that_cannot(machine: Machine, memory: vfio.Memory) -> None:
    machine.kernel.extensions.discard(_abi.VFIO_UNMAP_ALL)
    with machine.open() as device:
        for _ in range(5):
            device.iommu.map(memory)
        assert device.iommu.unmap_all() == 5 * 0x4000
        assert machine.kernel.mapped == {}


@interfaces
def test_a_mapping_the_kernel_refuses_takes_no_room(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        machine.kernel.fail[MAPS[interface]] = errno.EINVAL
        for _ in range(3):
            with pytest.raises(vfio.VfioError, match="cannot map 0x4000 bytes for DMA at IOVA 0x1000: EINVAL"):
                device.iommu.map(memory)
        machine.kernel.fail.clear()
        assert device.iommu.map(memory).iova == 0x1000


@interfaces
@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.ENOSPC, vfio.MappingLimit, "raise vfio_iommu_type1's module parameter dma_entry_limit"),
        (errno.EFAULT, vfio.VfioError, "not mapped in this process"),
        (errno.EEXIST, vfio.IovaError, "another process sharing this IOMMU"),
        (errno.EINVAL, vfio.VfioError, "ranges: 0x0-0xfedfffff, 0xfef00000-0x7fffffffff"),
    ],
)
def test_the_kernels_refusals_in_words(
    machine: Machine, memory: vfio.Memory, interface: str, code: int, kind: type[vfio.VfioError], says: str
) -> None:
    with machine.open(interface) as device:
        machine.kernel.fail[MAPS[interface]] = code
        with pytest.raises(kind, match=says) as caught:
            device.iommu.map(memory)
        assert caught.value.errno == code


@interfaces
@pytest.mark.parametrize(
    ("locked", "kind", "says"),
    [
        (
            (1 << 20, 8 << 20, False),
            vfio.LockedMemoryLimit,
            r"limit on locked memory is 8 MiB, 1 MiB are locked already, 8 MiB more are needed; .*ulimit -l 9216",
        ),
        ((1 << 20, 8 << 20, True), vfio.VfioError, "not enough memory to pin"),
        ((1 << 20, 64 << 20, False), vfio.VfioError, "not enough memory to pin"),
        ((None, None, False), vfio.VfioError, "not enough memory to pin"),
    ],
)
def test_the_locked_memory_limit(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    interface: str,
    locked: tuple[int | None, int | None, bool],
    kind: type[vfio.VfioError],
    says: str,
) -> None:
    monkeypatch.setattr(_diagnose, "locked_memory", lambda: locked)
    with machine.open(interface) as device, vfio.Memory.memfd(8 << 20) as memory:
        machine.kernel.fail[MAPS[interface]] = errno.ENOMEM
        with pytest.raises(vfio.VfioError, match=says) as caught:
            device.iommu.map(memory)
        assert type(caught.value) is kind


def test_what_this_process_has_locked() -> None:
    used, limit, exempt = _diagnose.locked_memory()
    assert used is not None
    assert used >= 0
    assert limit is None or limit > 0
    assert isinstance(exempt, bool)


@interfaces
def test_a_kernel_that_unmaps_something_else(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        mapping = device.iommu.map(memory)
        machine.kernel.mapped[mapping.iova] = 4096
        with pytest.raises(vfio.Malformed, match="unmapped 0x1000 bytes at IOVA 0x1000 where 0x4000 were mapped"):
            mapping.close()
        assert mapping.closed


@interfaces
def test_an_unmapping_that_fails_keeps_the_account(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with machine.open(interface) as device:
        mapping = device.iommu.map(memory)
        machine.kernel.fail[UNMAPS[interface]] = errno.EINVAL
        with pytest.raises(vfio.VfioError, match="cannot unmap IOVA 0x1000"):
            mapping.close()
        assert not mapping.closed
        with pytest.raises(vfio.VfioError, match="cannot unmap everything"):
            device.iommu.unmap_all()
    assert mapping.closed


@interfaces
def test_many_ranges(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    machine.kernel.ranges = [(i << 32, (i << 32) + 0xFFFF) for i in range(40)]
    with machine.open(interface) as device:
        assert len(device.iommu.iova_ranges) == 40
        assert device.iommu.iova_ranges[39] == vfio.IovaRange(39 << 32, (39 << 32) + 0xFFFF)


def test_a_space_without_devices_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    with vfio.Iommu.open("group", **machine.options) as iommu, vfio.Memory.memfd(4096) as memory:
        machine.kernel.fail[_abi.VFIO_IOMMU_GET_INFO] = errno.ENODEV
        with pytest.raises(vfio.VfioError, match="no device is in this address space yet"):
            iommu.map(memory)


def chain(*links: tuple[int, int, int]) -> bytearray:
    """Bytes with capability headers: (where, id, next)."""
    raw = bytearray(64)
    for where, kind, following in links:
        raw[where : where + 8] = kind.to_bytes(2, "little") + b"\1\0" + following.to_bytes(4, "little")
    return raw


def test_capability_chains() -> None:
    raw = chain((16, 1, 32), (32, 2, 24), (24, 3, 0))
    assert list(_sys.capabilities(raw, 16)) == [(1, 16), (2, 32), (3, 24)]
    assert list(_sys.capabilities(raw, 0)) == []


@pytest.mark.parametrize(
    ("raw", "first"),
    [
        (chain((16, 1, 16)), 16),
        (chain((16, 1, 32), (32, 2, 16)), 16),
        (chain((16, 1, 60)), 16),
        (chain(), 64),
        (chain(), 0xFFFFFFFF),
    ],
)
def test_broken_capability_chains_are_refused(raw: bytearray, first: int) -> None:
    with pytest.raises(vfio.Malformed, match="capability chain is broken"):
        list(_sys.capabilities(raw, first))


def test_a_struct_that_does_not_fit_is_refused() -> None:
    with pytest.raises(vfio.Malformed, match="leaves the 16 bytes"):
        _sys.at("struct vfio_info_cap_header", bytearray(16), 9)
    with pytest.raises(vfio.Malformed, match="leave the 16 bytes"):
        _sys.array_at("struct vfio_iova_range", bytearray(16), 8, 1)
    assert list(_sys.array_at("struct vfio_iova_range", bytearray(16), 16, 0)) == []


def test_a_kernel_that_asks_for_ever_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(fd: int, request: int, argument: bytearray) -> int:
        argument[0:4] = (len(argument) * 100).to_bytes(4, "little")
        return 0

    monkeypatch.setattr(_sys, "ioctl", greedy)
    with pytest.raises(vfio.Malformed, match="cannot be right"):
        _sys.query(0, 0, "vfio_region_info")


@interfaces
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_mapping_is_undone(
    machine: Machine, memory: vfio.Memory, monkeypatch: pytest.MonkeyPatch, interface: str, when: str
) -> None:
    def interrupted(fd: int, request: int, argument: object = 0) -> int:
        if request == MAPS[interface]:
            if when == "after":
                machine.kernel.ioctl(fd, request, argument)
            raise KeyboardInterrupt
        return machine.kernel.ioctl(fd, request, argument)

    with machine.open(interface) as device:
        with monkeypatch.context() as patch:
            patch.setattr(_sys, "ioctl", interrupted)
            with pytest.raises(KeyboardInterrupt):
                device.iommu.map(memory)
        assert machine.kernel.mapped == {}
        assert device.iommu.mappings == ()
        assert device.iommu.map(memory).iova == 0x1000


@interfaces
@pytest.mark.parametrize(("address", "size"), [(-4096, 4096), (4096, 0), (4096, -4096), ((1 << 64) - 4096, 8192)])
def test_memory_that_cannot_be(machine: Machine, interface: str, address: int, size: int) -> None:
    with machine.open(interface) as device:
        with pytest.raises(vfio.IovaError, match="there is no memory of"):
            device.iommu.map_address(address, size)
        assert device.iommu.mappings == ()


@interfaces
def test_a_closed_space_takes_no_mappings(
    machine: Machine, memory: vfio.Memory, monkeypatch: pytest.MonkeyPatch, interface: str
) -> None:
    with machine.open(interface) as device:
        device.iommu.map(memory)
    monkeypatch.undo()  # what Python's own ioctl says of a closed file is no OSError
    for late in (lambda: device.iommu.map(memory), lambda: device.iommu.iova_ranges, lambda: device.iommu.dma_avail):
        with pytest.raises(vfio.VfioError, match="address space is closed"):
            late()
    assert device.iommu.unmap_all() == device.iommu.unmap_range(0x1000, 0x1000) == 0


@interfaces
def test_what_others_have_open_too_is_unmapped(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    """Closing the last file would unmap it, but a child may have a copy."""
    with machine.open(interface) as device:
        mapping = device.iommu.map(memory)
    assert mapping.closed
    assert machine.kernel.mapped == {}


@interfaces
def test_ranges_follow_the_devices(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    machine.sysfs.function("0000:00:03.1", driver="vfio-pci", group=7, cdev="vfio0")
    with vfio.Iommu.open(interface, **machine.options) as iommu, machine.open(iommu=iommu):
        both = iommu.iova_ranges
        machine.kernel.ranges = [(0, 0xFFFF)]
        with machine.open(iommu=iommu, address="0000:00:03.1"):
            assert iommu.iova_ranges == (vfio.IovaRange(0, 0xFFFF),)
            iommu.map(memory)
            machine.kernel.ranges = [(found.start, found.last) for found in both]
        assert iommu.iova_ranges == both


@interfaces
def test_a_forked_child_leaves_its_parents_alone(machine: Machine, memory: vfio.Memory, interface: str) -> None:
    with vfio.Iommu.open(interface, **machine.options) as iommu, machine.open(iommu=iommu) as device:
        device.set_bus_master(True)
        mapping = iommu.map(memory)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                asked = len(machine.kernel.calls)
                mapping.close()
                own = iommu.map(memory)
                device.close()
                iommu.close()
                unmapped = machine.kernel.calls[asked:].count(UNMAPS[interface])
                # Its own mapping is undone, and nothing else.
                code = 0 if own.closed and unmapped == 1 and list(machine.kernel.mapped) == [mapping.iova] else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert device.bus_master
        assert not mapping.closed


def test_a_capability_within_a_user_namespace_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/status": "VmLck:\t8 kB\nCapEff:\t000001ffffffffff\n", "/proc/self/uid_map": "0 1000 1"}
    monkeypatch.setattr(_diagnose, "_text", files.get)
    assert _diagnose.locked_memory()[::2] == (8192, False)
    files["/proc/self/uid_map"] = "         0          0 4294967295"
    assert _diagnose.locked_memory()[::2] == (8192, True)
