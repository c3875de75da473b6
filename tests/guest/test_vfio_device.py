"""The VFIO library on a real kernel and real (emulated) devices: what the selftest cases do not ask.

Runs inside a guest, as root.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import vfio
from tests.descriptors import open_fds
from tests.guest.vfio_support import (
    EDU,
    MODES,
    NVME,
    PAGE,
    RNG,
    TESTDEV,
    Edu,
    Nvme,
    find,
    needs_devices,
    usable,
    why_not,
)
from vfio import _abi
from vfio.examples import nvme_identify

pytestmark = needs_devices

NIC = (0x1AF4, 0x1041)
NOBODY = 65534


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture(params=[mode for mode in MODES if not mode.startswith("iommufd")])
def type1(request: pytest.FixtureRequest) -> str:
    """The modes of /dev/vfio/vfio, for what iommufd does not have."""
    return usable(request.param)


def function(ids: tuple[int, int], name: str, *, alone: bool = True) -> vfio.PciFunction:
    found = find(ids, alone=alone)
    if found is None:
        pytest.skip(f"this guest has no {name} behind the IOMMU{', alone in its group' if alone else ''}")
    return found


@pytest.fixture
def edu(mode: str) -> Iterator[vfio.Device]:
    address = function(EDU, "edu").address
    with vfio.bind(address), vfio.open_device(address, mode) as device:
        yield device


@pytest.fixture
def nvme(mode: str) -> Iterator[vfio.Device]:
    address = function(NVME, "nvme").address
    with vfio.bind(address), vfio.open_device(address, mode) as device:
        yield device


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a file open or a function lent."""
    fds = open_fds()
    lent = vfio.leftovers()
    yield
    assert open_fds() == fds
    assert vfio.leftovers() == lent


