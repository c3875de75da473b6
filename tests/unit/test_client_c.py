"""The C client library under AddressSanitizer and UndefinedBehaviorSanitizer: with the real server, and with drivers
that lie. The program `client_c/probe.c` does what a test tells it, a word at a time."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netbridge.ipc.errors import PortError, Reason
from netbridge.ipc.messages import Bye, Link, Ready, Welcome, parse
from netbridge.ipc.offloads import ALL_OFFLOADS, GSO_TCPV4, NEEDS_CSUM, Offload, VirtioNetHeader
from netbridge.ipc.regions import SEALS
from netbridge.ipc.requests import Answer, Filter, Mac, Verdict
from netbridge.ipc.server import ClientAsks, ClientGone, ClientReady
from tests.unit.port_fakes import (
    DEADLINE_SECONDS,
    FACTS,
    HEADROOM,
    STRIDE,
    FakeRings,
    OfferedSession,
    SealedMemory,
    ServedPort,
)

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "tests" / "client-c"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"
RECEIVE, ALLOCATE, CONTROL = 1, 2, 4
MISUSE = -6


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    """The library and its examples as `make client-library` builds them, but with the sanitizers; and the probe."""
    BUILD.mkdir(parents=True, exist_ok=True)
    # One at a time, when several test processes want it.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = f"-O1 -g {SANITIZE}"
        call("make", "-C", str(ROOT / "client"), f"BUILD={BUILD}", f"CFLAGS={flags}")
        probe = ROOT / "tests/unit/client_c/probe.c"
        strict = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags.split()]
        archive = BUILD / "lib/libnetbridge-client.a"
        # Put in place whole: another test process may be running it.
        call(compiler(), *strict, f"-I{BUILD}/include", str(probe), str(archive), "-o", str(BUILD / "probe.new"))
        (BUILD / "probe.new").replace(BUILD / "probe")
    yield BUILD


def compiler() -> str:
    return os.environ.get("CC", "cc")


def call(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aethernet.sock"


class Probe:
    """A running probe. `first`: what it said of connecting."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def __call__(self, word: str, number: int = 0) -> int:
        return int(self.ask(word, number).split()[0])

    def ask(self, word: str, number: int = 0) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word} {number}\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        """Closes the session; nothing may be left of it, and the sanitizers have nothing to say. Once is enough."""
        process = self.process
        if process.returncode is not None:
            return
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        overdue = threading.Timer(DEADLINE_SECONDS, process.kill)
        overdue.start()
        process.stdin.close()
        # Not communicate(): that knows nothing of what readline() has read ahead.
        out, err = process.stdout.read(), process.stderr.read()
        assert (process.wait(), err) == (0, "")
        overdue.cancel()
        assert out.endswith("files 0\n")


@contextmanager
def probing(library: Path, path: Path, *words: str) -> Iterator[Probe]:
    with subprocess.Popen(
        [library / "probe", path, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            probe = Probe(process)
            yield probe
            probe.end()
        finally:
            process.kill()


@contextmanager
def serving(path: Path, **options: int | None) -> Iterator[tuple[ServedPort, OfferedSession]]:
    with (
        OfferedSession(**options) as offered,  # type: ignore[arg-type]
        ServedPort(path, agree=lambda asked: asked & offered.session.offloads) as port,
    ):
        with port.paused() as server:
            server.offer(offered.session)
        yield port, offered


def frame(number: int, length: int = 60) -> bytes:
    return bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xB5]) + number.to_bytes(4, "big") + bytes(length - 18)


def checksum(data: bytes) -> int:
    total = 0
    for byte in data:
        total = (total * 31 + byte) & 0xFFFFFFFF
    return total & 0x7FFFFFFF


# ---- With the real server


