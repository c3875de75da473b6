"""What a snapshot is keyed on, and what the cache does with it."""

from dataclasses import replace
from pathlib import Path

import pytest

from qemu.cache import Cache
from qemu.command import Disk, Machine, Nic
from qemu.errors import HarnessError
from qemu.snapshot import KEEP, Snapshot
from qemu.wire import Wire


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name in ("kernel", "initrd", "root", "code"):
        (tmp_path / name).write_bytes(b"1" * 4096)
    disks = (Disk(tmp_path / "root", "root"), Disk(tmp_path / "code", "code", loose=True))
    return Machine(kernel=tmp_path / "kernel", initrd=tmp_path / "initrd", disks=disks)


def key_of(machine: Machine) -> str:
    return Snapshot(machine, Cache(Path("/nonexistent"))).key


def test_what_is_on_the_code_disk_does_not_count(machine: Machine, tmp_path: Path) -> None:
    key = key_of(machine)
    (tmp_path / "code").write_bytes(b"2" * 4096)
    (tmp_path / "other").write_bytes(b"3" * 4096)
    moved = replace(machine, disks=(machine.disks[0], Disk(tmp_path / "other", "code", loose=True)))
    assert key_of(machine) == key_of(moved) == key
    (tmp_path / "code").write_bytes(b"2" * 8192)
    assert key_of(machine) != key, "its size counts"


@pytest.mark.parametrize(
    ("arguments", "mute"),
    [
        ((), None),
        (("-device", "nvme,serial=1", "-device", "virtio-rng-pci"), None),
        (("-device", "nvme,serial=1", "-device", "edu,id=edu0"), "edu"),
        (("-device", '{"driver": "edu"}'), "edu"),
    ],
)
def test_a_device_whose_state_qemu_forgets(machine: Machine, arguments: tuple[str, ...], mute: str | None) -> None:
    refusal = Snapshot(replace(machine, extra_args=arguments), Cache(Path("/nonexistent"))).refusal()
    assert refusal == (None if mute is None else f"QEMU keeps no state of its device {mute}")


def test_the_ends_of_a_wire_do_not_count(machine: Machine) -> None:
    with Wire() as one, Wire() as two:
        keys = {key_of(replace(machine, nics=(Nic(wire=wire),))) for wire in (one, two)}
    assert len(keys) == 1


def test_everything_else_does(machine: Machine, tmp_path: Path) -> None:
    others = [
        replace(machine, append=("word",)),
        replace(machine, memory_mb=513),
        replace(machine, machine="pc"),
        replace(machine, cpus=2),
        replace(machine, cpu="qemu64"),
        replace(machine, nics=(Nic(),)),
        replace(machine, nics=(Nic(properties={"packed": "on"}),)),
        replace(machine, extra_args=("-device", "edu")),
        replace(machine, kernel=tmp_path / "root"),
        replace(machine, initrd=None),
        replace(machine, disks=machine.disks[:1]),
        replace(machine, accel="kvm"),
        replace(machine, program="true"),
    ]
    keys = [key_of(machine), *(key_of(other) for other in others)]
    for name in ("kernel", "initrd", "root"):
        (tmp_path / name).write_bytes(b"22")
        keys.append(key_of(machine))
    assert len(set(keys)) == len(keys)


def test_it_is_made_once_and_can_be_discarded(machine: Machine, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    made = []

    def save(path: Path) -> None:
        made.append(path)
        path.write_bytes(b"state")

    kept = Snapshot(machine, cache)
    assert kept.find() is None
    for _ in range(2):
        kept.make(save)
    assert len(made) == 1
    found = kept.find()
    assert found is not None
    assert found.read_bytes() == b"state"
    kept.discard()
    kept.discard()
    assert kept.find() is None


def test_one_that_could_not_be_written_is_none(machine: Machine, tmp_path: Path) -> None:
    def save(path: Path) -> None:
        path.write_bytes(b"half")
        raise HarnessError("the device cannot be saved")

    kept = Snapshot(machine, Cache(tmp_path / "cache"))
    with pytest.raises(HarnessError, match="cannot be saved"):
        kept.make(save)
    assert kept.find() is None


def test_the_longest_unused_go(machine: Machine, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for n in range(KEEP + 3):
        kept = Snapshot(replace(machine, memory_mb=512 + n), cache)
        kept.make(lambda path: path.touch())
    assert len(cache.entries()) == KEEP
