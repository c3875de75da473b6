"""The cases of Linux's own VFIO selftests, on this library, in every mode that the kernel offers.

Runs inside a guest, as root. The names of the cases are those of the kernel's tools/testing/selftests/vfio; the code
is not. What the kernel's tests do with the driver of a DSA or IOAT engine is done with QEMU's edu and nvme here.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import vfio
from tests.guest.vfio_support import (
    EDU,
    MODES,
    NVME,
    PAGE,
    Edu,
    KernelLog,
    Nvme,
    find,
    huge_pages,
    needs_devices,
    usable,
)
from vfio import _abi, _sys

pytestmark = needs_devices

TOP = (1 << 64) - 1
CHUNK = Edu.CHUNK


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """What the table of cases is made of; before anything is skipped."""
    marker = request.node.get_closest_marker("vfio_case")
    parameters = {**request.node.callspec.params} if hasattr(request.node, "callspec") else {}
    mode = parameters.get("mode", "iommufd")
    record_property("vfio_case", marker.args[0].format(**parameters))
    record_property("vfio_mode", mode)
    record_property("kernel", platform.release())


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, row: None) -> str:
    return usable(request.param)


def lent(ids: tuple[int, int], name: str) -> Iterator[vfio.PciAddress]:
    function = find(ids)
    if function is None:
        pytest.skip(f"this guest has no {name} behind the IOMMU, alone in its group")
    with vfio.bind(function.address):
        yield function.address


@pytest.fixture(scope="module")
def lent_edu() -> Iterator[vfio.PciAddress]:
    yield from lent(EDU, "edu")


@pytest.fixture(scope="module")
def lent_nvme() -> Iterator[vfio.PciAddress]:
    yield from lent(NVME, "nvme")


@pytest.fixture
def edu(mode: str, lent_edu: vfio.PciAddress) -> Iterator[vfio.Device]:
    with vfio.open_device(lent_edu, mode) as device:
        assert device.interface == mode
        yield device


@pytest.fixture
def nvme(mode: str, lent_nvme: vfio.PciAddress) -> Iterator[vfio.Device]:
    with vfio.open_device(lent_nvme, mode) as device:
        yield device


@pytest.fixture
def memory() -> Iterator[vfio.Memory]:
    """Two pages of noise and four of zeros."""
    with vfio.Memory.memfd(6 * PAGE) as made:
        made.view[: 2 * PAGE] = os.urandom(2 * PAGE)
        yield made


# vfio_dma_mapping_test


@pytest.mark.vfio_case("dma_map_unmap[{pages}]")
@pytest.mark.parametrize("pages", ["anonymous", "anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb"])
def test_dma_map_unmap(edu: vfio.Device, pages: str) -> None:
    page_size = {"anonymous": 0, "anonymous_hugetlb_2mb": vfio.HUGE_2M, "anonymous_hugetlb_1gb": vfio.HUGE_1G}[pages]
    with huge_pages(page_size or vfio.HUGE_2M, 1 if page_size else 0) as reason:
        if page_size and reason:
            pytest.skip(reason)
        with vfio.Memory.anonymous(page_size or 8 * PAGE, huge=page_size) as memory:
            limit = None if page_size == vfio.HUGE_1G else Edu.BELOW
            with edu.iommu.map(memory, below=limit) as mapping:
                assert mapping.size == memory.size
                if limit is not None:
                    # It can be reached, at both ends.
                    memory.view[:CHUNK] = os.urandom(CHUNK)
                    Edu(edu).memcpy(mapping.iova + memory.size - CHUNK, mapping.iova, CHUNK)
                    assert memory.view[memory.size - CHUNK :] == memory.view[:CHUNK]
                assert edu.iommu.unmap_range(mapping.iova, mapping.size) == memory.size
            assert mapping.closed
            # What is unmapped is not there to be unmapped again, and there is room for it.
            with edu.iommu.map(memory, mapping.iova):
                pass
            assert edu.iommu.unmap_all() == 0


def last_place(device: vfio.Device, size: int) -> int:
    """The last address that the IOMMU can translate, less `size`."""
    return device.iommu.iova_ranges[-1].last + 1 - size


@pytest.mark.vfio_case("dma_map_limit.unmap_range")
def test_unmap_range_at_the_limit(edu: vfio.Device, memory: vfio.Memory) -> None:
    mapping = edu.iommu.map(memory, last_place(edu, memory.size))
    assert edu.iommu.unmap_range(mapping.iova, mapping.size) == memory.size
    assert mapping.closed


@pytest.mark.vfio_case("dma_map_limit.unmap_all")
def test_unmap_all_at_the_limit(edu: vfio.Device, memory: vfio.Memory) -> None:
    mapping = edu.iommu.map(memory, last_place(edu, memory.size))
    assert edu.iommu.unmap_all() == memory.size
    assert mapping.closed


@pytest.mark.vfio_case("dma_map_limit.overflow")
def test_overflow(edu: vfio.Device, memory: vfio.Memory) -> None:
    iova = TOP & ~(PAGE - 1)
    with pytest.raises(vfio.IovaError, match="past the end of 64-bit addresses"):
        edu.iommu.map(memory, iova, size=2 * PAGE)
    with pytest.raises(vfio.IovaError):
        edu.iommu.unmap_range(iova, 2 * PAGE)
    # The kernel's own answer, past the library's account. EOVERFLOW since 6.19, EINVAL before, except with iommufd.
    backend = edu.iommu._backend
    with pytest.raises(OSError, match=r"Invalid argument|Value too large") as caught:
        backend.map(memory.address, iova, 2 * PAGE, True, True)
    assert caught.value.errno in (errno.EOVERFLOW, errno.EINVAL)
    with pytest.raises(OSError, match=r"Invalid argument|Value too large"):
        backend.unmap(iova, 2 * PAGE)


# vfio_iommufd_setup_test: the character device, call by call


class Cdev:
    """An open VFIO character device and /dev/iommu, without the library's help."""

    def __init__(self, address: vfio.PciAddress) -> None:
        name = vfio.PciFunction(address).vfio_cdev
        assert name is not None
        self.iommu = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        self.fd = os.open(f"/dev/vfio/devices/{name}", os.O_RDWR | os.O_CLOEXEC)

    def bind(self, iommufd: int) -> int:
        request = _sys.struct("vfio_device_bind_iommufd")
        request.iommufd = iommufd
        _sys.call(self.fd, _abi.VFIO_DEVICE_BIND_IOMMUFD, request)
        return int(request.out_devid)

    def info(self) -> Any:
        return _sys.query(self.fd, _abi.VFIO_DEVICE_GET_INFO, "vfio_device_info")[0]

    def new_ioas(self) -> int:
        request = _sys.struct("iommu_ioas_alloc")
        _sys.call(self.iommu, _abi.IOMMU_IOAS_ALLOC, request)
        return int(request.out_ioas_id)

    def attach(self, pt_id: int) -> None:
        request = _sys.struct("vfio_device_attach_iommufd_pt")
        request.pt_id = pt_id
        _sys.call(self.fd, _abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, request)

    def detach(self) -> None:
        _sys.call(self.fd, _abi.VFIO_DEVICE_DETACH_IOMMUFD_PT, _sys.struct("vfio_device_detach_iommufd_pt"))

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.iommu)


