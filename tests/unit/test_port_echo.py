"""The echo service as a process of its own, against a driver's end written from docs/port.md."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netbridge.ipc.errors import Reason
from netbridge.ipc.server import ClientGone, ClientReady
from tests.unit.port_fakes import DEADLINE_SECONDS, FACTS, FakeRings, OfferedSession, ServedPort

PROGRAM = [sys.executable, "-m", "netbridge.services.echo"]


class Echo:
    """The running service."""

    def __init__(self, path: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "--socket", str(path), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> tuple[int, str, str]:
        """Exit code and the rest of what it printed."""
        out, err = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, out, err


@contextmanager
def running(path: Path, *options: str) -> Iterator[Echo]:
    echo = Echo(path, *options)
    try:
        yield echo
    finally:
        if echo.process.poll() is None:
            echo.process.kill()
        echo.process.communicate()


@contextmanager
def serving(path: Path, offered: OfferedSession) -> Iterator[ServedPort]:
    with ServedPort(path) as port:
        with port.paused() as server:
            server.offer(offered.session)
        yield port


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aethernet.sock"


def frame(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5]) + number.to_bytes(4, "big") + bytes(42)


def reply(number: int) -> bytes:
    sent = frame(number)
    return sent[6:12] + sent[:6] + sent[12:]


@pytest.mark.parametrize("read_only", [False, True], ids=["forwarded", "copied"])
def test_every_frame_comes_back_with_its_addresses_exchanged(path: Path, read_only: bool) -> None:
    with OfferedSession(rx_read_only=read_only) as offered, serving(path, offered) as port, running(path) as echo:
        driver = FakeRings(offered)
        assert isinstance(port.await_event(), ClientReady)
        assert echo.line() == (
            f"netbridge-echo: connected: socket {path}, session 7, mac 52:54:00:12:34:56, mtu 1500, link up\n"
        )
        for burst in range(50):
            numbers = range(burst * 4, burst * 4 + 1 + burst % 4)
            for number in numbers:
                driver.deliver(frame(number))
            assert driver.await_sent(len(numbers)) == [reply(number) for number in numbers]
            while len(driver.free) < 8:
                driver.take_back()
        with port.paused() as server:
            server.dismiss(Reason.SHUTDOWN)
        code, out, err = echo.end()
        assert (code, err) == (0, "")
        total = sum(1 + burst % 4 for burst in range(50))
        assert driver.forwarded == (0 if read_only else total)
        assert "closed: end the driver closed the port: orderly shutdown, " in out
        assert f"frames {total}, bytes {60 * total}, " in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_orderly_end(path: Path, number: signal.Signals) -> None:
    with OfferedSession() as offered, serving(path, offered) as port, running(path, "--json") as echo:
        driver = FakeRings(offered)
        assert isinstance(port.await_event(), ClientReady)
        assert json.loads(echo.line()) == {
            "event": "connected",
            "socket": str(path),
            "session": 7,
            "mac": "52:54:00:12:34:56",
            "mtu": 1500,
            "link": "up",
        }
        driver.deliver(frame(1))
        assert driver.await_sent(1) == [reply(1)]
        echo.process.send_signal(number)
        code, out, err = echo.end()
        assert (code, err) == (0, "")
        closed = json.loads(out)
        assert closed.pop("bursts") == 1
        assert closed == {
            "event": "closed",
            "end": "stopped by a signal",
            "frames": 1,
            "bytes": 60,
            "unsendable": 0,
            "forwarded": 1,
        }
        gone = port.await_event()
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.SHUTDOWN


def test_a_signal_ends_the_wait_for_a_driver(path: Path) -> None:
    with running(path, "--wait", "60") as echo:
        # It is waiting once it has looked for the driver; until then a signal would find no handler.
        with ServedPort(path) as port:
            while port.events.empty():
                with port.paused() as server:
                    if server.client is not None:
                        break
            echo.process.send_signal(signal.SIGTERM)
            assert echo.end() == (0, "", "")


def test_no_driver_is_one_line_and_a_code(path: Path) -> None:
    with running(path) as echo:
        assert echo.end() == (
            5,
            "",
            f"netbridge-echo: no driver listens at {path}; start one, or wait for it\n",
        )


def test_not_permitted_is_one_line_and_a_code(path: Path) -> None:
    with ServedPort(path) as port, running(path, "--wait", "60") as echo:
        with port.paused() as server:
            server.allowed_uids = frozenset()
        code, out, err = echo.end()
        assert (code, out) == (5, "")
        assert f"not permitted (uid {os.geteuid()} is not on the driver's list)" in err


def test_a_driver_that_dies_is_one_line_and_a_code(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered) as port, running(path, "--once", "--wait", "60") as echo:
        port.await_event()
        echo.line()
        with port.paused() as server:
            server.dismiss(Reason.FAILED, "no more device")
        code, out, err = echo.end()
        assert code == 5
        assert "closed: end the driver closed the port: internal failure (no more device)" in out
        assert err == "netbridge-echo: the driver closed the port: internal failure (no more device)\n"


def test_it_goes_on_with_the_next_session(path: Path) -> None:
    with OfferedSession(7) as first, OfferedSession(8) as second:
        with serving(path, first) as port, running(path, "--wait", "60") as echo:
            port.await_event()
            echo.line()
            with port.paused() as server:
                server.dismiss(Reason.DEVICE_RESET)
                server.offer(second.session)
            driver = FakeRings(second)
            assert "the device was reset" in echo.line()
            assert "session 8" in echo.line()
            driver.deliver(frame(1))
            assert driver.await_sent(1) == [reply(1)]


def test_news_of_the_link_do_not_disturb_it(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered) as port, running(path) as echo:
        driver = FakeRings(offered)
        port.await_event()
        echo.line()
        for mtu in range(1500, 1510):
            with port.paused() as server:
                server.update(FACTS._replace(mtu=mtu))
            driver.deliver(frame(mtu))
            assert driver.await_sent(1) == [reply(mtu)]
            driver.take_back()