def child(code: str, *arguments: str, uid: int | None = None, fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """A Python process that runs `code`, with its standard output to be read."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        user=uid,
        pass_fds=fds,
    )


# Binding


@pytest.mark.parametrize(("ids", "name"), [(NIC, "virtio-net"), (NVME, "nvme"), (EDU, "edu")])
def test_there_and_back(ids: tuple[int, int], name: str) -> None:
    here = function(ids, name)
    before = here.driver
    assert not vfio._diagnose.is_vfio_driver(before)
    for _ in range(2):
        with vfio.bind(here.address) as binding:
            assert here.driver == "vfio-pci"
            assert binding.previous == before
            assert vfio.leftovers() == (here.address,)
        assert (here.driver, here.driver_override) == (before, None)


def test_the_disk_that_the_guest_runs_from_is_not_taken_away() -> None:
    root = Path("/").stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(root)}:{os.minor(root)}").resolve()
    here = next(f for f in map(vfio.PciFunction, vfio.functions()) if disk.is_relative_to(Path(f.path).resolve()))
    before = here.driver
    with pytest.raises(vfio.DeviceBusy, match=rf"{disk.name} is mounted at /.*; unmount it"):
        vfio.bind(here.address)
    assert here.driver == before


def test_a_killed_driver_leaves_what_restore_needs() -> None:
    here = function(NVME, "nvme")
    before = here.driver
    code = """
import sys, time, vfio
binding = vfio.bind(sys.argv[1])
device = vfio.open_device(sys.argv[1])
registers = device.bar(0)
print("ready", flush=True)
time.sleep(1000)
"""
    with child(code, str(here.address)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert here.driver == "vfio-pci"
        # In use: neither taken back nor opened a second time, and the error says by whom.
        with pytest.raises(vfio.DeviceBusy, match=rf"held by process {process.pid} \(python3"):
            vfio.restore(here.address)
        with pytest.raises(vfio.DeviceBusy, match=rf"held by process {process.pid} \(python3"):
            vfio.open_device(here.address)
        process.send_signal(signal.SIGKILL)
    assert vfio.leftovers() == (here.address,)
    assert here.driver == "vfio-pci"
    # Claimable at once by the next one, which knows what was there before.
    with vfio.bind(here.address) as binding:
        assert binding.previous == before
        with vfio.open_device(here.address) as device:
            assert device.config.vendor_id == here.vendor_id
    assert here.driver == before


def test_restore_after_a_kill() -> None:
    here = function(NVME, "nvme")
    before = here.driver
    with child("import sys, os, vfio; vfio.bind(sys.argv[1]); os.kill(os.getpid(), 9)", str(here.address)) as process:
        process.wait(30)
    assert here.driver == "vfio-pci"
    assert vfio.restore(here.address) == before
    assert (here.driver, here.driver_override) == (before, None)


# Opening, and what is said when it does not work


def test_a_sibling_under_a_kernel_driver_makes_the_group_unusable(mode: str) -> None:
    one = function(EDU, "edu in a shared group", alone=False)
    sibling = next(
        member for member in map(vfio.PciFunction, one.group_members) if (member.vendor_id, member.device_id) == RNG
    )
    assert sibling.driver == "virtio-pci"
    with vfio.bind(one.address):
        with pytest.raises(vfio.GroupNotViable, match=f"{sibling.address} is bound to virtio-pci; bind every function"):
            vfio.open_device(one.address, mode)
        with vfio.bind(sibling.address), vfio.open_device(one.address, mode) as device:
            assert device.config.device_id == EDU[1]
    assert sibling.driver == "virtio-pci"


def test_a_device_that_is_not_lent_names_its_driver() -> None:
    here = function(NIC, "virtio-net")
    with pytest.raises(vfio.NotBound, match=f"bound to virtio-pci; vfio.bind\\('{here.address}'\\) first"):
        vfio.open_device(here.address)


def test_no_such_device() -> None:
    with pytest.raises(vfio.DeviceNotFound, match=r"the nearest are 0000:00:1f\.0 \(8086:2918"):
        vfio.bind("0000:00:1e.0")


def test_bridges_are_refused() -> None:
    bridges = [found for found in map(vfio.PciFunction, vfio.functions()) if found.is_bridge]
    if not bridges:
        pytest.skip("this guest has no PCI bridge")
    with pytest.raises(vfio.Unsupported, match="bridge"):
        vfio.bind(bridges[0].address)


def test_without_rights(mode: str) -> None:
    here = function(EDU, "edu")
    code = """
import sys, vfio
try:
    vfio.open_device(*sys.argv[1:])
except vfio.NotPermitted as error:
    print(error)
"""
    with vfio.bind(here.address), child(code, str(here.address), mode, uid=NOBODY) as process:
        text = process.communicate(timeout=30)[0]
    assert "EACCES (Permission denied): it belongs to uid 0" in text
    assert "run as root" in text


def test_binding_without_rights() -> None:
    here = function(EDU, "edu")
    code = """
import sys, vfio
try:
    vfio.bind(sys.argv[1])
except vfio.NotPermitted as error:
    print(error)
"""
    with child(code, str(here.address), uid=NOBODY) as process:
        assert "needs root" in process.communicate(timeout=30)[0]


def test_every_failure_to_open_leaves_nothing_open(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to the kernel fails in turn, after the real one was made for those before."""
    address = function(EDU, "edu").address
    real = vfio._sys.ioctl
    with vfio.bind(address):
        before = open_fds()
        number = 0
        while True:
            number += 1
            calls = 0

            def failing(fd: int, request: int, argument: object = 0, stop: int = number) -> int:
                nonlocal calls
                calls += 1
                if calls == stop:
                    raise OSError(5, "injected")
                return real(fd, request, argument)

            monkeypatch.setattr(vfio._sys, "ioctl", failing)
            try:
                vfio.open_device(address, mode).close()
                break
            except vfio.VfioError:
                assert open_fds() == before
            finally:
                monkeypatch.undo()
        assert number > 5
        # Nor does the kernel hold anything back.
        with vfio.open_device(address, mode):
            pass


# Regions


def test_io_ports_and_sub_page_bars(mode: str) -> None:
    address = function(TESTDEV, "pci-testdev").address
    with vfio.bind(address), vfio.open_device(address, mode) as device:
        memory, ports = device.bar(0), device.bar(1)
        assert ports.areas == ()
        for bar in (memory, ports):
            # docs/specs/pci-testdev.rst of QEMU: select a test at 0, its access width is told at 1, its name from 8 on.
            bar.write8(0, 0)
            assert bar.read8(1) in (1, 2, 4)
            name = bytes(bar.read8(0x10 + i) for i in range(4))
            assert name.isascii()


def test_extended_capabilities() -> None:
    found = None
    for address in vfio.functions():
        here = vfio.PciFunction(address)
        if (here.vendor_id, here.device_id) == RNG and here.iommu_group is not None:
            size = Path(here.path, "config").stat().st_size
            alone = all(vfio.PciFunction(m).is_bridge for m in here.group_members if m != address)
            if size == 4096 and alone:
                found = here
    if found is None:
        pytest.skip("this guest has no virtio-rng behind a root port (with aer=on)")
    with vfio.bind(found.address), vfio.open_device(found.address) as device:
        assert device.config.size == 4096
        extended = device.config.extended_capabilities()
        assert vfio.ExtendedCapability(0x0001, 2, 0x100) in extended  # advanced error reporting


def test_the_msix_table_cannot_be_written_by_accident(nvme: vfio.Device) -> None:
    where = nvme.msix_table
    assert where is not None
    index, area = where
    with pytest.raises(vfio.VfioError, match="MSI-X table, which the kernel keeps"):
        nvme.bar(index).write32(area.offset, 0)


def test_a_bar_keeps_working_over_a_reset(nvme: vfio.Device) -> None:
    registers = nvme.bar(0)
    version = registers.read32(8)
    nvme.set_bus_master(True)
    nvme.reset()
    assert registers.read32(8) == version
    assert nvme.bus_master


# Interrupts


def test_intx_is_masked_until_it_is_unmasked(edu: vfio.Device) -> None:
    engine = Edu(edu)
    with vfio.EventFd() as event:
        edu.irqs.enable_intx(event)
        engine.raise_interrupt()
        assert event.wait(10) == 1
        # Still asserted, but masked; unmasked before it is quiet, it comes again.
        assert event.wait(0.2) == 0
        edu.irqs.unmask_intx()
        assert event.wait(10) == 1
        assert engine.acknowledge() == 1
        edu.irqs.unmask_intx()
        assert event.wait(0.2) == 0
        # Masked by hand it stays quiet.
        edu.irqs.mask_intx()
        engine.raise_interrupt(4)
        assert event.wait(0.2) == 0
        edu.irqs.unmask_intx()
        assert event.wait(10) == 1
        assert engine.acknowledge() == 4
        edu.irqs.disable_intx()


def test_the_unmask_eventfd_lets_intx_come_again(edu: vfio.Device) -> None:
    engine = Edu(edu)
    with vfio.EventFd() as event, vfio.EventFd() as unmask:
        edu.irqs.enable_intx(event)
        edu.irqs.set_intx_unmask(unmask)
        for turn in range(1, 4):
            engine.raise_interrupt(turn)
            assert event.wait(10) == 1
            assert engine.acknowledge() == turn
            unmask.signal()
        edu.irqs.set_intx_unmask(None)
        edu.irqs.disable_intx()


def test_kinds_of_interrupts_exclude_each_other(edu: vfio.Device) -> None:
    with vfio.EventFd() as event:
        edu.irqs.enable_intx(event)
        with pytest.raises(vfio.VfioError, match="disable the other kind first"):
            edu.irqs.enable_msi([event])
        edu.irqs.disable_intx()
        edu.irqs.enable_msi([event])
        edu.irqs.disable_msi()
        edu.irqs.disable_msi()


def test_msix_vectors_come_and_go_at_run_time(nvme: vfio.Device) -> None:
    with vfio.EventFd() as one, vfio.EventFd() as two:
        nvme.irqs.enable_msix([one, None, None])
        nvme.irqs.trigger_msix(2)  # nobody listens
        nvme.irqs.set_msix(2, two)
        nvme.irqs.trigger_msix(2)
        assert two.wait(5) == 1
        nvme.irqs.set_msix(0, two)
        nvme.irqs.trigger_msix(0)
        assert (one.drain(), two.wait(5)) == (0, 1)
        nvme.irqs.set_msix(2, None)
        nvme.irqs.trigger_msix(2)
        assert two.wait(0.1) == 0
        if not nvme.irqs.info(vfio.MSIX).noresize:
            nvme.irqs.set_msix(10, one)
            nvme.irqs.trigger_msix(10)
            assert one.wait(5) == 1
        nvme.irqs.disable_msix()


def test_error_and_request_interrupts(nvme: vfio.Device) -> None:
    with vfio.EventFd() as event:
        for kind, enable, trigger, disable in (
            (vfio.ERROR, nvme.irqs.enable_error, nvme.irqs.trigger_error, nvme.irqs.disable_error),
            (vfio.REQUEST, nvme.irqs.enable_request, nvme.irqs.trigger_request, nvme.irqs.disable_request),
        ):
            assert nvme.irqs.info(kind).count == 1
            enable(event)
            trigger()
            assert event.wait(5) == 1
            disable()


def test_a_device_outside_pci_express_has_no_error_interrupt(edu: vfio.Device) -> None:
    assert edu.irqs.info(vfio.ERROR).count == 0
    with vfio.EventFd() as event, pytest.raises(vfio.Unsupported, match="the device has 0"):
        edu.irqs.enable_error(event)


def test_an_interrupt_reaches_asyncio_and_epoll(edu: vfio.Device) -> None:
    engine = Edu(edu)

    async def interrupts(event: vfio.EventFd) -> int:
        total = 0
        for _ in range(3):
            asyncio.get_running_loop().call_soon(engine.raise_interrupt)
            total += await asyncio.wait_for(event.wait_async(), 10)
            engine.acknowledge()
        return total

    with vfio.EventFd() as event, select.epoll() as poller:
        edu.irqs.enable_msi([event])
        assert asyncio.run(interrupts(event)) == 3
        poller.register(event, select.EPOLLIN)
        engine.raise_interrupt()
        assert poller.poll(10) == [(event.fileno(), select.EPOLLIN)]
        engine.acknowledge()


# Power and resets


def test_power_state(nvme: vfio.Device) -> None:
    assert nvme.power_state == 0
    nvme.set_power_state(3)
    assert nvme.power_state == 3
    nvme.set_power_state(0)
    assert nvme.bar(0).read32(8)


def test_low_power(nvme: vfio.Device) -> None:
    if not nvme.feature_supported(_abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY):
        pytest.skip("this kernel has no runtime power management for VFIO devices")
    registers = nvme.bar(0)
    nvme.enter_low_power()
    nvme.exit_low_power()
    assert registers.read32(8)
    with vfio.EventFd() as event:
        nvme.enter_low_power(wakeup=event)
        # The kernel turns it off when it gets round to it; only then can an access wake it.
        status = Path(vfio.PciFunction(nvme.address).path, "power/runtime_status")
        deadline = time.monotonic() + 20
        while status.read_text() != "suspended\n":
            assert time.monotonic() < deadline, f"the device is still {status.read_text()}"
            time.sleep(0.01)
        assert nvme.config.vendor_id == NVME[0]  # an access through the kernel wakes it
        assert event.wait(10)
        assert registers.read32(8)


def test_a_device_without_a_reset_method_says_so(edu: vfio.Device) -> None:
    assert not edu.can_reset
    with pytest.raises(vfio.Unsupported, match="no way to reset it"):
        edu.reset()
    with pytest.raises(vfio.Unsupported, match="neither its slot nor its bus"):
        edu.hot_reset_dependents()


def test_hot_reset_of_a_bus(mode: str) -> None:
    one = function(EDU, "edu behind a bridge to conventional PCI", alone=False)
    with vfio.bind(one.address):
        others = [vfio.PciFunction(m) for m in one.group_members if m != one.address]
        siblings = [member for member in others if not member.is_bridge]
        (sibling,) = siblings
        with vfio.bind(sibling.address), vfio.open_device(one.address, mode) as device:
            dependents = {d.address: d for d in device.hot_reset_dependents()}
            assert {one.address, sibling.address} <= set(dependents)
            if mode == "iommufd":
                assert all(d.group is None and d.owned for d in dependents.values())
            else:
                assert all(d.group == one.iommu_group for d in dependents.values())
            registers = device.bar(0)
            registers.write32(Edu.LIVENESS, 5)
            assert registers.read32(Edu.LIVENESS) == 0xFFFFFFFA
            device.hot_reset()
            assert device.config.device_id == EDU[1]
            assert registers.read32(Edu.ID) & 0xFFFF == 0x00ED


def test_hot_reset_of_one_of_several_in_an_address_space(mode: str) -> None:
    """The kernel refuses the files of more groups than there are functions to reset: two, and here are three groups."""
    one = function(EDU, "edu behind a bridge to conventional PCI", alone=False)
    others = [m for m in one.group_members if m != one.address and not vfio.PciFunction(m).is_bridge]
    others += [function(NVME, "nvme").address, function(EDU, "edu").address]
    with ExitStack() as stack:
        for address in (one.address, *others):
            stack.enter_context(vfio.bind(address))
        iommu = stack.enter_context(vfio.Iommu.open(mode))
        for address in others:
            stack.enter_context(vfio.open_device(address, iommu=iommu))
        device = stack.enter_context(vfio.open_device(one.address, iommu=iommu))
        assert len(device.hot_reset_dependents()) < len(others)
        device.hot_reset()
        assert device.bar(0).read32(Edu.ID) & 0xFFFF == 0x00ED


# Address spaces


def test_two_devices_in_one_address_space(mode: str) -> None:
    one, two = function(EDU, "edu").address, function(NVME, "nvme").address
    with (
        vfio.bind(one),
        vfio.bind(two),
        vfio.Iommu.open(mode) as iommu,
        vfio.open_device(one, iommu=iommu) as edu,
        vfio.open_device(two, iommu=iommu) as nvme,
        vfio.Memory.memfd(4 * PAGE) as memory,
        iommu.map(memory, below=Edu.BELOW) as dma,
    ):
        # What one writes, the other reads.
        assert Nvme(nvme, dma, memory).identify(dma.iova + 2 * PAGE) == [0]
        Edu(edu).memcpy(dma.iova + 3 * PAGE, dma.iova + 2 * PAGE, Edu.CHUNK)
        assert any(memory.view[3 * PAGE + 4 : 3 * PAGE + 24])
        assert memory.view[3 * PAGE :][: Edu.CHUNK] == memory.view[2 * PAGE :][: Edu.CHUNK]


def test_a_forked_child_leaves_its_parents_alone(edu: vfio.Device) -> None:
    engine = Edu(edu)
    with vfio.Memory.memfd(2 * PAGE) as memory, edu.iommu.map(memory, below=Edu.BELOW) as dma:
        memory.view[:5] = b"there"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dma.close()
                edu.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        engine.memcpy(dma.iova + PAGE, dma.iova, 5)
        assert bytes(memory.view[PAGE : PAGE + 5]) == b"there"


def test_memory_shared_with_another_process_is_the_devices_too(edu: vfio.Device) -> None:
    with vfio.Memory.memfd(2 * PAGE) as memory, edu.iommu.map(memory, below=Edu.BELOW) as dma:
        code = """
import os, sys, vfio
with vfio.Memory.from_fd(os.dup(int(sys.argv[1])), require_seals=True) as memory:
    memory.view[:8] = b"through!"
"""
        with child(code, str(memory.fd), uid=NOBODY, fds=(memory.fd,)) as process:
            assert process.communicate(timeout=30)[0] == ""
        Edu(edu).memcpy(dma.iova + PAGE, dma.iova, 8)
        assert bytes(memory.view[PAGE : PAGE + 8]) == b"through!"


def test_the_number_of_mappings_is_limited(type1: str) -> None:
    address = function(EDU, "edu").address
    limit = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    before = limit.read_text()
    limit.write_text("8")
    try:
        with vfio.bind(address), vfio.open_device(address, type1) as device, vfio.Memory.memfd(9 * PAGE) as memory:
            assert device.iommu.dma_avail == 8
            for page in range(8):
                device.iommu.map(memory, offset=page * PAGE, size=PAGE)
            assert device.iommu.dma_avail == 0
            with pytest.raises(vfio.MappingLimit, match="limit on DMA mappings is reached; 8 are open here"):
                device.iommu.map(memory, offset=8 * PAGE, size=PAGE)
            device.iommu.mappings[0].close()
            device.iommu.map(memory, offset=8 * PAGE, size=PAGE)
    finally:
        limit.write_text(before)


SANDBOXED = """
import os, resource, socket, sys, vfio
channel = socket.socket(fileno=int(sys.argv[1]))
words, fds, _, _ = socket.recv_fds(channel, 1024, 3)
interface, ioas_id, group = words.decode().split()
files = vfio.DeviceFds(interface, fds[0], fds[1], fds[2] if group == "group" else -1, int(ioas_id))
os.chroot("/var/empty") if os.geteuid() == 0 and os.path.isdir("/var/empty") else None
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with vfio.Device.from_fds(sys.argv[2], files) as device:
    registers = device.bar(0)
    assert registers.read32(0) & 0xFFFF == 0x00ED
    device.set_bus_master(True)
    with vfio.Memory.memfd(2 * 4096) as memory, device.iommu.map(memory, below=1 << 28) as dma:
        memory.view[:5] = b"hello"
        for source, target, command in ((dma.iova, 0x40000, 1), (0x40000, dma.iova + 4096, 3)):
            registers.write64(0x80, source)
            registers.write64(0x88, target)
            registers.write64(0x90, 5)
            registers.write64(0x98, command)
            while registers.read64(0x98) & 1:
                pass
        assert bytes(memory.view[4096:4101]) == b"hello"
    with vfio.EventFd() as event:
        device.irqs.enable_msi([event])
        device.irqs.trigger_msi(0)
        assert event.wait(5) == 1
    with vfio.Memory.memfd(4 << 20) as memory:
        try:
            device.iommu.map(memory)
            print("mapped more than the limit")
        except vfio.LockedMemoryLimit as error:
            print(error)
"""


def test_a_sandboxed_driver_gets_its_files_from_a_monitor(mode: str) -> None:
    """Opened here; driven by a process without rights that was sent the files and is told its locked-memory limit."""
    address = function(EDU, "edu").address
    with vfio.bind(address), vfio.open_device(address, mode) as device:
        fds = device.fds
        files = [fd for fd in (fds.device, fds.iommu, fds.group) if fd >= 0]
        ours, theirs = socket.socketpair()
        with ours, theirs, child(SANDBOXED, str(theirs.fileno()), str(address), fds=(theirs.fileno(),)) as process:
            words = f"{fds.interface} {fds.ioas_id} {'group' if fds.group >= 0 else '-'}"
            socket.send_fds(ours, [words.encode()], files)
            text = process.communicate(timeout=60)[0]
        assert process.returncode == 0, text
        assert "limit on locked memory is 1 MiB" in text, text
        assert "4 MiB more are needed; raise it: ulimit -l" in text
        # It is ours again, with nothing of theirs in its address space.
        assert device.iommu.unmap_all() == 0
        assert device.bar(0).read32(0) & 0xFFFF == 0x00ED


def test_a_device_without_an_iommu_is_opened_by_name_only() -> None:
    allowed = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    if not allowed.exists():
        pytest.skip("this kernel has no VFIO without an IOMMU (CONFIG_VFIO_NOIOMMU)")
    unguarded = [f for f in map(vfio.PciFunction, vfio.functions()) if f.iommu_group is None and not f.is_bridge]
    nics = [f for f in unguarded if (f.vendor_id, f.device_id) == NIC]
    if not nics:
        pytest.skip("every device of this guest is behind an IOMMU (boot it with intel_iommu=off)")
    address = nics[0].address
    with pytest.raises(vfio.NoIommu, match="the kernel uses no IOMMU"):
        vfio.bind(address)
    before = allowed.read_text()
    allowed.write_text("Y")
    try:
        with vfio.bind(address):
            for interface in ("auto", "group"):
                with pytest.raises(vfio.Unsupported, match='opened by name only: interface="noiommu"'):
                    vfio.open_device(address, interface)
            with (
                vfio.open_device(address, "noiommu") as device,
                vfio.EventFd() as event,
                vfio.Memory.memfd(PAGE) as memory,
            ):
                assert device.interface == "noiommu"
                device.irqs.enable_msix([event])
                device.irqs.trigger_msix(0)
                assert event.wait(5) == 1
                with pytest.raises(vfio.Unsupported, match="nothing can be mapped"):
                    device.iommu.map(memory)
    finally:
        allowed.write_text(before)


# The example of docs/vfio.md


def test_the_nvme_example() -> None:
    here = function(NVME, "nvme")
    before = here.driver
    serial, model = nvme_identify.identify(str(here.address))
    assert serial
    assert model == "QEMU NVMe Ctrl"
    assert here.driver == before


def test_the_example_as_a_command() -> None:
    here = function(NVME, "nvme")
    done = subprocess.run(
        [sys.executable, nvme_identify.__file__, str(here.address)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "model QEMU NVMe Ctrl" in done.stdout


def test_a_forgotten_device_does_not_keep_the_function() -> None:
    address = function(EDU, "edu").address
    with vfio.bind(address):
        device: vfio.Device | None = vfio.open_device(address)
        assert device is not None
        device.bar(0)
        device = None
        with vfio.open_device(address):
            pass


def test_an_unprivileged_user_may_use_what_it_is_given() -> None:
    """With the group's node handed over, no further right is needed."""
    if why_not("type1v2") is not None:
        pytest.skip(f"{why_not('type1v2')}")
    here = function(EDU, "edu")
    with vfio.bind(here.address):
        node = Path(f"/dev/vfio/{here.iommu_group}")
        os.chown(node, NOBODY, NOBODY)
        code = """
import sys, vfio
with vfio.open_device(sys.argv[1], "group") as device:
    print(device.bar(0).read32(0) & 0xFFFF)
"""
        with child(code, str(here.address), uid=NOBODY) as process:
            assert process.communicate(timeout=30)[0] == f"{0xED}\n"
