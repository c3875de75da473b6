"""Frames through the rings: the real client library against a driver's end written from docs/port.md."""

from __future__ import annotations

import asyncio
import os
import random
import select
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge.client import Client, Frame, PortClosed, PortError, Reason, connect
from netbridge.ipc.server import ClientGone
from tests.unit.port_fakes import CONTINUATION_OFFSET, HEADROOM, STRIDE, FakeRings, OfferedSession, ServedPort


class Bench:
    """A served port, a connected client and the driver's end of its rings."""

    def __init__(self, path: Path, offered: OfferedSession) -> None:
        self.port = ServedPort(path)
        with self.port.paused() as server:
            server.offer(offered.session)
        self.driver = FakeRings(offered)
        self.client: Client = connect(path)
        self.port.await_event()

    def close(self) -> None:
        self.client.close()
        self.port.close()


@pytest.fixture
def offered() -> Iterator[OfferedSession]:
    with OfferedSession(0xBEEF) as offered:
        yield offered


@pytest.fixture
def bench(tmp_path: Path, offered: OfferedSession) -> Iterator[Bench]:
    bench = Bench(tmp_path / "aethernet.sock", offered)
    yield bench
    bench.close()


@pytest.fixture
def client(bench: Bench) -> Client:
    return bench.client


@pytest.fixture
def driver(bench: Bench) -> FakeRings:
    return bench.driver


def frame_of(number: int, size: int = 60) -> bytes:
    return random.Random(number).randbytes(size)


# ---- Receiving


