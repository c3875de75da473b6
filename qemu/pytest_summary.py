"""What a run says at its end: trouble of the harness, the guests there were, and which cases were not run and why.

Part of pytest_plugin.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from qemu.session import EXIT_INFRASTRUCTURE, SESSION, Booted


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.infrastructure:
        only = f" (nothing else failed: exit code {EXIT_INFRASTRUCTURE})"
        more = only if session.only_infrastructure else ""
        terminalreporter.section(f"trouble with the harness, not with what is tested{more}")
        for nodeid, reason in session.infrastructure:
            terminalreporter.write_line(f"{nodeid}: {reason}")
    if session.booted:
        terminalreporter.write_line(f"guests: {summary(session.booted)}; artefacts in {session.artefacts}")
        for panic in session.panics:
            terminalreporter.write_line(f"booted once more: a guest that had not come up: {panic}")
        spent: defaultdict[str, float] = defaultdict(float)
        for reports in terminalreporter.stats.values():
            for report in reports:
                if isinstance(report, pytest.TestReport):
                    spent[str(report.when)] += report.duration
        workers = config.getoption("numprocesses", None)
        among = f"; added up over {workers} workers" if workers else ""
        terminalreporter.write_line(f"time: {phases(spent, session.preparing, session.booted)}{among}")
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        longrepr = report.longrepr
        reasons[str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")] += 1
    deselected = len(terminalreporter.stats.get("deselected", []))
    if deselected:
        reasons[f"deselected ({shown(config)})"] += deselected
    if reasons:
        terminalreporter.write_line(
            f"not run: {reasons.total()} cases: "
            + "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        )


def shown(config: pytest.Config) -> str:
    """The options by which tests were left out, as they were given."""
    given = {"-m": config.getoption("markexpr", ""), "-k": config.getoption("keyword", "")}
    return ", ".join(f"{option} {word!r}" for option, word in given.items() if word) or "--deselect"


def summary(booted: Sequence[Booted]) -> str:
    """One line on all guests of a run."""
    restored = [guest.seconds for guest in booted if guest.origin.startswith("restored")]
    cold = [guest.seconds for guest in booted if not guest.origin.startswith("restored")]
    parts = [
        f"{len(times)} {how} in {min(times):.1f}-{max(times):.1f} s"
        for how, times in (("booted", cold), ("restored", restored))
        if times
    ]
    accels = dict.fromkeys(guest.accel for guest in booted)
    return f"{', '.join(parts)}, under {'; '.join(accels)}"


def phases(spent: Mapping[str, float], preparing: Mapping[str, float], booted: Sequence[Booted]) -> str:
    """One line on where a run's time went: `spent` by what pytest calls setup, call and teardown, in seconds."""
    parts = {**preparing, "guests coming up": sum(guest.seconds for guest in booted)}
    within = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in parts.items() if seconds >= 0.05)
    setup, call, teardown = (spent.get(name, 0.0) for name in ("setup", "call", "teardown"))
    whole = f"setting up {setup:.1f} s, tests {call:.1f} s, tearing down {teardown:.1f} s"
    return f"{whole}; within these {within}" if within else whole
