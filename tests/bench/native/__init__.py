"""Small C programs that benches are made of, each one file in this directory, compiled when first wanted."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parents[2] / "build" / "bench" / "native"
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror")


class CompilationFailed(RuntimeError):
    """The compiler's words."""


def build(
    name: str,
    *,
    where: Path = HERE,
    sources: Sequence[Path] = (),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> Path:
    """Compiles NAME.c of the directory `where` with the other `sources` and returns the program. Raises
    CompilationFailed."""
    files = [where / f"{name}.c", *sources]
    words = [*FLAGS, *flags, *(str(file) for file in files), *libraries]
    folders = [HERE, *(Path(word[2:]) for word in flags if word.startswith("-I"))]
    inputs = files + sorted(header for folder in folders for header in folder.glob("*.h"))
    key = hashlib.sha256("\0".join(words).encode() + b"".join(file.read_bytes() for file in inputs)).hexdigest()[:12]
    program = OUT / f"{name}-{key}"
    if not program.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        scratch = program.with_name(f"{program.name}.part")
        done = subprocess.run(["gcc", *words, "-o", scratch], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilationFailed(f"{name}.c does not compile:\n{done.stderr}")
        scratch.rename(program)
    return program
