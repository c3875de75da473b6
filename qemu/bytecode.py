"""Compiles Python to the guest's bytecode on the host, by running the guest's own interpreter out of the sysroot.

On a read-only disk Python cannot keep what it has compiled, and an emulated processor takes about a second to compile
this project: so each program started in a guest would lose that second.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from qemu.cache import Progress

# Reads lines of two fields: the source, and what it is called in the guest. A file that does not compile is left to the
# guest, where whoever imports it gets the usual error.
SCRIPT = """
import os, py_compile, sys
for line in sys.stdin:
    source, name = line.rstrip("\\n").split("\\t")
    directory, file = os.path.split(source)
    target = os.path.join(directory, "__pycache__", f"{file[:-3]}.{sys.implementation.cache_tag}.pyc")
    try:
        # Unchecked: nobody edits the source in the guest, and looking takes time.
        py_compile.compile(source, target, name, True, -1, py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except py_compile.PyCompileError:
        pass
"""


def interpreter(sysroot: Path) -> list[str] | None:
    """The command that runs the sysroot's Python on this host; None when the sysroot has none."""
    loader = sysroot / "usr/lib64/ld-linux-x86-64.so.2"
    found = sorted(sysroot.glob("usr/bin/python3.[0-9]*[0-9]"))
    if not loader.exists() or not found:
        return None
    # Isolated, so that neither this host's Python nor its environment has a say.
    return [str(loader), "--library-path", str(sysroot / "usr/lib/x86_64-linux-gnu"), str(found[-1]), "-I", "-S"]


def compile_python(sources: Iterable[tuple[Path, str]], sysroot: Path, progress: Progress) -> None:
    """Puts each source's bytecode where the guest's Python looks for it: into __pycache__ beside the source.

    With each source goes the path that it will have in the guest, for tracebacks. Where the guest's interpreter does
    not run on this host there is no bytecode, and `progress` is told.
    """
    command = interpreter(sysroot)
    if command is None:
        progress("no bytecode is made for the guest: the recipe's sysroot has no Python (such as python3.13-minimal)")
        return
    lines = "".join(f"{source}\t{name}\n" for source, name in sources)
    done = subprocess.run(
        [*command, "-c", SCRIPT],
        input=os.fsencode(lines),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing said"]
        progress(f"no bytecode is made for the guest: its Python does not run here ({done.returncode}: {said[-1]})")
