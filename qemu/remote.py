"""Runs tests inside a guest, one by one, in one pytest process that stays; the reports come back as plain data.

The guest's end is images/remote_pytest.py. That process dying, hanging or being killed with its guest is the
failure of the test that ran; the next test gets a new process.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.completed import CommandError
from qemu.errors import AgentError
from qemu.guest_process import GuestProcess
from qemu.inside import Inside

HOME = "/run/harness"
NIC_VARIABLE = "HARNESS_NIC"
"""Tells the tests the PCI address of the NIC that they may take, where they are not to choose."""
PLUGIN = Path(__file__).parents[1] / "images" / "remote_pytest.py"
START_SECONDS = 60.0
COUNTS = re.compile(r"[\w-][\w.-]*\.gcda")
DIE_SECONDS = 5.0
SAVE_SECONDS = 30.0


@dataclass
class Report:
    """One phase of one test: the fields of pytest's own report that survive as text."""

    nodeid: str
    when: str
    outcome: str
    duration: float = 0.0
    longrepr: str | tuple[str, str, str] | None = None
    crash: tuple[str, int, str] | None = None
    """File, line and message of the failure."""
    sections: list[tuple[str, str]] = field(default_factory=list)
    wasxfail: str | None = None
    properties: list[tuple[str, str]] = field(default_factory=list)


