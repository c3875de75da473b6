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

import re
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu import accel, capabilities, shell, target
from qemu.agent import CommandFailed
from qemu.dimensions import Dimensions
from qemu.errors import HarnessError, NotOnMetal
from qemu.guest import Guest
from qemu.images import Image
from qemu.inside import Inside
from qemu.remote import Report
from qemu.session import EXIT_INFRASTRUCTURE, Booted, Session, exit_code, summary
from qemu.truth import KINDS, STALL, Truth

if TYPE_CHECKING:
    from qemu.wire import Wire

TEST_SECONDS = 60.0


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


KEY = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
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
    config.stash[KEY] = Session(config)


def pytest_report_header(config: pytest.Config) -> str:
    session = config.stash[KEY]
    if session.target is not None:
        return f"tests run on {session.target.name}, not in guests"
    try:
        return f"guest accelerator: {accel.expectation(session.accel)}"
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    ours = session.config.stash[KEY]
    ours.close()
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["guests"] = [[list(guest) for guest in ours.booted], [list(entry) for entry in ours.infrastructure]]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        failed = [report.nodeid for kind in ("failed", "error") for report in reporter.stats.get(kind, [])]
        session.exitstatus = exit_code(int(session.exitstatus), failed, ours.infrastructure)
        ours.only_infrastructure = session.exitstatus == EXIT_INFRASTRUCTURE


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A parallel run: what the worker has to tell, for the summary."""
    booted, infrastructure = getattr(node, "workeroutput", {}).get("guests", ([], []))
    session = node.config.stash[KEY]
    session.booted += [Booted(*facts) for facts in booted]
    session.infrastructure += [(nodeid, reason) for nodeid, reason in infrastructure]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[KEY]
    if session.infrastructure:
        only = f" (nothing else failed: exit code {EXIT_INFRASTRUCTURE})"
        more = only if session.only_infrastructure else ""
        terminalreporter.section(f"trouble with the harness, not with what is tested{more}")
        for nodeid, reason in session.infrastructure:
            terminalreporter.write_line(f"{nodeid}: {reason}")
    if session.booted:
        terminalreporter.write_line(f"guests: {summary(session.booted)}; artefacts in {session.artefacts}")
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


# Tests that run in the guest


def _runs_in_guest(item: pytest.Item) -> bool:
    roots = [item.config.rootpath / str(root) for root in item.config.getini("guest_tests")]
    return any(root in item.path.parents for root in roots)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _runs_in_guest(item):
            item.add_marker("guest")


def pytest_collection_finish(session: pytest.Session) -> None:
    needs = session.config.stash[KEY].needs
    for item in session.items:
        for marker in item.iter_markers("guest_needs"):
            needs.add(**marker.kwargs)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not _runs_in_guest(item):
        return None
    session = item.config.stash[KEY]
    following = nextitem.nodeid if nextitem is not None and _runs_in_guest(nextitem) else None
    marker = item.get_closest_marker("guest_timeout")
    timeout = session.patience * (float(marker.args[0]) if marker is not None else TEST_SECONDS)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    began = time.time()
    try:
        remote = session.remote([other for other in item.session.items if _runs_in_guest(other)])
        lacking = _lacking(item, remote.guest)
        trouble_before = len(remote.guest.kernel_trouble())
        reports = [_skipped(item, lacking)] if lacking else remote.run(item.nodeid, following, timeout)
        trouble = remote.guest.kernel_trouble()[trouble_before:]
    except HarnessError as error:
        session.infrastructure.append((item.nodeid, str(error).splitlines()[0]))
        text = f"{type(error).__name__}: {error}"
        reports = [Report(item.nodeid, "setup", "failed", longrepr=text, crash=("", 0, text.splitlines()[0]))]
        trouble = []
    _blame(reports, trouble)
    if any(report.outcome == "failed" for report in reports):
        _shell_on_fail(item.config, item.nodeid, session.shared)
    for report in reports:
        if trouble:
            report.sections.append(("trouble on the guest's console", "\n".join(trouble)))
        item.ihook.pytest_runtest_logreport(report=_replay(item, report, began))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _lacking(item: pytest.Item, guest: Inside | None) -> str | None:
    """The first need of a test that is not met; without a guest, only those that the host can meet are looked at."""
    for name, probe in capabilities.OF_HOST.items():
        if item.get_closest_marker(name) and (reason := probe()):
            return reason
    for name, lacks in capabilities.OF_GUEST.items():
        marker = item.get_closest_marker(name)
        if guest is not None and marker is not None and (reason := lacks(guest, *marker.args)):
            return reason
    return None


def _skipped(item: pytest.Item, reason: str) -> Report:
    path, line, _ = item.location
    return Report(item.nodeid, "setup", "skipped", longrepr=(path, str((line or 0) + 1), f"Skipped: {reason}"))


def _shell_on_fail(config: pytest.Config, nodeid: str, guest: Guest | None) -> None:
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
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if reason := _lacking(item, None):
        pytest.skip(reason)
    try:
        yield
    except NotOnMetal as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        yield
    except NotOnMetal as error:
        pytest.skip(str(error))


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, HarnessError):
        text = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
        item.config.stash[KEY].infrastructure.append((item.nodeid, text.splitlines()[0]))
    if report.when == "call" and report.failed:
        funcargs = getattr(item, "funcargs", {})
        _shell_on_fail(item.config, item.nodeid, funcargs.get("guest") or funcargs.get("shared_guest"))
    return report


# Fixtures


@pytest.fixture(scope="session")
def guests(pytestconfig: pytest.Config) -> Session:
    """What all guests of this run are made from; guests.boot(name, …) gives a test one of its own."""
    return pytestconfig.stash[KEY]


@pytest.fixture(scope="session")
def guest_image(guests: Session) -> Image:
    """The image named in the configuration; built when it is not in the cache."""
    return guests.image()


@pytest.fixture(scope="session")
def code_disk(guests: Session) -> Path:
    """The disk with the project's code as it is now."""
    return guests.code()


