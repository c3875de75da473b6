"""Received frames sent from where they are, by the Python client, to a driver's end written from docs/port.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge.client import Client, Frame, Offload, VirtioNetHeader, connect
from tests.unit.port_fakes import STRIDE, FakeRings, OfferedSession, ServedPort
from tests.unit.test_port_frames import Bench, frame_of


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with OfferedSession(0xBEEF, rx_count=80, queue_pairs=2) as offered:
        bench = Bench(tmp_path / "aethernet.sock", offered)
        yield bench
        bench.close()


@pytest.fixture
def client(bench: Bench) -> Client:
    return bench.client


@pytest.fixture
def driver(bench: Bench) -> FakeRings:
    return bench.driver


def receive(client: Client, driver: FakeRings, number: int = 1, size: int = 60) -> Frame:
    driver.deliver(frame_of(number, size))
    (frame,) = client.receive(timeout=0)
    return frame


def test_a_frame_is_sent_as_it_came(client: Client, driver: FakeRings) -> None:
    receive(client, driver).forward()
    assert driver.await_sent(1) == [frame_of(1)]
    assert driver.forwarded == 1
    assert driver.take_back() == []


def test_a_frame_is_changed_where_it_is(client: Client, driver: FakeRings) -> None:
    assert client.rx_writable
    frame = receive(client, driver)
    frame.writable_data[:6] = b"abcdef"
    assert bytes(frame) == b"abcdef" + frame_of(1)[6:]
    assert frame.data.readonly
    frame.queue = 1
    frame.forward()
    assert driver.take_sent_with_headers() == [(b"abcdef" + frame_of(1)[6:], b"", 1)]


def test_many_keep_their_order_among_what_is_sent(client: Client, driver: FakeRings) -> None:
    frames: list[Frame] = []
    for number in range(70):  # more than the library hands over at once
        driver.deliver(frame_of(number, 14 + number))
    while len(frames) < 60:
        frames += client.receive(timeout=0)
    client.send_bytes(frame_of(100))
    client.forward(frames)
    client.send_bytes(frame_of(101))
    sent = [frame_of(number, 14 + number) for number in range(len(frames))]
    assert driver.await_sent(len(frames) + 2) == [frame_of(100), *sent, frame_of(101)]
    assert driver.take_back() == []
    assert driver.forwarded == len(frames)


def test_a_forwarded_frame_is_gone(client: Client, driver: FakeRings) -> None:
    frame = receive(client, driver)
    views = [frame.data, frame.writable_data]
    frame.forward()
    for view in views:
        with pytest.raises(ValueError, match="released memoryview"):
            view[0]
    for use in (lambda: frame.data, lambda: frame.writable_data, frame.forward):
        with pytest.raises(ValueError, match="this frame was released or forwarded"):
            use()
    with pytest.raises(ValueError, match="this frame was released or forwarded, or belongs to another session"):
        client.forward([frame])
    frame.release()
    client.release([frame])
    assert driver.take_back() == []
    assert len(driver.take_sent()) == 1


def test_none_is_sent_when_one_cannot_be(client: Client, driver: FakeRings) -> None:
    good, released, cut = (receive(client, driver, number) for number in range(3))
    released.release()
    driver.take_back()
    with pytest.raises(ValueError, match="was released"):
        client.forward([good, released])
    with pytest.raises(ValueError, match="the same frame twice"):
        client.forward([good, good])
    for queue in (-1, 2):
        good.queue = queue
        with pytest.raises(ValueError, match=f"queue pair {queue}: there are 2, from 0 on"):
            client.forward([cut, good])
    good.queue = 0
    part = cut.writable_data[:14]
    with pytest.raises(BufferError, match="still in use"):
        client.forward([good, cut])
    assert driver.take_sent() == []
    del part
    assert bytes(good) == frame_of(0)
    client.forward([good, cut])
    assert driver.take_sent() == [frame_of(0), frame_of(2)]


def test_a_frame_of_several_buffers_is_copied_instead(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1, 1500), piece_bytes=500)
    (frame,) = client.receive(timeout=0)
    with pytest.raises(ValueError, match="this frame spans 3 buffers, and only frames of one can be forwarded"):
        frame.forward()
    with pytest.raises(ValueError, match="this frame spans 3 buffers"):
        _ = frame.writable_data
    client.send_bytes(bytes(frame))
    frame.release()
    assert driver.take_sent() == [frame_of(1, 1500)]
    assert len(driver.take_back()) == 3


def test_lengths_that_are_no_frames(client: Client, driver: FakeRings) -> None:
    frame = receive(client, driver, size=13)
    with pytest.raises(ValueError, match=f"length 13 is not between 14 and {STRIDE - 64}"):
        frame.forward()


def test_where_frames_can_only_be_read_they_are_sent_as_they_came(tmp_path: Path) -> None:
    with OfferedSession(rx_read_only=True) as offered:
        bench = Bench(tmp_path / "aethernet.sock", offered)
        assert not bench.client.rx_writable
        frame = receive(bench.client, bench.driver)
        with pytest.raises(ValueError, match="received frames can only be read in this session"):
            _ = frame.writable_data
        frame.forward()
        assert bench.driver.take_sent() == [frame_of(1)]
        bench.close()


def test_work_that_a_header_leaves_is_not_left_undone(tmp_path: Path) -> None:
    offloads = Offload.GUEST_CSUM | Offload.GUEST_TSO4
    path = tmp_path / "aethernet.sock"
    with (
        OfferedSession(offloads=offloads) as offered,
        ServedPort(path, agree=lambda asked: asked & offloads) as port,
    ):
        with port.paused() as server:
            server.offer(offered.session)
        driver = FakeRings(offered)
        with connect(path, offloads=offloads) as client:
            for header in (VirtioNetHeader(flags=1), VirtioNetHeader(gso_type=1), VirtioNetHeader(gso_type=0x84)):
                driver.deliver(frame_of(1), header=header.pack())
                (frame,) = client.receive(timeout=0)
                with pytest.raises(ValueError, match="to be cut yet, or its checksum to be made"):
                    frame.forward()
                frame.release()
            driver.deliver(frame_of(2), header=VirtioNetHeader(flags=2, csum_start=7).pack())
            (frame,) = client.receive(timeout=0)
            frame.forward()
            assert driver.take_sent_with_headers() == [(frame_of(2), b"", 0)]
