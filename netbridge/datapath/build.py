"""Builds the C core, `netbridge.datapath._core`, with cffi in API mode.

The module uses CPython's limited API, so one build serves every CPython from 3.11 on. Run this file to build it in
place; packaging goes through setup.py, and the harness compiles the same `ffibuilder` against a guest's C library.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CORE = HERE / "core"

# -fno-tree-slp-vectorize: two counters side by side, put into a vector to be stored at once, cost more than they save.
# Warnings are errors in `make lint` and in the core's tests, not for whoever installs it with a newer compiler.
COMPILE_ARGS = ["-std=gnu11", "-O3", "-fno-tree-slp-vectorize", "-Wall", "-Wextra", "-fno-strict-aliasing"]


def builder(directory: str) -> FFI:
    """The module's builder, with the core's sources in this directory."""
    ffi = FFI()
    ffi.cdef((CORE / "api.h").read_text(encoding="utf-8"))
    ffi.set_source(
        "netbridge.datapath._core",
        '#include "core.h"',
        sources=[f"{directory}/{path.name}" for path in sorted(CORE.glob("*.c"))],
        depends=[f"{directory}/{path.name}" for path in sorted(CORE.glob("*.h"))],
        include_dirs=[directory],
        extra_compile_args=COMPILE_ARGS,
        py_limited_api=True,
    )
    return ffi


# For setuptools and the harness. setuptools takes no absolute paths: relative ones are, to where it runs.
ffibuilder = builder(os.path.relpath(CORE))


def build_in_place() -> Path:
    """Compiles the module beside this file, for whoever works on the core. Returns the module's path."""
    with tempfile.TemporaryDirectory() as directory:
        built = Path(builder(str(CORE)).compile(tmpdir=directory))
        # Renamed into place: writing over a module that a running process has mapped would crash that process.
        beside = shutil.copy(built, HERE / f".{built.name}.new")
        return Path(beside).replace(HERE / built.name)


def check() -> int:
    """Compiles every source with all warnings as errors, and keeps nothing. Returns the compiler's verdict."""
    compiler = os.environ.get("CC", "cc").split()
    sources = [str(path) for path in sorted(CORE.glob("*.c"))]
    return subprocess.run([*compiler, *COMPILE_ARGS, "-Werror", "-fsyntax-only", *sources], check=False).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the C core in place.")
    parser.add_argument("--check", action="store_true", help="only compile it with warnings as errors; keep nothing")
    if parser.parse_args().check:
        sys.exit(check())
    print(build_in_place())
