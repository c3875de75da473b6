"""A disk that is mounted, swapped on or part of another one is not taken away from the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

import vfio
from tests.unit.test_vfio_binding import ADDRESS, Machine
from vfio import _disks

PCI = f"bus/pci/devices/{ADDRESS}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path, monkeypatch)
    made.sysfs.function(ADDRESS, driver="nvme", group=7, class_code=0x010802)
    (tmp_path / "sys/class/block").mkdir()
    (tmp_path / "proc/self").mkdir(parents=True)
    return made


def block(machine: Machine, path: str, number: str) -> Path:
    home = machine.sysfs.root / path
    (home / "holders").mkdir(parents=True)
    (home / "dev").write_text(f"{number}\n")
    (machine.sysfs.root / "class/block" / home.name).symlink_to(home)
    return home


def used(machine: Machine, *, mounts: str = "", swaps: str = "") -> str | None:
    proc = machine.sysfs.root.parent / "proc"
    (proc / "self/mountinfo").write_text(mounts)
    (proc / "swaps").write_text(f"Filename\tType\n{swaps}")
    function = vfio.PciFunction(ADDRESS, sysfs_root=str(machine.sysfs.root))
    return _disks.in_use(function, str(proc))


def test_mounted_swapped_on_or_part_of_another(machine: Machine) -> None:
    block(machine, f"{PCI}/nvme/nvme0/nvme0n1", "259:0")
    part = block(machine, f"{PCI}/nvme/nvme0/nvme0n1/nvme0n1p1", "259:1")
    block(machine, "devices/other/sda1", "8:1")
    elsewhere = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 1 0:5 / /proc rw - proc proc rw\nodd\n"
    assert used(machine, mounts=elsewhere, swaps="/dev/sda1 partition 1 0 -2\n") is None
    assert used(machine, mounts=f"{elsewhere}24 1 259:1 / /home rw shared:1 - ext4 /dev/root rw") == (
        "nvme0n1p1 is mounted at /home"
    )
    # btrfs has numbers of its own.
    assert used(machine, mounts="24 1 0:35 / /data rw - btrfs /dev/nvme0n1 rw") == "nvme0n1 is mounted at /data"
    assert used(machine, swaps="/dev/nvme0n1p1 partition 1 0 -2\n") == "nvme0n1p1 is swapped on"
    (part / "holders/dm-0").mkdir()
    assert used(machine) == "nvme0n1p1 is part of dm-0"


def test_a_hidden_path_leads_to_the_disk_that_is_used(machine: Machine) -> None:
    block(machine, f"{PCI}/nvme/nvme0/nvme0c0n1", "259:0")
    block(machine, "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:1")
    block(machine, "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p2", "259:2")
    assert used(machine, mounts="24 1 259:2 / / rw - ext4 /dev/root rw") == "nvme0n1p2 is mounted at /"
    assert used(machine, mounts="24 1 8:2 / / rw - ext4 /dev/root rw") is None


def test_bind_refuses_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_disks, "in_use", lambda function: f"{function.address} has the root")
    with pytest.raises(vfio.DeviceBusy, match=r"not taken away from the kernel: .* has the root; unmount it \(umount"):
        machine.bind()
    assert machine.sysfs.writes == []
    assert machine.now[0] == "nvme"
