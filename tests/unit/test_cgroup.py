"""The driver's cgroup, in a directory that plays the kernel's file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netbridge.vnode.cgroup import Cgroup, NoCgroup

NAME = "netbridge-0000:00:1f.0"


def group(path: Path, *, members: str = "") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.controllers").write_text("cpu memory pids\n")
    (path / "cgroup.procs").write_text(members)
    (path / "cgroup.subtree_control").write_text("pids\n")
    for name in ("memory.max", "memory.oom.group", "memory.swap.max", "cpu.max"):
        (path / name).write_text("max\n")
    (path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (path / "cgroup.events").write_text("populated 0\nfrozen 0\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    group(tmp_path)
    group(tmp_path / NAME)
    return tmp_path


def test_limits_are_written_where_the_kernel_reads_them(root: Path) -> None:
    cgroup = Cgroup(NAME, root=str(root), own="")
    assert (root / "cgroup.subtree_control").read_text().startswith("+memory +cpu")
    cgroup.limit(16 << 20)
    cgroup.limit_cpu(0.05)
    told = {
        name: (root / NAME / name).read_text().rstrip("\n\0") for name in ("memory.max", "memory.swap.max", "cpu.max")
    }
    assert told["memory.max"].startswith("16777216")
    assert told["memory.swap.max"].startswith("0")
    assert told["cpu.max"].startswith("5000 100000")
    cgroup.limit_cpu(0.001)
    assert (root / NAME / "cpu.max").read_text().startswith("1000 100000"), "the kernel takes no less"
    cgroup.limit_cpu(None)
    assert (root / NAME / "cpu.max").read_text().startswith("max 100000")
    assert cgroup.out_of_memory_kills == 2
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
