"""The client library's handshake: with the real server, and with drivers that lie."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from netbridge.client import Client, PortClosed, PortError, PortUnavailable, Reason, connect
from netbridge.ipc.errors import BadGeometry
from netbridge.ipc.messages import Bye, Link, Welcome, parse
from netbridge.ipc.regions import SEALS
from netbridge.ipc.server import ClientGone, ClientReady, ClientRefused
from tests.descriptors import count_open_fds
from tests.unit.port_fakes import (
    FACTS,
    MAC,
    STRIDE,
    FakeRings,
    OfferedSession,
    RawClient,
    SealedMemory,
    ServedPort,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "aethernet.sock"


@contextmanager
def serving(path: Path, offered: OfferedSession | None = None, **options: object) -> Iterator[ServedPort]:
    with ServedPort(path, **options) as port:
        if offered is not None:
            with port.paused() as server:
                server.offer(offered.session)
        yield port


# ---- With the real server


def test_connecting_tells_what_there_is_to_know(path: Path) -> None:
    before = count_open_fds()
    with OfferedSession(41, rx_limit=5) as offered, serving(path, offered) as port:
        with connect(path, name="my-stack") as client:
            assert (client.session, client.mac, client.mtu, client.link_up) == (41, MAC, 1500, True)
            assert (client.speed_mbps, client.room, client.rx_limit, client.closed) == (10_000, STRIDE - 64, 5, False)
            ready = port.await_event()
            assert isinstance(ready, ClientReady)
            assert ready.peer.name == "my-stack"
        gone = port.await_event()
        assert isinstance(gone, ClientGone)
        assert (gone.session, gone.reason) == (41, Reason.SHUTDOWN)
    assert count_open_fds() == before


def test_changed_facts_arrive(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered) as port, connect(path) as client:
        port.await_event()
        with port.paused() as server:
            server.update(FACTS._replace(link_up=False, mtu=9000))
        assert client.wait(timeout=0.0) is False
        assert (client.link_up, client.mtu) == (False, 9000)


def test_the_drivers_last_words_are_the_error(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered) as port, connect(path) as client:
        port.await_event()
        with port.paused() as server:
            server.dismiss(Reason.DEVICE_RESET, "the device asked for it")
        for _ in range(2):
            with pytest.raises(PortClosed, match=r"the device was reset \(the device asked for it\)") as caught:
                client.receive(timeout=5)
        assert caught.value.reason is Reason.DEVICE_RESET
        assert caught.value.reason.may_pass
        assert client.closed
        with pytest.raises(PortClosed):
            client.send_bytes(bytes(60))


def test_the_drivers_death_ends_a_wait(path: Path) -> None:
    with OfferedSession() as offered:
        port = ServedPort(path)
        with port.paused() as server:
            server.offer(offered.session)
        with connect(path) as client:
            port.await_event()
            with port.paused() as server:
                connection = server._client
                assert connection is not None
                timer = threading.Timer(0.05, connection.socket.shutdown, [socket.SHUT_RDWR])
                timer.start()
                with pytest.raises(PortClosed, match="hung up"):
                    client.receive(timeout=30)
                timer.join()
        port.close()


def test_nobody_there(path: Path) -> None:
    before = count_open_fds()
    with pytest.raises(PortUnavailable, match=r"no driver listens at .*aethernet\.sock; start one"):
        connect(path)
    path.write_text("")
    with pytest.raises(PortError, match=r"no driver listens at"):
        connect(path)
    with pytest.raises(PortError, match=r"cannot connect to"):
        connect(path.parent / ("x" * 120))
    with pytest.raises(ValueError, match="client name"):
        connect(path, name="not a name")
    assert count_open_fds() == before


def test_without_free_file_descriptors(path: Path) -> None:
    """Wherever they come to an end while the offer is taken: the driver is not to blame."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = count_open_fds()
    for free in itertools.count(7):  # both ends of the connection, and what comes with WELCOME
        with OfferedSession() as offered, serving(path, offered) as port, ExitStack() as hoard:
            highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + free + 1, hard))
            hoard.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            taken = []
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for fd in taken[:free]:
                os.close(fd)
            for fd in taken[free:]:
                hoard.callback(os.close, fd)
            try:
                connect(path).close()
                break
            except PortError as error:
                assert not isinstance(error, BadGeometry), error
                assert str(error).endswith("Too many open files")
                gone = port.await_event()
                assert isinstance(gone, ClientGone)
                assert gone.reason is Reason.FAILED
    assert free > 10
    assert count_open_fds() == before