@pytest.fixture
def cdev(row: None, request: pytest.FixtureRequest) -> Iterator[Cdev]:
    usable("iommufd")
    made = Cdev(request.getfixturevalue("lent_edu"))
    yield made
    made.close()


@pytest.mark.vfio_case("cdev.bind")
def test_cdev_bind(cdev: Cdev) -> None:
    assert cdev.bind(cdev.iommu) > 0
    assert cdev.info().num_regions >= 9


@pytest.mark.vfio_case("cdev.get_info_without_bind_fails")
def test_cdev_get_info_without_bind_fails(cdev: Cdev) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        cdev.info()


@pytest.mark.vfio_case("cdev.bind_bad_iommufd_fails")
def test_cdev_bind_bad_iommufd_fails(cdev: Cdev) -> None:
    for bad in (-2, cdev.fd):
        with pytest.raises(OSError, match=r"Bad file|bad state|Invalid argument"):
            cdev.bind(bad)


@pytest.mark.vfio_case("cdev.repeated_bind_fails")
def test_cdev_repeated_bind_fails(cdev: Cdev) -> None:
    cdev.bind(cdev.iommu)
    with pytest.raises(OSError, match="Invalid argument"):
        cdev.bind(cdev.iommu)


@pytest.mark.vfio_case("cdev.attach_detach_pt")
def test_cdev_attach_detach_pt(cdev: Cdev) -> None:
    cdev.bind(cdev.iommu)
    for _ in range(2):
        cdev.attach(cdev.new_ioas())
        cdev.detach()


