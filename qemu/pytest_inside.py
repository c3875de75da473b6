"""Tests below `guest_tests`: collected here as any other, run in the guest that they share, reported one by one.

Part of pytest_plugin.py.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from qemu.capabilities import lacking
from qemu.errors import HarnessError
from qemu.pytest_fail import shell_on_fail
from qemu.remote import Report
from qemu.session import SESSION
from qemu.truth import STALL

TEST_SECONDS = 60.0


class RemoteFailure:
    """A failure in the guest, the way pytest's terminal and junit reporters want a failure."""

    class Crash:
        def __init__(self, path: str, lineno: int, message: str):
            self.path = path
            self.lineno = lineno
            self.message = message

    def __init__(self, text: str, crash: tuple[str, int, str] | None):
        self.text = text
        self.reprcrash = self.Crash(*crash) if crash is not None else None

    def toterminal(self, terminal: Any) -> None:
        for line in self.text.splitlines():
            terminal.line(line)

    def __str__(self) -> str:
        return self.text


def _runs_in_guest(item: pytest.Item) -> bool:
    roots = [item.config.rootpath / str(root) for root in item.config.getini("guest_tests")]
    return any(root in item.path.parents for root in roots)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _runs_in_guest(item):
            item.add_marker("guest")


def pytest_collection_finish(session: pytest.Session) -> None:
    needs = session.config.stash[SESSION].needs
    for item in session.items:
        for marker in item.iter_markers("guest_needs"):
            needs.add(**marker.kwargs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not _runs_in_guest(item):
        return None
    session = item.config.stash[SESSION]
    following = nextitem.nodeid if nextitem is not None and _runs_in_guest(nextitem) else None
    marker = item.get_closest_marker("guest_timeout")
    timeout = session.patience * (float(marker.args[0]) if marker is not None else TEST_SECONDS)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    began = time.time()
    try:
        remote = session.remote([other for other in item.session.items if _runs_in_guest(other)])
        reason = lacking(item, remote.guest)
        trouble_before = len(remote.guest.kernel_trouble())
        reports = [_skipped(item, reason)] if reason else remote.run(item.nodeid, following, timeout)
        trouble = remote.guest.kernel_trouble()[trouble_before:]
    except HarnessError as error:
        session.infrastructure.append((item.nodeid, str(error).splitlines()[0]))
        text = f"{type(error).__name__}: {error}"
        reports = [Report(item.nodeid, "setup", "failed", longrepr=text, crash=("", 0, text.splitlines()[0]))]
        trouble = []
    _blame(reports, trouble)
    if any(report.outcome == "failed" for report in reports):
        shell_on_fail(item.config, item.nodeid, session.shared)
    for report in reports:
        if trouble:
            report.sections.append(("trouble on the guest's console", "\n".join(trouble)))
        item.ihook.pytest_runtest_logreport(report=_replay(item, report, began))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _skipped(item: pytest.Item, reason: str) -> Report:
    path, line, _ = item.location
    return Report(item.nodeid, "setup", "skipped", longrepr=(path, str((line or 0) + 1), f"Skipped: {reason}"))


def _blame(reports: list[Report], trouble: list[str]) -> None:
    """Fail the test for what the kernel complained of while it ran, unless it has failed anyway."""
    serious = next((line for line in trouble if not STALL.search(line)), None)
    if serious is not None and reports and all(report.outcome != "failed" for report in reports):
        text = f"the guest's kernel: {serious}"
        reports[-1].outcome, reports[-1].longrepr, reports[-1].crash = "failed", text, ("", 0, text)


def _replay(item: pytest.Item, report: Report, began: float) -> pytest.TestReport:
    longrepr: Any = report.longrepr
    if isinstance(longrepr, tuple):
        path = longrepr[0].removeprefix(str(item.config.getini("guest_root"))).lstrip("/")
        longrepr = (path, int(longrepr[1]), longrepr[2])
    elif longrepr is not None:
        longrepr = RemoteFailure(longrepr, report.crash)
    replayed = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=report.outcome,  # type: ignore[arg-type]
        longrepr=longrepr,
        when=report.when,  # type: ignore[arg-type]
        sections=report.sections,
        duration=report.duration,
        start=began,
        stop=began + report.duration,
        user_properties=[*report.properties],
    )
    if report.wasxfail is not None:
        replayed.wasxfail = report.wasxfail
    return replayed