def test_waiting_for_a_driver_that_starts_later(path: Path) -> None:
    with OfferedSession() as offered:
        ports: list[ServedPort] = []

        def start() -> None:
            port = ServedPort(path)
            with port.paused() as server:
                server.offer(offered.session)
            ports.append(port)

        timer = threading.Timer(0.1, start)
        timer.start()
        with connect(path, wait=30) as client:
            assert client.session == 7
        timer.join()
        ports[0].close()


def test_waiting_has_an_end(path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(PortUnavailable):
        connect(path, wait=0.2)
    assert 0.2 <= time.monotonic() - start < 5


def test_busy_is_an_answer(path: Path) -> None:
    before = count_open_fds()
    with OfferedSession() as offered, serving(path, offered) as port, connect(path):
        port.await_event()
        with pytest.raises(PortClosed, match="another client has the port") as caught:
            connect(path)
        assert caught.value.reason is Reason.BUSY
        assert isinstance(port.await_event(), ClientRefused)
    assert count_open_fds() == before


def test_a_client_that_waits_follows_one_that_leaves(path: Path) -> None:
    with OfferedSession(1) as one, OfferedSession(2) as two, serving(path, one) as port:
        first = connect(path)
        port.await_event()
        timer = threading.Timer(0.1, first.close)
        timer.start()
        following = threading.Thread(target=lambda: result.append(connect(path, wait=30)))
        result: list[Client] = []
        following.start()
        while not isinstance(port.await_event(), ClientGone):
            pass
        with port.paused() as server:
            server.offer(two.session)
        following.join()
        timer.join()
        with result[0] as client:
            assert client.session == 2


def test_a_driver_whose_device_is_not_ready_is_not_waited_for_too_long(path: Path) -> None:
    before = count_open_fds()
    with serving(path), pytest.raises(PortUnavailable, match="did not answer in time"):
        connect(path, timeout=0.1)
    assert count_open_fds() == before


def test_sessions_in_a_row_leak_nothing(path: Path) -> None:
    with serving(path) as port:
        before = None
        for number in range(1, 101):
            with OfferedSession(number) as offered:
                with port.paused() as server:
                    server.offer(offered.session)
                with connect(path) as client:
                    assert client.session == number
                    client.send_bytes(bytes(60), timeout=0) if client.allocate(1, timeout=0) else None
                while not isinstance(port.await_event(), ClientGone):
                    pass
            now = (count_open_fds(), Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:"))
            before = before or now
            assert now == before


def test_a_client_that_is_forgotten_says_so(path: Path) -> None:
    before = count_open_fds()
    with OfferedSession() as offered, serving(path, offered) as port:
        client = connect(path)
        port.await_event()
        with pytest.warns(ResourceWarning, match="session 7 was never closed"):
            del client
        assert isinstance(port.await_event(), ClientGone)
    assert count_open_fds() == before


def test_a_client_needs_nothing_of_the_driver() -> None:
    # Less what Python itself brings: under coverage.py that is more.
    program = "import sys; before = {*sys.modules}; import netbridge.client, netbridge.services.echo; "
    program += "print(sorted({*sys.modules} - before))"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    for stranger in ("vfio", "yaml", "netbridge.ipc.server", "netbridge.vnode", "netbridge.virtio", "dataclasses"):
        assert f"'{stranger}'" not in modules


# ---- Drivers that lie


class LyingDriver:
    """Listens at `path`, answers one HELLO as a test says, and keeps what it hears afterwards."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], object]) -> None:
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(10)
        self.heard: list[bytes] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(10)
            connection.recv(4096)
            self._answer(connection)
            while data := connection.recv(4096):
                self.heard.append(data)

    def bye(self) -> Bye:
        """What the client said about it, last."""
        self._thread.join()
        message = parse(self.heard[-1])
        assert isinstance(message, Bye)
        return message

    def __enter__(self) -> LyingDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def welcome_of(offered: OfferedSession) -> Welcome:
    return Welcome(offered.session.number, FACTS, offered.session.geometry)


def refused(path: Path, data: bytes, fds: tuple[int, ...]) -> tuple[PortError, Bye]:
    """The error of a client that is answered so, and its BYE; nothing may leak."""
    before = count_open_fds()
    with LyingDriver(path, lambda connection: socket.send_fds(connection, [data], fds)) as driver:
        with pytest.raises(PortError) as caught:
            connect(path)
        bye = driver.bye()
    assert count_open_fds() == before
    return caught.value, bye


@pytest.mark.parametrize("seals", [0, SEALS & ~fcntl.F_SEAL_SHRINK, SEALS & ~fcntl.F_SEAL_SEAL])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_memory_that_could_shrink_is_refused(path: Path, which: int, seals: int) -> None:
    with OfferedSession() as offered:
        fds = list(offered.session.fds())
        bad = SealedMemory(os.fstat(fds[which]).st_size, seals=seals)
        fds[which] = bad.fd
        error, bye = refused(path, welcome_of(offered).pack(), tuple(fds))
        assert isinstance(error, BadGeometry)
        assert "not sealed" in str(error)
        assert bye.reason is Reason.GEOMETRY
        bad.close()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("by", [-4096, 4096])
def test_memory_of_another_size_is_refused(path: Path, which: int, by: int) -> None:
    with OfferedSession() as offered:
        fds = list(offered.session.fds())
        bad = SealedMemory(os.fstat(fds[which]).st_size + by + 4096 * (which == 0))
        if os.fstat(fds[which]).st_size == bad.size:
            bad.close()
            bad = SealedMemory(os.fstat(fds[which]).st_size + 8192)
        fds[which] = bad.fd
        error, bye = refused(path, welcome_of(offered).pack(), tuple(fds))
        assert "bytes instead of" in str(error)
        assert bye.reason is Reason.GEOMETRY
        bad.close()


def test_a_geometry_that_reaches_beyond_its_memory_is_refused(path: Path) -> None:
    with OfferedSession() as offered:
        welcome = welcome_of(offered)
        geometry = welcome.geometry
        bad = geometry._replace(tx_done=geometry.tx_done._replace(offset=(1 << 64) - 128))
        error, bye = refused(path, welcome._replace(geometry=bad).pack(), offered.session.fds())
        assert "tx_done ends at byte" in str(error)
        assert bye.reason is Reason.GEOMETRY


def test_a_doorbell_that_blocks_is_refused(path: Path) -> None:
    with OfferedSession() as offered:
        fds = list(offered.session.fds())
        blocking = os.eventfd(0)
        fds[3] = blocking
        error, _ = refused(path, welcome_of(offered).pack(), tuple(fds))
        assert "not opened with O_NONBLOCK" in str(error)
        os.close(blocking)


def test_a_doorbell_that_is_none_is_refused(path: Path) -> None:
    with OfferedSession() as offered:
        fds = list(offered.session.fds())
        for stranger in (1, 3):
            fds[4] = fds[stranger]
            error, _ = refused(path, welcome_of(offered).pack(), tuple(fds))
            assert "driver doorbell: no epoll instance" in str(error)
            path.unlink()


@pytest.mark.parametrize("count", [0, 4, 6, 20])
def test_welcome_with_another_number_of_fds_is_refused(path: Path, count: int) -> None:
    with OfferedSession() as offered:
        fds = (offered.session.fds() * 4)[:count]
        error, bye = refused(path, welcome_of(offered).pack(), fds)
        assert "is no driver" in str(error)
        assert bye.reason in (Reason.UNEXPECTED, Reason.MALFORMED)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n", "magic"),
        (b"x" * 5000, "packet longer than any message"),
        (Link(FACTS).pack(), "LINK with 5 file descriptors instead of WELCOME"),
        (struct.pack("<4sHHII", b"NBPT", 2, 7, 16, 0), "message of version 7"),
    ],
)
def test_what_is_no_welcome_is_refused(path: Path, data: bytes, says: str) -> None:
    with OfferedSession() as offered:
        error, _ = refused(path, data, offered.session.fds())
        assert says in str(error)


def test_fds_with_a_bye_are_closed(path: Path) -> None:
    before = count_open_fds()
    reader, writer = os.pipe()

    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [Bye(Reason.FAILED, "no device").pack()], [writer])
        os.close(writer)

    with LyingDriver(path, answer):
        with pytest.raises(PortClosed, match=r"internal failure \(no device\)"):
            connect(path)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert count_open_fds() == before


def test_rubbish_and_fds_in_a_running_session_end_it(path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [welcome_of(offered).pack()], offered.session.fds())
        socket.send_fds(connection, [Link(FACTS).pack()], [0, 1])

    with OfferedSession() as offered:
        before = count_open_fds()
        with LyingDriver(path, answer) as driver:
            with connect_or_later(path, "file descriptors where none belong"):
                pass
            assert driver.bye().reason is Reason.MALFORMED
        assert count_open_fds() == before


@contextmanager
def connect_or_later(path: Path, says: str) -> Iterator[None]:
    """A session that fails with this error: while connecting, or at the first look at the control socket."""
    with pytest.raises(PortError, match=says), connect(path) as client:
        client.receive(timeout=10)
    yield


def test_a_read_only_rx_region_is_read_only(path: Path) -> None:
    with OfferedSession(rx_read_only=True) as offered, serving(path, offered) as port:
        driver = FakeRings(offered)
        with connect(path) as client:
            port.await_event()
            # The driver's own mapping is older than the seal.
            driver.deliver(b"x" * 60)
            with client.receive(timeout=0)[0] as frame:
                assert bytes(frame.data) == b"x" * 60
            client.send_bytes(bytes(60))
            assert driver.take_sent() == [bytes(60)]
            client_fd = client._fds[1]
            with pytest.raises(PermissionError):
                mmap.mmap(client_fd, offered.rx.size)
            with pytest.raises(PermissionError):
                os.pwrite(client_fd, b"y", 64)
            mmap.mmap(client_fd, offered.rx.size, prot=mmap.PROT_READ).close()


def test_a_region_said_to_be_writable_that_is_not_is_refused(path: Path) -> None:
    with OfferedSession(rx_read_only=True) as offered:
        welcome = welcome_of(offered)
        geometry = welcome.geometry._replace(rx=welcome.geometry.rx._replace(read_only=False))
        error, bye = refused(path, welcome._replace(geometry=geometry).pack(), offered.session.fds())
        assert "cannot map" in str(error)
        assert bye.reason is Reason.FAILED


def test_a_raw_client_and_the_library_see_the_same_welcome(path: Path) -> None:
    with OfferedSession() as offered, serving(path, offered), RawClient(path) as raw:
        raw.send(b"NBPT" + struct.pack("<HHII", 1, 1, 64, 0) + struct.pack("<HHIQ32s", 1, 1, 0, 0, b"rust"))
        data, fds = raw.receive()
        for fd in fds:
            os.close(fd)
        # The numbers of docs/port.md, read without the library.
        mac, flags, mtu, speed = struct.unpack_from("<6sHII", data, 16)
        session, pairs, headroom, continuation, rx_limit, offloads, rings_size, largest, pieces = struct.unpack_from(
            "<HHIIIQQII", data, 32
        )
        assert (mac, flags, mtu, speed) == (MAC, 1, 1500, 10_000)
        assert (session, pairs, headroom, continuation, rx_limit, offloads) == (7, 1, 64, 52, 6, 0)
        assert (largest, pieces) == (STRIDE - 64, 1)
        rings = [struct.unpack_from("<QII", data, 72 + 16 * i) for i in range(4)]
        assert [slots for _, slots, _ in rings] == [8, 8, 16, 4]
        assert all(offset % 128 == 0 and offset + 128 + 16 * slots <= rings_size for offset, slots, _ in rings)
        assert struct.unpack_from("<QIIII", data, 136) == (offered.rx.size, 8, STRIDE, 0, 0)
        assert struct.unpack_from("<QIIII", data, 160) == (offered.tx.size, 4, STRIDE, 0, 0)