@pytest.mark.vfio_case("cdev.attach_invalid_pt_fails")
def test_cdev_attach_invalid_pt_fails(cdev: Cdev) -> None:
    cdev.bind(cdev.iommu)
    with pytest.raises(OSError, match="No such file"):
        cdev.attach(0x7FFFFFFF)


# vfio_pci_device_test


@pytest.mark.vfio_case("device.config_space_read_write")
def test_config_space_read_write(edu: vfio.Device) -> None:
    function = vfio.PciFunction(edu.address)
    config = edu.config
    assert (config.vendor_id, config.device_id) == (function.vendor_id, function.device_id)
    assert config.read32(0) == function.device_id << 16 | function.vendor_id
    assert config.read8(1) << 8 | config.read8(0) == function.vendor_id
    config.write16(_abi.PCI_VENDOR_ID, 0xFFFF)
    assert config.vendor_id == function.vendor_id
    for on in (True, False, True):
        edu.set_bus_master(on)
        assert edu.bus_master is on
    command = config.read16(_abi.PCI_COMMAND)
    config.write16(_abi.PCI_COMMAND, command | _abi.PCI_COMMAND_INTX_DISABLE)
    assert config.read16(_abi.PCI_COMMAND) == command | _abi.PCI_COMMAND_INTX_DISABLE
    config.write16(_abi.PCI_COMMAND, command)
    config.write8(_abi.PCI_INTERRUPT_LINE, 0x5A)
    assert config.interrupt_line == 0x5A


@pytest.mark.vfio_case("device.validate_bars[{name}]")
@pytest.mark.parametrize("name", ["edu", "nvme"])
def test_validate_bars(mode: str, name: str, request: pytest.FixtureRequest) -> None:
    device: vfio.Device = request.getfixturevalue(name)
    implemented = [region for region in device.regions[:6] if region.size]
    assert implemented
    for region in implemented:
        assert region.readable
        assert region.writable
        assert region.size & (region.size - 1) == 0
        bar = device.bar(region.index)
        # The mapping and the file show the same registers.
        through_file = int.from_bytes(os.pread(device.fd, 4, region.offset), "little")
        assert bar.read32(0) == through_file
        if region.mappable:
            assert sum(area.size for area in bar.areas) == region.size
            assert bar.address(0) % PAGE == 0
    for region in device.regions[:6]:
        if not region.size:
            assert not region.mappable
            with pytest.raises(vfio.Unsupported, match="is not implemented"):
                device.bar(region.index)


@pytest.mark.vfio_case("device.reset")
def test_reset(nvme: vfio.Device) -> None:
    assert nvme.can_reset
    with vfio.Memory.memfd(2 * PAGE) as queues, nvme.iommu.map(queues) as dma:
        controller = Nvme(nvme, dma, queues)
        assert controller.registers.read32(Nvme.CSTS) & 1 == 1
        nvme.reset()
        assert controller.registers.read32(Nvme.CSTS) & 1 == 0


@pytest.mark.vfio_case("irq.enable_trigger_disable[{kind}]")
@pytest.mark.parametrize("kind", ["msi", "msix"])
def test_irq_enable_trigger_disable(mode: str, kind: str, request: pytest.FixtureRequest) -> None:
    device: vfio.Device = request.getfixturevalue("edu" if kind == "msi" else "nvme")
    irqs = device.irqs
    count = irqs.info(vfio.MSI if kind == "msi" else vfio.MSIX).count
    assert count
    enable, trigger, disable = (getattr(irqs, f"{verb}_{kind}") for verb in ("enable", "trigger", "disable"))
    events = [vfio.EventFd() for _ in range(count)]
    try:
        for _ in range(2):
            enable(events)
            for vector, event in enumerate(events):
                trigger(vector)
                assert event.wait(5) == 1, f"vector {vector}"
                assert not any(other.drain() for other in events)
            disable()
            with pytest.raises(vfio.VfioError, match="it is not enabled"):
                trigger(0)
            assert not any(event.drain() for event in events)
    finally:
        for event in events:
            event.close()


