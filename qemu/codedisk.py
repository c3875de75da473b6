"""Packs the project's code into a small disk image that a guest mounts at /code.

What changes with every edit travels here, so that it never costs a new root image. images/code.toml says what goes
onto it: trees of files, single files, and C extensions. The extensions are compiled for the guest (sysroot.py), and so
is the Python (bytecode.py). The image is ext4: every guest kernel can mount that without a module, and every host
can make it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qemu.bytecode import compile_python
from qemu.cache import Cache, Progress
from qemu.errors import ImageBuildFailed, RecipeError
from qemu.images import Image, silent
from qemu.settings import read_toml
from qemu.sysroot import cffi_extension, compiled
from qemu.tools import run_tool

SPECIFICATION = Path("images/code.toml")
DEFAULT_OUT = Path("build/code.img")

NEVER = ("__pycache__", ".*", "*.pyc", "*.so", "*.o", "*.egg-info")
"""Names left out everywhere: hidden files, and what was built for the host."""

BLOCK = 1024
SMALLEST = 16 << 20
"""Bytes of the smallest disk. Sizes are powers of two, because a guest that is restored from a snapshot is to find a
disk of the size that it knows, whatever is on it."""


@dataclass(frozen=True)
class CffiModule:
    """An extension module that the cffi builder `builder` in the file `script` describes."""

    module: str
    script: Path
    builder: str


@dataclass(frozen=True)
class CodeSpecification:
    """What goes onto the disk. `files` maps places on the disk to files of the host.

    `trees` are directories below `base`, each of which keeps its place; `exclude` are patterns for paths relative to
    `base`.
    """

    base: Path
    trees: tuple[str, ...]
    exclude: tuple[str, ...]
    files: tuple[tuple[str, Path], ...]
    extensions: tuple[CffiModule, ...]

    @classmethod
    def load(cls, path: Path) -> CodeSpecification:
        """Raises RecipeError, naming file, key and what was expected."""
        table = read_toml(path)
        directory = table.string("base", 'a directory relative to this file, such as ".."', default=".")
        base = (path.parent / directory).resolve()
        trees = table.strings(
            "trees", f"a list of directories below {base}", default=(), valid=lambda name: (base / name).is_dir()
        )
        exclude = table.strings("exclude", "a list of patterns of paths below base", default=())
        files = []
        for entry in table.tables("files", "tables with from and to"):
            source = entry.string("from", f"a file below {base}", valid=lambda name: (base / name).is_file())
            place = entry.string("to", "a path on the disk, relative to its top", valid=_is_inside)
            files.append((place, base / source))
            entry.finish()
        extensions = []
        for entry in table.tables("extensions", "tables with module and cffi"):
            module = entry.string("module", 'a module such as "package._name"', valid=_is_module)
            script, _, builder = entry.string(
                "cffi",
                f'a build script below {base} and the cffi.FFI object in it, such as "package/build.py:ffibuilder"',
                valid=lambda text: ":" in text and (base / text.partition(":")[0]).is_file(),
            ).partition(":")
            extensions.append(CffiModule(module, base / script, builder))
            entry.finish()
        table.finish()
        return cls(base, trees, exclude, tuple(files), tuple(extensions))


def _is_inside(place: str) -> bool:
    path = PurePosixPath(place)
    return bool(place) and not path.is_absolute() and ".." not in path.parts


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def build_code_disk(
    image: Image, spec: Path = SPECIFICATION, out: Path = DEFAULT_OUT, progress: Progress | None = None
) -> Path:
    """Writes the disk image for guests of `image` to `out`, replacing it in one step, and returns `out`.

    Give every run an `out` of its own where several may run at once. Raises RecipeError, ToolMissing, or
    ImageBuildFailed with what the compiler said.
    """
    tell = progress or silent
    with tempfile.TemporaryDirectory(prefix="code-disk-") as directory:
        scratch = Path(directory)
        tree = scratch / "tree"
        build_code_tree(image, spec, tree, "/code", tell)
        _make_image(tree, out, scratch / "code.img")
    return out


def build_code_tree(image: Image, spec: Path, tree: Path, root: str, progress: Progress | None = None) -> None:
    """The same as files in the new directory `tree`, for a machine that will have them at `root`."""
    tell = progress or silent
    code = CodeSpecification.load(spec)
    tree.mkdir(parents=True)
    for place, source in _files(code):
        target = tree / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        # Whatever this user's umask is, every user of the guest is to read it.
        target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
    for entry in code.extensions:
        with tempfile.TemporaryDirectory(prefix="extension-") as generated:
            extension = cffi_extension(entry.script, entry.builder, Path(generated, "c"))
            if extension.module != entry.module:
                raise RecipeError(f"{spec}: the builder of {entry.module} is for {extension.module}")
            target = tree / extension.file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(compiled(extension, image.sysroot, Cache(), tell), target)
    compile_python(((path, f"{root}/{path.relative_to(tree)}") for path in tree.rglob("*.py")), image.sysroot, tell)


def _files(code: CodeSpecification) -> Iterator[tuple[str, Path]]:
    yield from code.files
    for name in code.trees:
        for directory, below, names in os.walk(code.base / name):
            below[:] = [entry for entry in below if not _never(entry)]
            for entry in names:
                source = Path(directory, entry)
                place = source.relative_to(code.base).as_posix()
                if not _never(entry) and not any(fnmatch.fnmatch(place, pattern) for pattern in code.exclude):
                    yield place, source


def _never(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in NEVER)


def _make_image(tree: Path, out: Path, scratch: Path) -> None:
    for directory in (tree, *(path for path in tree.rglob("*") if path.is_dir())):
        directory.chmod(0o755)
    everything = list(tree.rglob("*"))
    blocks = sum(path.stat().st_size // BLOCK + 3 for path in everything)
    # Room for the file system's own tables: 256 bytes an inode, and half a mebibyte for what does not grow.
    inodes = len(everything) + 64
    size = blocks + inodes // 4 + 512
    argv = ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-N", str(inodes), "-m", "0", "-L", "code"]
    argv += ["-O", "^has_journal,^metadata_csum,^resize_inode", "-E", "root_owner=0:0"]
    run_tool([*argv, "-d", str(tree), str(scratch), str(size)], doing=f"making {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A guest that still has the old one open keeps it.
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            shutil.copyfile(scratch, beside)
            os.truncate(beside, max(SMALLEST, 1 << (scratch.stat().st_size - 1).bit_length()))
            beside.rename(out)
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
    except OSError as error:
        raise ImageBuildFailed(f"{out}: {error}") from error
