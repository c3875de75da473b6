"""Compiles C for the guest on the host: the host's compiler, the guest's headers and C library.

The sysroot is the guest suite's own development packages, unpacked. What is linked against it asks for no newer
symbols than the guest has, whatever the host's C library is, and uses only Python's limited API, so it loads in
every CPython from 3.11 on.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from qemu.cache import Cache, Progress, key_of
from qemu.errors import ImageBuildFailed, RecipeError, ToolMissing
from qemu.tools import run_tool

LIMITED_API = 0x030B0000

# Unpacked beside what is of use, and large: documentation, and libraries for linking Python into a program.
SUPERFLUOUS = ("usr/share", "usr/src", "usr/lib/python3*/config-*")

GLIBC_VERSION = re.compile(r"\bGLIBC_(\d+(?:\.\d+)+)\b")


def unpack_sysroot(packages: list[Path], out: Path) -> None:
    """Unpacks the packages into the directory `out`. Raises ImageBuildFailed or ToolMissing."""
    # Debian's merged /usr; older packages still have files in /lib.
    for name in ("lib", "lib64"):
        (out / "usr" / name).mkdir(parents=True)
        (out / name).symlink_to(f"usr/{name}")
    for package in packages:
        # tar follows the links above, unlike dpkg-deb -x, which would put directories in their place.
        files = run_tool(["dpkg-deb", "--fsys-tarfile", str(package)], doing=f"unpacking {package.name}")
        run_tool(
            ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(out)],
            doing=f"unpacking {package.name}",
            input_data=files,
        )
    for pattern in SUPERFLUOUS:
        for path in out.glob(pattern):
            shutil.rmtree(path)


@dataclass(frozen=True)
class Extension:
    """A C extension module and how it is compiled. `headers` are only looked at to see whether they have changed."""

    module: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    define_macros: tuple[tuple[str, str | None], ...] = ()
    compile_args: tuple[str, ...] = ()
    link_args: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Where it goes, relative to the directory that is on Python's path."""
        return Path(*self.module.split(".")).with_suffix(".abi3.so")


def cffi_extension(script: Path, name: str, scratch: Path) -> Extension:
    """The extension that the cffi builder `name` in a build script describes; its C is generated into `scratch`.

    Raises RecipeError when the script has no such builder or cannot be run, ToolMissing without cffi.
    """
    try:
        import cffi
    except ImportError:
        raise ToolMissing("the Python package cffi is needed to compile for the guest: pip install cffi") from None
    try:
        builder = runpy.run_path(str(script)).get(name)
    except Exception as error:
        raise RecipeError(f"{script}: the cffi build script fails: {type(error).__name__}: {error}") from error
    if not isinstance(builder, cffi.FFI):
        raise RecipeError(f"{script}: expected a cffi.FFI object named {name}, found {builder!r}")
    with contextlib.redirect_stdout(io.StringIO()):  # where it says what it generates
        described = builder.distutils_extension(tmpdir=str(scratch), verbose=False)
    include_dirs = tuple(Path(path) for path in described.include_dirs)
    return Extension(
        described.name,
        tuple(Path(path) for path in described.sources),
        (*(Path(path) for path in described.depends), *(path for top in include_dirs for path in top.glob("*.h"))),
        include_dirs,
        tuple((name, value) for name, value in described.define_macros),
        tuple(described.extra_compile_args),
        tuple(described.extra_link_args),
        tuple(described.libraries),
    )


def compiled(extension: Extension, sysroot: Path, cache: Cache, progress: Progress) -> Path:
    """The extension's shared object, compiled against the sysroot unless an equal one has been before.

    The sysroot is a cache entry, whose name stands for its contents. Raises ToolMissing when there is no compiler,
    ImageBuildFailed with what the compiler said.
    """
    command = compile_command(extension, sysroot)
    files = sorted({*extension.sources, *extension.headers})
    try:
        contents = [part for file in files for part in (file.name, file.read_bytes())]
    except OSError as error:
        raise RecipeError(f"a source of {extension.module} cannot be read: {error}") from None
    # The paths are left out of the key: what is compiled is the same in every checkout.
    options = [str(part) for part in command if not str(part).startswith("/")]
    compiler = run_tool([command[0], "--version"], doing="asking the compiler for its version")
    key = key_of(sysroot.name, compiler, *options, *contents)

    def build(out: Path) -> None:
        progress(f"compiling {extension.module} for the guest")
        target = out / extension.file.name
        run_tool([*command, "-o", str(target)], doing=f"compiling {extension.module} for the guest")
        check_library_version(target, sysroot)

    return cache.ensure("extension", key, build, progress) / extension.file.name


def compile_command(extension: Extension, sysroot: Path) -> list[str]:
    """The compiler's command line, but for the output file."""
    includes = sorted(sysroot.glob("usr/include/python3.*"))
    if len(includes) != 1:
        raise ImageBuildFailed(f"{sysroot}: expected the headers of one Python, found {len(includes)}")
    triplet = "x86_64-linux-gnu"
    defines = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
    return [
        *shlex.split(os.environ.get("CC", "gcc")),
        f"--sysroot={sysroot}",
        # A compiler that knows nothing of Debian's per-architecture directories needs to be told.
        "-isystem",
        f"{sysroot}/usr/include/{triplet}",
        "-B",
        f"{sysroot}/usr/lib/{triplet}",
        "-L",
        f"{sysroot}/usr/lib/{triplet}",
        "-isystem",
        str(includes[0]),
        "-shared",
        "-fPIC",
        "-O2",
        "-g",
        *defines,
        f"-DPy_LIMITED_API={LIMITED_API:#010x}",
        *extension.compile_args,
        *(part for directory in extension.include_dirs for part in ("-I", str(directory))),
        *(str(source) for source in extension.sources),
        *(f"-l{library}" for library in extension.libraries),
        *extension.link_args,
    ]


def library_versions(file: Path) -> list[tuple[int, ...]]:
    """The versions of the GNU C library that a shared object asks for or, being that library, has; lowest first."""
    text = run_tool(["readelf", "--version-info", "--wide", str(file)], doing=f"reading {file}").decode()
    return sorted({tuple(int(part) for part in version.split(".")) for version in GLIBC_VERSION.findall(text)})


def check_library_version(file: Path, sysroot: Path) -> None:
    """Raises ImageBuildFailed when `file` asks for a newer C library than the sysroot's."""
    has = library_versions(sysroot / "usr/lib/x86_64-linux-gnu/libc.so.6")[-1]
    asks = max(library_versions(file), default=has)
    if asks > has:
        versions = [".".join(str(part) for part in version) for version in (asks, has)]
        raise ImageBuildFailed(
            f"{file.name} asks for version {versions[0]} of the C library and the guest has {versions[1]}; "
            f"the compiler did not keep to --sysroot={sysroot} ({sys.platform})"
        )
