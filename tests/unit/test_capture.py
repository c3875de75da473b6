"""Captures: what the file says, byte for byte of each frame, as scapy's own pcapng reader sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scapy.utils import RawPcapNgReader

from netbridge.client import connect
from netbridge.ipc.errors import Reason
from netbridge.ipc.server import ClientGone, ClientReady
from netbridge.metrics import CounterPage
from netbridge.services.pcapng import Capture, CaptureFailed
from tests.unit.port_fakes import DEADLINE_SECONDS, FACTS, FakeRings, OfferedSession, ServedPort

INBOUND, OUTBOUND = 1, 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aethernet.sock"


@contextmanager
def serving(path: Path, *offered: OfferedSession) -> Iterator[ServedPort]:
    with ServedPort(path) as port:
        with port.paused() as server:
            server.offer(offered[0].session)
        yield port


@contextmanager
def service(name: str, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"netbridge.services.{name}", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def frame(number: int, length: int = 60) -> bytes:
    head = bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5]) + number.to_bytes(4, "big")
    return head + bytes(i % 251 for i in range(length - len(head)))


class Block:
    """A block as the specification has it, without anybody's library: kind, body and options by code."""

    def __init__(self, kind: int, body: bytes) -> None:
        self.kind, self.body = kind, body
        self.options: dict[int, bytes] = {}
        at = {0x0A0D0D0A: 16, 1: 8, 5: 12}.get(kind)
        if kind == 6:
            captured = int.from_bytes(body[12:16], "little")
            self.interface, self.original = (int.from_bytes(body[i : i + 4], "little") for i in (0, 16))
            self.time = int.from_bytes(body[4:8], "little") << 32 | int.from_bytes(body[8:12], "little")
            self.data = body[20 : 20 + captured]
            at = 20 + (captured + 3) // 4 * 4
        assert at is not None
        while code := int.from_bytes(body[at : at + 2], "little"):
            length = int.from_bytes(body[at + 2 : at + 4], "little")
            self.options[code] = body[at + 4 : at + 4 + length]
            at += 4 + (length + 3) // 4 * 4
        assert body[at:] == bytes(4), "the end of the options is the end of the block"

    def number(self, code: int) -> int:
        return int.from_bytes(self.options[code], "little")


def blocks(data: bytes) -> list[Block]:
    found = []
    while data:
        kind, length = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
        assert length % 4 == 0
        assert 12 <= length <= len(data)
        assert data[length - 4 : length] == data[4:8]
        found.append(Block(kind, data[8 : length - 4]))
        data = data[length:]
    return found


def test_the_service_writes_every_frame(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.pcapng"
    frames = [frame(i, length) for i, length in enumerate((60, 61, 62, 63, 1514, 14, 1984))]
    long = frame(99, 5000)
    began = time.time_ns()
    with OfferedSession() as offered, serving(path, offered) as port:
        driver = FakeRings(offered)
        with service("capture", "--socket", path, "--wait", "60", "--out", out, "--count", len(frames) + 1) as process:
            assert isinstance(port.await_event(), ClientReady)
            for one in frames[:4]:
                driver.deliver(one)
            while len(driver.free) < 8:
                driver.take_back()
            for one in frames[4:]:
                driver.deliver(one)
            driver.deliver(long)
            assert process.wait(DEADLINE_SECONDS) == 0
            assert process.stderr is not None
            assert b"closed: end done, frames 8\n" in process.stderr.read()
    section, interface, *packets, statistics = blocks(out.read_bytes())
    assert (section.kind, interface.kind, statistics.kind) == (0x0A0D0D0A, 1, 5)
    assert section.body[:8] == bytes.fromhex("4d3c2b1a01000000")
    assert interface.options[2] == b"aethernet"
    assert interface.options[3] == b"Net-Bridge, session 7, MTU 1500, link up"
    assert interface.options[6] == FACTS.mac
    assert interface.number(8) == FACTS.speed_mbps * 1_000_000
    assert interface.options[9] == b"\x09"
    assert [packet.data for packet in packets] == [*frames, long]
    assert all(packet.original == len(packet.data) and packet.interface == 0 for packet in packets)
    assert all(packet.number(2) == INBOUND for packet in packets)
    times = [began, *(packet.time for packet in packets), time.time_ns()]
    assert times == sorted(times)
    assert (statistics.number(4), statistics.number(8), 5 in statistics.options) == (8, 8, False)
    # A reader that is not ours.
    with out.open("rb") as file:
        assert [data for data, _ in RawPcapNgReader(file)] == [*frames, long]


def test_to_a_pipe_with_drops_in_the_statistics(path: Path, tmp_path: Path) -> None:
    counters = CounterPage(f"{path}.counters")
    counters.counters.drops[0] = 5
    try:
        with OfferedSession() as offered, serving(path, offered) as port:
            driver = FakeRings(offered)
            with service("capture", "--socket", path, "--wait", "60", "--out", "-") as process:
                assert isinstance(port.await_event(), ClientReady)
                assert process.stderr is not None
                process.stderr.readline()
                driver.deliver(frame(1))
                while len(driver.free) < 8:
                    driver.take_back()
                counters.counters.drops[0] = 7
                process.send_signal(signal.SIGTERM)
                out, _ = process.communicate(timeout=DEADLINE_SECONDS)
                assert process.returncode == 0
    finally:
        counters.close()
    *_, packet, statistics = blocks(out)
    assert packet.data == frame(1)
    assert (statistics.number(4), statistics.number(5), statistics.number(8)) == (3, 2, 1)


def test_a_reader_that_leaves_is_an_orderly_end(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered) as port:
        driver = FakeRings(offered)
        with service("capture", "--socket", path, "--wait", "60", "--out", "-") as process:
            assert isinstance(port.await_event(), ClientReady)
            assert process.stdout is not None
            process.stdout.close()
            driver.deliver(frame(1))
            assert process.wait(DEADLINE_SECONDS) == 0


def test_a_full_disk_is_one_line_and_a_code(path: Path) -> None:
    with service("capture", "--socket", path, "--out", "/dev/full") as process:
        assert process.wait(DEADLINE_SECONDS) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            b"netbridge-capture: cannot write the capture /dev/full: No space left on device\n"
        )


