"""The driver's end of the control socket, over real sockets: the handshake, and everything that is not one.

The server is called from the test itself, as the pump's owner calls it: wait for `fileno()`, then `handle()`.
"""

from __future__ import annotations

import fcntl
import os
import random
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netbridge.ipc.errors import BadGeometry, PortError, PortInUse, PortUnavailable, Reason
from netbridge.ipc.listener import PortListener
from netbridge.ipc.messages import Bye, Facts, Hello, Link, Ready, Welcome, parse
from netbridge.ipc.server import ClientGone, ClientReady, ClientRefused, Event, PortServer
from netbridge.ipc.session import PortSession
from tests.descriptors import count_open_fds
from tests.unit.port_fakes import (
    DEADLINE_SECONDS,
    FACTS,
    MAC,
    STRIDE,
    OfferedSession,
    RawClient,
    SealedMemory,
    close_all,
)

HELLO = Hello("tester").pack()
READY = Ready().pack()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "aethernet.sock"


@pytest.fixture
def server(path: Path) -> Iterator[PortServer]:
    with PortServer(path, {os.geteuid()}, FACTS) as server:
        yield server


@pytest.fixture
def offered(server: PortServer) -> Iterator[OfferedSession]:
    with OfferedSession() as offered:
        server.offer(offered.session)
        yield offered


def handle(server: PortServer) -> list[Event]:
    """Waits until the server has something to do, and lets it."""
    readable, _, _ = select.select([server.fileno()], [], [], DEADLINE_SECONDS)
    assert readable, "the server's fd did not become readable"
    return server.handle()