def test_frames_both_ways(library: Path, path: Path) -> None:
    with serving(path, rx_limit=5) as (port, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        assert probe.first == f"session 7 room {STRIDE - HEADROOM} limit 5 link 1"
        ready = port.await_event()
        assert isinstance(ready, ClientReady)
        assert ready.peer.name == "probe"
        for _ in range(20):  # more than the rings hold
            driver.deliver(frame(1))
            driver.deliver(frame(2, 3000), piece_bytes=1000)
            assert probe("wait", RECEIVE) == RECEIVE
            assert probe("receive", 64) == 4
            assert probe("sum") == checksum(frame(1) + frame(2, 3000))
            assert [probe("flags", i) for i in range(4)] == [0, 1, 3, 2]
            assert probe("release", 4) == 0
            assert probe("allocate", 3) == 3
            assert probe("length", 100) == 0
            assert probe("fill", 0x5A) == 3
            assert probe("send", 3) == 0
            assert probe("flush") == 0
            room = STRIDE - HEADROOM
            assert driver.await_sent(3) == [b"Z" * 100, b"Z" * room, b"Z" * room]
            assert len(driver.take_back()) == 4
        with port.paused() as server:
            server.update(FACTS._replace(mtu=9000))
        assert probe("wait", CONTROL | RECEIVE) == CONTROL
        assert (probe("check"), probe("mtu")) == (0, 9000)
        assert (probe("arm", RECEIVE), probe("arm", ALLOCATE)) == (0, ALLOCATE)
        driver.deliver(frame(1))
        assert probe("arm", RECEIVE) == RECEIVE
        probe.end()
        gone = port.await_event()
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.SHUTDOWN


def test_forwarding(library: Path, path: Path) -> None:
    with serving(path, queue_pairs=2) as (_, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        assert probe("writable") == 1
        for _ in range(20):  # more than the rings hold
            driver.deliver(frame(0))
            driver.deliver(frame(1))
            assert probe("wait", RECEIVE) == RECEIVE
            assert probe("receive", 2) == 2
            assert probe("overwrite", 0x5A) == 2
            assert (probe("received_queue", 1), probe("received_length", 50)) == (1, 0)
            assert probe("forward_twice") == MISUSE
            assert driver.take_sent() == []
            assert probe("forward", 2) == 0
            assert probe("flush") == 0
            assert driver.take_sent_with_headers() == [(b"Z" * 50, b"", 1), (b"Z" * 60, b"", 0)]
            assert probe.ask("forward", 1) == f"{MISUSE} forward: a piece that is not held, or is there twice"
            assert probe.ask("release", 1) == f"{MISUSE} release: a piece that is not held, or is there twice"
            assert (driver.take_sent(), driver.take_back()) == ([], [])


@pytest.mark.parametrize("flags", [1, 2, 3, 8])
def test_what_cannot_be_forwarded(library: Path, path: Path, flags: int) -> None:
    with serving(path, tx_largest=9014, tx_pieces=5, tx_count=8) as (_, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        driver.deliver(frame(1))
        assert probe("receive", 1) == 1
        assert probe("allocate", 1) == 1
        assert probe("forward_allocated", 1) == MISUSE
        for length in (0, 13, STRIDE - HEADROOM + 1, 1 << 29):
            assert probe("received_length", length) == 0
            assert probe.ask("forward", 1).startswith(f"{MISUSE} forward: a length that is no frame's")
        assert probe("received_length", 60) == 0
        assert probe("received_queue", 1) == 1
        assert probe.ask("forward", 1) == f"{MISUSE} forward: no such queue pair"
        assert probe("received_queue", 0) == 0
        assert probe("received_flag", flags) == flags
        assert probe.ask("forward", 1).startswith(f"{MISUSE} forward: ")
        assert probe("received_flag", 0) == 0
        assert probe("flush") == 0
        assert driver.take_sent() == []
        assert probe("forward", 1) == 0
        assert driver.take_sent() == [frame(1)]


def test_read_only_frames_can_be_forwarded_as_they_are(library: Path, path: Path) -> None:
    with serving(path, rx_read_only=True) as (_, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        assert probe("writable", 0) == 0
        driver.deliver(frame(1))
        assert probe("receive", 1) == 1
        assert probe("forward", 1) == 0
        assert driver.take_sent() == [frame(1)]


def test_frames_with_a_header_are_forwarded_if_it_asks_for_nothing(library: Path, path: Path) -> None:
    offloads = 1 << 1 | 1 << 7  # GUEST_CSUM, GUEST_TSO4
    with (
        serving(path, offloads=offloads) as (_, offered),
        probing(library, path, "0", "probe", str(offloads)) as probe,
    ):
        driver = FakeRings(offered)
        for flags, gso_type in ((1, 0), (0, 1), (1, 1), (0, 4)):
            driver.deliver(frame(1), header=struct.pack("<BBHHHHH", flags, gso_type, 54, 1400, 34, 16, 1))
            assert probe("receive", 1) == 1
            assert probe.ask("forward", 1).startswith(f"{MISUSE} forward: a frame whose checksum is to be made yet")
            assert probe("release", 1) == 0
        driver.deliver(frame(1), header=struct.pack("<BBHHHHH", 2, 0, 0, 0, 0, 0, 1))
        assert probe("receive", 1) == 1
        assert probe("forward", 1) == 0
        assert driver.take_sent_with_headers() == [(frame(1), b"", 0)]


def test_what_a_caller_may_not_do_is_refused_and_harms_nothing(library: Path, path: Path) -> None:
    with serving(path) as (_, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        driver.deliver(frame(1))
        assert probe("wait", RECEIVE) == RECEIVE
        assert probe("receive", 1) == 1
        assert probe("release", 1) == 0
        assert probe.ask("release", 1) == f"{MISUSE} release: a piece that is not held, or is there twice"
        assert probe("allocate", 2) == 2
        for length in (0, 13, STRIDE - HEADROOM + 1, 1 << 29):
            assert probe("length", length) == 0
            assert probe("send", 1) == MISUSE
        assert probe("length", 60) == 0
        assert probe("twice") == MISUSE
        assert probe("fill", 1) == 2
        assert probe("send", 1) == 0
        assert probe("send", 1) == MISUSE
        assert probe("flush") == 0
        assert driver.await_sent(1) == [b"\x01" * 60]
        assert len(driver.take_back()) == 1


@pytest.mark.parametrize("name", ["", "not a name", "x" * 33])
def test_names(library: Path, path: Path, name: str) -> None:
    with probing(library, path, "1", name) as probe:
        assert probe.first.startswith(f"refused {MISUSE} 0 0 a client's name is 1 to 32 letters")


def test_nobody_there(library: Path, path: Path) -> None:
    with probing(library, path, "1") as probe:
        assert probe.first == f"refused -1 2 1 no driver listens at {path}; start one, or wait for it"
    with probing(library, Path("/" + "x" * 120), "1") as probe:
        assert "a socket's path has at most 107 bytes" in probe.first


@pytest.mark.parametrize(("reason", "may_pass"), [(Reason.BUSY, 1), (Reason.NOT_PERMITTED, 0), (Reason.SHUTDOWN, 0)])
def test_the_drivers_last_words(library: Path, path: Path, reason: Reason, may_pass: int) -> None:
    with LyingDriver(path, lambda peer: peer.send(Bye(reason, "said\x1b[2J so").pack())):
        with probing(library, path, "1") as probe:
            assert probe.first == (
                f"refused -2 {reason.value} {may_pass} the driver closed the port: {reason.words} (said?[2J so)"
            )


@pytest.mark.parametrize("limit", [9, 10], ids=["to wait with", "for event loops"])
def test_without_a_free_file_descriptor(library: Path, path: Path, limit: int) -> None:
    """There are three before, and the control socket and what came with WELCOME take six."""
    with serving(path):
        done = subprocess.run(
            ["sh", "-c", 'ulimit -n "$0"; exec "$@"', str(limit), library / "probe", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    first, last = done.stdout.splitlines()
    assert first.startswith("refused -5 "), "the driver is not to blame"
    assert first.endswith("Too many open files")
    assert last == "files 0"


def test_a_driver_that_ends_the_session(library: Path, path: Path) -> None:
    with serving(path) as (port, _), probing(library, path) as probe:
        port.await_event()
        with port.paused() as server:
            server.dismiss(Reason.DEVICE_RESET)
        assert probe("wait", RECEIVE | CONTROL) & CONTROL
        for word in ("check", "receive", "allocate", "send", "wait"):
            assert probe.ask(word, 1) == "-2 the driver closed the port: the device was reset"


@pytest.mark.parametrize("read_only", [False, True], ids=["forwarded", "copied"])
def test_the_example(library: Path, path: Path, read_only: bool) -> None:
    with serving(path, rx_read_only=read_only) as (port, offered):
        driver = FakeRings(offered)
        echo = subprocess.Popen([library / "echo", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            port.await_event()
            for number in range(100):
                driver.deliver(frame(number))
                (answer,) = driver.await_sent(1)
                assert answer == frame(number)[6:12] + frame(number)[:6] + frame(number)[12:]
                driver.take_back()
            assert driver.forwarded == (0 if read_only else 100)
            echo.send_signal(signal.SIGTERM)
            assert echo.communicate(timeout=DEADLINE_SECONDS) == ("session 7\n100 frames, 0 pieces not sent\n", "")
            assert echo.returncode == 0
        finally:
            echo.kill()
            echo.communicate()


def test_the_example_that_listens(library: Path, path: Path) -> None:
    with serving(path, offloads=int(Offload.GUEST_TSO4)) as (port, offered):
        driver = FakeRings(offered)
        command = [str(library / "listen"), str(path), "01:00:5e:00:00:fb"]
        listen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert isinstance(port.await_event(), ClientReady)
            asked = port.await_event()
            assert isinstance(asked, ClientAsks)
            assert asked.request == Filter(1, multicast=(bytes.fromhex("01005e0000fb"),))
            driver.deliver(frame(1, 3000), header=VirtioNetHeader(NEEDS_CSUM, GSO_TCPV4, gso_size=1448).pack())
            assert listen.stdout is not None
            wanted = [
                "link up, MTU 1500, 52:54:00:12:34:56",
                "1984 bytes, flags 1, segments of 1448",
                "  and 1016 bytes",
            ]
            assert [listen.stdout.readline().rstrip("\n") for _ in wanted] == wanted
            with port.paused() as server:
                server.update(FACTS._replace(link_up=False))
            assert listen.stdout.readline() == "link down, MTU 1500, 52:54:00:12:34:56\n"
            listen.send_signal(signal.SIGTERM)
            assert listen.communicate(timeout=DEADLINE_SECONDS) == ("", "")
            assert listen.returncode == 0
        finally:
            listen.kill()
            listen.communicate()


def test_the_shared_library_and_its_pkg_config_file(library: Path, tmp_path: Path) -> None:
    """What pkg-config would say, taken from the file: it is not to be installed for this."""
    fields = dict(
        line.split("=", 1) for line in (library / "lib/pkgconfig/netbridge-client.pc").read_text().splitlines()[:3]
    )
    assert fields["prefix"] == str(library)
    program = tmp_path / "echo"
    source = ROOT / "client/examples/echo.c"
    flags = [f"-I{library}/include", f"-L{library}/lib", "-lnetbridge-client", f"-Wl,-rpath,{library}/lib"]
    call(compiler(), *SANITIZE.split(), str(source), *flags, "-o", str(program))
    done = subprocess.run([program, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no driver listens at" in done.stderr
    names = call("nm", "-D", "--defined-only", str(library / "lib/libnetbridge-client.so"))
    assert {line.split()[2].partition("@")[0] for line in names.splitlines() if " T " in line} == {
        line.split()[2]
        for line in call("nm", "-g", "--defined-only", str(library / "lib/libnetbridge-client.a")).splitlines()
        if " T " in line
    }


# ---- Facts, requests, offloads


def test_the_facts_are_kept_up_to_date(library: Path, path: Path) -> None:
    with serving(path) as (port, _), probing(library, path) as probe:
        assert probe.ask("link") == "1 10000 0 52:54:00:12:34:56"
        for facts, wanted in (
            (FACTS._replace(link_up=False, speed_mbps=0), "0 0 0 52:54:00:12:34:56"),
            (FACTS._replace(mac=bytes(range(6)), announce=True), "1 10000 1 00:01:02:03:04:05"),
            (FACTS._replace(mac=bytes(range(6)), speed_mbps=25_000), "1 25000 1 00:01:02:03:04:05"),
        ):
            with port.paused() as server:
                server.update(facts)
            assert probe("wait", CONTROL) == CONTROL
            assert probe("check") == 0
            assert probe.ask("link") == wanted


def test_filters_and_the_mac_address(library: Path, path: Path) -> None:
    with serving(path) as (port, offered), probing(library, path) as probe:
        FakeRings(offered)
        port.await_event()
        groups = tuple(bytes([1, 0, 0, 0, 0, i]) for i in range(1, 64))
        cases: list[tuple[str, int, Filter | Mac]] = [
            ("filter", 0, Filter(vlans=frozenset({0}), all_unicast=True, no_broadcast=True)),
            (
                "filter",
                64,
                Filter(
                    all_unicast=True,
                    no_broadcast=True,
                    unicast=(bytes([2, 0, 0, 0, 0, 0]),),
                    multicast=groups,
                    vlans=frozenset({64}),
                ),
            ),
            ("modes", 63, Filter(0, True, True, True, True, True, True)),
            ("modes", 1, Filter(promiscuous=True)),
            ("mac", 9, Mac(0, bytes([2, 0, 0, 0, 0, 9]))),
        ]
        for number, (word, count, wanted) in enumerate(cases, 1):
            assert probe(word, count) == 0
            asked = port.await_event()
            assert isinstance(asked, ClientAsks)
            assert asked.request == wanted._replace(request=number)
        assert probe.ask("filter", 65) == f"{MISUSE} filter: 65 addresses: 64 at most"
        assert probe.ask("modes", 64) == f"{MISUSE} filter: unknown modes 0x40"
        for verdict in list(Verdict)[1:]:
            port.verdict = (verdict, "no\x1b, sorry")
            assert probe.ask("mac", 1) == "-7 the driver did not do what was asked for: no?, sorry"
            assert probe("reason") == verdict
        port.verdict = (Verdict.DONE, "")
        assert (probe("mac", 2), probe("check"), probe("allocate", 1)) == (0, 0, 1), "the session goes on"


def test_a_driver_that_answers_something_else_or_leaves(library: Path, path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [welcome_of(offered).pack()], offered.session.fds())
        assert parse(connection.recv(4096)) == Ready()
        asked = parse(connection.recv(4096))
        assert isinstance(asked, Mac)
        connection.send(Answer(asked.request + 1, Verdict.REFUSED, "another's").pack())
        connection.send(Link(FACTS._replace(mac=asked.mac)).pack())
        connection.send(Answer(asked.request, Verdict.DONE).pack())
        connection.recv(4096)
        connection.send(Bye(Reason.DEVICE_RESET).pack())

    with OfferedSession() as offered, LyingDriver(path, answer), probing(library, path) as probe:
        assert probe("mac", 7) == 0
        assert probe.ask("link") == "1 10000 0 02:00:00:00:00:07", "before the answer"
        assert probe.ask("modes", 1) == "-2 the driver closed the port: the device was reset"
        assert probe("mac", 7) == -2


def test_frames_of_several_buffers(library: Path, path: Path) -> None:
    room = STRIDE - HEADROOM
    with (
        serving(path, tx_count=8, tx_pieces=3, tx_largest=3 * room - 100, queue_pairs=2) as (_, offered),
        probing(library, path) as probe,
    ):
        driver = FakeRings(offered)
        assert probe("largest") == 3 * room - 100
        assert probe("allocate", 2) == 2
        assert (probe("length", 20), probe("fill", 0x41)) == (0, 2)
        for word, number, says in (
            ("flag", 1, "send: the last piece of a frame is missing"),
            ("flag", 2, "send: flags that do not belong there"),
            ("flag", 8, "send: flags that do not belong there"),
            ("flag", 4, "send: a header, but the session has no offloads on the transmit side"),
            ("queue", 2, "send: a piece of no queue pair, or of another than its frame's"),
        ):
            probe(word, number)
            assert probe.ask("send", 1) == f"{MISUSE} {says}"
            probe(word, 0)
        assert probe("put_flags") == 2
        probe("queue", 1)
        assert "another than its frame's" in probe.ask("send", 2)
        probe("queue", 0)
        assert probe("send", 2) == 0
        assert driver.await_sent(1) == [b"A" * (20 + room)]
        assert probe("allocate", 3) == 3
        assert probe("put_flags") == 3
        assert probe.ask("send", 3) == f"{MISUSE} send: a length that is no frame's"
        assert probe("length", room - 100) == 0
        assert (probe("fill", 0x42), probe("send", 3)) == (3, 0)
        assert driver.await_sent(1) == [b"B" * (3 * room - 100)]
        assert (probe("allocate", 4), probe("put_flags")) == (4, 4)
        assert probe.ask("send", 4) == f"{MISUSE} send: a frame of too many pieces"


@pytest.mark.parametrize("asked", [ALL_OFFLOADS, ALL_OFFLOADS & ~Offload.HOST_USO, Offload.CSUM, 0, (1 << 64) - 1])
def test_offloads(library: Path, path: Path, asked: int) -> None:
    header = VirtioNetHeader(NEEDS_CSUM, GSO_TCPV4, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)
    with (
        serving(path, offloads=int(ALL_OFFLOADS & asked)) as (port, offered),
        probing(library, path, "0", "probe", str(asked)) as probe,
    ):
        driver = FakeRings(offered)
        ready = port.await_event()
        assert isinstance(ready, ClientReady)
        has_receive, has_send = bool(asked & Offload.GUEST_TSO4), bool(asked & Offload.CSUM)
        driver.deliver(frame(1), header=header.pack() if has_receive else b"")
        assert (probe("wait", RECEIVE), probe("receive", 1)) == (RECEIVE, 1)
        assert probe("header") == (1448 if has_receive else -1)
        assert (probe("allocate", 1), probe("length", 60), probe("fill", 0x43)) == (1, 0, 1)
        assert probe("put_header", 20) == 0
        if has_send:
            assert probe("send", 1) == 0
            sent = VirtioNetHeader(NEEDS_CSUM, csum_start=20, csum_offset=6).pack()
            assert driver.take_sent_with_headers() == [(b"C" * 60, sent, 0)]
        else:
            assert "no offloads on the transmit side" in probe.ask("send", 1)


def test_offloads_that_were_not_asked_for(library: Path, path: Path) -> None:
    with OfferedSession(offloads=int(ALL_OFFLOADS)) as offered:
        fds = offered.session.fds()
        for offloads, says in ((Offload.CSUM, "of which only 0 were asked for"), (1 << 3, "that nobody knows")):
            first, _ = refusal(library, path, welcome_of(offered)._replace(offloads=offloads).pack(), fds)
            assert says in first


# ---- Drivers that lie


class LyingDriver:
    """Listens at `path` and answers each HELLO as a test says; keeps what it hears last of each."""

    def __init__(self, path: Path, *answers: Callable[[socket.socket], object]) -> None:
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(DEADLINE_SECONDS)
        self.last: list[bytes] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for answer in self._answers:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(DEADLINE_SECONDS)
                connection.recv(4096)
                answer(connection)
                last = b""
                while data := connection.recv(4096):
                    last = data
                self.last.append(last)

    def byes(self) -> list[Reason]:
        self._thread.join()
        said = [parse(data) for data in self.last]
        return [message.reason for message in said if isinstance(message, Bye)]

    def __enter__(self) -> LyingDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def offering(data: bytes, fds: tuple[int, ...]) -> Callable[[socket.socket], object]:
    return lambda connection: socket.send_fds(connection, [data], fds)


def welcome_of(offered: OfferedSession) -> Welcome:
    return Welcome(offered.session.number, FACTS, offered.session.geometry)


def refusal(library: Path, path: Path, data: bytes, fds: tuple[int, ...]) -> tuple[str, Reason]:
    with LyingDriver(path, offering(data, fds)) as driver:
        with probing(library, path, "1") as probe:
            first = probe.first
        (reason,) = driver.byes()
    path.unlink()
    return first, reason


def test_memory_that_is_not_as_it_is_said_to_be(library: Path, path: Path) -> None:
    with OfferedSession() as offered:
        for which in range(3):
            size = os.fstat(offered.session.fds()[which]).st_size
            for seals, by, says in (
                (0, 0, "not sealed"),
                (SEALS & ~fcntl.F_SEAL_SHRINK, 0, "not sealed"),
                (SEALS & ~fcntl.F_SEAL_GROW, 0, "not sealed"),
                (SEALS & ~fcntl.F_SEAL_SEAL, 0, "not sealed"),
                (SEALS, 4096, "does not have the size"),
                (SEALS, -4096, "does not have the size"),
            ):
                if size + by == 0:
                    continue
                bad = SealedMemory(size + by, seals=seals)
                fds = list(offered.session.fds())
                fds[which] = bad.fd
                first, reason = refusal(library, path, welcome_of(offered).pack(), tuple(fds))
                assert first.startswith("refused -4 0 0 ")
                assert says in first
                assert reason is Reason.GEOMETRY
                bad.close()
            fds = list(offered.session.fds())
            fds[which] = fds[3]
            assert "not a memfd" in refusal(library, path, welcome_of(offered).pack(), tuple(fds))[0]


def test_doorbells_that_are_none(library: Path, path: Path) -> None:
    blocking = os.eventfd(0)
    with OfferedSession() as offered:
        data, fds = welcome_of(offered).pack(), offered.session.fds()
        assert "O_NONBLOCK" in refusal(library, path, data, (*fds[:3], blocking, fds[4]))[0]
        for stranger in (1, 3):
            assert "no epoll instance" in refusal(library, path, data, (*fds[:4], fds[stranger]))[0]
    os.close(blocking)


def test_what_is_no_welcome(library: Path, path: Path) -> None:
    with OfferedSession() as offered:
        good, fds = welcome_of(offered).pack(), offered.session.fds()
        for count in (0, 4, 6, 20):
            first, reason = refusal(library, path, good, (fds * 4)[:count])
            assert first.startswith("refused -3 ")
            assert reason in (Reason.UNEXPECTED, Reason.MALFORMED)
        for data, wanted in (
            (b"HTTP/1.1 200 OK\r\n", Reason.MALFORMED),
            (b"x", Reason.MALFORMED),
            (b"x" * 5000, Reason.MALFORMED),
            (good[:-1], Reason.MALFORMED),
            (good + b"\0", Reason.MALFORMED),
            (Link(FACTS).pack(), Reason.MALFORMED),
            (struct.pack("<4sHHII", b"NBPT", 2, 7, 16, 0), Reason.VERSION),
        ):
            first, reason = refusal(library, path, data, fds)
            assert first.startswith("refused -3 ")
            assert reason is wanted
        assert "no WELCOME" in refusal(library, path, Ready().pack(), ())[0]


def test_every_number_of_welcome_is_checked_as_the_python_client_checks_it(library: Path, path: Path) -> None:
    """Single bits, single words, and words that are beside a bound: both clients come to the same verdict."""
    choose = random.Random(1)
    interesting = [0, 1, 7, 59, 63, 64, 65, 127, 128, 2047, 2048, 4095, 4096, 1 << 20, 1 << 24, 1 << 31, (1 << 32) - 1]
    with OfferedSession() as offered:
        good, fds = welcome_of(offered).pack(), offered.session.fds()
        sizes = [os.fstat(fd).st_size for fd in fds[:3]]
        offers = [good]
        offers += [flipped(good, bit) for bit in range(16 * 8, len(good) * 8)]
        for at in range(16, len(good), 4):
            offers += [good[:at] + value.to_bytes(4, "little") + good[at + 4 :] for value in interesting]
        for _ in range(300):
            at, value = choose.randrange(64, len(good) - 7, 8), choose.choice([-1, 1]) * choose.choice(interesting)
            offers.append(good[:at] + (value % (1 << 64)).to_bytes(8, "little") + good[at + 8 :])
        # What a driver may grant that was not asked for is another matter.
        offers = [data for data in offers if data[48:56] == good[48:56]]
        with LyingDriver(path, *(offering(data, fds) for data in offers)):
            with probing(library, path, str(len(offers))) as probe:
                verdicts = [probe.first] + [probe.line() for _ in offers[1:]]
    for data, verdict in zip(offers, verdicts, strict=True):
        assert verdict.startswith("session") == holds(data, sizes), (verdict, data.hex())
    assert sum(verdict.startswith("session") for verdict in verdicts) > 10, "else this shows nothing"


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def holds(data: bytes, sizes: list[int]) -> bool:
    try:
        welcome = parse(data)
        assert isinstance(welcome, Welcome)
        welcome.geometry.check()
    except PortError:
        return False
    geometry = welcome.geometry
    return [geometry.rings_size, geometry.rx.size, geometry.tx.size] == sizes


@pytest.mark.parametrize(
    ("data", "fds", "says"),
    [
        (Link(FACTS).pack(), 2, "file descriptors where none belong"),
        (Ready().pack(), 0, "a message out of place in a running session"),
        (Link(FACTS).pack()[:-1], 0, "LINK of 31 bytes instead of 32"),
        (Link(FACTS._replace(mtu=68)).pack().replace(b"\x44\0\0\0", b"\x43\0\0\0"), 0, "facts that may not be"),
        (b"x" * 1100, 0, "longer than any message"),
        (Filter(1).pack(), 0, "a message out of place in a running session"),
        (Answer(1, Verdict.DONE).pack()[:20] + b"\5" + bytes(107), 0, "ANSWER with a verdict"),
        (Answer(1, Verdict.DONE).pack()[:22] + b"\1" + bytes(105), 0, "ANSWER with a verdict"),
    ],
)
def test_rubbish_in_a_running_session_ends_it(library: Path, path: Path, data: bytes, fds: int, says: str) -> None:
    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [welcome_of(offered).pack()], offered.session.fds())
        assert parse(connection.recv(4096)) == Ready()
        socket.send_fds(connection, [data], [0] * fds)

    with OfferedSession() as offered, LyingDriver(path, answer) as driver, probing(library, path) as probe:
        if probe.first.startswith("session"):
            assert probe("wait", CONTROL) == CONTROL
            assert says in probe.ask("check")
        else:
            assert says in probe.first
        probe.end()
        (reason,) = driver.byes()
        assert reason in (Reason.MALFORMED, Reason.UNEXPECTED)


RX, TX_ACK = FakeRings.RX_PACKET, FakeRings.TX_PACKET_ACK


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([(1, 0, 60, RX, 0), (1, 0, 60, RX, 0)], "an RX buffer came twice"),
        ([(1, 8, 60, RX, 0)], "an entry in rx_active"),
        ([(2, 0, 60, RX, 0)], "an entry in rx_active"),
        ([(1, 0, STRIDE - HEADROOM + 1, RX, 0)], "an entry in rx_active"),
        ([(1, 0, 0xFFFFFFFF, RX, 0)], "an entry in rx_active"),
        ([(1, 0, 60, TX_ACK, 0)], "an entry in rx_active"),
        ([(1, 0, 60, RX, 2)], "an entry in rx_active"),
        ([(1, 0, 60, RX, 1), (1, 1, 60, RX, 0)], "an entry in rx_active"),
    ],
)
def test_entries_that_may_not_be(
    library: Path, path: Path, entries: list[tuple[int, int, int, int, int]], says: str
) -> None:
    with serving(path) as (port, offered), probing(library, path) as probe:
        driver = FakeRings(offered)
        for region, index, length, kind, flags in entries:
            driver.rx_active.put(driver.handle(region, index), length, kind, flags)
        answers = [probe.ask("receive", 1) for _ in entries]
        assert says in answers[-1]
        assert answers[-1].startswith("-3 ")
        assert probe("allocate", 1) == -3, "the session is over"
        port.await_event()
        gone = port.await_event()
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.RING_FAULT


def test_buffers_to_send_that_may_not_be(library: Path, path: Path) -> None:
    lies: tuple[Callable[[FakeRings], object], ...] = (
        lambda driver: driver.tx_done.put(driver.handle(2, 0), 1984, TX_ACK),  # twice
        lambda driver: driver.tx_done.put(driver.handle(2, 4), 1984, TX_ACK),
        lambda driver: driver.tx_done.put(driver.handle(2, 0), 1985, TX_ACK),
        lambda driver: driver.tx_done.set_word(0, 1 << 31),
    )
    for lie in lies:
        with serving(path) as (_, offered), probing(library, path) as probe:
            driver = FakeRings(offered)
            assert probe("allocate", 4) == 4
            lie(driver)
            assert probe("allocate", 1) == -3
