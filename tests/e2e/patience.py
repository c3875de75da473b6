"""What the tests of the harness itself wait for, and how long."""

from __future__ import annotations

import os
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLD_SECONDS = 15.0
"""Within which trouble is told, on a machine that is not busy with something else."""
BUSY = 1.5
"""The load from which on a machine counts as busy: one guest that boots makes up for less."""


def patience(seconds: float = TOLD_SECONDS) -> float:
    """So many seconds of a machine that has nothing else to do; at least four times as many of one that has."""
    load = max(*os.getloadavg()[:2], float(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return seconds if load < BUSY else seconds * max(4.0, load)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pid: int, seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {seconds} s"
        time.sleep(0.02)
