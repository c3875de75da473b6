"""What is done when a test fails: trouble of the harness is told from what is tested, and a shell is given if one was
asked for.

Part of pytest_plugin.py.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

from qemu import shell
from qemu.errors import HarnessError
from qemu.guest import Guest
from qemu.session import SESSION


def shell_on_fail(config: pytest.Config, nodeid: str, guest: Guest | None) -> None:
    """If it was asked for: gives the terminal to a shell in the guest, and goes on when that ends."""
    if not config.getoption("shell_on_fail") or guest is None or guest.lost is not None:
        return
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    try:
        print(f"\n{nodeid} has failed; this is its guest as it is now. Ctrl-] or exit goes on.", file=sys.stderr)
        shell.interact(guest)
    except HarnessError as error:
        print(error, file=sys.stderr)
    finally:
        if capture is not None:
            capture.resume_global_capture()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, HarnessError):
        text = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
        item.config.stash[SESSION].infrastructure.append((item.nodeid, text.splitlines()[0]))
    if report.when in ("setup", "call") and report.failed:
        funcargs = getattr(item, "funcargs", {})
        shell_on_fail(item.config, item.nodeid, funcargs.get("guest") or funcargs.get("shared_guest"))
    return report
