"""The driver's cgroup, in a directory that plays the kernel's file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netbridge.vnode.cgroup import Cgroup, NoCgroup, Slot

NAME = "netbridge-0000:00:1f.0"


def group(path: Path, *, members: str = "") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.controllers").write_text("cpu memory pids\n")
    (path / "cgroup.procs").write_text(members)
    (path / "cgroup.subtree_control").write_text("pids\n")
    for name in ("memory.max", "memory.oom.group", "memory.swap.max", "cpu.max", "cpu.weight"):
        (path / name).write_text("max\n")
    (path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (path / "cgroup.events").write_text("populated 0\nfrozen 0\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    group(tmp_path)
    group(tmp_path / NAME)
    return tmp_path


def test_limits_are_written_where_the_kernel_reads_them(root: Path) -> None:
    group(root / "driver-7")
    slot = Slot(f"{root}/driver-7")
    slot.limit(16 << 20)
    slot.limit_cpu(0.05)
    told = {
        name: (root / "driver-7" / name).read_text().rstrip("\n\0")
        for name in ("memory.max", "memory.swap.max", "cpu.max")
    }
    assert told["memory.max"].startswith("16777216")
    assert told["memory.swap.max"].startswith("0")
    assert told["cpu.max"].startswith("5000 100000")
    slot.limit_cpu(0.001)
    assert (root / "driver-7" / "cpu.max").read_text().startswith("1000 100000"), "the kernel takes no less"
    slot.limit_cpu(None)
    assert (root / "driver-7" / "cpu.max").read_text().startswith("max 100000")
    slot.yield_to_others()
    assert (root / "driver-7" / "cpu.weight").read_text().startswith("1ax")
    slot.hurry()
    assert (root / "driver-7" / "cpu.weight").read_text().startswith("100")
    assert slot.out_of_memory_kills == 2


def test_each_driver_process_has_a_place_of_its_own(root: Path) -> None:
    (root / NAME / "driver-1").mkdir()
    cgroup = Cgroup(NAME, root=str(root), own="")
    for path in (root, root / NAME):
        assert (path / "cgroup.subtree_control").read_text().startswith("+memory +cpu")
    assert cgroup.clear(0.0) is False
    assert not (root / NAME / "driver-1").exists(), "of a monitor that was killed"
    first, second = cgroup.slot(), cgroup.slot()
    assert (first.path, second.path) == (f"{cgroup.path}/driver-1", f"{cgroup.path}/driver-2")
    (Path(first.path) / "cgroup.procs").write_text("41\n")
    (Path(second.path) / "cgroup.procs").write_text("42\n43\n")
    assert sorted(cgroup.members) == [41, 42, 43]
    (Path(first.path) / "cgroup.procs").unlink()  # the kernel's files do not keep a directory
    first.close()
    assert not Path(first.path).exists()
    second.close()
    assert Path(second.path).exists(), "somebody is in it"
    cgroup.close()


def test_without_a_mount_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NoCgroup, match="no cgroup v2 is mounted"):
        Cgroup(NAME, root=str(tmp_path), own="")


def test_in_a_group_of_ones_own_the_monitor_makes_room(root: Path) -> None:
    group(root / "unit", members=f"{os.getpid()}\n")
    group(root / "unit" / "monitor")
    group(root / "unit" / NAME)
    cgroup = Cgroup(NAME, root=str(root), own="/unit")
    assert cgroup.path == f"{root}/unit/{NAME}"
    assert (root / "unit" / "monitor" / "cgroup.procs").read_text() == "0"
    cgroup.close()


def test_a_group_shared_with_others_is_left_alone(root: Path) -> None:
    group(root / "session", members=f"1\n{os.getpid()}\n")
    with pytest.raises(NoCgroup, match="Delegate=yes"):
        Cgroup(NAME, root=str(root), own="/session")
    assert not (root / "session" / "monitor").exists()


def test_two_monitors_know_of_each_other(root: Path) -> None:
    first = Cgroup(NAME, root=str(root), own="")
    second = Cgroup(NAME, root=str(root), own="")
    assert (first.taken, second.taken) == (False, True)
    second.close()
    assert (root / NAME).exists()
    first.close()
    third = Cgroup(NAME, root=str(root), own="")
    assert not third.taken
    third.close()


def test_an_empty_group_needs_no_clearing(root: Path) -> None:
    cgroup = Cgroup(NAME, root=str(root), own="")
    assert cgroup.clear(0.0) is False
    cgroup.close()


def test_who_does_not_leave_is_killed(root: Path) -> None:
    (root / NAME / "cgroup.events").write_text("populated 1\n")
    (root / NAME / "cgroup.kill").write_text("")
    cgroup = Cgroup(NAME, root=str(root), own="")
    with pytest.raises(NoCgroup, match="cannot be ended"):
        cgroup.clear(0.0)
    assert (root / NAME / "cgroup.kill").read_text() == "1"
    cgroup.close()
