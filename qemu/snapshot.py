"""Guests as they are right after booting, kept in the image cache, so that the next one like it need not boot.

A snapshot holds a guest whose agent has greeted and to whom nothing has been said yet: no clock of the host, no code
disk, no claimed device. Its key is made of all that went in: image, command line, QEMU, processor. What may differ
from guest to guest, the ends of its channels and what is on the code disk, does not count.

QEMU's own migration writes and reads it (VirtualMachine.save and resume in vm.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import qemu.vm
from images.agent.protocol import PROTOCOL
from qemu.cache import Cache, key_of
from qemu.command import Channels, Machine, build, netdev_id

KIND = "snapshot"
KEEP = 24
"""Snapshots in the cache, at about 100 MB each; beyond that the longest unused go."""
FILE = "state"
DESCRIPTOR = re.compile(r",[a-z.]*(fds?|str|path)=[^,]*")


class Snapshot:
    """The snapshot of one machine, there or not. Making one touches nothing but the files that it is keyed on."""

    def __init__(self, machine: Machine, cache: Cache):
        self._cache = cache
        self._machine = machine
        self.key = key_of(*_inputs(machine))

    def refusal(self) -> str | None:
        """Why no snapshot of this machine would be sound, or None when one may be."""
        mute = [name for name in _added(self._machine) if not _is_saved(self._machine.program, name)]
        return f"QEMU keeps no state of its device {mute[0]}" if mute else None

    def find(self) -> Path | None:
        """The file to restore from, or None while there is none."""
        place = self._cache.find(KIND, self.key)
        return None if place is None else place / FILE

    def make(self, save: Callable[[Path], None]) -> None:
        """Have `save` write the file. When another process is at it, waits for that one."""
        # Not flushed to the disk: one that a power cut has left incomplete is found out when it is restored.
        self._cache.ensure(KIND, self.key, lambda place: save(place / FILE), _silent, durable=False)
        self._cache.trim(KIND, KEEP)

    def discard(self) -> None:
        """Remove it: it could not be restored."""
        self._cache.remove(KIND, self.key)


def _silent(_line: str) -> None:
    """It takes a moment, of which there is nothing to tell."""


def _added(machine: Machine) -> list[str]:
    """The drivers of the devices that were added by hand."""
    words = machine.extra_args
    values = [value for word, value in itertools.pairwise(words) if word == "-device"]
    return [
        str(json.loads(value).get("driver")) if value.startswith("{") else value.partition(",")[0] for value in values
    ]


def _is_saved(program: str, driver: str) -> bool:
    """Whether a restored device is what it was. One without a description of its state QEMU leaves out of a snapshot
    without a word, and restores as after power-on: its BARs are nowhere then. Virtio devices are saved by their bus."""
    return driver.startswith("virt") or driver in _described(program)


@functools.cache
def _described(program: str) -> frozenset[str]:
    """The types of which QEMU has such a description: what it says itself. Empty when it cannot be asked."""
    with tempfile.TemporaryDirectory(prefix="vmstate-") as place:
        out = Path(place) / "vmstate.json"
        command = [program, "-machine", "none", "-nodefaults", "-dump-vmstate", str(out)]
        with contextlib.suppress(OSError):
            subprocess.run(command, capture_output=True, check=False, timeout=60)
        return frozenset(json.loads(out.read_text())) if out.exists() else frozenset()


def _inputs(machine: Machine) -> list[str]:
    files = [machine.kernel, *([machine.initrd] if machine.initrd else [])]
    # The files of an image lie in the cache under a key of their own; a file elsewhere is told by its time.
    files += [disk.path for disk in machine.disks if not disk.loose]
    facts = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    loose = [disk for disk in machine.disks if disk.loose]
    facts += [f"{disk.serial} {disk.path.stat().st_size}" for disk in loose]
    named = tuple(dataclasses.replace(disk, path=Path("any")) if disk.loose else disk for disk in machine.disks)
    netdevs = {
        nic.id: DESCRIPTOR.sub("", nic.wire.netdev(netdev_id(nic))) + getattr(nic.wire, "shape", "")
        if nic.wire is not None
        else ""
        for nic in machine.nics
    }
    shape = build(dataclasses.replace(machine, disks=named), Channels("null", "null", "null", netdevs))
    processor = _processor() if machine.accel == "kvm" else ""
    code = inspect.getsource(qemu.vm.VirtualMachine.save)
    return [json.dumps(shape), *facts, _version(machine.program), processor, str(PROTOCOL), code]


@functools.cache
def _version(program: str) -> str:
    """What tells this QEMU from any other."""
    path = shutil.which(program)
    if path is None:
        return ""  # starting it will say so
    status = Path(path).resolve().stat()
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{Path(path).resolve()} {status.st_size} {status.st_mtime_ns} {said}"


@functools.cache
def _processor() -> str:
    """What a guest that has the host's own processor sees of it."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    wanted = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags")
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0].strip() in wanted)