def test_a_frame_arrives_where_the_device_put_it(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    assert bytes(frame.data) == frame_of(1)
    assert len(frame) == 60
    assert frame.data.readonly
    # No copy: what changes in the DMA memory shows.
    driver.rx[HEADROOM] ^= 0xFF
    assert frame.data[0] == frame_of(1)[0] ^ 0xFF
    assert driver.take_back() == []
    frame.release()
    assert driver.take_back() == [0]


def test_frames_come_in_order_and_in_bursts(client: Client, driver: FakeRings) -> None:
    for number in range(6):
        driver.deliver(frame_of(number))
    assert [bytes(frame) for frame in client.receive(most=4, timeout=0)] == [frame_of(n) for n in range(4)]
    frames = client.receive(timeout=0)
    assert [bytes(frame) for frame in frames] == [frame_of(4), frame_of(5)]
    client.release(frames)
    assert driver.take_back() == [4, 5]
    assert driver.rx_active.consumed == 6


def test_a_released_frame_raises(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    view = frame.data
    with frame:
        pass
    with pytest.raises(ValueError, match="this frame was released"):
        _ = frame.data
    with pytest.raises(ValueError, match="released memoryview"):
        view[0]
    frame.release()
    client.release([frame])
    assert driver.take_back() == [0]


def test_a_frame_given_back_twice_at_once_goes_back_once(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    client.release([frame, frame])
    assert driver.take_back() == [0]


def test_what_was_cut_from_a_frame_keeps_it_here(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    driver.deliver(frame_of(2))
    first, second = client.receive(timeout=0)
    payload = first.data[14:]
    with pytest.raises(BufferError, match="still in use"):
        client.release([second, first])
    assert driver.take_back() == []
    assert bytes(payload) == frame_of(1)[14:]
    # Both are still here, so they can still be read.
    assert (bytes(first.data), bytes(second.data)) == (frame_of(1), frame_of(2))
    del payload
    client.release([second, first])
    assert driver.take_back() == [1, 0]


def test_a_long_frame_comes_in_pieces(client: Client, driver: FakeRings) -> None:
    long = frame_of(3, 5000)
    driver.deliver(long)
    driver.deliver(frame_of(4))
    frame, short = client.receive(timeout=0)
    assert bytes(frame) == long
    assert len(frame) == 5000
    assert [len(piece) for piece in frame.pieces] == [1984, 1984, 1032]
    assert driver.rx[STRIDE + CONTINUATION_OFFSET : STRIDE + CONTINUATION_OFFSET + 10] == long[1984:1994]
    with pytest.raises(ValueError, match="spans 3 buffers"):
        _ = frame.data
    assert bytes(short.data) == frame_of(4)
    client.release([frame, short])
    assert driver.take_back() == [0, 1, 2, 3]


def test_a_long_frame_may_come_bit_by_bit(client: Client, driver: FakeRings) -> None:
    long = frame_of(3, 5000)
    driver.deliver(long)
    assert client.receive(most=1, timeout=0) == []
    assert client.receive(most=1, timeout=0) == []
    (frame,) = client.receive(most=1, timeout=0)
    assert bytes(frame) == long


def test_ring_counts_wrap(tmp_path: Path, offered: OfferedSession) -> None:
    bench = Bench(tmp_path / "aethernet.sock", offered)
    client, driver = bench.client, bench.driver
    near_the_end = (1 << 32) - 5
    for ring in (driver.rx_active, driver.rx_free):
        ring.position = near_the_end
        ring.set_word(0, near_the_end)
    client.native.rx_active_taken = client.native.rx_free_put = near_the_end
    for number in range(20):
        driver.deliver(frame_of(number))
        (frame,) = client.receive(timeout=0)
        assert bytes(frame) == frame_of(number)
        frame.release()
        assert len(driver.take_back()) == 1
    assert driver.rx_active.produced == 15
    bench.close()


def test_holding_everything_and_waiting_for_more_is_an_error(tmp_path: Path) -> None:
    with OfferedSession(rx_limit=2) as offered:
        bench = Bench(tmp_path / "aethernet.sock", offered)
        for number in range(2):
            bench.driver.deliver(frame_of(number))
        frames = bench.client.receive(timeout=0)
        with pytest.raises(PortError, match="all 2 RX buffers a client may hold are held; release"):
            bench.client.receive()
        assert bench.client.receive(timeout=0) == []
        bench.client.release(frames)
        bench.close()


# ---- Waiting


def test_a_wait_ends_with_a_frame(client: Client, driver: FakeRings) -> None:
    timer = threading.Timer(0.05, driver.deliver, [frame_of(1)])
    timer.start()
    (frame,) = client.receive(timeout=30)
    timer.join()
    assert bytes(frame) == frame_of(1)
    frame.release()
    assert driver.rx_active.wake == 0


def test_a_wait_ends_with_its_time(client: Client) -> None:
    assert client.receive(timeout=0.05) == []
    assert client.wait(timeout=0.01) is False


def test_no_doorbell_is_rung_for_somebody_who_is_awake(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.driver_doorbell)
    assert client.wait(timeout=0)
    (frame,) = client.receive(timeout=0)
    frame.release()
    client.send_bytes(frame_of(2))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.client_doorbell)
    driver.rx_free.set_word(68, 1)
    driver.tx_active.set_word(68, 1)
    client.send_bytes(frame_of(3))
    # One bell for both, and both wishes are granted.
    assert os.eventfd_read(driver.client_doorbell) == 1
    assert (driver.rx_free.wake, driver.tx_active.wake) == (0, 0)


def test_an_event_loop_of_ones_own(client: Client, driver: FakeRings) -> None:
    assert client.arm()
    assert driver.rx_active.wake == 1
    assert not select.select([client.fileno()], [], [], 0)[0]
    driver.deliver(frame_of(1))
    assert select.select([client.fileno()], [], [], 5)[0]
    client.release(client.receive(timeout=0))
    assert client.arm()
    assert not select.select([client.fileno()], [], [], 0)[0]
    driver.deliver(frame_of(2))
    assert not client.arm(), "a frame is there already"
    client.release(client.receive(timeout=0))


def test_asyncio(bench: Bench) -> None:
    client, driver = bench.client, bench.driver

    async def reader() -> list[bytes]:
        seen: list[bytes] = []
        try:
            async for frame in client:
                seen.append(bytes(frame))
                if len(seen) == 12:
                    with bench.port.paused() as server:
                        server.dismiss(Reason.DEVICE_RESET)
        except PortClosed as error:
            assert error.reason is Reason.DEVICE_RESET
        return seen

    async def both() -> list[bytes]:
        task = asyncio.create_task(reader())
        for number in range(12):
            await asyncio.sleep(0)
            driver.deliver(frame_of(number))
            while not driver.take_back():
                await asyncio.sleep(0.001)
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(asyncio.wait_for(both(), 30)) == [frame_of(number) for number in range(12)]


# ---- Sending


def test_a_frame_is_sent_from_where_it_was_written(client: Client, driver: FakeRings) -> None:
    (buffer,) = client.allocate()
    assert buffer.room == len(buffer.data) == STRIDE - HEADROOM == client.room
    buffer.data[:20] = frame_of(1, 20)
    buffer.length = 20
    client.send(buffer)
    assert driver.take_sent() == [frame_of(1, 20)]
    with pytest.raises(ValueError, match="sent or released"):
        _ = buffer.data
    with pytest.raises(ValueError, match="sent or released"):
        client.send(buffer)


def test_many_frames_keep_their_order(client: Client, driver: FakeRings) -> None:
    sent = [frame_of(n, 14 + 7 * n) for n in range(100)]
    seen: list[bytes] = []
    left = list(sent)
    while left:
        buffers = client.allocate(most=3, timeout=5)
        client.send(*(buffer.write(left.pop(0)) for buffer in buffers[: len(left)]))
        seen += driver.take_sent()
    assert seen == sent


def test_all_buffers_out_then_one_comes_back(client: Client, driver: FakeRings) -> None:
    buffers = client.allocate(most=100)
    assert len(buffers) == 4
    assert client.allocate(timeout=0.01) == []
    with pytest.raises(TimeoutError, match="0 of 1 TX buffers came free"):
        client.send_bytes(frame_of(1), timeout=0.01)
    client.send(*(buffer.write(frame_of(n)) for n, buffer in enumerate(buffers)))
    timer = threading.Timer(0.05, driver.take_sent)
    timer.start()
    client.send_bytes(frame_of(5), timeout=30)
    timer.join()


def test_a_buffer_that_is_not_sent_is_used_again(client: Client, driver: FakeRings) -> None:
    buffers = client.allocate(most=4)
    for buffer in buffers:
        buffer.release()
        buffer.release()
    assert len(client.allocate(most=4, timeout=0)) == 4
    assert driver.take_sent() == []


@pytest.mark.parametrize("length", [0, 13, STRIDE - HEADROOM + 1, -1])
def test_a_length_that_is_no_frames_is_refused(client: Client, driver: FakeRings, length: int) -> None:
    good, bad = client.allocate(most=2)
    good.write(frame_of(1))
    bad.length = length
    with pytest.raises(ValueError, match=f"length {length} is not between 14 and 1984"):
        client.send(good, bad)
    assert driver.take_sent() == []
    client.send(good)
    assert driver.take_sent() == [frame_of(1)]


def test_sending_misuse_is_named(client: Client, driver: FakeRings) -> None:
    with pytest.raises(ValueError, match="a frame of 13 bytes: wanted 14 to 1984"):
        client.send_bytes(bytes(13))
    (buffer,) = client.allocate()
    with pytest.raises(ValueError, match="does not fit"):
        buffer.write(bytes(STRIDE))
    buffer.write(frame_of(1))
    with pytest.raises(ValueError, match="the same buffer twice"):
        client.send(buffer, buffer)
    view = buffer.data[2:8]
    with pytest.raises(BufferError, match="still in use"):
        client.send(buffer)
    assert driver.take_sent() == []
    view.release()
    buffer.data[0] ^= 0xFF
    client.send(buffer)
    assert driver.take_sent() == [bytes([frame_of(1)[0] ^ 0xFF]) + frame_of(1)[1:]]


# ---- The end


def test_frames_of_a_closed_client_are_of_no_use(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    (buffer,) = client.allocate()
    view = frame.data
    client.close()
    client.close()
    with pytest.raises(ValueError):
        view[0]
    with pytest.raises(ValueError):
        _ = frame.data
    frame.release()
    buffer.release()
    with pytest.raises(PortError, match="this client was closed"):
        client.receive(timeout=0)
    with pytest.raises(PortError, match="this client was closed"):
        client.send_bytes(frame_of(1))


def test_what_is_still_looked_at_stays_mapped(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    kept = frame.data[:6]
    with pytest.warns(ResourceWarning, match="1 frames of session 48879 are still in use"):
        client.close()
    assert bytes(kept) == frame_of(1)[:6]


def test_closing_cleanly_warns_of_nothing(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    frames = client.receive(timeout=0)
    assert bytes(frames[0].data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.close()


# ---- Drivers that lie


def lies() -> list[tuple[str, tuple[int, int, int, int]]]:
    def handle(region: int, index: int) -> int:
        return 0xBEEF << 48 | 1 << 32 | region << 24 | index

    return [
        ("index beyond the region", (handle(1, 8), 60, 1, 0)),
        ("the other region", (handle(2, 0), 60, 1, 0)),
        ("longer than its buffer", (handle(1, 0), STRIDE - HEADROOM + 1, 1, 0)),
        ("another kind", (handle(1, 0), 60, 3, 0)),
        ("continuation of nothing", (handle(1, 0), 60, 1, 2)),
    ]


@pytest.mark.parametrize("entry", [pytest.param(entry, id=name) for name, entry in lies()])
def test_an_entry_that_may_not_be_ends_the_session(bench: Bench, entry: tuple[int, int, int, int]) -> None:
    bench.driver.rx_active.put(*entry)
    for _ in range(2):
        with pytest.raises(PortError, match="the driver broke the port's protocol"):
            bench.client.receive(timeout=0)
    gone = bench.port.await_event()
    assert isinstance(gone, ClientGone)
    assert gone.reason is Reason.RING_FAULT


def test_a_buffer_that_comes_twice_ends_the_session(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1))
    (frame,) = client.receive(timeout=0)
    driver.rx_active.put(driver.handle(1, 0), 60, 1)
    with pytest.raises(PortError, match="RX buffer 0 came twice"):
        client.receive(timeout=0)
    assert isinstance(frame, Frame)


def test_a_frame_that_begins_in_the_middle_of_another_ends_the_session(client: Client, driver: FakeRings) -> None:
    driver.rx_active.put(driver.handle(1, 0), 60, 1, 1)
    driver.rx_active.put(driver.handle(1, 1), 60, 1, 0)
    with pytest.raises(PortError, match="out of order"):
        client.receive(timeout=0)


def test_a_count_that_ran_ahead_ends_the_session(client: Client, driver: FakeRings) -> None:
    driver.rx_active.set_word(0, 9)
    with pytest.raises(PortError, match="an entry in rx_active that may not be"):
        client.receive(timeout=0)


def test_a_lie_in_tx_done_ends_the_session(client: Client, driver: FakeRings) -> None:
    driver.tx_done.put(driver.handle(2, 4), 1984, 3)
    with pytest.raises(PortError, match="an entry in tx_done that may not be"):
        client.allocate(most=10)


def test_a_tx_buffer_that_comes_twice_ends_the_session(client: Client, driver: FakeRings) -> None:
    assert len(client.allocate(most=4)) == 4
    driver.tx_done.put(driver.handle(2, 3), 1984, 3)
    with pytest.raises(PortError, match="TX buffer 3 came twice"):
        client.allocate()


def test_the_headers_words_are_where_the_document_says(client: Client, driver: FakeRings) -> None:
    client.arm()
    assert struct.unpack_from("<I", driver.rx_active.memory, driver.rx_active.offset + 68)[0] == 1
    driver.deliver(frame_of(1))
    client.wait(timeout=5)
    (frame,) = client.receive(timeout=0)
    assert struct.unpack_from("<I", driver.rx_active.memory, driver.rx_active.offset + 64)[0] == 1
    frame.release()
    assert struct.unpack_from("<I", driver.rx_free.memory, driver.rx_free.offset)[0] == 1