def handle_until(server: PortServer, kind: type[Event]) -> Event:
    """The next event, which must be of this kind."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        events = handle(server)
        if events:
            assert len(events) == 1, events
            assert isinstance(events[0], kind), events
            return events[0]
    raise AssertionError(f"no {kind.__name__} came")


def quiet(server: PortServer) -> bool:
    return not select.select([server.fileno()], [], [], 0)[0]


def shake_hands(server: PortServer, client: RawClient) -> list[int]:
    """The whole handshake; returns the fds of WELCOME."""
    client.send(HELLO)
    assert handle(server) == []
    data, fds = client.receive()
    assert isinstance(parse(data), Welcome)
    client.send(READY)
    event = handle_until(server, ClientReady)
    assert isinstance(event, ClientReady)
    return fds


def told(client: RawClient) -> Bye:
    """The BYE that the driver said, after which it hung up."""
    data, fds = client.receive()
    assert fds == []
    message = parse(data)
    assert isinstance(message, Bye), message
    assert client.receive() == (b"", [])
    return message


# ---- The handshake


def test_handshake(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as client:
        client.send(HELLO)
        assert handle(server) == []
        data, fds = client.receive()
        assert parse(data) == Welcome(7, FACTS, offered.session.geometry)
        try:
            inodes = [os.fstat(fd).st_ino for fd in fds]
            assert inodes == [os.fstat(fd).st_ino for fd in offered.session.fds()]
            assert os.fstat(fds[0]).st_size == offered.session.geometry.rings_size
            assert (inodes[1], inodes[2]) == (os.fstat(offered.rx.fd).st_ino, os.fstat(offered.tx.fd).st_ino)
            os.eventfd_write(fds[3], 1)
            assert os.eventfd_read(offered.session.client_doorbell_fd) == 1
            for _ in range(2):
                assert not select.select([fds[4]], [], [], 0)[0]
                os.eventfd_write(offered.session.driver_doorbell_fd, 1)
                assert select.select([fds[4]], [], [], 0)[0]
                with select.epoll.fromfd(os.dup(fds[4])) as doorbell:
                    assert len(doorbell.poll(0)) == 1
        finally:
            close_all(fds)
        assert not server.running
        client.send(READY)
        event = handle_until(server, ClientReady)
        assert isinstance(event, ClientReady)
        assert event.session == 7
        assert (event.peer.pid, event.peer.uid, event.peer.name) == (os.getpid(), os.geteuid(), "tester")
        assert server.running
        assert quiet(server)


def test_a_client_cannot_make_the_drivers_doorbell_block(
    server: PortServer, offered: OfferedSession, path: Path
) -> None:
    with RawClient(path) as client:
        fds = shake_hands(server, client)
        for fd in fds:
            os.set_blocking(fd, True)
        assert not os.get_blocking(offered.session.driver_doorbell_fd)
        # Nothing that was sent can be written to, or read from, so as to change the driver's eventfd.
        for attempt in (lambda: os.write(fds[4], b"\xff" * 7 + b"\x7f"), lambda: os.read(fds[4], 8)):
            with pytest.raises(OSError, match="Invalid argument"):
                attempt()
        same = {str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in (*fds[:3], fds[4])}
        assert "anon_inode:[eventfd]" not in same
        close_all(fds)


def test_a_client_waits_for_the_session_it_will_get(server: PortServer, path: Path) -> None:
    with RawClient(path) as client:
        client.send(HELLO)
        assert handle(server) == []
        assert quiet(server)
        with OfferedSession(9) as offered:
            server.offer(offered.session)
            data, fds = client.receive()
            close_all(fds)
            welcome = parse(data)
            assert isinstance(welcome, Welcome)
            assert welcome.session == 9


def test_the_drivers_own_delay_is_not_held_against_the_client(path: Path) -> None:
    with PortServer(path, {os.geteuid()}, FACTS, handshake_seconds=0.05) as server, RawClient(path) as client:
        client.send(HELLO)
        assert handle(server) == []
        assert not select.select([server.fileno()], [], [], 0.2)[0]
        assert server.client is not None


def test_an_offer_is_for_one_client_only(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as first:
        first.send(HELLO)
        handle(server)
        close_all(first.receive()[1])
    gone = handle_until(server, ClientGone)
    # It never said READY, yet it has the fds: the session is spent.
    assert isinstance(gone, ClientGone)
    assert gone.session == 7
    with RawClient(path) as second:
        second.send(HELLO)
        handle(server)
        assert not select.select([second.socket], [], [], 0)[0]


def test_a_client_that_left_before_welcome_leaves_the_offer(server: PortServer, path: Path) -> None:
    with OfferedSession() as offered:
        server.offer(offered.session)
        RawClient(path).close()
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        assert gone.session is None
        with RawClient(path) as client:
            close_all(shake_hands(server, client))


def test_a_withdrawn_offer_is_not_made(server: PortServer, offered: OfferedSession, path: Path) -> None:
    server.withdraw()
    with RawClient(path) as client:
        client.send(HELLO)
        handle(server)
        assert not select.select([client.socket], [], [], 0)[0]


def test_no_new_offer_while_a_session_lives(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as client, OfferedSession(8) as other:
        close_all(shake_hands(server, client))
        with pytest.raises(PortError, match="session 7 is still with client tester"):
            server.offer(other.session)


# ---- The end


def test_a_bye_of_the_client_is_passed_on(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as client:
        close_all(shake_hands(server, client))
        client.send(Bye(Reason.SHUTDOWN, "done").pack())
        gone = handle_until(server, ClientGone)
    assert isinstance(gone, ClientGone)
    assert (gone.session, gone.reason, gone.text) == (7, Reason.SHUTDOWN, "done")
    assert "client tester" in str(gone)
    assert not server.running


def test_a_bye_is_heard_although_the_client_left_with_unread_messages(
    server: PortServer, offered: OfferedSession, path: Path
) -> None:
    with RawClient(path) as client:
        close_all(shake_hands(server, client))
        server.update(FACTS._replace(link_up=False))
        client.send(Bye(Reason.SHUTDOWN, "done").pack())
    gone = handle_until(server, ClientGone)
    assert isinstance(gone, ClientGone)
    assert gone.reason is Reason.SHUTDOWN


@pytest.mark.parametrize("packet", [None, b""])
def test_a_hang_up_is_noticed(server: PortServer, offered: OfferedSession, path: Path, packet: bytes | None) -> None:
    with RawClient(path) as client:
        close_all(shake_hands(server, client))
        if packet is not None:
            # Not to be told from a hang-up, so it is one.
            client.send(packet)
            gone = handle_until(server, ClientGone)
    if packet is None:
        gone = handle_until(server, ClientGone)
    assert isinstance(gone, ClientGone)
    assert (gone.session, gone.reason, gone.text) == (7, Reason.UNSPECIFIED, "hung up")


def test_dismissal_tells_the_client_why(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as client:
        close_all(shake_hands(server, client))
        gone = server.dismiss(Reason.RING_FAULT, "a handle that was already given back")
        assert gone is not None
        assert (gone.session, gone.reason) == (7, Reason.RING_FAULT)
        assert told(client) == Bye(Reason.RING_FAULT, "a handle that was already given back")
    assert server.dismiss(Reason.RING_FAULT) is None
    with OfferedSession(8) as following, RawClient(path) as client:
        server.offer(following.session)
        close_all(shake_hands(server, client))


def test_closing_says_so_and_leaves_nothing(path: Path) -> None:
    before = count_open_fds()
    with OfferedSession() as offered:
        server = PortServer(path, {os.geteuid()}, FACTS)
        server.offer(offered.session)
        with RawClient(path) as client:
            close_all(shake_hands(server, client))
            server.close()
            assert told(client).reason is Reason.SHUTDOWN
        server.close()
    assert list(path.parent.iterdir()) == []
    assert count_open_fds() == before


# ---- Live facts


def test_changed_facts_are_told(server: PortServer, offered: OfferedSession, path: Path) -> None:
    server.update(FACTS._replace(mtu=9000))
    with RawClient(path) as client:
        client.send(HELLO)
        handle(server)
        data, fds = client.receive()
        close_all(fds)
        welcome = parse(data)
        assert isinstance(welcome, Welcome)
        assert welcome.facts.mtu == 9000
        down = Facts(MAC, 9000, False, 0)
        server.update(down)
        server.update(down)
        assert parse(client.receive()[0]) == Link(down)
        assert not select.select([client.socket], [], [], 0)[0]


def test_a_client_that_does_not_read_gets_the_newest_facts_later(
    server: PortServer, offered: OfferedSession, path: Path
) -> None:
    with RawClient(path) as client:
        close_all(shake_hands(server, client))
        changes = 5000
        for speed in range(changes):
            server.update(FACTS._replace(speed_mbps=speed))
        assert quiet(server), "a full socket is no work"
        seen: list[Facts] = []
        client.socket.settimeout(0)
        last = FACTS._replace(speed_mbps=changes - 1)
        while not seen or seen[-1] != last:
            try:
                message = parse(client.receive()[0])
                assert isinstance(message, Link)
                seen.append(message.facts)
            except BlockingIOError:
                assert handle(server) == []
        assert len(seen) < changes
        assert quiet(server)


# ---- Who may


def test_another_uid_is_refused(path: Path) -> None:
    with PortServer(path, {os.geteuid() + 1}, FACTS) as server, RawClient(path) as client:
        client.send(HELLO)
        refused = handle_until(server, ClientRefused)
        assert isinstance(refused, ClientRefused)
        assert (refused.peer.uid, refused.reason) == (os.geteuid(), Reason.NOT_PERMITTED)
        assert "was refused: not permitted" in str(refused)
        bye = told(client)
        assert bye.reason is Reason.NOT_PERMITTED
        assert str(os.geteuid()) in bye.text
        assert server.client is None


def test_a_second_client_is_told_that_the_port_is_busy(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as first:
        close_all(shake_hands(server, first))
        with RawClient(path) as second:
            refused = handle_until(server, ClientRefused)
            assert isinstance(refused, ClientRefused)
            assert refused.reason is Reason.BUSY
            assert told(second).reason is Reason.BUSY
        assert server.running
        assert quiet(server)


def test_a_successor_that_is_already_there_does_not_find_the_port_busy(
    server: PortServer, offered: OfferedSession, path: Path
) -> None:
    with RawClient(path) as first:
        close_all(shake_hands(server, first))
    with RawClient(path) as second:
        second.send(HELLO)
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        with OfferedSession(8) as following:
            server.offer(following.session)
            data, fds = second.receive()
            close_all(fds)
            assert isinstance(parse(data), Welcome)


def test_a_crowd_at_the_door_changes_nothing(server: PortServer, offered: OfferedSession, path: Path) -> None:
    with RawClient(path) as first, ExitStack() as crowd:
        close_all(shake_hands(server, first))
        before = count_open_fds()
        refused = 0
        for _ in range(1000):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            crowd.callback(client.close)
            while client.connect_ex(str(path)):
                refused += len(server.handle())
        while not quiet(server):
            refused += len(server.handle())
        assert refused == 1000
        crowd.close()
        assert count_open_fds() == before
        assert server.running


def test_without_a_free_fd_a_client_is_turned_away(server: PortServer, path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RawClient(path) as client:
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        with ExitStack() as hoard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            hoard.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            try:
                while True:
                    hoard.callback(os.close, os.dup(0))
            except OSError:
                pass
            assert server.handle() == []
            assert quiet(server), "the one who could not be let in would keep the driver awake"
        assert client.receive()[0] == b""
    with RawClient(path) as client:
        assert server.handle() == []
        assert server.client is not None


# ---- Time


@pytest.mark.parametrize("silent_after", ["connect", "HELLO"])
def test_a_silent_client_is_dropped(path: Path, silent_after: str) -> None:
    with (
        OfferedSession() as offered,
        PortServer(path, {os.geteuid()}, FACTS, handshake_seconds=0.05) as server,
        RawClient(path) as client,
    ):
        server.offer(offered.session)
        if silent_after == "HELLO":
            client.send(HELLO)
            assert handle(server) == []
            close_all(client.receive()[1])
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        awaited = "HELLO" if silent_after == "connect" else "READY"
        assert (gone.reason, gone.text) == (Reason.TIMEOUT, f"{awaited} did not come")
        assert told(client).reason is Reason.TIMEOUT


def test_a_client_that_is_ready_may_be_silent(path: Path) -> None:
    with (
        OfferedSession() as offered,
        PortServer(path, {os.geteuid()}, FACTS, handshake_seconds=0.1) as server,
        RawClient(path) as client,
    ):
        server.offer(offered.session)
        close_all(shake_hands(server, client))
        assert not select.select([server.fileno()], [], [], 0.3)[0]


def test_a_message_that_came_in_time_counts_although_it_is_read_late(path: Path) -> None:
    with (
        OfferedSession() as offered,
        PortServer(path, {os.geteuid()}, FACTS, handshake_seconds=0.05) as server,
        RawClient(path) as client,
    ):
        server.offer(offered.session)
        client.send(HELLO)
        handle(server)
        close_all(client.receive()[1])
        client.send(READY)
        # The driver was busy with frames; by now the deadline has passed too.
        time.sleep(0.1)
        assert isinstance(handle_until(server, ClientReady), ClientReady)
        assert quiet(server)


# ---- Rubbish


def rubbish() -> list[tuple[str, bytes, Reason]]:
    bye_with_no_end = Bye(Reason.SHUTDOWN).pack()[:-1]
    return [
        ("short", b"N", Reason.MALFORMED),
        ("header only", HELLO[:16], Reason.MALFORMED),
        ("cut", HELLO[:-1], Reason.MALFORMED),
        ("long", HELLO + b"\0", Reason.MALFORMED),
        ("oversized", HELLO + bytes(5000), Reason.MALFORMED),
        ("magic", b"XXXX" + HELLO[4:], Reason.MALFORMED),
        ("type", HELLO[:4] + b"\x63\0" + HELLO[6:], Reason.MALFORMED),
        ("header version", HELLO[:6] + b"\x02\0" + HELLO[8:], Reason.VERSION),
        ("no common version", Hello("tester", 2, 3).pack(), Reason.VERSION),
        ("READY first", READY, Reason.UNEXPECTED),
        ("LINK", Link(FACTS).pack(), Reason.UNEXPECTED),
        ("half a BYE", bye_with_no_end, Reason.MALFORMED),
    ]


@pytest.mark.parametrize(("packet", "reason"), [pytest.param(p, r, id=name) for name, p, r in rubbish()])
def test_rubbish_first_is_answered_with_a_reason(server: PortServer, path: Path, packet: bytes, reason: Reason) -> None:
    before = count_open_fds()
    with RawClient(path) as client:
        client.send(packet)
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        assert (gone.session, gone.reason) == (None, reason)
        assert told(client).reason is reason
    assert count_open_fds() == before
    assert quiet(server)


@pytest.mark.parametrize("packet", [HELLO, READY, Link(FACTS).pack(), b"?" * 200], ids=["HELLO", "READY", "LINK", "?"])
@pytest.mark.parametrize("when", ["await READY", "running"])
def test_nothing_but_the_next_step_is_taken(
    server: PortServer, offered: OfferedSession, path: Path, packet: bytes, when: str
) -> None:
    if when == "await READY" and packet == READY:
        return
    with RawClient(path) as client:
        if when == "running":
            close_all(shake_hands(server, client))
        else:
            client.send(HELLO)
            handle(server)
            close_all(client.receive()[1])
        client.send(packet)
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        expected = Reason.MALFORMED if packet[:1] == b"?" else Reason.UNEXPECTED
        assert (gone.session, gone.reason) == (7, expected)
        assert told(client).reason is expected


def test_hello_twice_before_welcome_is_refused(server: PortServer, path: Path) -> None:
    with RawClient(path) as client:
        client.send(HELLO)
        client.send(HELLO)
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        assert (gone.session, gone.reason) == (None, Reason.UNEXPECTED)


@pytest.mark.parametrize("count", [1, 7, 253])
def test_stray_fds_never_arrive(server: PortServer, offered: OfferedSession, path: Path, count: int) -> None:
    with RawClient(path) as client:
        reader, writer = os.pipe()
        client.send(HELLO, [writer] * count)
        os.close(writer)
        before = count_open_fds()
        gone = handle_until(server, ClientGone)
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.MALFORMED
        assert told(client).text == "a client sends no file descriptors"
        assert count_open_fds() == before
        # Nobody holds the pipe's other end any more.
        assert os.read(reader, 1) == b""
        os.close(reader)


def test_fds_in_a_packet_that_is_never_read_are_let_go(server: PortServer, path: Path) -> None:
    reader, writer = os.pipe()
    with RawClient(path) as client:
        client.send(b"rubbish")
        for _ in range(8):
            client.send(HELLO, [writer])
        os.close(writer)
        handle_until(server, ClientGone)
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.thorough
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.sampled_from([HELLO, READY, Link(FACTS).pack(), Bye(Reason.SHUTDOWN).pack(), HELLO[:20]]),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_whatever_is_sent_the_server_goes_on(
    server: PortServer, path: Path, packets: list[bytes], with_offer: bool
) -> None:
    before = count_open_fds()
    with ExitStack() as stack:
        server.withdraw()
        if with_offer:
            server.offer(stack.enter_context(OfferedSession()).session)
        client = stack.enter_context(RawClient(path))
        server.handle()
        for packet in packets:
            try:
                client.send(packet)
            except (BrokenPipeError, ConnectionResetError):
                break
            server.handle()
        server.dismiss(Reason.SHUTDOWN)
        server.withdraw()
    assert count_open_fds() == before
    assert server.client is None
    # Still in order: the next one is served.
    with OfferedSession(11) as offered, RawClient(path) as client:
        server.offer(offered.session)
        close_all(shake_hands(server, client))
        server.dismiss(Reason.SHUTDOWN)


def test_sessions_in_a_row_leak_nothing(server: PortServer, path: Path) -> None:
    rng = random.Random(1)
    before = None
    for number in range(1, 201):
        with OfferedSession(number) as offered, RawClient(path) as client:
            server.offer(offered.session)
            close_all(shake_hands(server, client))
            if rng.random() < 0.5:
                client.close()
                handle_until(server, ClientGone)
            else:
                server.dismiss(Reason.DEVICE_RESET)
        now = (count_open_fds(), Path("/proc/self/maps").read_text(encoding="utf-8").count("netbridge-rings"))
        before = before or now
        assert now == before


# ---- The socket's file


def test_the_socket_file_has_the_mode_it_was_given(path: Path) -> None:
    with PortServer(path, {0}, FACTS, mode=0o620):
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o620
        assert path.parent.stat().st_mode & 0o022 == 0
    assert not path.exists()


def test_a_client_that_is_early_is_never_told_that_it_may_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment that the file is there, whoever may connect later can, and is told that nobody listens."""
    seen = []

    def look(step: str, real: Callable[..., None], *arguments: object) -> None:
        early = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with early, pytest.raises(ConnectionRefusedError):
            early.connect(str(path))
        seen.append((step, path.stat().st_mode & 0o777))
        real(*arguments)

    for step in ("chown", "chmod"):
        monkeypatch.setattr(os, step, partial(look, step, getattr(os, step)))
    before = os.umask(0o077)
    try:
        PortListener(path, mode=0o600, owner=os.geteuid()).close()
        assert os.umask(0o077) == 0o077, "as it was"
    finally:
        os.umask(before)
    assert seen == [("chown", 0o777), ("chmod", 0o777)]