@pytest.fixture
def shared_guest(guests: Session) -> Guest:
    """The guest that tests in it share, with one NIC; up, though what tests before have left in it is still there."""
    return guests.guest()


@pytest.fixture
def dimensions(request: pytest.FixtureRequest) -> Dimensions:
    """What the test's guest is to be like: the defaults, and what its markers `guest_with` pin."""
    return Dimensions.pinned(marker.kwargs for marker in request.node.iter_markers("guest_with"))


@pytest.fixture
def guest(request: pytest.FixtureRequest, guests: Session, dimensions: Dimensions, artefacts: Path) -> Iterator[Guest]:
    """A guest of the test's own, in which nothing has happened yet. Afterwards it is looked at (truth.py)."""
    with guests.fresh(artefacts.name, dimensions) as guest:
        if reason := _lacking(request.node, guest):
            pytest.skip(reason)
        before = Truth(guest)
        yield guest
        allowed = {kind for marker in request.node.iter_markers("guest_allows") for kind in marker.args}
        problems = [] if getattr(guest, "refused", False) else before.problems(allowed)
        if problems:
            pytest.fail("after the test its guest is not as it has to be:\n  " + "\n  ".join(problems), pytrace=False)


@dataclass(frozen=True)
class Claimed:
    """A NIC that VFIO has: its guest, its PCI address, and the driver that it had."""

    guest: Guest
    address: str
    driver: str


@pytest.fixture
def claimed(guest: Guest) -> Iterator[Claimed]:
    """The guest with its first NIC bound to vfio-pci, and given back afterwards."""
    address = next(address for address in guest.functions("0x02"))
    driver = guest.rebind(address, "vfio-pci")
    yield Claimed(guest, address, driver)
    try:
        guest.rebind(address, driver)
    except CommandFailed as error:
        pytest.fail(f"the NIC {address} could not be given back to {driver}: {error}")


@pytest.fixture
def wire(guest: Guest) -> Wire:
    """The NIC of the test's guest."""
    return guest.wire


@pytest.fixture
def artefacts(request: pytest.FixtureRequest, guests: Session) -> Path:
    """A directory for what this test wants to keep."""
    path: Path = guests.artefacts / re.sub(r"[^\w.\[\]-]+", "-", request.node.nodeid).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path
