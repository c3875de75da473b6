"""What machine a bench ran on, and in which state that was at the moment.

Where a host places the two processors of a virtual machine decides what a cache line costs between them: about 60 ns
when they are near, about 280 ns when they are not, and a data path between two threads is as fast as that. The host may
move them at any time, so this is measured before and after each round and reported beside the figures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tests.bench import native


@functools.cache
def _processors() -> tuple[str, str]:
    """Two that this process may run on; twice the same where there is one."""
    usable = sorted(os.sched_getaffinity(0))
    return str(usable[0]), str(usable[1 % len(usable)])


def cache_line_ns() -> float:
    """One-way time of a cache line between two processors, nanoseconds; NaN on a machine that has only one."""
    first, second = _processors()
    if first == second:
        return float("nan")
    program = native.build("cache_line", libraries=("-pthread",))
    return float(subprocess.run([program, first, second], check=True, capture_output=True, text=True).stdout)


def claim_processors() -> None:
    """Where Linux shares out processor time by session first (autogroups), a process's own priority counts only within
    its session: so this run's whole session goes before the others. Only root may; elsewhere nothing changes."""
    group = Path("/proc/self/autogroup")
    if os.geteuid() == 0 and group.exists():
        with contextlib.suppress(OSError):
            group.write_text("-20")


def describe() -> dict[str, Any]:
    """Plain data for the head of a report. Names no host."""
    return {
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cache_line_ns": round(cache_line_ns(), 1),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
