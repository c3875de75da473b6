"""A pytest plugin for the guest: runs the tests that the host names, one by one, and reports on each.

Loaded with `-p remote_pytest` by a pytest whose standard input and output are the host's. Collection is as usual;
then it takes requests, one JSON object a line, and answers with events, likewise:

    host:  {"run": NODEID, "next": NODEID or null}
    guest: {"event": "collected", "count": N}                      once, first
           {"event": "report", "when": …, "outcome": …, …}         for each phase of the test
           {"event": "done", "nodeid": NODEID}                     or "unknown", with the collection's errors

End of file on standard input ends the session, fixtures torn down. The reports hold text only, so that the pytest
here and the one on the host need not be of the same version.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KEEP_COUNTS = "gcov_keep_counts"
"""A function, void (void), by which a library that was compiled for gcov writes its counts down, and begins anew."""

# Taken before pytest captures anything. What it prints itself, and what slips past the capture, goes to stderr.
_requests = os.fdopen(os.dup(0), "rb")
_events = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
_nothing = os.open("/dev/null", os.O_RDONLY)
os.dup2(_nothing, 0)
os.close(_nothing)

_errors: list[str] = []


def _tell(event: str, **fields: Any) -> None:
    _events.write(json.dumps({"event": event, **fields}).encode() + b"\n")
    _events.flush()


def pytest_configure(config: pytest.Config) -> None:
    # Registered by the host's plugin there; the two have to agree on what is a marker.
    needs = ("needs_root", "needs_kvm", "needs_iommufd", "needs_hugepages(count)")
    for marker in ("guest", "guest_timeout(seconds)", "guest_needs(devices, words, memory_mb)", *needs):
        config.addinivalue_line("markers", f"{marker}: for the host")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _errors.append(f"{report.nodeid}: {report.longreprtext}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    longrepr: Any = None
    if isinstance(report.longrepr, tuple):
        longrepr = [str(part) for part in report.longrepr]
    elif report.longrepr is not None:
        longrepr = report.longreprtext
    _tell(
        "report",
        nodeid=report.nodeid,
        when=report.when,
        outcome=report.outcome,
        duration=report.duration,
        longrepr=longrepr,
        crash=None if crash is None else [str(crash.path), crash.lineno, str(crash.message)],
        sections=[[str(name), str(text)] for name, text in report.sections],
        wasxfail=getattr(report, "wasxfail", None),
        properties=[[str(name), str(value)] for name, value in report.user_properties],
    )


def _save_coverage() -> None:
    """What has been measured so far is where the host can fetch it, whatever the next test does to this process."""
    if "coverage" in sys.modules:
        import coverage

        measuring = coverage.Coverage.current()
        if measuring is not None:
            measuring.save()
        for keep in _keepers():
            keep()


def _keepers() -> list[Callable[[], object]]:
    """Of each library here that is compiled for gcov and has one, the function that writes its counts down."""
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    found = []
    for path in sorted(paths):
        with contextlib.suppress(OSError, AttributeError):
            found.append(getattr(ctypes.CDLL(path), KEEP_COUNTS))
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    items = {item.nodeid: item for item in session.items}
    _tell("collected", count=len(items), errors=_errors)
    for line in _requests:
        request = json.loads(line)
        item = items.get(request["run"])
        if item is None:
            _tell("unknown", nodeid=request["run"], errors=_errors)
            continue
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(request["next"]))
        _save_coverage()
        _tell("done", nodeid=item.nodeid)
    return True