def test_a_live_socket_is_not_stolen(server: PortServer, path: Path) -> None:
    inode = path.stat().st_ino
    with pytest.raises(PortInUse, match=r"another instance serves .*aethernet\.sock; stop it"):
        PortServer(path, {0}, FACTS)
    assert path.stat().st_ino == inode
    with RawClient(path):
        server.handle()
        assert server.client is not None


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_strangers_live_socket_is_not_stolen(path: Path, kind: int) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, kind) as stranger:
        stranger.bind(str(path))
        stranger.listen(0)
        with pytest.raises(PortInUse, match="another instance serves"):
            PortServer(path, {0}, FACTS)
        assert path.is_socket()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
        dead.listen(1)
    with PortServer(path, {os.geteuid()}, FACTS) as server, RawClient(path):
        server.handle()
        assert server.client is not None


def test_a_driver_that_was_killed_leaves_no_lock(path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        PortServer(path, {0}, FACTS)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert path.is_socket()
    with PortServer(path, {os.geteuid()}, FACTS), RawClient(path):
        pass


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(PortInUse, match="exists and is no socket; remove it"):
        PortServer(path, {0}, FACTS)
    assert path.read_text() == "precious"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_ones_socket_is_not_removed_at_the_end(path: Path) -> None:
    server = PortServer(path, {0}, FACTS)
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(path))
        server.close()
        assert path.is_socket()


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = count_open_fds()
    with pytest.raises(PortUnavailable, match=r"cannot listen at .*file/x\.sock: "):
        PortServer(tmp_path / "file" / "x.sock", {0}, FACTS)
    with pytest.raises(PortUnavailable, match="longer than 107 bytes"):
        PortServer(tmp_path / ("x" * 108), {0}, FACTS)
    assert count_open_fds() == before


