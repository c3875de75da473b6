"""Opening a device through either interface, against a fake kernel: the order of calls, what errors say, no leaks."""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import vfio
from tests.descriptors import open_fds
from tests.unit.vfio_fakes import FakeKernel, FakeSysfs
from vfio import _abi, _diagnose, _sys

ADDRESS = "0000:00:03.0"


class Machine:
    """A function bound to vfio-pci in group 7, with a character device."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sysfs = FakeSysfs(root / "sys")
        self.sysfs.function(ADDRESS, driver="vfio-pci", group=7, cdev="vfio0")
        self.kernel = FakeKernel(root / "dev")
        self.options = {"sysfs_root": str(root / "sys"), "dev_root": str(root / "dev")}
        monkeypatch.setattr(_sys, "ioctl", self.kernel.ioctl)

    def open(self, interface: str = "", iommu: vfio.Iommu | None = None, address: str = ADDRESS) -> vfio.Device:
        interface = interface or ("group" if iommu is None else "auto")
        return vfio.open_device(address, interface, iommu=iommu, **self.options)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def names(calls: list[int], table: dict[int, str]) -> list[str]:
    return [table[call] for call in calls if call in table]


def test_the_group_way_in(machine: Machine) -> None:
    before = open_fds()
    with machine.open() as device:
        assert device.interface == "type1v2"
        assert str(device.address) == ADDRESS
        assert (device.num_regions, device.num_irqs, device.can_reset) == (9, 5, True)
        assert device.config.vendor_id == 0x1AF4
        assert device.config.interrupt_line == 11
        assert device.fds.group >= 0
        assert machine.kernel.calls[:7] == [
            _abi.VFIO_GET_API_VERSION,
            _abi.VFIO_CHECK_EXTENSION,
            _abi.VFIO_GROUP_GET_STATUS,
            _abi.VFIO_GROUP_SET_CONTAINER,
            _abi.VFIO_SET_IOMMU,
            _abi.VFIO_GROUP_GET_DEVICE_FD,
            _abi.VFIO_DEVICE_GET_INFO,
        ]
    assert open_fds() == before
    device.close()


def test_the_iommufd_way_in(machine: Machine) -> None:
    before = open_fds()
    with machine.open("iommufd") as device:
        assert device.interface == "iommufd"
        assert (device.fds.group, device.fds.ioas_id) == (-1, 5)
        assert machine.kernel.calls[:4] == [
            _abi.IOMMU_IOAS_ALLOC,
            _abi.VFIO_DEVICE_BIND_IOMMUFD,
            _abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
            _abi.VFIO_DEVICE_GET_INFO,
        ]
        assert device.iommu.dma_avail is None
        assert device.iommu.page_size == 4096
    assert open_fds() == before


def test_the_choice_is_automatic(machine: Machine) -> None:
    with machine.open("auto") as device:
        assert device.interface == "iommufd"
    (machine.kernel.dev / "iommu").unlink()
    with machine.open("auto") as device:
        assert device.interface == "type1v2"


def test_an_old_kernel_has_type1_only(machine: Machine) -> None:
    machine.kernel.extensions.discard(_abi.VFIO_TYPE1v2_IOMMU)
    with machine.open() as device:
        assert device.interface == "type1"
    with pytest.raises(vfio.Unsupported, match="of kind type1v2; load the module"):
        machine.open("type1v2")


def test_there_is_no_other_interface(machine: Machine) -> None:
    with pytest.raises(vfio.Unsupported, match="no interface 'best'; give one of auto, iommufd, group"):
        machine.open("best")


@pytest.mark.thorough
@pytest.mark.parametrize("interface", ["group", "iommufd"])
def test_no_failure_leaks(machine: Machine, interface: str) -> None:
    """Whichever call fails, and however, nothing stays open."""
    with machine.open(interface) as device:
        total = len(machine.kernel.calls)
        del device
    before = open_fds()
    for number in range(1, total + 1):
        for code in (errno.EINVAL, errno.EPERM, errno.EBUSY, errno.ENODEV, errno.ENOTTY, errno.EIO):
            machine.kernel.calls.clear()
            machine.kernel.fail_at = (number, code)
            try:
                machine.open(interface).close()
            except vfio.VfioError as error:
                assert re.search(r"[a-z]", str(error)), error
            # At once, and not when the garbage is collected.
            assert open_fds() == before, (number, code)


@pytest.mark.parametrize("interface", ["group", "iommufd"])
def test_an_interrupt_anywhere_leaks_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch, interface: str) -> None:
    before = open_fds()
    number = 0
    while True:
        number += 1
        machine.kernel.calls.clear()

        def interrupted(fd: int, request: int, argument: object = 0, stop: int = number) -> int:
            if len(machine.kernel.calls) + 1 == stop:
                machine.kernel.calls.append(request)
                raise KeyboardInterrupt
            return machine.kernel.ioctl(fd, request, argument)

        monkeypatch.setattr(_sys, "ioctl", interrupted)
        try:
            machine.open(interface).close()
            break
        except KeyboardInterrupt:
            assert open_fds() == before, number
    assert number > 5


def test_not_lent(machine: Machine) -> None:
    machine.sysfs.function("0000:00:04.0", driver="e1000e", group=8)
    with pytest.raises(vfio.NotBound, match=r"bound to e1000e; vfio.bind\('0000:00:04.0'\) first"):
        machine.open(address="0000:00:04.0")


def test_a_group_that_is_not_viable_names_who(machine: Machine) -> None:
    machine.sysfs.function("0000:00:03.1", driver="e1000e", group=7)
    machine.sysfs.function("0000:00:03.2", driver="pcieport", group=7)
    machine.sysfs.function("0000:00:03.3", group=7)
    machine.kernel.viable = False
    with pytest.raises(vfio.GroupNotViable) as caught:
        machine.open()
    assert str(caught.value) == (
        "0000:00:03.0: IOMMU group 7 is not viable: 0000:00:03.1 is bound to e1000e; "
        "bind every function of the group to vfio-pci (vfio.bind), or unbind it"
    )
    for code in (errno.EBUSY, errno.EPERM):
        machine.kernel.fail[_abi.VFIO_DEVICE_BIND_IOMMUFD] = code
        with pytest.raises(vfio.GroupNotViable, match=r"03.1 is bound to e1000e"):
            machine.open("iommufd")


def test_without_interrupt_remapping(machine: Machine) -> None:
    machine.kernel.fail[_abi.VFIO_SET_IOMMU] = errno.EPERM
    with pytest.raises(vfio.NotPermitted, match=r"forge any interrupt.*vfio_iommu_type1.allow_unsafe_interrupts=1"):
        machine.open()
    machine.kernel.fail[_abi.VFIO_DEVICE_BIND_IOMMUFD] = errno.EPERM
    with pytest.raises(vfio.NotPermitted, match=r"iommufd.allow_unsafe_interrupts=1"):
        machine.open("iommufd")


def test_a_device_that_is_open_already(machine: Machine) -> None:
    machine.kernel.fail[_abi.VFIO_GROUP_GET_DEVICE_FD] = errno.EBUSY
    with pytest.raises(vfio.DeviceBusy, match="it is open already"):
        machine.open()


def test_a_group_somebody_holds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    node = machine.kernel.dev / "vfio/7"
    real: Callable[..., int] = os.open

    def busy(path: str, flags: int, mode: int = 0o777) -> int:
        if path == str(node) and flags & os.O_RDWR:
            raise OSError(errno.EBUSY, "busy", path)
        return real(path, flags, mode)

    with node.open():
        monkeypatch.setattr("vfio._diagnose.os.open", busy)
        with pytest.raises(vfio.DeviceBusy, match=rf"held by process {os.getpid()} \(.*\); stop that process first"):
            machine.open()
        monkeypatch.undo()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.EBUSY])
def test_a_character_device_somebody_holds(machine: Machine, code: int) -> None:
    machine.kernel.fail[_abi.VFIO_DEVICE_BIND_IOMMUFD] = code
    with (machine.kernel.dev / "vfio/7").open():
        with pytest.raises(vfio.DeviceBusy, match=rf"held by process {os.getpid()} \("):
            machine.open("iommufd")
    kind = vfio.NotPermitted if code == errno.EPERM else vfio.VfioError
    with pytest.raises(kind) as caught:
        machine.open("iommufd")
    assert type(caught.value) is kind


def test_vfio_is_not_loaded(machine: Machine) -> None:
    (machine.kernel.dev / "vfio/vfio").unlink()
    with pytest.raises(vfio.DriverMissing, match="modprobe vfio-pci"):
        machine.open()


def test_no_iommufd_in_this_kernel(machine: Machine) -> None:
    (machine.kernel.dev / "iommu").unlink()
    with pytest.raises(vfio.Unsupported, match=r'no .*/iommu; use interface="group"'):
        machine.open("iommufd")


def test_a_device_without_an_iommu_is_opened_by_name_only(machine: Machine) -> None:
    (machine.sysfs.root / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    machine.kernel.extensions.add(_abi.VFIO_NOIOMMU_IOMMU)
    (machine.kernel.dev / "vfio/noiommu-7").write_text("")
    for interface in ("auto", "group", "iommufd"):
        with pytest.raises(vfio.Unsupported, match='opened by name only: interface="noiommu"'):
            machine.open(interface)
    with machine.open("noiommu") as device:
        assert device.interface == "noiommu"
        with vfio.Memory.memfd(4096) as memory, pytest.raises(vfio.Unsupported, match="physical addresses"):
            device.iommu.map(memory)
    (machine.sysfs.root / "kernel/iommu_groups/7/name").write_text("DMAR\n")
    with pytest.raises(vfio.Unsupported, match="sits behind an IOMMU"):
        machine.open("noiommu")


def test_a_device_that_is_not_pci(machine: Machine) -> None:
    machine.kernel.device_flags = 0
    before = open_fds()
    with pytest.raises(vfio.Unsupported, match="not a PCI one"):
        machine.open()
    assert open_fds() == before


def test_bars_are_mapped_once_and_closed_with_the_device(machine: Machine) -> None:
    before = open_fds()
    with machine.open() as device:
        bar = device.bar(0)
        assert device.bar(0) is bar
        assert device.config.read16(_abi.PCI_COMMAND) == _abi.PCI_COMMAND_MEMORY
        bar.write32(0x10, 1)
        ports = device.bar(4)
        assert ports.areas == ()
        assert device.config.read16(_abi.PCI_COMMAND) == _abi.PCI_COMMAND_MEMORY | _abi.PCI_COMMAND_IO
        ports.write8(3, 0x42)
        assert ports.read8(3) == 0x42
        with pytest.raises(vfio.Unsupported, match="BAR 1 is not implemented: it has 0, 4"):
            device.bar(1)
        with pytest.raises(vfio.VfioError, match="no region 9, only 0 to 8"):
            device.bar(9)
        assert device.region_info(8).size == 0
        assert [region.index for region in device.regions] == list(range(9))
        bar.close()
        assert device.bar(0) is not bar
    assert open_fds() == before
    assert bar.closed
    for late in (
        lambda: device.bar(0),
        device.reset,
        lambda: device.fds,
        lambda: device.config.read32(0),
        lambda: device.set_bus_master(True),
        device.irqs.unmask_intx,
        lambda: device.irqs.enable_msix([1]),
    ):
        with pytest.raises(vfio.VfioError, match="device is closed"):
            late()


def test_the_msix_table_is_kept_out(machine: Machine) -> None:
    machine.kernel.poke(0x06, b"\x10")
    machine.kernel.poke(0x34, b"\x40")
    machine.kernel.poke(0x40, bytes((0x11, 0, 3, 0)) + (0x2000 | 0).to_bytes(4, "little"))
    with machine.open() as device:
        assert device.msix_table == (0, vfio.Area(0x2000, 0x40))
        assert device.bar(0).areas == (vfio.Area(0, 0x2000), vfio.Area(0x3000, 0x1000))


def test_command_bits(machine: Machine) -> None:
    with machine.open() as device:
        assert not device.bus_master
        device.set_bus_master(True)
        device.set_memory_decoding(True)
        device.set_intx_disable(True)
        assert machine.kernel.peek(4, 2) == (0x406).to_bytes(2, "little")
        assert device.bus_master
        device.set_intx_disable(False)
        device.set_memory_decoding(False)
        assert machine.kernel.peek(4, 2) == b"\x04\x00"
    # Closing takes away its DMA before anything else.
    assert machine.kernel.peek(4, 2) == b"\0\0"


def test_power_state(machine: Machine) -> None:
    with machine.open() as device:
        assert device.power_state == 0
        device.set_power_state(0)
        with pytest.raises(vfio.Unsupported, match="no power management"):
            device.set_power_state(3)
        machine.kernel.poke(0x06, b"\x10")
        machine.kernel.poke(0x34, b"\x40\0")
        machine.kernel.poke(0x40, bytes((0x01, 0, 3, 0, 0x08, 0)))
        device.set_power_state(3)
        assert machine.kernel.peek(0x44, 1) == b"\x0b"
        assert device.power_state == 3
        with pytest.raises(vfio.VfioError, match="no power state D4"):
            device.set_power_state(4)


def test_reset(machine: Machine) -> None:
    with machine.open() as device:
        device.reset()
        assert machine.kernel.calls[-1] == _abi.VFIO_DEVICE_RESET
        machine.kernel.fail[_abi.VFIO_DEVICE_RESET] = errno.ENODEV
        with pytest.raises(vfio.DeviceGone, match="cannot reset it: ENODEV"):
            device.reset()
    machine.kernel.device_flags = _abi.VFIO_DEVICE_FLAGS_PCI
    with machine.open() as device, pytest.raises(vfio.Unsupported, match="no way to reset it"):
        device.reset()


def test_hot_reset_lists_its_dependents(machine: Machine) -> None:
    with machine.open() as device:
        machine.kernel.hot_reset = [(7, 0, 0, 0x18 + i % 8) for i in range(20)]  # more than is asked for at first
        found = device.hot_reset_dependents()
        assert len(found) == 20
        assert found[1] == vfio.HotResetDependent(vfio.PciAddress(0, 0, 3, 1), 7, None)
        machine.kernel.hot_reset = [(7, 0, 0, 0x18), (9, 0, 0, 0x20)]
        device.hot_reset()
        machine.kernel.fail[_abi.VFIO_DEVICE_PCI_HOT_RESET] = errno.EPERM
        with pytest.raises(vfio.NotPermitted, match=r"reset 0000:00:04.0 too; bind those"):
            device.hot_reset()
        machine.kernel.fail[_abi.VFIO_DEVICE_PCI_HOT_RESET] = errno.ENOTTY
        with pytest.raises(vfio.DeviceGone, match="link to it stays down"):
            device.hot_reset()
        machine.kernel.fail[_abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO] = errno.ENODEV
        with pytest.raises(vfio.Unsupported, match="neither its slot nor its bus"):
            device.hot_reset_dependents()


def test_hot_reset_with_iommufd_knows_who_is_owned(machine: Machine) -> None:
    with machine.open("iommufd") as device:
        machine.kernel.hot_reset = [(3, 0, 0, 0x18), (0, 0, 0, 0x19), (0xFFFFFFFF, 0, 0, 0x1A)]
        machine.kernel.hot_reset_flags = _abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID
        assert [(d.group, d.owned) for d in device.hot_reset_dependents()] == [
            (None, True),
            (None, True),
            (None, False),
        ]
        machine.kernel.fail[_abi.VFIO_DEVICE_PCI_HOT_RESET] = errno.EPERM
        with pytest.raises(vfio.NotPermitted, match=r"would reset 0000:00:03.2 too"):
            device.hot_reset()


def test_a_forgotten_device_is_closed(machine: Machine) -> None:
    before = open_fds()
    machine.open().bar(0)
    gc.collect()
    assert open_fds() == before


# Handed-over files


@pytest.mark.parametrize("interface", ["group", "iommufd"])
def test_from_fds(machine: Machine, interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.open(interface) as first:
        before = open_fds()
        fds = first.fds
        copies = fds._replace(
            device=os.dup(fds.device),
            iommu=os.dup(fds.iommu),
            group=os.dup(fds.group) if fds.group >= 0 else -1,
        )
        with monkeypatch.context() as sandbox:
            # Neither sysfs nor /dev can be opened in the sandbox.
            sandbox.setattr("os.open", lambda *_: pytest.fail("opened a file"))
            device = vfio.Device.from_fds(ADDRESS, copies)
            with device, vfio.Memory.memfd(4096) as memory:
                assert device.interface == first.interface
                mapping = device.iommu.map(memory)
                assert machine.kernel.mapped == {mapping.iova: 4096}
                device.bar(0).write32(0, 1)
        # The receiver's mappings go with it, although the files live on elsewhere.
        assert machine.kernel.mapped == {}
        assert open_fds() == before


@pytest.mark.parametrize("fail", [_abi.VFIO_DEVICE_GET_INFO, None])
def test_from_fds_takes_them_even_when_it_fails(machine: Machine, fail: int | None) -> None:
    with machine.open() as first:
        before = open_fds()
        fds = first.fds
        copies = fds._replace(device=os.dup(fds.device), iommu=os.dup(fds.iommu), group=os.dup(fds.group))
        if fail is None:
            copies = copies._replace(interface="teleport")
        else:
            machine.kernel.fail[fail] = errno.EIO
        with pytest.raises(vfio.VfioError):
            vfio.Device.from_fds(ADDRESS, copies)
        assert open_fds() == before


# Several devices in one address space


@pytest.mark.parametrize("interface", ["group", "iommufd"])
def test_no_failure_of_a_second_device_leaks(machine: Machine, interface: str) -> None:
    machine.sysfs.function("0000:00:03.1", driver="vfio-pci", group=7, cdev="vfio0")
    with vfio.Iommu.open(interface, **machine.options) as iommu, machine.open(iommu=iommu):
        assert iommu.page_size == 4096
        before = open_fds()
        number = 0
        while True:
            number += 1
            machine.kernel.calls.clear()
            machine.kernel.fail_at = (number, errno.EIO)
            try:
                machine.open(iommu=iommu, address="0000:00:03.1").close()
                break
            except vfio.VfioError:
                assert open_fds() == before, number
        assert number > 3
        machine.kernel.fail_at = None
        with vfio.Memory.memfd(4096) as memory, iommu.map(memory):
            pass


@pytest.mark.parametrize("interface", ["group", "iommufd"])
def test_two_devices_share_an_address_space(machine: Machine, interface: str) -> None:
    machine.sysfs.function("0000:00:03.1", driver="vfio-pci", group=7, cdev="vfio0")
    before = open_fds()
    with vfio.Iommu.open(interface, **machine.options) as iommu, vfio.Memory.memfd(8192) as memory:
        with machine.open(iommu=iommu) as one:
            with machine.open(iommu=iommu, address="0000:00:03.1") as two:
                assert one.iommu is two.iommu is iommu
                mapping = iommu.map(memory)
            assert not mapping.closed
        # With its last group the container forgets its mappings; an IOAS keeps them.
        assert mapping.closed is (interface == "group")
        with machine.open(iommu=iommu):
            again = iommu.map(memory)
            assert not again.closed
    assert open_fds() == before
    with pytest.raises(vfio.VfioError, match="address space is closed"):
        machine.open(iommu=iommu)


def test_an_address_space_that_is_given_decides_the_interface(machine: Machine) -> None:
    with vfio.Iommu.open("iommufd", **machine.options) as iommu:
        with pytest.raises(vfio.Unsupported, match=r"cannot be opened as 'group' into .* 'iommufd'"):
            machine.open("group", iommu)
        machine.open("iommufd", iommu).close()
        machine.open("auto", iommu).close()
    with vfio.Iommu.open("group", **machine.options) as iommu:
        for interface in ("group", "type1v2", "auto"):
            machine.open(interface, iommu).close()
        with pytest.raises(vfio.Unsupported, match=r"cannot be opened as 'type1' into .* 'type1v2'"):
            machine.open("type1", iommu)


def test_the_choice_is_automatic_for_an_address_space_too(machine: Machine) -> None:
    with vfio.Iommu.open(**machine.options) as iommu, machine.open(iommu=iommu) as device:
        assert device.interface == "iommufd"
    (machine.kernel.dev / "vfio/devices/vfio0").unlink()
    with vfio.Iommu.open(**machine.options) as iommu:
        assert iommu.interface == "type1v2"


@pytest.mark.parametrize("node", ["iommu", "vfio/devices/vfio0"])
def test_what_may_not_be_opened_is_not_chosen(machine: Machine, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    real = os.access

    def forbidden(path: str, mode: int, **options: bool) -> bool:
        return path != str(machine.kernel.dev / node) and real(path, mode, **options)

    monkeypatch.setattr("vfio._iommufd.os.access", forbidden)
    with machine.open("auto") as device:
        assert device.interface == "type1v2"
    with vfio.Iommu.open(**machine.options) as iommu:
        assert iommu.interface == "type1v2"


def test_compatibility_mode_needs_iommufd_too(machine: Machine) -> None:
    (machine.kernel.dev / "iommu").unlink()
    with pytest.raises(vfio.Unsupported, match="this kernel has no iommufd"):
        machine.open("iommufd-compat-type1v2")


def test_no_right_to_go_without_an_iommu(machine: Machine) -> None:
    (machine.sysfs.root / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    machine.kernel.extensions.add(_abi.VFIO_NOIOMMU_IOMMU)
    (machine.kernel.dev / "vfio/noiommu-7").write_text("")
    machine.kernel.fail[_abi.VFIO_GROUP_SET_CONTAINER] = errno.EPERM
    with pytest.raises(vfio.NotPermitted, match="CAP_SYS_RAWIO"):
        machine.open("noiommu")


def test_low_power(machine: Machine) -> None:
    with machine.open() as device, vfio.EventFd() as event:
        device.enter_low_power()
        device.enter_low_power(wakeup=event)
        device.exit_low_power()
        assert machine.kernel.features == [
            (_abi.VFIO_DEVICE_FEATURE_SET | _abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, b""),
            (
                _abi.VFIO_DEVICE_FEATURE_SET | _abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
                event.fileno().to_bytes(4, "little") + bytes(4),
            ),
            (_abi.VFIO_DEVICE_FEATURE_SET | _abi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, b""),
        ]
        assert not device.feature_supported(-1)
        assert not device.feature_supported(1 << 16)


def test_files_are_not_handed_over_from_a_closed_space(machine: Machine) -> None:
    with vfio.Iommu.open(**machine.options) as iommu, machine.open(iommu=iommu) as device:
        iommu.close()
        with pytest.raises(vfio.VfioError, match="address space is closed"):
            _ = device.fds


def test_hot_reset_gives_the_groups_that_it_concerns_only(machine: Machine) -> None:
    """The kernel refuses more files than there are functions to reset."""
    machine.sysfs.function("0000:00:04.0", driver="vfio-pci", group=8)
    (machine.kernel.dev / "vfio/8").write_bytes(b"")
    machine.kernel.hot_reset = [(7, 0, 0, 0x18)]
    with vfio.Iommu.open("group", **machine.options) as iommu, machine.open(iommu=iommu) as one:
        with machine.open(iommu=iommu, address="0000:00:04.0"):
            one.hot_reset()
            assert machine.kernel.hot_reset_groups == [one.fds.group]
            machine.kernel.hot_reset = [(7, 0, 0, 0x18), (7, 0, 0, 0x19), (8, 0, 0, 0x20), (9, 0, 0, 0x28)]
            machine.kernel.fail[_abi.VFIO_DEVICE_PCI_HOT_RESET] = errno.EINVAL
            with pytest.raises(vfio.NotPermitted, match=r": it would reset 0000:00:05.0 too; bind those"):
                one.hot_reset()


@pytest.mark.parametrize("with_group", [True, False])
def test_hot_reset_of_a_device_that_was_handed_over(machine: Machine, with_group: bool) -> None:
    machine.kernel.hot_reset = [(7, 0, 0, 0x18)]
    with machine.open() as first:
        fds = first.fds
        group = os.dup(fds.group) if with_group else -1
        copies = fds._replace(device=os.dup(fds.device), iommu=os.dup(fds.iommu), group=group)
        with vfio.Device.from_fds(ADDRESS, copies) as device:
            if with_group:
                device.hot_reset()
                assert machine.kernel.hot_reset_groups == [group]
            else:
                with pytest.raises(vfio.Unsupported, match=r"without its group's file; send DeviceFds.group"):
                    device.hot_reset()


def test_a_mapping_in_a_newcomers_way(machine: Machine) -> None:
    machine.kernel.fail[_abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT] = errno.EADDRINUSE
    with pytest.raises(vfio.VfioError, match="at addresses that this device cannot use"):
        machine.open("iommufd")


def test_a_holder_with_a_name_of_several_lines(tmp_path: Path) -> None:
    fds = tmp_path / "42/fd"
    fds.mkdir(parents=True)
    (fds / "3").symlink_to("/dev/vfio/7")
    (tmp_path / "42/comm").write_text("a\nb\x1b[2J\n")
    assert _diagnose.describe_holders(["/dev/vfio/7"], str(tmp_path)) == "held by process 42 (a?b?[2J)"
