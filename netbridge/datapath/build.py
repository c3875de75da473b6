"""Builds the C core, `netbridge.datapath._core`, with cffi in API mode.

The module uses CPython's limited API, so one build serves every CPython from 3.11 on. Run this file to build it in
place; packaging goes through setup.py, and the harness compiles the same `ffibuilder` against a guest's C library.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CORE = HERE / "core"

# Warnings are errors for whoever works on the core (`make lint` and its tests), not for whoever installs it with a newer compiler.
COMPILE_ARGS = ["-std=gnu11", "-O3", "-Wall", "-Wextra", "-fno-strict-aliasing"]

ffibuilder = FFI()
ffibuilder.cdef((CORE / "api.h").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "netbridge.datapath._core",
    '#include "core.h"',
    sources=[str(path) for path in sorted(CORE.glob("*.c"))],
    depends=[str(path) for path in sorted(CORE.glob("*.h"))],
    include_dirs=[str(CORE)],
    extra_compile_args=COMPILE_ARGS,
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent.parent), verbose=True)
