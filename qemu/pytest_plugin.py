"""Guests for pytest: fixtures that boot one, and tests that run inside one while the host reports on them.

Loaded with `-p qemu.pytest_plugin`. In the configuration (paths are relative to the root directory):

    guest_recipe   the image's recipe
    guest_code     the specification of the code disk
    guest_tests    directories whose tests run in the guest
    guest_root     where the guest has its copy of the root directory (/code)
    guest_args     more arguments for QEMU, for the guest that tests share, such as further devices
    guest_words    more words for that guest's kernel command line
    guest_patience how many times as long as usual a guest may take to boot, and a test in it

Tests below `guest_tests` are collected here as any other, so their modules have to import here. They are set up,
run and torn down in the guest, in the fixtures of the guest's own pytest; markers such as skipif are judged there.
One during which the guest's kernel complains of itself, with an oops, a warning, or a report of its sanitizers, fails.
All of them share one guest, which comes up when the first of them asks for it, and anew when it was lost. What some of
them need of it, the marker `guest_needs` says: the guest has what all tests of this run need, so that a run without
such tests has a smaller guest.

For tests on the host there is a ladder of fixtures, each of which rests on the one before: `guest_image`, `code_disk`,
`guest` (a fresh one for each test, restored from a snapshot, with what the marker `guest_with` pins), `claimed` (its
NIC bound to vfio-pci). After each test what has to be true of a guest (truth.py) is looked at, except what the marker
`guest_allows` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qemu import accel, capabilities, target
from qemu.dimensions import Dimensions, UnknownDimension
from qemu.session import EXIT_INFRASTRUCTURE, SESSION, Booted, Session, exit_code
from qemu.truth import KINDS

pytest_plugins = ["qemu.pytest_fail", "qemu.pytest_fixtures", "qemu.pytest_inside", "qemu.pytest_summary"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "tests on a guest")
    group.addoption(
        "--accel",
        choices=accel.NAMES,
        default=None,
        help=f"accelerator of the guests (also {accel.VARIABLE}); auto: kvm if guests run under it, else tcg",
    )
    group.addoption(
        "--require-kvm", action="store_true", help="fail instead of falling back when guests do not run under KVM"
    )
    group.addoption(
        "--shell-on-fail", action="store_true", help="when a test fails: a shell in its guest as it is at that moment"
    )
    group.addoption(
        "--guest-coverage", type=Path, default=None, metavar="DIR", help="where data on what ran in the guest go"
    )
    group.addoption(
        "--artefacts", type=Path, default=None, metavar="DIR", help="where consoles, captures and logs go (build/tests)"
    )
    target.add_options(group)
    parser.addini("guest_recipe", "recipe of the guest's image", default="images/trixie.toml")
    parser.addini("guest_code", "specification of the code disk", default="images/code.toml")
    parser.addini("guest_tests", "directories of tests that run in the guest", type="linelist", default=["tests/guest"])
    parser.addini("guest_args", "more arguments for the QEMU of the shared guest", type="args", default=[])
    parser.addini("guest_words", "more words for its kernel's command line", type="args", default=[])
    parser.addini("guest_patience", "how many times as long as usual things may take in a guest", default="1")
    parser.addini("guest_root", "the guest's copy of the root directory", default="/code")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("shell_on_fail") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--shell-on-fail: parallel runs (-n) have no terminal to give")
    for line in (
        "guest: runs inside the guest (set on all tests below guest_tests)",
        "guest_timeout(seconds): how long a test may take in the guest (60)",
        "guest_needs(devices, words, memory_mb): what the shared guest is to have for a test: arguments for QEMU, a "
        "device in each, words for the kernel's command line, and so much memory",
        "guest_with(machine, kernel, ring, ...): what the fresh guest of a test is to be like: see dimensions.py",
        f"guest_allows(kinds): what may be wrong with the guest after the test, of {', '.join(KINDS)}",
        *capabilities.MARKERS,
    ):
        config.addinivalue_line("markers", line)
    config.stash[SESSION] = Session(config)


def pytest_report_header(config: pytest.Config) -> str:
    session = config.stash[SESSION]
    if session.target is not None:
        return f"tests run on {session.target.name}, not in guests"
    try:
        return f"guest accelerator: {accel.expectation(session.accel)}"
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    ours = session.config.stash[SESSION]
    ours.close()
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        booted, trouble = [list(guest) for guest in ours.booted], [list(entry) for entry in ours.infrastructure]
        output["guests"] = [booted, trouble, dict(ours.preparing), ours.panics]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        failed = [report.nodeid for kind in ("failed", "error") for report in reporter.stats.get(kind, [])]
        session.exitstatus = exit_code(int(session.exitstatus), failed, ours.infrastructure)
        ours.only_infrastructure = session.exitstatus == EXIT_INFRASTRUCTURE


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A parallel run: what the worker has to tell, for the summary."""
    booted, infrastructure, preparing, panics = getattr(node, "workeroutput", {}).get("guests", ([], [], {}, []))
    session = node.config.stash[SESSION]
    session.booted += [Booted(*facts) for facts in booted]
    session.panics += panics
    for what, seconds in preparing.items():
        session.preparing[what] += seconds
    session.infrastructure += [(nodeid, reason) for nodeid, reason in infrastructure]


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Markers that say what there is not are told before anything is booted for them."""
    for item in items:
        try:
            for marker in item.iter_markers("guest_with"):
                Dimensions.pinned([marker.kwargs]).recipe(config.stash[SESSION].recipe())
        except UnknownDimension as error:
            raise pytest.UsageError(f"{item.nodeid}: guest_with: {error}") from None
        for marker in item.iter_markers("guest_allows"):
            for kind in marker.args:
                if kind not in KINDS:
                    raise pytest.UsageError(
                        f"{item.nodeid}: guest_allows: there is no {kind!r}; there are: {', '.join(KINDS)}"
                    )
