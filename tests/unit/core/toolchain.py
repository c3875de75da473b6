"""Compiles the C core together with its C tests, once for each state of the sources, and knows the names of the cases.

Results are kept under build/tests/core, in a directory named by what went in: who runs the tests again does not compile
again. Several test processes may ask at the same time; one compiles, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[2]
CORE = ROOT / "netbridge" / "datapath" / "core"
BUILD = ROOT / "build" / "tests" / "core"

FLAGS = ("-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
# jitter.c stands in front of these.
LINK_FLAGS = ("-Wl,--wrap=epoll_wait,--wrap=poll,--wrap=eventfd_write",)

# Not compiled by themselves: a file in the tests' directory includes them, to see their inside.
INCLUDED_ELSEWHERE = {"pump.c", "receive.c", "transmit.c", "complete.c", "wake.c", "client.c"}
# What every test program needs besides its cases.
SUPPORT = (
    "check",
    "fake_device",
    "fake_ring_packed",
    "fake_ring_split",
    "jitter",
    "traffic",
    "white_box_client",
    "white_box_pump",
    "world",
)

_CASE = re.compile(r"^TEST\((\w+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """A way to compile: `name` for people and paths, the compiler's extra `flags`, and what the program is run and
    linked with."""

    name: str
    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    link_flags: tuple[str, ...] = ()


ADDRESS = Variant(
    "address",
    ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    (("ASAN_OPTIONS", "detect_stack_use_after_return=1"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
)
# -Wno-tsan: ThreadSanitizer does not model fences, and gcc says so. The core never relies on a fence for one thread to
# see another's data, only against lost wake-ups, so no race is hidden and none is made up; that the fences do their own
# work is what the cases about wake-ups are for.
THREAD = Variant(
    "thread",
    ("-O1", "-fsanitize=thread", "-Wno-tsan"),
    (("TSAN_OPTIONS", f"halt_on_error=1 atexit_sleep_ms=0 suppressions={TESTS / 'thread_sanitizer.supp'}"),),
)
# As it is shipped, for measuring.
PLAIN = Variant("plain", ("-O3", "-fno-tree-slp-vectorize", "-fno-strict-aliasing", "-DWITHOUT_JITTER"))


class CompilationFailed(Exception):
    """The compiler's own words."""


def case_names(*files: str) -> list[str]:
    """The cases in these files (stems), as `file-case`; in every file with cases when none is named."""
    stems = files or tuple(sorted(path.stem for path in TESTS.glob("*.c") if _CASE.search(path.read_text())))
    return [f"{stem}-{case}" for stem in stems for case in _CASE.findall((TESTS / f"{stem}.c").read_text())]


def build(variant: Variant, program: str, files: Sequence[str], directory: Path = TESTS) -> Path:
    """The program `program`: the core, what every test needs, and these files (stems) of `directory`. Raises
    CompilationFailed."""
    sources = {
        **{path: variant.flags for path in CORE.glob("*.c") if path.name not in INCLUDED_ELSEWHERE},
        **{TESTS / f"{stem}.c": variant.flags for stem in SUPPORT},
        # The cases themselves are not worth optimising; it would take longer than they run.
        **{directory / f"{stem}.c": (*variant.flags, "-O0") if directory == TESTS else variant.flags for stem in files},
    }
    inputs = {*sources, *TESTS.glob("*.h"), *CORE.glob("*.h"), *(CORE / name for name in INCLUDED_ELSEWHERE)}
    key = hashlib.sha256(repr((_compiler(), FLAGS, variant, LINK_FLAGS)).encode())
    for path in sorted(inputs):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    built = BUILD / f"{program}-{variant.name}-{key.hexdigest()[:16]}"
    with (BUILD / f"{program}-{variant.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (built / program).exists():
            for stale in BUILD.glob(f"{program}-{variant.name}-*"):
                shutil.rmtree(stale)
            built.mkdir()
            compile_program(sources, built / program, (*LINK_FLAGS, *variant.link_flags))
    return built / program


def build_tests(variant: Variant, *files: str) -> Path:
    """The test program with the cases of these files (stems). Raises CompilationFailed."""
    return build(variant, "core-tests", (*files, "check_main"))


def compile_program(sources: Mapping[Path, Sequence[str]], program: Path, link_flags: Sequence[str] = ()) -> None:
    """Compiles each source with its own flags, two at a time, and links them. Raises CompilationFailed."""

    def compile_one(source: Path) -> Path:
        target = program.with_name(f"{source.stem}.o")
        _call([*_compiler(), *FLAGS, *sources[source], f"-I{TESTS}", f"-I{CORE}", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = program.with_suffix(".new")
    all_flags = dict.fromkeys(flag for flags in sources.values() for flag in flags)
    _call([*_compiler(), *FLAGS, *all_flags, *objects, *link_flags, "-o", unfinished])
    unfinished.rename(program)


def run(
    variant: Variant, command: Sequence[str | Path], timeout: float, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program of this variant, with `more` in its environment. Raises subprocess.TimeoutExpired."""
    environment = {**os.environ, **dict(variant.environment), **more}
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def _compiler() -> list[str]:
    return os.environ.get("CC", "cc").split()


def _call(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CompilationFailed(f"{' '.join(map(str, command))}\n{done.stdout}")
