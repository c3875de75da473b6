"""Runs a selection of tests again and again and tells which of them do not always come to the same.

    python -m qemu.flakes 20 tests/e2e/test_echo.py -n 2

Everything behind the number goes to pytest. A round that was interrupted does not count. The exit code is 0 when every
test came to the same in all rounds, 1 when one did not, 2 when there was nothing to run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

OUT = Path("build/flakes")


def outcomes(junit: Path) -> Iterable[tuple[str, str]]:
    """Each test of a junit file and what it came to: passed, failed, error or skipped."""
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = {"failure": "failed"}.get(min(kinds, default=""), min(kinds, default="passed"))
        yield f"{case.get('classname')}::{case.get('name')}", outcome


def flaky(rounds: Iterable[Iterable[tuple[str, str]]]) -> dict[str, Counter[str]]:
    """The tests that did not come to the same each time, or did not pass, with how often they came to what."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for cases in rounds:
        for name, outcome in cases:
            seen[name][outcome] += 1
    return {name: counts for name, counts in sorted(seen.items()) if set(counts) - {"passed", "skipped"}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make flakes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rounds", type=int, help="how many times")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments for pytest")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"the number of rounds is at least 1, not {options.rounds}")
    OUT.mkdir(parents=True, exist_ok=True)
    done: list[list[tuple[str, str]]] = []
    try:
        for number in range(1, options.rounds + 1):
            junit = OUT / f"round-{number}.xml"
            junit.unlink(missing_ok=True)
            began = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}"]
            command += [f"--artefacts={OUT / f'round-{number}'}", *options.pytest]
            with (OUT / f"round-{number}.log").open("wb") as log:
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            if code not in (0, 1) or not junit.exists():
                print(f"flakes: pytest ended with {code}; see {log.name}", file=sys.stderr)
                return 2
            done.append(list(outcomes(junit)))
            bad = sum(outcome in ("failed", "error") for _, outcome in done[-1])
            seconds = time.monotonic() - began
            print(
                f"round {number} of {options.rounds}: {len(done[-1])} cases, {bad} failed, {seconds:.0f} s", flush=True
            )
    except KeyboardInterrupt:
        print(f"\nflakes: interrupted after {len(done)} rounds", file=sys.stderr)
    if not any(done):
        print("flakes: no test was run", file=sys.stderr)
        return 2
    found = flaky(done)
    runs = sum(len(cases) for cases in done)
    bad = sum(counts["failed"] + counts["error"] for counts in found.values())
    if options.json:
        result = {
            "rounds": len(done),
            "runs": runs,
            "failed": bad,
            "flaky": {name: dict(n) for name, n in found.items()},
        }
        print(json.dumps(result, indent=2))
    else:
        for name, counts in found.items():
            print(f"  {name}: " + ", ".join(f"{count} × {outcome}" for outcome, count in counts.most_common()))
        print(f"{bad} of {runs} runs failed in {len(done)} rounds; flake rate {100 * bad / runs:.2f} %")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
