"""The supervisor with processes that are real and do nothing: restarts, the one that stands by, and the end of all of
them. The device is a file; what the supervisor logs drives each test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vfio
from netbridge import metrics
from netbridge.bridge import Stop
from netbridge.errors import ExitCode
from netbridge.log import Log
from netbridge.session import Settings
from netbridge.vnode import supervisor
from netbridge.vnode.manifest import Manifest
from netbridge.vnode.options import DriverFailed, Options
from netbridge.vnode.supervisor import Supervisor

# The supervisor is alone in its process; a pytest worker is not, which Python 3.12 and later warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

DEADLINE_S = 60

PROGRAM = """
import os, socket, sys
sys.path[:0] = sys.argv[1:]
from netbridge.vnode import handover
channel = socket.socket(fileno=handover.CHANNEL_FD)
assert handover.await_told(channel)[0] is None
handover.say(channel, handover.READY)
start = handover.await_told(channel)
if start is None:
    os._exit(0)
assert len(start[1]) == 4
{then}
handover.say(channel, handover.UP)
if channel.recv(64) == handover.STOP:
    handover.say(channel, handover.STOPPED, "SIGNAL")
"""


class Watched(Log):
    """A log that is acted on: the n-th of `on[event]` is called the n-th time, with the fields of the event."""

    def __init__(self) -> None:
        super().__init__(True)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.on: dict[str, list[Callable[[dict[str, Any]], object]]] = {}

    def __call__(self, event: str, **fields: object) -> None:
        self.seen.append((event, fields))
        if self.on.get(event):
            self.on[event].pop(0)(fields)

    def pids(self, event: str) -> list[int]:
        return [fields["driver"] for name, fields in self.seen if name == event]


class Stopping:
    def __init__(self) -> None:
        self.received = 0
        self._readable, self._written = os.pipe()

    def fileno(self) -> int:
        return self._readable

    def stop(self, _fields: dict[str, Any]) -> None:
        self.received = signal.SIGTERM
        os.write(self._written, b"x")

    def close(self) -> None:
        os.close(self._readable)
        os.close(self._written)


class Bench:
    def __init__(self, directory: Path, then: str = "") -> None:
        program = directory / "driver"
        program.write_text(PROGRAM.format(then=then))
        manifest = Manifest.find("net-bridge")
        granted = manifest.capabilities._replace(irq=manifest.capabilities.irq, log=True)
        self.manifest = manifest._replace(path=str(directory / "vnode.yml"), entrypoint="driver", capabilities=granted)
        self.log = Watched()
        self.stopping = Stopping()
        self.page = metrics.CounterPage(str(directory / "counters"))

    def run(self) -> Stop:
        options = Options(
            pci=None,
            socket_path="port",
            counters_path="counters",
            service_uids=(),
            driver_user=None,
            without_features=(),
            interface="auto",
            settings=Settings(),
        )
        stopping: Any = self.stopping
        port: Any = SimpleNamespace(fileno=lambda: self.page.fd)
        runs = Supervisor(self.manifest, options, self.log, stopping, port, self.page, None, None, 1 << 20)
        try:
            return runs.run()
        finally:
            runs.end()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    @contextmanager
    def open_device(_address: object, interface: str = "auto") -> Iterator[object]:
        with Path(os.devnull).open("rb") as null:
            fds = vfio.DeviceFds("type1v2", null.fileno(), null.fileno(), ioas_id=0)
            yield SimpleNamespace(fds=fds, config=SimpleNamespace(interrupt_line=11), address="0000:00:1f.0")

    monkeypatch.setattr(vfio, "open_device", open_device)
    monkeypatch.setattr(supervisor, "STANDBY_SECONDS", 0.0)
    made: list[Bench] = []

    def make(then: str = "") -> Bench:
        made.append(Bench(tmp_path, then))
        return made[-1]

    def too_late(*_: object) -> None:
        raise TimeoutError(f"after {DEADLINE_S} s only this was logged: {[one.log.seen for one in made]}")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(DEADLINE_S)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for one in made:
        one.stopping.close()
        one.page.close()
        for pid in one.log.pids("claimed") + one.log.pids("standby"):
            assert not Path(f"/proc/{pid}").exists()


def kill(fields: dict[str, Any]) -> None:
    os.kill(fields["driver"], signal.SIGKILL)


def test_who_stands_by_takes_over(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.log.on = {
        "standby": [
            lambda _: os.kill(one.log.pids("claimed")[-1], signal.SIGKILL),
            lambda _: os.kill(one.log.pids("claimed")[-1], signal.SIGKILL),
            one.stopping.stop,
        ],
    }
    assert one.run() is Stop.SIGNAL
    first, second, third = one.log.pids("claimed")
    assert one.log.pids("standby")[:2] == [second, third]
    assert one.log.pids("driver_died") == [first, second]
    assert [fields["restarts"] for event, fields in one.log.seen if event == "driver_restarts"] == [1, 2]


def test_one_that_dies_standing_by_costs_nothing(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.log.on = {
        "standby": [kill, one.stopping.stop],
        # The driver goes on; the next one is a new process, and has one beside it again.
        "standby_died": [lambda _: os.kill(one.log.pids("claimed")[-1], signal.SIGKILL)],
    }
    assert one.run() is Stop.SIGNAL
    first, second = one.log.pids("claimed")
    assert one.log.pids("standby_died") == one.log.pids("standby")[:1]
    assert second not in one.log.pids("standby")
    assert one.log.pids("driver_died") == [first]


def test_told_to_stop_before_any_stands_by(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.log.on = {"up": [one.stopping.stop]}
    assert one.run() is Stop.SIGNAL
    assert one.log.pids("standby") == []


def test_drivers_that_never_come_up_are_given_up(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Backoff", lambda: SimpleNamespace(after=lambda _: 0.0))
    one = bench(then="os._exit(7)")
    with pytest.raises(DriverFailed, match="5 times in a row; last: ended with exit code 7") as failed:
        one.run()
    assert failed.value.exit_code == ExitCode.FAILURE
    assert len(one.log.pids("driver_died")) == 5


def test_a_driver_that_says_why_it_cannot_start_is_not_started_again(bench: Callable[..., Bench]) -> None:
    one = bench(then='handover.say(channel, handover.FAILED, "4\\nno such device\\x1b"); os._exit(4)')
    with pytest.raises(DriverFailed, match=r"^no such device\?$") as failed:
        one.run()
    assert failed.value.exit_code == ExitCode.DEVICE
    assert len(one.log.pids("claimed")) == 1
