"""The harness: what a test in a guest costs, beside a cold boot for each, which is what one pays without snapshots.

Both run the same tests on the same image through the same pytest plugin: a guest of its own for each test, in which a
command is run and a file is put. `first` is the time from the start of pytest until the first test has passed, all
included; `each` what each further one takes; `suite` all five and the end of pytest.

virtme-ng, the peer one would name, does not run here: it wants 9p, or the virtiofsd that is written in Rust, and
neither Debian's cloud kernel nor Debian 12 has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qemu.errors import HarnessError
from qemu.images import DEFAULT_RECIPE, Recipe, ensure_image
from tests.bench.contest import Contest, Pair, Series, Unavailable

SUMMARY = "a guest of its own for each test: restored, against booted"
ROOT = Path(__file__).resolve().parents[2]
TESTS = 5
SUITE_SECONDS = 900.0

SUITE = """
import json, os, time
import pytest
from qemu.guest import Nic

@pytest.fixture
def of_its_own(guests, artefacts):
    with guests.boot(artefacts.name, nics=[Nic()], snapshot={snapshot}) as made:
        assert made.origin.startswith({origin!r}), made.origin
        yield made

@pytest.mark.parametrize("number", range({tests}))
def test_it(of_its_own, number):
    assert of_its_own.run(["true"]).returncode == 0
    of_its_own.put(b"x" * 100_000, "/tmp/file")

def pytest_runtest_logreport(report):
    if report.when == "teardown":
        with open({times!r}, "a") as file:
            file.write(json.dumps(time.time()) + "\\n")
"""


def contests(quick: bool) -> Iterator[Contest | Series]:
    """One series with all metrics. Raises Unavailable where no guest can be had."""
    try:
        ensure_image(Recipe.load(ROOT / DEFAULT_RECIPE))
        visit("warm")  # the snapshot is there from here on, as it is for whoever runs tests for the second time
    except HarnessError as error:
        raise Unavailable(f"no guest: {error}") from error
    ours, peer = "Net-Bridge", "cold boot"
    metrics = (("time to first test", "first"), ("each further test", "each"), (f"suite of {TESTS} tests", "suite"))
    yield Series(
        "harness",
        {ours: lambda: visit("restored"), peer: lambda: visit("booted")},
        [Pair(metric, "s", figure, ours, peer, "lower", 1.0) for metric, figure in metrics],
        commands=("python -m tests.bench harness",),
    )


def visit(kind: str) -> Mapping[str, float]:
    """Run the suite once, its guests restored or booted; seconds by figure."""
    with tempfile.TemporaryDirectory(prefix="bench-harness-") as directory:
        here = Path(directory)
        times = here / "times"
        suite = here / "test_suite.py"
        tests = 1 if kind == "warm" else TESTS
        origin = "" if kind == "warm" else kind
        suite.write_text(SUITE.format(snapshot=kind != "booted", origin=origin, tests=tests, times=str(times)))
        # The hook is a plugin's, and the tests are its neighbours.
        options = [
            "-p",
            "no:cacheprovider",
            "-p",
            "test_suite",
            f"--rootdir={ROOT}",
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        options += ["-o", f"pythonpath=. {here}", f"--artefacts={here / 'out'}"]
        if accel := os.environ.get("ACCEL"):
            options.append(f"--accel={accel}")
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *options, str(suite)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{here}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=SUITE_SECONDS,
            check=False,
        )
        ended = time.time()
        if done.returncode != 0:
            raise RuntimeError(f"the suite failed ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-500:]}")
        at = [json.loads(line) for line in times.read_text().splitlines()]
    each = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else at[0] - began
    return {"first": at[0] - began, "each": each, "suite": ended - began}
