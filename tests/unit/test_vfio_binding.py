"""Binding to vfio-pci and back: nothing lost whatever was there before, and wherever it is cut short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vfio
from tests.descriptors import open_fds
from tests.unit.vfio_fakes import FakeSysfs
from vfio import _diagnose, _sys

ADDRESS = "0000:00:03.0"


class Machine:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sysfs = FakeSysfs(root / "sys")
        self.sysfs.driver("vfio-pci")
        self.state = root / "run"
        self.options = {"sysfs_root": str(self.sysfs.root), "state_dir": str(self.state), "dev_root": str(root / "dev")}
        monkeypatch.setattr(_sys, "write_file", self.sysfs.write)

    @property
    def now(self) -> tuple[str | None, str | None]:
        function = vfio.PciFunction(ADDRESS, sysfs_root=str(self.sysfs.root))
        return function.driver, function.driver_override

    def bind(self) -> vfio.Binding:
        return vfio.bind(ADDRESS, **self.options)

    def restore(self) -> str | None:
        return vfio.restore(ADDRESS, **self.options)

    def leftovers(self) -> list[str]:
        return [str(address) for address in vfio.leftovers(state_dir=str(self.state))]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_there_and_back(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    before = open_fds()
    with machine.bind() as binding:
        assert machine.now[0] == machine.now[1] == "vfio-pci"
        assert (binding.driver, binding.previous) == ("vfio-pci", "virtio-pci")
        assert machine.leftovers() == [ADDRESS]
    assert machine.now == ("virtio-pci", None)
    assert machine.leftovers() == []
    assert open_fds() == before
    # The override is set before the function is free for anybody to take, both ways.
    writes = [write.split("/")[-1].split("=")[0] for write in machine.sysfs.writes]
    assert writes == ["driver_override", "unbind", "drivers_probe"] * 2 + ["driver_override"]
    binding.restore()  # harmless


def test_a_function_without_a_driver_is_left_without_one(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, group=7)
    with machine.bind():
        assert machine.now[0] == machine.now[1] == "vfio-pci"
    assert machine.now == (None, None)


def test_an_override_that_was_there_comes_back(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    machine.sysfs.write(f"{machine.sysfs.root}/bus/pci/devices/{ADDRESS}/driver_override", "virtio-pci")
    with machine.bind():
        pass
    assert machine.now == ("virtio-pci", "virtio-pci")


def test_a_function_that_was_lent_all_along_stays_lent(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="vfio-pci", group=7)
    with machine.bind() as binding:
        assert binding.previous == "vfio-pci"
    assert machine.now == ("vfio-pci", None)
    assert machine.sysfs.writes == []
    assert machine.leftovers() == []


def test_a_function_unplugged_meanwhile_is_no_error(machine: Machine) -> None:
    path = machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    with machine.bind():
        path.rename(machine.sysfs.root / "gone")
    assert machine.leftovers() == []


def _killed_at(machine: Machine, write: int, what: str) -> bool:
    """Run bind or restore in a child that is killed just before its write number `write`; whether it was."""
    child = os.fork()
    if child == 0:
        left = write

        def die(path: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)

        machine.sysfs.before_write = die
        try:
            machine.bind() if what == "bind" else machine.restore()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize("then", ["restore", "bind"])
@pytest.mark.parametrize("write", [1, 2, 3])
def test_bind_killed_anywhere_is_put_right(machine: Machine, write: int, then: str) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    assert _killed_at(machine, write, "bind")
    if then == "restore":
        assert machine.restore() == "virtio-pci"
    else:
        with machine.bind() as binding:
            assert machine.now[0] == "vfio-pci"
            assert binding.previous == "virtio-pci"
    assert machine.now == ("virtio-pci", None)
    assert machine.leftovers() == []


@pytest.mark.parametrize("then", ["restore", "bind"])
@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_restore_killed_anywhere_is_put_right(machine: Machine, write: int, then: str) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    machine.bind()
    assert _killed_at(machine, write, "restore")
    if then == "restore":
        assert machine.restore() == "virtio-pci"
    else:
        with machine.bind():
            assert machine.now[0] == "vfio-pci"
    assert machine.now == ("virtio-pci", None)
    assert machine.leftovers() == []


def test_the_killed_children_do_reach_those_writes(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    assert not _killed_at(machine, 4, "bind")
    assert not _killed_at(machine, 5, "restore")


def test_restore_without_notes_lets_the_kernel_choose(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    machine.bind()
    (machine.state / ADDRESS).unlink()
    assert machine.restore() == "virtio-pci"
    assert machine.now == ("virtio-pci", None)


def test_restore_leaves_alone_what_is_not_lent(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    assert machine.restore() == "virtio-pci"
    assert machine.sysfs.writes == []


def test_notes_of_an_earlier_life_are_not_believed(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="e1000e", group=7)
    machine.state.mkdir()
    (machine.state / ADDRESS).write_text("driver=virtio-pci\noverride=\n")
    with machine.bind() as binding:
        assert binding.previous == "e1000e"
    assert machine.now == ("e1000e", None)


def test_notes_that_bind_did_not_write_are_refused(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="vfio-pci", group=7)
    machine.state.mkdir()
    (machine.state / ADDRESS).write_text("driver=../../../etc\noverride=\n")
    with pytest.raises(vfio.VfioError, match="remove the file"):
        machine.restore()


def test_a_driver_that_refuses_is_rolled_back(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    probe = machine.sysfs._probe

    def refuse(function: Path) -> None:
        if (function / "driver_override").read_text().strip() != "vfio-pci":
            probe(function)

    monkeypatch.setattr(machine.sysfs, "_probe", refuse)
    before = open_fds()
    with pytest.raises(vfio.VfioError, match=r"vfio-pci did not take it.*dmesg"):
        machine.bind()
    assert machine.now == ("virtio-pci", None)
    assert machine.leftovers() == []
    assert open_fds() == before


@pytest.mark.parametrize("write", [1, 2, 3])
def test_an_interrupted_bind_is_rolled_back(machine: Machine, write: int) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    left = write

    def interrupt(path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    machine.sysfs.before_write = interrupt
    with pytest.raises(KeyboardInterrupt):
        machine.bind()
    assert machine.now == ("virtio-pci", None)
    assert machine.leftovers() == []


def test_a_function_in_use_is_not_taken_back(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    binding = machine.bind()
    node = tmp_path / "dev/vfio/7"
    node.parent.mkdir(parents=True)
    node.write_text("")
    with node.open("r+"):
        with pytest.raises(vfio.DeviceBusy, match=rf"held by process {os.getpid()} \(.*, this process\)"):
            binding.restore()
        assert machine.now[0] == "vfio-pci"
    binding.restore()
    assert machine.now == ("virtio-pci", None)


def test_the_driver_to_go_back_to_is_gone(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    binding = machine.bind()
    driver = machine.sysfs.root / "bus/pci/drivers/virtio-pci"
    driver.rename(driver.with_name("elsewhere"))
    with pytest.raises(vfio.DriverMissing, match="modprobe virtio-pci, then restore again"):
        binding.restore()
    assert machine.leftovers() == [ADDRESS]
    driver.with_name("elsewhere").rename(driver)
    assert machine.restore() == "virtio-pci"


def test_vfio_pci_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch)
    (machine.sysfs.root / "bus/pci/drivers/vfio-pci/unbind").unlink()
    (machine.sysfs.root / "bus/pci/drivers/vfio-pci").rmdir()
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    with pytest.raises(vfio.DriverMissing, match="load it: modprobe vfio-pci"):
        machine.bind()
    assert machine.sysfs.writes == []


def test_a_bridge_is_refused(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, class_code=0x060400, driver="pcieport", group=7)
    with pytest.raises(vfio.Unsupported, match="bridge"):
        machine.bind()


@pytest.mark.parametrize(
    ("cpuinfo", "cmdline", "says"),
    [
        ("vendor_id : GenuineIntel", "quiet", "add intel_iommu=on to the kernel command line"),
        ("vendor_id : AuthenticAMD", "quiet", "amd_iommu=off"),
        ("", "quiet", "firmware"),
    ],
)
def test_an_iommu_that_is_off_names_the_parameter(
    machine: Machine, tmp_path: Path, cpuinfo: str, cmdline: str, says: str
) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci")
    with pytest.raises(vfio.NoIommu, match="not behind it"):
        machine.bind()
    assert machine.sysfs.writes == []
    (machine.sysfs.root / "class/iommu/dmar0").rmdir()
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cpuinfo").write_text(cpuinfo)
    (proc / "cmdline").write_text(cmdline)
    error = _diagnose.no_iommu(ADDRESS, str(machine.sysfs.root), str(proc))
    assert "the kernel uses no IOMMU" in str(error)
    assert says in str(error)


def test_without_rights_it_says_so(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)

    def forbid(path: str) -> None:
        raise PermissionError(13, "no", path)

    machine.sysfs.before_write = forbid
    with pytest.raises(vfio.NotPermitted, match="needs root"):
        machine.bind()


def test_restoring_what_was_unplugged_removes_its_notes(machine: Machine) -> None:
    path = machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    machine.bind()
    path.rename(machine.sysfs.root / "gone")
    assert machine.leftovers() == [ADDRESS]
    assert machine.restore() is None
    assert machine.leftovers() == []
    with pytest.raises(vfio.DeviceNotFound):
        machine.restore()


@pytest.mark.parametrize("name", ["foo+bar", "AMD (R) thing", "a:b,c"])
def test_odd_names_of_drivers_come_back(machine: Machine, name: str) -> None:
    machine.sysfs.function(ADDRESS, driver=name, group=7)
    with machine.bind():
        assert machine.now[0] == "vfio-pci"
    assert machine.now == (name, None)


@pytest.mark.parametrize("text", ["", "override=\n", "driver=\x1b[2J\noverride=\n"])
def test_incomplete_notes_are_refused(machine: Machine, text: str) -> None:
    machine.sysfs.function(ADDRESS, driver="vfio-pci", group=7)
    machine.state.mkdir()
    (machine.state / ADDRESS).write_text(text)
    with pytest.raises(vfio.VfioError, match="remove the file"):
        machine.restore()
    assert machine.sysfs.writes == []


def test_an_interrupt_while_waiting_for_the_lock_leaks_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    before = open_fds()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vfio._notes.fcntl.flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.bind()
    assert open_fds() == before
    assert machine.sysfs.writes == []


def test_without_notes_nothing_is_bound(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    machine.state.write_text("a file where the directory should be")
    with pytest.raises(vfio.VfioError, match=r"cannot keep notes in .*: EEXIST"):
        machine.bind()
    with pytest.raises(vfio.VfioError, match=r"cannot keep notes in .*: ENOTDIR"):
        machine.leftovers()
    machine.state.unlink()
    (machine.state / f"{ADDRESS}.new").mkdir(parents=True)
    before = open_fds()
    with pytest.raises(vfio.VfioError, match=r"cannot keep notes in .*: EISDIR"):
        machine.bind()
    assert machine.sysfs.writes == []
    assert machine.now[0] == "virtio-pci"
    assert open_fds() == before


def test_somebody_else_unbinds_at_the_same_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    real = machine.sysfs.write

    def raced(target: str, text: str) -> None:
        if target.endswith("/unbind") and (path / "driver").exists():
            (path / "driver").unlink()
            raise OSError(19, "No such device", target)  # what the kernel says when it is not bound to that driver
        real(target, text)

    monkeypatch.setattr(_sys, "write_file", raced)
    machine.bind()
    assert machine.now[0] == "vfio-pci"


def test_a_forked_child_does_not_give_it_back(machine: Machine) -> None:
    machine.sysfs.function(ADDRESS, driver="virtio-pci", group=7)
    with machine.bind() as binding:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                binding.__exit__(None, None, None)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert machine.now[0] == "vfio-pci"
    assert machine.now[0] == "virtio-pci"


@pytest.mark.parametrize(
    ("words", "asked"), [("intel_iommu=on,sm_on", True), ("intel_iommu=on intel_iommu=off", False)]
)
def test_kernel_parameters_are_read_as_the_kernel_reads_them(tmp_path: Path, words: str, asked: bool) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id : GenuineIntel")
    (tmp_path / "cmdline").write_text(words)
    error = _diagnose.no_iommu(ADDRESS, str(tmp_path), str(tmp_path))
    assert ("add intel_iommu=on" in str(error)) is not asked
