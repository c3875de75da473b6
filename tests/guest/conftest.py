"""Collects what the VFIO selftest cases came to, on the host, into build/vfio/cases.json.

A row for each case and mode: case, mode, kernel, outcome ("passed", "failed" or "skipped") and reason. Rows that are
in the file and were not run anew stay, so that runs on several kernels add up to one table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_rows: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vfio_case(name): a case of the VFIO selftests; {parameter} is filled in")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if "vfio_case" not in properties:
        return
    row = _rows.setdefault(
        report.nodeid,
        {
            "case": str(properties["vfio_case"]),
            "mode": str(properties["vfio_mode"]),
            "kernel": str(properties["kernel"]),
            "outcome": "passed",
            "reason": "",
        },
    )
    if report.outcome != "passed" and row["outcome"] != "failed":
        row["outcome"] = report.outcome
        longrepr = report.longrepr
        crash = getattr(longrepr, "reprcrash", None)
        if isinstance(longrepr, tuple):
            row["reason"] = str(longrepr[2]).removeprefix("Skipped: ")
        else:
            row["reason"] = crash.message if crash is not None else str(longrepr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # The guest's own pytest hands its reports to the host's, which writes them down.
    if not _rows or not session.config.pluginmanager.has_plugin("qemu.pytest_plugin"):
        return
    path = session.config.rootpath / "build" / "vfio" / "cases.json"
    new = {_key(row): row for row in _rows.values()}
    rows = [row for row in _read(path) if _key(row) not in new] + list(new.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _key(row: dict[str, str]) -> tuple[str | None, ...]:
    return row.get("case"), row.get("mode"), row.get("kernel")


def _read(path: Path) -> list[dict[str, str]]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