def test_a_listener_opened_by_somebody_else_stays_theirs(path: Path) -> None:
    with PortListener(path) as listener:
        for _ in range(2):
            with PortServer(listener, {os.geteuid()}, FACTS) as server, RawClient(path):
                server.handle()
                assert server.client is not None
        assert path.is_socket()
    assert not path.exists()


# ---- The session's own checks


def test_a_session_is_not_made_of_what_does_not_hold() -> None:
    before = count_open_fds()
    good = SealedMemory(4 * STRIDE)
    half_sealed = SealedMemory(4 * STRIDE, seals=fcntl.F_SEAL_SEAL)
    with pytest.raises(BadGeometry, match="rx region: not sealed"):
        PortSession(1, half_sealed, good, rx_count=4, tx_count=4, stride=STRIDE)
    with pytest.raises(BadGeometry, match=r"rx region: not sealed .F_SEAL_FUTURE_WRITE missing"):
        PortSession(1, good, good, rx_count=4, tx_count=4, stride=STRIDE, rx_read_only=True)
    with pytest.raises(BadGeometry, match="do not fit"):
        PortSession(1, good, good, rx_count=5, tx_count=4, stride=STRIDE)
    with pytest.raises(ValueError, match="session number 0"):
        PortSession(0, good, good, rx_count=4, tx_count=4, stride=STRIDE)
    good.close()
    half_sealed.close()
    assert count_open_fds() == before


def test_facts_that_no_device_has_are_the_callers_mistake(server: PortServer) -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        server.update(Facts(b"short"))
