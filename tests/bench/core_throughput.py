"""Builds and runs the core's throughput program: `python -m tests.bench.core_throughput [FRAMES [LENGTH]]`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.unit.core import toolchain


def main(arguments: list[str]) -> int:
    try:
        program = toolchain.build(toolchain.PLAIN, "core_throughput", ("core_throughput",), Path(__file__).parent)
    except toolchain.CompilationFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{program}", flush=True)
    return subprocess.run([program, *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
