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
All of them, and the tests here that use the fixture `guest`, share one guest, which is booted when the first of them
asks for it, and anew when it was lost. What some of them need of it, the marker `guest_needs` says: the guest has what
all tests of this run need, so that a run without such tests has a smaller guest.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qemu import accel
from qemu.codedisk import build_code_disk
from qemu.errors import HarnessError
from qemu.guest import Guest, Nic, boot
from qemu.images import Image, Recipe, ensure_image
from qemu.remote import RemoteTests, Report

if TYPE_CHECKING:
    from qemu.wire import Wire

BOOT_SECONDS = 180.0
TEST_SECONDS = 60.0
MEMORY_MB = 512
STALL = re.compile(r"blocked|stall|lockup")
"""Of the trouble on a guest's console, what a busy host alone can cause."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guest", "tests on a guest")
    group.addoption(
        "--accel",
        choices=accel.NAMES,
        default=None,
        help=f"accelerator of the guests (also {accel.VARIABLE}); auto: kvm if guests run under it, else tcg",
    )
    group.addoption(
        "--artefacts", type=Path, default=None, metavar="DIR", help="where consoles, captures and logs go (build/tests)"
    )
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


@dataclass
class Needs:
    """What the shared guest is to have beyond what every guest has."""

    arguments: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    memory_mb: int = MEMORY_MB

    def add(self, devices: Sequence[str] = (), words: Sequence[str] = (), memory_mb: int = 0) -> None:
        """The arguments of one marker. Whole device lines are compared, so two tests may need the same one."""
        self.arguments += [line for line in devices if line not in self.arguments]
        self.words += [word for word in words if word not in self.words]
        self.memory_mb = max(self.memory_mb, memory_mb)


class Session:
    """What the tests of one run share: image, code disk, guest, and the pytest inside it."""

    def __init__(self, config: pytest.Config):
        self.config = config
        worker = getattr(config, "workerinput", {}).get("workerid", "")
        base: Path = config.getoption("artefacts") or config.rootpath / "build" / "tests"
        self.artefacts = base.absolute() / worker
        self.booted: list[str] = []
        """A line for each guest that was booted, for the summary."""
        self.infrastructure: list[str] = []
        """What failed for reasons of the harness, not of what is tested: nodeid and reason."""
        self.needs = Needs()
        self.patience = _patience(str(config.getini("guest_patience")))
        self._image: Image | None = None
        self._code: Path | None = None
        self._guest: Guest | None = None
        self._remote: RemoteTests | None = None
        self._broken: HarnessError | None = None

    def say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)

    def _once(self, make: Callable[[], Any]) -> Any:
        """What cannot be made is not tried again for every test that wants it."""
        if self._broken is not None:
            raise self._broken
        try:
            return make()
        except HarnessError as error:
            self._broken = error
            raise

    def image(self) -> Image:
        if self._image is None:
            recipe = self.config.rootpath / str(self.config.getini("guest_recipe"))
            self._image = self._once(lambda: ensure_image(Recipe.load(recipe), progress=self.say))
        return self._image

    def code(self) -> Path:
        if self._code is None:
            specification = self.config.rootpath / str(self.config.getini("guest_code"))
            image = self.image()
            self.artefacts.mkdir(parents=True, exist_ok=True)
            self._code = self._once(lambda: build_code_disk(image, specification, self.artefacts / "code.img"))
        return self._code

    def boot(self, name: str, **options: Any) -> Guest:
        """A guest of its own, for a test that changes or breaks it; to be closed by whoever asked for it."""
        options.setdefault("accel", self.config.getoption("accel") or "auto")
        options.setdefault("code", self.code())
        options.setdefault("timeout", BOOT_SECONDS * self.patience)
        guest = boot(self.image(), artefacts=self.artefacts / name, say=self.say, **options)
        self.booted.append(f"{guest.accel}, up in {guest.boot_seconds:.1f} s")
        return guest

    def guest(self) -> Guest:
        """The guest that all share. Booted anew when it was lost."""
        if self._guest is not None and self._guest.lost is not None:
            self.end_guest()
        if self._guest is None:
            name = f"guest-{len(self.booted)}"
            more = [word for line in self.needs.arguments for word in shlex.split(line)]
            self._guest = self._once(
                lambda: self.boot(
                    name,
                    nics=[Nic()],
                    extra_args=[*self.config.getini("guest_args"), *more],
                    # Of words that contradict each other the kernel takes the last.
                    append=[*self.needs.words, *self.config.getini("guest_words")],
                    memory_mb=self.needs.memory_mb,
                )
            )
        return self._guest

    def remote(self, items: list[pytest.Item]) -> RemoteTests:
        guest = self.guest()
        if self._remote is None or self._remote.guest is not guest:
            root = str(self.config.getini("guest_root"))
            files = dict.fromkeys(item.nodeid.split("::")[0] for item in items)
            paths = [f"{root}/{file}" for file in files]
            log = guest.artefacts / "guest-pytest.log"
            options = ["-o", f"addopts={shlex.join(_for_guest(self.config.getini('addopts')))}"]
            self._remote = RemoteTests(
                guest, paths, root=root, log=log, options=options, configuration=self.config.inipath
            )
        return self._remote

    def end_guest(self) -> None:
        if self._remote is not None:
            with contextlib.suppress(HarnessError):
                self._remote.close()
            self._remote = None
        if self._guest is not None:
            self._guest.close()
            self._guest = None


def _patience(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 1000.0:
        raise pytest.UsageError(f"guest_patience: expected a number from 1 to 1000, found {text!r}")
    return value


def _for_guest(options: list[str]) -> list[str]:
    """The options from the configuration without plugins of the host: this one, and parallel runs."""
    kept = []
    words = iter(options)
    for word in words:
        if word in ("-p", "-n"):
            next(words, None)
        elif not word.startswith(("-p", "-n")):
            kept.append(word)
    return kept


KEY = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest: runs inside the guest (set on all tests below guest_tests)")
    config.addinivalue_line("markers", "guest_timeout(seconds): how long a test may take in the guest (60)")
    config.addinivalue_line(
        "markers",
        "guest_needs(devices, words, memory_mb): what the shared guest is to have for a test: arguments for QEMU, a "
        "device in each, words for the kernel's command line, and so much memory",
    )
    config.stash[KEY] = Session(config)


def pytest_report_header(config: pytest.Config) -> str:
    wanted = config.getoption("accel")
    try:
        return f"guest accelerator: {accel.expectation(wanted)}"
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[KEY].end_guest()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[KEY]
    for line in session.booted[:1]:
        more = f"; {len(session.booted) - 1} more guests" if len(session.booted) > 1 else ""
        terminalreporter.write_line(f"guest: {line}{more}; artefacts in {session.artefacts}")
    if session.infrastructure:
        terminalreporter.section("trouble with the harness, not with what is tested")
        for line in session.infrastructure:
            terminalreporter.write_line(line)


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
        trouble_before = len(remote.guest.kernel_trouble())
        reports = remote.run(item.nodeid, following, timeout)
        trouble = remote.guest.kernel_trouble()[trouble_before:]
    except HarnessError as error:
        session.infrastructure.append(f"{item.nodeid}: {str(error).splitlines()[0]}")
        text = f"{type(error).__name__}: {error}"
        reports = [Report(item.nodeid, "setup", "failed", longrepr=text, crash=("", 0, text.splitlines()[0]))]
        trouble = []
    _blame(reports, trouble)
    for report in reports:
        if trouble:
            report.sections.append(("trouble on the guest's console", "\n".join(trouble)))
        item.ihook.pytest_runtest_logreport(report=_replay(item, report, began))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


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
        item.config.stash[KEY].infrastructure.append(f"{item.nodeid}: {text.splitlines()[0]}")
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
def guest(guests: Session) -> Guest:
    """The guest that all tests share, with one NIC; up, though what tests before have left in it is still there."""
    return guests.guest()


@pytest.fixture
def wire(guest: Guest) -> Wire:
    """The shared guest's NIC, with no frame waiting."""
    guest.wire.drain()
    return guest.wire


@pytest.fixture
def artefacts(request: pytest.FixtureRequest, guests: Session) -> Path:
    """A directory for what this test wants to keep."""
    path: Path = guests.artefacts / re.sub(r"[^\w.\[\]-]+", "-", request.node.nodeid).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path