class RemoteTests:
    """A resident pytest in `guest`, which has collected `paths` below `root`, the guest's copy of the project.

    `options` are more arguments for it; `configuration` is the host's file of pytest settings, used there too; `log`
    gets what it prints besides reports. Into the directory `coverage` comes, after each test, a file of coverage.py's
    data on the Python below `root` that ran in it, and what C compiled for gcov has counted: up to this test if its
    library has a function for that (see images/remote_pytest.py), or else when its process ends.
    Collecting may take `patience` times as long as usual. What this puts there besides is in the directory `home`;
    `nic` is the PCI function that the tests may take.
    """

    def __init__(
        self,
        guest: Inside,
        paths: Sequence[str],
        *,
        root: str,
        log: Path,
        options: Sequence[str] = (),
        configuration: Path | None = None,
        coverage: Path | None = None,
        patience: float = 1.0,
        home: str = HOME,
        nic: str | None = None,
    ):
        self.guest = guest
        self._home = home
        self._nic = nic
        self._paths = list(paths)
        self._root = root
        self._log = log
        self._options = list(options)
        self._configuration = configuration
        self._coverage = coverage
        self._start_seconds = START_SECONDS * patience
        self._process: GuestProcess | None = None
        self._position = 0
        self._partial = b""

    def run(self, nodeid: str, following: str | None, timeout: float) -> list[Report]:
        """Run one test. `following` is the one that comes next, so that what both use is kept for it.

        Every trouble ends in a report of a failure, except that GuestLost is raised when the guest is gone.
        """
        reports: list[Report] = []
        waiting = f"its tests were not collected in the guest within {self._start_seconds:g} s"
        try:
            if self._process is None or not self._process.running:
                self._start()
            assert self._process is not None
            waiting = f"not done in the guest within {timeout:g} s"
            self._process.write(json.dumps({"run": nodeid, "next": following}).encode() + b"\n")
            while True:
                event = self._event(timeout)
                if event is None:
                    return [*reports, self._died(nodeid, reports, "the guest's pytest died")]
                if event["event"] == "report":
                    reports.append(_report(event))
                elif event["event"] == "unknown":
                    errors = "\n".join(event["errors"]) or "the code disk has another version of the file?"
                    text = f"the guest's pytest did not collect this test:\n{errors}"
                    return [Report(nodeid, "setup", "failed", longrepr=text, crash=("", 0, text.splitlines()[0]))]
                elif event["event"] == "done":
                    self._keep_coverage()
                    return reports
        except CommandError:
            # Its own answer to SIGABRT is the traceback of every thread, on stderr.
            if self._process is not None:
                self._process.kill(signal.SIGABRT)
                try:
                    self._process.wait(DIE_SECONDS)
                except CommandError:
                    self._process.kill()
            return [*reports, self._died(nodeid, reports, waiting)]

    def _start(self) -> None:
        self.guest.put(PLUGIN, f"{self._home}/{PLUGIN.name}")
        options = ["-p", PLUGIN.stem, "-p", "no:cacheprovider", f"--rootdir={self._root}", *self._options]
        if self._configuration is not None:
            self.guest.put(self._configuration, f"{self._home}/{self._configuration.name}")
            options += ["-c", f"{self._home}/{self._configuration.name}"]
        self._position, self._partial = 0, b""
        self._ident = f"{time.time_ns()}"
        self._counts = f"{self._home}/gcov-{self._ident}"
        self._process = self.guest.start(
            ["python3", "-m", *self._measured(), "pytest", *options, *self._paths],
            cwd=self._root,
            # coverage.py's own C would have to be compiled for the guest; what Python brings since 3.12 needs none.
            env={
                "PYTHONPATH": f"{self._home}:{self._root}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "COVERAGE_CORE": "sysmon",
                **({} if self._nic is None else {NIC_VARIABLE: self._nic}),
                # For what is compiled with --coverage: where its counts come.
                **({} if self._coverage is None else {"GCOV_PREFIX": self._counts, "GCOV_PREFIX_STRIP": "99"}),
            },
            stdin=True,
        )
        self._event(self._start_seconds)

    def _keep_coverage(self) -> None:
        """Fetch what has been measured up to the test that is done."""
        if self._coverage is None:
            return
        with contextlib.suppress(AgentError):  # nothing was measured yet
            self.guest.get(f"{self._home}/coverage.data", self._coverage / f"data.guest.{self._ident}")
        kept = self._coverage / f"gcov.guest.{self._ident}"
        for name in self.guest.eval(
            f"import os; os.path.isdir({self._counts!r}) and os.listdir({self._counts!r}) or []"
        ):
            if COUNTS.fullmatch(name):
                kept.mkdir(exist_ok=True)
                self.guest.get(f"{self._counts}/{name}", kept / name)

    def _measured(self) -> list[str]:
        """The words that have coverage.py run what follows, after it was put there."""
        if self._coverage is None:
            return []
        import coverage

        package = Path(coverage.__file__).parent
        for file in package.glob("*.py"):
            self.guest.put(file, f"{self._home}/coverage/{file.name}")
        return ["coverage", "run", f"--data-file={self._home}/coverage.data", f"--source={self._root}", "-m"]

    def _event(self, timeout: float) -> dict[str, Any] | None:
        """The next event; None when the process has ended."""
        assert self._process is not None
        while b"\n" not in self._partial:
            data, self._position = self._process.read(self._position, timeout=timeout)
            if not data:
                return None
            self._partial += data
        line, _, self._partial = self._partial.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _died(self, nodeid: str, reports: Sequence[Report], what: str) -> Report:
        """A report of the phase that was under way when the process was lost."""
        process = self._process
        assert process is not None
        self._keep_log()
        self._process = None
        phases = ("setup", "call", "teardown")
        when = phases[min(len(reports), 2)]
        words = "\n".join(process.stderr.rstrip().splitlines()[-60:])
        ended = "" if process.returncode is None else f" (exit code {process.returncode})"
        lost = "" if self._coverage is None else "\nWhat ran in this test is not measured."
        text = f"{what}{ended}{lost}\n--- end of what it said\n{words}"
        return Report(nodeid, when, "failed", longrepr=text, crash=("", 0, f"{what}{ended}"))

    def _keep_log(self) -> None:
        if self._process is not None:
            with self._log.open("a") as log:
                log.write(self._process.stderr)

    def close(self) -> None:
        """End the process, tearing down what is set up."""
        if self._process is not None and self._process.running and self.guest.lost is None:
            self._process.close_stdin()
            try:
                self._process.wait(DIE_SECONDS if self._coverage is None else SAVE_SECONDS)
                if self._coverage is not None:
                    self._keep_coverage()
            except CommandError:
                self._process.kill()
        self._keep_log()
        self._process = None


def _report(event: dict[str, Any]) -> Report:
    longrepr = event["longrepr"]
    if isinstance(longrepr, list):
        path, line, reason = longrepr
        longrepr = (path, line, reason)
    return Report(
        event["nodeid"],
        event["when"],
        event["outcome"],
        event["duration"],
        longrepr,
        None if event["crash"] is None else (event["crash"][0], int(event["crash"][1]), event["crash"][2]),
        [(name, text) for name, text in event["sections"]],
        event["wasxfail"],
        [(name, value) for name, value in event["properties"]],
    )
