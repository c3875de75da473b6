"""Fuzzes the C core with everything a device can write: `python -m tests.unit.core.fuzz [--seconds 60] [--keep]`.

libFuzzer, which comes with clang, mutates inputs of device_fuzz.c and keeps what reaches new code. It begins with the
corpus that is kept beside this file, and works in build/fuzz. An input that fails is left there, and the program's
exit code is 1. `--keep` reduces what was found to a small corpus that reaches the same code, and keeps that here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.unit.core import toolchain
from tests.unit.core.toolchain import Variant

CORPUS = toolchain.TESTS / "corpus"
WORK = toolchain.ROOT / "build" / "fuzz"
LONGEST_INPUT = 512
# Under ASan's own allocator a world is a few megabytes.
LIMITS = ("-timeout=20", "-len_control=0", "-rss_limit_mb=1024", f"-max_len={LONGEST_INPUT}")

FUZZ = Variant(
    "fuzz",
    ("-O1", "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"),
    (("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
    ("-fsanitize=fuzzer",),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long to look for more (default: %(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help=f"keep a small corpus in {CORPUS.relative_to(toolchain.ROOT)}"
    )
    options = parser.parse_args(arguments)
    os.environ["CC"] = "clang"
    try:
        program = toolchain.build(FUZZ, "device-fuzz", ("device_fuzz",))
    except toolchain.CompilationFailed as error:
        print(error, file=sys.stderr)
        return 1
    found = WORK / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    failing = f"-artifact_prefix={WORK}/"
    code = _run(program, f"-max_total_time={options.seconds}", "-print_final_stats=1", failing, *LIMITS, found, CORPUS)
    if code:
        print(f"fuzz: failed; the input is in {WORK}: run {program} on it", file=sys.stderr)
        return 1
    if options.keep:
        small = WORK / "small"
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir()
        code = _run(program, "-set_cover_merge=1", *LIMITS, small, CORPUS, found)
        if code == 0:
            shutil.rmtree(CORPUS)
            shutil.copytree(small, CORPUS)
    return 1 if code else 0


def _run(program: Path, *words: str | Path) -> int:
    return subprocess.run([program, *words], env={**os.environ, **dict(FUZZ.environment)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