# vfio_pci_driver_test


@pytest.mark.vfio_case("driver.init_remove")
def test_driver_init_remove(nvme: vfio.Device) -> None:
    with vfio.Memory.memfd(2 * PAGE) as queues, nvme.iommu.map(queues) as dma:
        for _ in range(3):
            queues.view[:] = bytes(2 * PAGE)
            controller = Nvme(nvme, dma, queues)
            controller.registers.write32(Nvme.CC, 0)
            nvme.reset()


@pytest.mark.vfio_case("driver.memcpy_success")
def test_driver_memcpy(edu: vfio.Device, memory: vfio.Memory) -> None:
    with edu.iommu.map(memory, below=Edu.BELOW) as dma:
        engine = Edu(edu)
        # Across the border of two pages, at both ends.
        engine.memcpy(dma.iova + 3 * PAGE - 100, dma.iova + PAGE - 500, CHUNK)
        assert memory.view[3 * PAGE - 100 :][:CHUNK] == memory.view[PAGE - 500 :][:CHUNK]
        assert bytes(memory.view[2 * PAGE : 3 * PAGE - 100]) == bytes(PAGE - 100)
        assert not any(memory.view[3 * PAGE - 100 + CHUNK :])


def unmapped(device: vfio.Device) -> int:
    """An address that edu could send, but that nothing is mapped at."""
    return Edu.BELOW - 16 * PAGE


def assert_fault(log: KernelLog, device: vfio.Device, access: Callable[[], None]) -> None:
    """The IOMMU stops an access, and the kernel says so. VT-d merges a fault with one that is not read yet, and the
    kernel limits how often it speaks, so the access is made until it is told of."""
    for _ in range(10):
        access()
        line = log.find("fault addr", seconds=1.0)
        if line is not None:
            assert str(device.address)[5:] in line
            return
    raise AssertionError("the kernel tells of no IOMMU fault")


@pytest.mark.vfio_case("driver.memcpy_from_unmapped_iova")
def test_driver_memcpy_from_unmapped_iova(edu: vfio.Device, memory: vfio.Memory) -> None:
    with edu.iommu.map(memory, below=Edu.BELOW) as dma, KernelLog() as log:
        engine = Edu(edu)
        engine.memcpy(dma.iova + 2 * PAGE, dma.iova, CHUNK)
        assert_fault(log, edu, lambda: engine.memcpy(dma.iova + 3 * PAGE, unmapped(edu), CHUNK))
        # Nothing of ours came along, and the device goes on.
        assert memory.view[3 * PAGE :][:CHUNK] != memory.view[PAGE:][:CHUNK]
        engine.memcpy(dma.iova + 4 * PAGE, dma.iova + PAGE, CHUNK)
        assert memory.view[4 * PAGE :][:CHUNK] == memory.view[PAGE:][:CHUNK]


@pytest.mark.vfio_case("driver.memcpy_to_unmapped_iova")
def test_driver_memcpy_to_unmapped_iova(edu: vfio.Device, memory: vfio.Memory) -> None:
    before = bytes(memory.view)
    with edu.iommu.map(memory, below=Edu.BELOW, write=False) as dma, KernelLog() as log:
        engine = Edu(edu)
        # Nothing mapped there, and something mapped for reading only.
        for target in (unmapped(edu), dma.iova + 2 * PAGE):
            assert_fault(log, edu, partial(engine.memcpy, target, dma.iova, CHUNK))
        assert bytes(memory.view) == before


@pytest.mark.vfio_case("driver.send_msi")
def test_driver_send_msi(edu: vfio.Device) -> None:
    engine = Edu(edu)
    with vfio.EventFd() as event:
        edu.irqs.enable_msi([event])
        for _ in range(3):
            engine.raise_interrupt()
            assert event.wait(10) == 1
            assert engine.acknowledge() == 1
        edu.irqs.disable_msi()


