"""Runs a selection of tests on several kernels, one after the other, and tells what came of each.

    python -m qemu.kernels trixie bookworm trixie-backports -- tests/e2e -m "not thorough"

A kernel is named as its recipe in images/; `name:8` gives its guests eight times as long for everything, which a kernel
that watches itself needs. Everything behind `--` goes to pytest. The exit code is pytest's worst: 0 only when all
kernels passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qemu.errors import HarnessError
from qemu.flakes import outcomes
from qemu.images import Recipe

IMAGES = Path("images")
OUT = Path("build/tests")


def run(kernel: str, patience: str, words: Sequence[str]) -> tuple[int, Counter[str]]:
    """One kernel: pytest's exit code, and how many cases came to what."""
    out = OUT / kernel
    out.mkdir(parents=True, exist_ok=True)
    junit = out / "junit.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-o", f"guest_recipe={IMAGES / kernel}.toml"]
    command += ["-o", f"guest_patience={patience}", f"--artefacts={out}", f"--junitxml={junit}", *words]
    code = subprocess.run(command, check=False).returncode
    return code, Counter(outcome for _, outcome in outcomes(junit)) if junit.exists() else Counter()


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    mine, theirs = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        prog="python -m qemu.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the outcomes as JSON on the last line, too")
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="a recipe's name, and perhaps :PATIENCE")
    options = parser.parse_args(mine)
    named = [(name, patience or "1") for name, _, patience in (word.partition(":") for word in options.kernels)]
    try:
        for name, _ in named:
            Recipe.load(IMAGES / f"{name}.toml")
    except HarnessError as error:
        parser.error(str(error))
    told, lines, worst = {}, [], 0
    for name, patience in named:
        print(f"=== kernel {name}", flush=True)
        began = time.monotonic()
        code, counts = run(name, patience, theirs)
        seconds = round(time.monotonic() - began)
        worst = max(worst, code)
        told[name] = {"exit": code, "seconds": seconds, **counts}
        what = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if counts[kind])
        lines.append(
            f"  {name:<18} {'ok' if code == 0 else f'exit {code}':<8} {seconds:>5} s  {what or 'nothing was run'}"
        )
        if code == 2:
            print("interrupted", file=sys.stderr)
            break
    print("\n".join(("kernels:", *lines)), flush=True)
    if options.json:
        print(json.dumps(told))
    return worst


if __name__ == "__main__":
    sys.exit(main())
