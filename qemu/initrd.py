"""Builds the guest's initramfs: one static program, images/init and its companions, and the kernel's modules.

Modules and init stay in use after the root is mounted (see images/initrd.sh), so that neither a change to them nor
another kernel needs a new root image. The archive is not compressed: unpacking would take longer than reading.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

from qemu.bytecode import compile_python
from qemu.kernel import Kernel, modules_needed, read_module
from qemu.recipe import KernelPart
from qemu.tools import run_tool

INIT_FILES = Path(__file__).resolve().parents[1] / "images"

GUEST = "usr/lib/guest"
AGENT = "agent"
"""The package of the guest's agent, in images/ and in GUEST."""
FILES = {
    "init": "initrd.sh",
    f"{GUEST}/init": "init",
    f"{GUEST}/fstab.early": "fstab.early",
    f"{GUEST}/fstab": "fstab",
    f"{GUEST}/fstab.late": "fstab.late",
    f"{GUEST}/core": "core",
}
"""Where in the initramfs each file of images/ goes, besides the agent's."""

MODULE_INDEXES = ("modules.builtin", "modules.builtin.modinfo", "modules.order")
"""What depmod reads, besides the modules."""


class Archive:
    """A cpio archive in the kernel's format, `newc` (Documentation/driver-api/early-userspace/buffer-format.rst).

    Everything in it belongs to root and nothing has a date, so equal contents make equal archives.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0
        self._directories: set[str] = set()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]

    def directory(self, name: str) -> None:
        """A directory, after those that it is in; one that is there already is left as it is."""
        if name in self._directories or not name:
            return
        self.directory(name.rpartition("/")[0])
        self._directories.add(name)
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def link(self, name: str, target: str) -> None:
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


def initrd_inputs(part: KernelPart, files: Path = INIT_FILES) -> list[str | bytes]:
    """All that decides what `build_initrd` makes, the kernel and busybox aside."""
    names = [repr((part.early, part.late, part.available))]
    here = [files / name for name in FILES.values()]
    agent = [part for file in _agent(files) for part in (file.name, file.read_bytes())]
    return [*names, *(file.read_bytes() for file in here), *agent, Path(__file__).read_bytes()]


def _agent(files: Path) -> list[Path]:
    return sorted((files / AGENT).glob("*.py"))


def build_initrd(
    part: KernelPart, kernel: Kernel, busybox: bytes, sysroot: Path | None = None, files: Path = INIT_FILES
) -> bytes:
    """The initramfs. With `sysroot`, the agent is in it compiled for the guest's Python, too.

    Raises ImageBuildFailed when the kernel lacks a module of the recipe, or ToolMissing.
    """
    archive = Archive()
    for name in ("dev", "proc", "sys", "root"):
        archive.directory(name)
    archive.file(f"{GUEST}/busybox", busybox, executable=True)
    archive.link("bin/busybox", f"/{GUEST}/busybox")
    archive.link("lib", "usr/lib")
    for place, name in FILES.items():
        archive.file(place, (files / name).read_bytes(), executable=True)
    for file in _agent(files):
        archive.file(f"{GUEST}/{AGENT}/{file.name}", file.read_bytes())
    if sysroot is not None:
        for name, data in _compiled(_agent(files), sysroot).items():
            archive.file(f"{GUEST}/{AGENT}/__pycache__/{name}", data)
    lists = f'early="{" ".join(part.early)}"\nlate="{" ".join(part.late)}"\n'
    archive.file(f"{GUEST}/modules", lists.encode())
    _add_modules(archive, part, kernel)
    return archive.finish()


def _compiled(sources: list[Path], sysroot: Path) -> dict[str, bytes]:
    """The agent's bytecode, by the names in __pycache__; empty where the guest's Python does not run here."""
    with tempfile.TemporaryDirectory() as directory:
        copies = [Path(shutil.copy(source, directory)) for source in sources]
        names = [(copy, f"/{GUEST}/{AGENT}/{copy.name}") for copy in copies]
        compile_python(names, sysroot, lambda _line: None)
        return {path.name: path.read_bytes() for path in Path(directory).glob("__pycache__/*.pyc")}


def _add_modules(archive: Archive, part: KernelPart, kernel: Kernel) -> None:
    with tempfile.TemporaryDirectory() as directory:
        modules = Path(directory, "lib/modules", kernel.release)
        modules.mkdir(parents=True)
        for name in MODULE_INDEXES:
            (modules / name).write_bytes((kernel.modules / name).read_bytes())
        for path in modules_needed(kernel, (*part.early, *part.late, *part.available)):
            # Unpacked, because the guest would otherwise do it at every start.
            unpacked = modules / path.partition(".ko")[0]
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            unpacked.with_name(f"{unpacked.name}.ko").write_bytes(read_module(kernel.modules / path))
        run_tool(["depmod", "-b", directory, kernel.release], doing="indexing the modules of the initramfs")
        for file in sorted(path for path in modules.rglob("*") if path.is_file()):
            archive.file(f"usr/lib/modules/{kernel.release}/{file.relative_to(modules)}", file.read_bytes())