def test_seconds_end_it(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.pcapng"
    with (
        OfferedSession() as offered,
        serving(path, offered),
        service("capture", "--socket", path, "--wait", "60", "--out", out, "--seconds", "0.3") as process,
    ):
        assert process.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--count", "0", "--out", "x"), b"'0' is not a positive whole number"),
        (("--seconds", "nan", "--out", "x"), b"'nan' is not a positive number"),
        (("--snap-length", "131073", "--out", "x"), b"at most 131072"),
        (("--out", "/nowhere/x"), b"cannot write the capture /nowhere/x: No such file or directory"),
    ],
)
def test_what_a_user_can_do_wrong(options: tuple[str, ...], words: bytes) -> None:
    with service("capture", *options) as process:
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode in (1, 2)
        assert words in err
        assert b"Traceback" not in err


def test_echo_captures_both_directions(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.pcapng"
    with OfferedSession() as offered, serving(path, offered) as port:
        driver = FakeRings(offered)
        with service("echo", "--socket", path, "--wait", "60", "--capture", out) as process:
            assert isinstance(port.await_event(), ClientReady)
            driver.deliver(frame(1))
            (answer,) = driver.await_sent(1)
            with port.paused() as server:
                server.dismiss(Reason.SHUTDOWN)
            assert process.wait(DEADLINE_SECONDS) == 0
    packets = [block for block in blocks(out.read_bytes()) if block.kind == 6]
    assert [(packet.data, packet.number(2)) for packet in packets] == [(frame(1), INBOUND), (answer, OUTBOUND)]


def test_any_client_can_capture_and_cut_frames_short(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.pcapng"
    with OfferedSession() as offered, serving(path, offered), Capture.open(str(out), snap_length=100) as capture:
        driver = FakeRings(offered)
        with connect(path) as client:
            capture.begin(client)
            client.send_bytes(frame(1, 200))
            driver.deliver(frame(2, 3000))
            (received,) = client.receive(timeout=DEADLINE_SECONDS)
            received.release()
            capture.end()
        assert (capture.sent, capture.received) == (1, 1)
    packets = [block for block in blocks(out.read_bytes()) if block.kind == 6]
    expected = [(frame(1, 200)[:100], 200, OUTBOUND), (frame(2, 3000)[:100], 3000, INBOUND)]
    assert [(packet.data, packet.original, packet.number(2)) for packet in packets] == expected


def test_a_file_that_takes_no_more_ends_the_capture_and_not_the_client(path: Path) -> None:
    readable, written = os.pipe()
    with OfferedSession() as offered, serving(path, offered), Capture(written, "pipe") as capture:
        driver = FakeRings(offered)
        with connect(path) as client:
            capture.begin(client)
            os.close(readable)
            client.send_bytes(frame(1))
            client.send_bytes(frame(2))
            assert driver.await_sent(2) == [frame(1), frame(2)]
            assert capture.reader_left
            capture.end()
            capture.check()
    with pytest.raises(CaptureFailed, match="/dev/full: No space left on device"):
        Capture.open("/dev/full")


def test_a_disk_that_was_full_does_not_end_the_next_session_either(path: Path) -> None:
    with OfferedSession(1) as first, OfferedSession(2) as second, Capture.open(os.devnull) as capture:
        with serving(path, first) as port:
            FakeRings(first)
            with connect(path) as client:
                capture.begin(client)
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, capture._native.fd)
                os.close(full)
                client.send_bytes(frame(1))
                capture.end()
            assert capture.state == "ended: No space left on device"
            assert isinstance(port.await_event(), ClientReady)
            assert isinstance(port.await_event(), ClientGone)
            with port.paused() as server:
                server.offer(second.session)
            driver = FakeRings(second)
            with connect(path, wait=DEADLINE_SECONDS) as client:
                capture.begin(client)
                client.send_bytes(frame(2))
                assert driver.await_sent(1) == [frame(2)]
                capture.end()
        with pytest.raises(CaptureFailed, match="cannot write the capture /dev/null: No space left on device"):
            capture.check()


SMALL_DISK = 'mount -t tmpfs -o size=16k none "$0" && exec "$@"'


def test_a_disk_that_becomes_full_is_one_line_and_a_code(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    place = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(disk)]
    if subprocess.run([*place, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system of one's own: not for this user")
    words = ["--socket", path, "--out", disk / "frames.pcapng", "--wait", "60"]
    command = [*place, sys.executable, "-m", "netbridge.services.capture", *map(str, words)]
    with OfferedSession() as offered, serving(path, offered) as port:
        driver = FakeRings(offered)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert isinstance(port.await_event(), ClientReady)
            deadline = time.monotonic() + DEADLINE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                if driver.free:
                    driver.deliver(frame(1, 1500))
                driver.take_back()
            assert process.poll() == 1, "it should have ended when the disk was full"
            assert process.stderr is not None
            said = process.stderr.read()
    assert f"netbridge-capture: cannot write the capture {disk}/frames.pcapng: No space left on device\n" in said
    assert "Traceback" not in said
