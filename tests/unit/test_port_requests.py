"""What a client may ask for in a running session: on the wire, at the driver's end, in the client library."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netbridge.client import Client, RequestRefused, connect
from netbridge.ipc.errors import BadMessage, Reason
from netbridge.ipc.messages import Bye, Facts, Hello, Link, Ready, parse
from netbridge.ipc.requests import Answer, Filter, Mac, Verdict
from netbridge.ipc.server import ClientAsks, ClientGone, ClientReady, PortServer
from tests.unit.port_fakes import FACTS, OfferedSession, RawClient, ServedPort, close_all

STATION, GROUP = bytes.fromhex("525400000001"), bytes.fromhex("01005e000001")

addresses = st.lists(st.binary(min_size=6, max_size=6), max_size=32).map(tuple)
filters = st.builds(
    Filter,
    st.integers(0, (1 << 32) - 1),
    *(st.booleans() for _ in range(6)),
    addresses,
    addresses,
    st.frozensets(st.integers(0, 4095), max_size=20),
)
requests = st.one_of(
    filters,
    st.builds(Mac, st.integers(0, (1 << 32) - 1), st.binary(min_size=6, max_size=6)),
    st.builds(Answer, st.integers(0, (1 << 32) - 1), st.sampled_from(Verdict), st.text("abc", max_size=104)),
)


# ---- On the wire


@given(requests)
def test_what_is_packed_is_parsed(message: Filter | Mac | Answer) -> None:
    assert parse(message.pack()) == message


def test_the_documented_bytes() -> None:
    def header(kind: int, length: int) -> bytes:
        return struct.pack("<4sHHII", b"NBPT", kind, 1, length, 0)

    wanted = Filter(
        7, all_multicast=True, no_broadcast=True, unicast=(STATION,), multicast=(GROUP,), vlans=frozenset({9})
    )
    body = struct.pack("<IHBB", 7, 0b100010, 1, 1) + (STATION + GROUP).ljust(384, b"\0") + b"\0\x02".ljust(512, b"\0")
    assert wanted.pack() == header(6, 920) + body
    assert Mac(8, STATION).pack() == header(7, 32) + struct.pack("<I6s6x", 8, STATION)
    assert Answer(9, Verdict.REFUSED, "no").pack() == header(8, 128) + struct.pack("<IHH104s", 9, 3, 0, b"no")


@pytest.mark.parametrize(
    ("message", "at", "value", "says"),
    [
        (Filter(), 20, b"\x40", "unknown receive modes 0x40"),
        (Filter(), 22, b"\x41", "65 addresses"),
        (Filter(), 22, b"\xff\xff", "510 addresses"),
        (Filter(), 30, b"\x01", "not zero"),
        (Mac(1, STATION), 26, b"\x01", "reserved"),
        (Mac(1, STATION), 31, b"\x01", "reserved"),
        (Answer(1, Verdict.DONE), 20, b"\x05", "unknown verdict 5"),
        (Answer(1, Verdict.DONE), 22, b"\x01", "reserved"),
    ],
)
def test_what_may_not_be(message: Filter | Mac | Answer, at: int, value: bytes, says: str) -> None:
    packed = bytearray(message.pack())
    packed[at : at + len(value)] = value
    with pytest.raises(BadMessage, match=says):
        parse(bytes(packed))


@pytest.mark.parametrize(
    "bad",
    [Filter(unicast=(STATION,) * 65), Filter(unicast=(b"12345",)), Filter(vlans=frozenset({4096})), Mac(1, b"1234567")],
)
def test_what_does_not_fit_a_request_is_the_callers_mistake(bad: Filter | Mac) -> None:
    with pytest.raises(ValueError):
        bad.pack()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Filter(unicast=(GROUP,)), "01:00:5e:00:00:01 is no station's address"),
        (Filter(unicast=(bytes(6),)), "no station's address"),
        (Filter(multicast=(STATION,)), "52:54:00:00:00:01 is no multicast address"),
        (Filter(vlans=frozenset({4095})), "VLAN 4095"),
        (Filter(unicast=(STATION,), multicast=(GROUP, b"\xff" * 6), vlans=frozenset({0, 4094})), ""),
    ],
)
def test_what_can_never_be_wanted_is_named(wanted: Filter, why: str) -> None:
    assert why in wanted.why_invalid()
    assert bool(why) == bool(wanted.why_invalid())


# ---- At the driver's end


@contextmanager
def running(path: Path) -> Iterator[tuple[PortServer, RawClient]]:
    """A server and a client in a running session."""
    with PortServer(path, {os.geteuid()}, FACTS) as server, OfferedSession() as offered:
        server.offer(offered.session)
        with RawClient(path) as client:
            client.send(Hello("tester").pack())
            server.handle()
            close_all(client.receive()[1])
            client.send(Ready().pack())
            (event,) = server.handle()
            assert isinstance(event, ClientReady)
            yield server, client
            server.dismiss(Reason.SHUTDOWN)


@pytest.mark.parametrize("request_", [Filter(1, promiscuous=True), Mac(2, STATION)])
def test_a_request_is_an_event_and_is_answered(tmp_path: Path, request_: Filter | Mac) -> None:
    with running(tmp_path / "port") as (server, client):
        for _ in range(3):
            client.send(request_.pack())
            (event,) = server.handle()
            assert isinstance(event, ClientAsks)
            assert event.request == request_
            assert "tester" in str(event)
            server.answer(event.request, Verdict.REFUSED, "the device says no")
            answer = parse(client.receive()[0])
            assert answer == Answer(request_.request, Verdict.REFUSED, "the device says no")


def test_a_request_before_the_last_was_answered_ends_the_session(tmp_path: Path) -> None:
    with running(tmp_path / "port") as (server, client):
        client.send(Mac(1, STATION).pack())
        client.send(Mac(2, STATION).pack())
        asked, gone = server.handle()
        assert isinstance(asked, ClientAsks)
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.UNEXPECTED
        server.answer(asked.request, Verdict.DONE)  # nobody is there any more
        assert isinstance(parse(client.receive()[0]), Bye)


def test_requests_belong_into_a_running_session(tmp_path: Path) -> None:
    with PortServer(tmp_path / "port", {os.geteuid()}, FACTS) as server, RawClient(tmp_path / "port") as client:
        client.send(Mac(1, STATION).pack())
        (gone,) = server.handle()
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.UNEXPECTED


def test_an_answer_is_not_for_a_client_to_say(tmp_path: Path) -> None:
    with running(tmp_path / "port") as (server, client):
        client.send(Answer(1, Verdict.DONE).pack())
        (gone,) = server.handle()
        assert isinstance(gone, ClientGone)
        assert gone.reason is Reason.UNEXPECTED


def test_an_answer_waits_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    with running(tmp_path / "port") as (server, client):
        client.send(Mac(1, STATION).pack())
        (event,) = server.handle()
        assert isinstance(event, ClientAsks)
        for speed in range(5000):
            server.update(FACTS._replace(speed_mbps=speed))
        server.answer(event.request, Verdict.DONE)
        client.socket.settimeout(0)
        said: list[object] = []
        while not said or not isinstance(said[-1], Answer):
            try:
                said.append(parse(client.receive()[0]))
            except BlockingIOError:
                assert server.handle() == []
        assert said[-2] == Link(FACTS._replace(speed_mbps=4999)), "the facts first, then the answer"


def test_an_announcement_is_asked_for_once_each_time_and_never_lost(tmp_path: Path) -> None:
    wish = FACTS._replace(announce=True)
    with running(tmp_path / "port") as (server, client):
        for _ in range(2):
            server.update(wish)
            assert parse(client.receive()[0]) == Link(wish)
        # While the client does not read, newer facts take the place of older ones; the wish stays.
        for speed in range(5000):
            server.update(FACTS._replace(speed_mbps=speed, announce=speed == 4000))
        client.socket.settimeout(0)
        facts: list[Facts] = []
        while not facts or facts[-1].speed_mbps != 4999:
            try:
                message = parse(client.receive()[0])
                assert isinstance(message, Link)
                facts.append(message.facts)
            except BlockingIOError:
                server.handle()
        assert any(item.announce for item in facts)


# ---- In the client library


@contextmanager
def connected(path: Path) -> Iterator[tuple[ServedPort, Client]]:
    with OfferedSession() as offered, ServedPort(path) as port:
        with port.paused() as server:
            server.offer(offered.session)
        with connect(path) as client:
            port.await_event()
            yield port, client


def test_the_client_asks_and_returns_when_it_is_done(tmp_path: Path) -> None:
    wanted = Filter(multicast=(GROUP,), vlans=frozenset({5}))
    with connected(tmp_path / "port") as (port, client):
        client.set_filter(wanted)
        client.set_mac(STATION)
        first, second = port.await_event(), port.await_event()
        assert isinstance(first, ClientAsks)
        assert isinstance(second, ClientAsks)
        assert first.request._replace(request=0) == wanted
        assert isinstance(second.request, Mac)
        assert second.request.mac == STATION
        assert first.request.request != second.request.request


def test_the_drivers_refusal_is_the_error_and_the_session_goes_on(tmp_path: Path) -> None:
    with connected(tmp_path / "port") as (port, client):
        port.verdict = (Verdict.NOT_OFFERED, "CTRL_VLAN is not agreed")
        with pytest.raises(RequestRefused, match="not offered: CTRL_VLAN is not agreed") as caught:
            client.set_filter(Filter(vlans=frozenset({5})))
        assert caught.value.verdict is Verdict.NOT_OFFERED
        port.verdict = (Verdict.DONE, "")
        client.set_filter(Filter())
        assert not client.closed


def test_a_driver_that_does_not_answer_is_not_waited_for_forever(tmp_path: Path) -> None:
    with connected(tmp_path / "port") as (port, client):
        port.verdict = None
        with pytest.raises(TimeoutError, match=r"did not answer a request within 0\.02 s"):
            client.set_filter(Filter(), timeout=0.02)


def test_facts_that_change_meanwhile_are_seen(tmp_path: Path) -> None:
    with connected(tmp_path / "port") as (port, client):
        with port.paused() as server:
            server.update(FACTS._replace(link_up=False, announce=True))
        client.set_filter(Filter())
        assert not client.link_up
        assert client.announcements == 1
