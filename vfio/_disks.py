"""Which of a function's disks are in use: read-only looks at sysfs and /proc, before a disk is taken from the kernel.

Unbinding asks nobody: a file system that is mounted, the machine's own root even, loses its disk.
"""

from __future__ import annotations

import os

from vfio import _sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vfio.pci import PciFunction


def in_use(function: PciFunction, proc_root: str = "/proc") -> str | None:
    """Words for what uses the disks behind a function and their partitions, or None when nothing does."""
    blocks = f"{function.sysfs_root}/class/block"
    paths = {name: os.path.realpath(f"{blocks}/{name}") for name in _listdir(blocks)}
    homes = [os.path.realpath(function.path)]
    below = [name for name, path in paths.items() if _inside(path, homes)]
    # With NVMe's multipath the function has a hidden path, nvme0c0n1, to the disk that is used, nvme0n1.
    homes += [paths[head] for head in map(_head, below) if head in paths]
    places = _places(proc_root)
    words = []
    for name, path in sorted(paths.items()):
        if not _inside(path, homes):
            continue
        where = places.get(name) or places.get(_text(f"{path}/dev"))
        holders = _listdir(f"{path}/holders")
        if where is not None:
            words.append(f"{name} is {where}")
        elif holders:
            words.append(f"{name} is part of {', '.join(sorted(holders))}")
    return "; ".join(words) or None


def _places(proc_root: str) -> dict[str, str]:
    """What is mounted or swapped on: by the number of the device, "8:1", and by its name, "sda1"."""
    found: dict[str, str] = {}
    for line in _text(f"{proc_root}/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, source = mount.split(), kind.split()[1:2]
        if len(fields) < 5:
            continue
        # By name, too: btrfs has numbers of its own.
        for key in (fields[2], *(os.path.basename(os.path.realpath(s)) for s in source if s.startswith("/dev/"))):
            found.setdefault(key, f"mounted at {fields[4]}")
    for line in _text(f"{proc_root}/swaps").splitlines():
        if line.startswith("/dev/"):
            found[os.path.basename(os.path.realpath(line.split()[0]))] = "swapped on"
    return found


def _head(name: str) -> str:
    controller, path, rest = name.partition("c")
    return controller + rest.lstrip("0123456789") if path and name.startswith("nvme") else name


def _inside(path: str, homes: list[str]) -> bool:
    return any(path == home or path.startswith(f"{home}/") for home in homes)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        return _sys.read_file(path, 1 << 20)
    except OSError:
        return ""