@pytest.mark.vfio_case("driver.mix_and_match")
def test_driver_mix_and_match(edu: vfio.Device, memory: vfio.Memory) -> None:
    engine = Edu(edu)
    with edu.iommu.map(memory, below=Edu.BELOW) as dma, vfio.EventFd() as event:
        edu.irqs.enable_msi([event])
        for turn in range(1, 4):
            engine.to_device(dma.iova, CHUNK, interrupt=True)
            assert event.wait(20) == 1
            assert engine.acknowledge() == Edu.DMA_DONE
            engine.raise_interrupt(turn)
            assert event.wait(10) == 1
            assert engine.acknowledge() == turn
            engine.to_memory(dma.iova + (2 + turn % 4) * PAGE, CHUNK, interrupt=True)
            assert event.wait(20) == 1
            assert engine.acknowledge() == Edu.DMA_DONE
            assert memory.view[(2 + turn % 4) * PAGE :][:CHUNK] == memory.view[:CHUNK]
        edu.irqs.disable_msi()


@pytest.mark.vfio_case("driver.memcpy_storm")
def test_driver_memcpy_storm(nvme: vfio.Device) -> None:
    with vfio.Memory.memfd(2 * PAGE) as queues, vfio.Memory.memfd(48 * PAGE) as target:
        with nvme.iommu.map(queues) as queue_dma, nvme.iommu.map(target) as dma:
            controller = Nvme(nvme, queue_dma, queues)
            for _ in range(4):
                target.view[:] = bytes(target.size)
                pages = [dma.iova + page * PAGE for page in range(48)]
                assert controller.identify(*pages) == [0] * 48
                first = bytes(target.view[:PAGE])
                assert first[4:24].strip()
                assert all(target.view[page * PAGE :][:PAGE] == first for page in range(48))


# vfio_dma_mapping_mmio_test: a BAR mapped for DMA, so that devices can reach each other


@pytest.mark.vfio_case("mmio.{what}")
@pytest.mark.parametrize("what", ["map_full_bar", "map_partial_bar", "map_bar_misaligned"])
def test_mmio(edu: vfio.Device, mode: str, what: str) -> None:
    bar = edu.bar(0)
    offset, size, iova = {
        "map_full_bar": (0, bar.size, 2 << 20),
        "map_partial_bar": (0, bar.size // 2, 2 << 20),
        # On a page, but not where large pages of the process and of the IOMMU would meet.
        "map_bar_misaligned": (PAGE, bar.size // 2, (2 << 20) + 3 * PAGE),
    }[what]
    if mode.startswith("iommufd"):
        with pytest.raises(vfio.VfioError, match=r"cannot map .* EFAULT"):
            edu.iommu.map_address(bar.address(offset), size, iova)
        return
    with edu.iommu.map_address(bar.address(offset), size, iova) as dma:
        assert edu.iommu.unmap_range(dma.iova, dma.size) == size
    with pytest.raises(vfio.IovaError, match="does not start on a page"):
        edu.iommu.map_address(bar.address(offset) + 4, PAGE, iova)


@pytest.mark.vfio_case("mmio.peer_reads_bar")
@pytest.mark.parametrize("mode", ["type1", "type1v2"], indirect=True)
def test_mmio_peer(mode: str, lent_edu: vfio.PciAddress, lent_nvme: vfio.PciAddress) -> None:
    """One device reads a register of the other, through the IOMMU. Not a case of the kernel's tests, and not for
    iommufd, which does not map BARs, as `test_mmio` shows."""
    with vfio.Iommu.open(mode) as iommu, vfio.Memory.memfd(PAGE) as memory:
        with vfio.open_device(lent_edu, iommu=iommu) as one, vfio.open_device(lent_nvme, iommu=iommu) as other:
            registers = other.bar(0)
            with (
                iommu.map(memory, below=Edu.BELOW) as dma,
                iommu.map_address(registers.address(0), PAGE, below=Edu.BELOW) as peer,
            ):
                Edu(one).memcpy(dma.iova, peer.iova + Nvme.CAP, 8)
                assert int.from_bytes(memory.view[:8], "little") == registers.read64(Nvme.CAP)
