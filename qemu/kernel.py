"""Takes Debian kernel packages apart into what a guest is started with: a kernel image and a tree of modules."""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qemu.errors import ImageBuildFailed
from qemu.tools import run_tool

# Of the x86 boot protocol's header (Documentation/arch/x86/boot.rst): where the compressed kernel lies in a bzImage.
SETUP_SECTORS = 0x1F1
MAGIC = 0x202
PAYLOAD = 0x248

PVH_NOTE = re.compile(rb"\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0")
"""The ELF note (name, type 18) that tells where a bare kernel is entered; without it QEMU cannot start one."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that was unpacked into a directory. `release` is what uname -r will say.

    `image` unpacks itself. `bare`, where there is one, is the same kernel unpacked, an ELF file that is started by its
    PVH entry: that spares an emulated processor about a second.
    """

    image: Path
    bare: Path | None
    modules: Path
    release: str

    @classmethod
    def at(cls, directory: Path) -> Kernel:
        """What `unpack_kernel` put into `directory`."""
        (modules,) = (directory / "modules").iterdir()
        bare = directory / "vmlinux"
        return cls(directory / "vmlinuz", bare if bare.exists() else None, modules, modules.name)


def unpack_kernel(packages: list[Path], out: Path) -> None:
    """Puts vmlinuz, modules/RELEASE and, where possible, vmlinux into the directory `out`.

    Raises ImageBuildFailed or ToolMissing.
    """
    scratch = out / "unpacked"
    scratch.mkdir()
    for package in packages:
        run_tool(["dpkg-deb", "-x", str(package), str(scratch)], doing=f"unpacking {package.name}")
    found = [path for path in (*scratch.glob("lib/modules/*"), *scratch.glob("usr/lib/modules/*")) if path.is_dir()]
    release = found[0].name if found else ""
    # In Debian, from 7 on the kernel lies with its modules.
    images = [
        path for path in (scratch / f"boot/vmlinuz-{release}", *(top / "vmlinuz" for top in found)) if path.exists()
    ]
    if len(found) != 1 or len(images) != 1:
        names = ", ".join(package.name for package in packages)
        raise ImageBuildFailed(f"these packages hold no kernel with its modules: {names}")
    modules = found[0]

    images[0].rename(out / "vmlinuz")
    bare = decompress((out / "vmlinuz").read_bytes())
    if bare is not None and PVH_NOTE.search(bare):
        (out / "vmlinux").write_bytes(bare)

    # depmod looks below lib/modules, wherever the package has them.
    base = modules.parents[2]
    run_tool(["depmod", "-b", str(base), release], doing=f"indexing the modules of {release}")
    (out / "modules").mkdir()
    modules.rename(out / "modules" / release)
    shutil.rmtree(scratch)


def decompress(image: bytes) -> bytes | None:
    """The kernel proper, an ELF file, out of a bzImage; None when it is packed in a way not known here."""
    if image[MAGIC : MAGIC + 4] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = (image[SETUP_SECTORS] + 1) * 512 + offset
    # After the compressed kernel come four bytes with its real length.
    payload, size = image[start : start + length - 4], image[start + length - 4 : start + length]
    kernel = _unpack(payload)
    if kernel is None or len(kernel) != int.from_bytes(size, "little") or not kernel.startswith(b"\x7fELF"):
        return None
    return kernel


def _unpack(data: bytes) -> bytes | None:
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return run_tool(["zstd", "-dc"], doing="unpacking what zstd packed", input_data=data)
    if data.startswith(b"\x02\x21\x4c\x18"):
        return run_tool(["lz4", "-dc"], doing="unpacking what lz4 packed", input_data=data)
    if data.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    return None


def read_module(path: Path) -> bytes:
    """A module's ELF file, whichever way it is packed."""
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    unpacked = _unpack(data)
    if unpacked is None:
        raise ImageBuildFailed(f"{path}: packed in a way not known here")
    return unpacked


def module_name(path: str) -> str:
    """What the kernel calls the module in a file: `vfio_pci` for kernel/drivers/vfio/pci/vfio-pci.ko.xz."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def modules_needed(kernel: Kernel, names: Iterable[str]) -> list[str]:
    """The files of the named modules and of all that they depend on, relative to the modules' directory.

    A module built into the kernel needs no file. Raises ImageBuildFailed for one that does not exist.
    """
    needs, builtin = _indexes(kernel.modules)
    files: dict[str, None] = {}
    for name in names:
        plain = name.replace("-", "_")
        if plain in needs:
            files.update(dict.fromkeys(needs[plain]))
        elif plain not in builtin:
            raise ImageBuildFailed(f"kernel {kernel.release} has no module {name}, which the recipe asks for")
    return list(files)


def has_module(modules: Path, name: str) -> bool:
    """Whether a kernel with this directory of modules has that one, or has it built in."""
    needs, builtin = _indexes(modules)
    return name.replace("-", "_") in needs.keys() | builtin


def _indexes(modules: Path) -> tuple[dict[str, list[str]], set[str]]:
    """Each module by its name, with its file and those that it depends on; and what is built in."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[module_name(path)] = [path, *others.split()]
    return needs, {module_name(path) for path in (modules / "modules.builtin").read_text().split()}
