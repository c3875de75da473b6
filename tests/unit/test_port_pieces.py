"""Frames of several buffers, virtio headers and queue pairs, from the library's end; sessions that suit a client."""

from __future__ import annotations

import os
import random
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge.client import Client, Offload, PortError, VirtioNetHeader, connect
from netbridge.ipc.offloads import ALL_OFFLOADS, GSO_TCPV4, NEEDS_CSUM, RX_OFFLOADS, TX_OFFLOADS
from netbridge.ipc.server import ClientReady, ClientWaits
from tests.unit.port_fakes import HEADROOM, STRIDE, FakeRings, OfferedSession, ServedPort

ROOM = STRIDE - HEADROOM
HEADER = VirtioNetHeader(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16)
# Field by field, as docs/port.md has it.
HEADER_BYTES = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)


def frame_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


class Bench:
    """A client of a session with these options, and the driver's end of its rings."""

    def __init__(self, path: Path, offered: OfferedSession) -> None:
        self.port = ServedPort(path, agree=lambda asked: asked & offered.session.offloads)
        with self.port.paused() as server:
            server.offer(offered.session)
        self.driver = FakeRings(offered)
        self.client: Client = connect(path, offloads=ALL_OFFLOADS)
        self.port.await_event()

    def close(self) -> None:
        self.client.close()
        self.port.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with OfferedSession(
        tx_count=8, tx_pieces=5, tx_largest=9022, offloads=ALL_OFFLOADS, queue_pairs=4, rx_count=16
    ) as offered:
        bench = Bench(tmp_path / "aethernet.sock", offered)
        yield bench
        bench.close()


@pytest.fixture
def client(bench: Bench) -> Client:
    return bench.client


@pytest.fixture
def driver(bench: Bench) -> FakeRings:
    return bench.driver


def test_the_session_says_what_it_has(client: Client) -> None:
    assert client.offloads == ALL_OFFLOADS
    assert (client.queue_pairs, client.largest, client.most_pieces, client.room) == (4, 9022, 5, ROOM)


# ---- Sending


@pytest.mark.parametrize("size", [14, ROOM, ROOM + 1, 3 * ROOM, 9022])
def test_bytes_of_any_length_arrive_as_one_frame(client: Client, driver: FakeRings, size: int) -> None:
    for number in range(4):
        client.send_bytes(frame_of(number, size), timeout=0)
        assert driver.take_sent() == [frame_of(number, size)]


def test_a_frame_of_buffers_filled_one_by_one(client: Client, driver: FakeRings) -> None:
    pieces = client.allocate(most=3)
    for number, buffer in enumerate(pieces):
        buffer.write(frame_of(number, 10 + number))
    (single,) = client.allocate()
    client.send(pieces, single.write(frame_of(9, 60)))
    assert driver.take_sent() == [b"".join(frame_of(n, 10 + n) for n in range(3)), frame_of(9, 60)]
    with pytest.raises(ValueError, match="was sent or released"):
        _ = pieces[1].data


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([], "a frame of 0 buffers: wanted 1 to 5"),
        ([20] * 6, "a frame of 6 buffers: wanted 1 to 5"),
        ([20, 0], "length 0 is not between 1 and 1984"),
        ([20, ROOM + 1], "length 1985 is not between 1 and 1984"),
        ([6, 7], "length 13 is not between 14 and 9022"),
        ([ROOM] * 5, "length 9920 is not between 14 and 9022"),
    ],
)
def test_a_frame_that_the_driver_would_refuse(client: Client, driver: FakeRings, lengths: list[int], says: str) -> None:
    buffers = client.allocate(most=len(lengths)) if lengths else []
    for buffer, length in zip(buffers, lengths, strict=True):
        buffer.length = length
    with pytest.raises(ValueError, match=says):
        client.send(buffers)
    assert driver.take_sent() == []


def test_bytes_that_are_too_many(client: Client) -> None:
    with pytest.raises(ValueError, match="a frame of 9023 bytes: wanted 14 to 9022"):
        client.send_bytes(bytes(9023))


def test_buffers_that_did_not_suffice_are_not_lost(client: Client, driver: FakeRings) -> None:
    held = client.allocate(most=5)
    with pytest.raises(TimeoutError, match="3 of 5 TX buffers came free"):
        client.send_bytes(bytes(9022), timeout=0.01)
    for buffer in held:
        buffer.release()
    client.send_bytes(frame_of(1, 9022), timeout=0)
    assert driver.take_sent() == [frame_of(1, 9022)]


def test_a_header_goes_in_front_of_the_first_piece(client: Client, driver: FakeRings) -> None:
    client.send_bytes(frame_of(1, 5000), header=HEADER, queue=3)
    client.send_bytes(frame_of(2, 60), header=HEADER)
    client.send_bytes(frame_of(3, 60), queue=1)
    assert driver.take_sent_with_headers() == [
        (frame_of(1, 5000), HEADER_BYTES, 3),
        (frame_of(2, 60), HEADER_BYTES, 0),
        (frame_of(3, 60), b"", 1),
    ]


def test_a_header_of_an_earlier_frame_is_not_sent_again(client: Client, driver: FakeRings) -> None:
    for number in range(20):
        client.send_bytes(frame_of(number, 60), timeout=0, header=None if number % 2 else HEADER)
        ((_, header, _),) = driver.take_sent_with_headers()
        assert header == (b"" if number % 2 else HEADER_BYTES)


@pytest.mark.parametrize("queue", [-1, 4, 256])
def test_a_queue_that_there_is_not(client: Client, queue: int) -> None:
    with pytest.raises(ValueError, match=f"queue pair {queue}: there are 4"):
        client.send_bytes(bytes(60), queue=queue)


def test_numbers_that_are_no_headers(client: Client, driver: FakeRings) -> None:
    with pytest.raises(ValueError, match="hdr_len=65536"):
        client.send_bytes(bytes(60), header=HEADER._replace(hdr_len=65536))
    assert driver.take_sent() == []
    assert len(client.allocate(most=8)) == 8


# ---- Receiving


def test_a_received_header_is_told(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1, 60), header=HEADER_BYTES, queue=2)
    driver.deliver(frame_of(2, 5000), header=HEADER_BYTES)
    short, long = client.receive(timeout=0)
    assert (bytes(short.data), short.header, short.queue) == (frame_of(1, 60), HEADER, 2)
    assert (bytes(long), long.header, long.queue) == (frame_of(2, 5000), HEADER, 0)
    short.release()
    with pytest.raises(ValueError, match="this frame was released"):
        _ = short.header


def test_without_offloads_there_are_no_headers(tmp_path: Path) -> None:
    with OfferedSession() as offered:
        bench = Bench(tmp_path / "aethernet.sock", offered)
        bench.driver.deliver(frame_of(1, 60))
        with bench.client.receive(timeout=0)[0] as frame:
            assert frame.header is None
        with pytest.raises(ValueError, match="no offloads on the transmit side"):
            bench.client.send_bytes(bytes(60), header=HEADER)
        # And a driver that says there is one is not believed.
        bench.driver.deliver(frame_of(2, 60), header=HEADER_BYTES)
        with pytest.raises(PortError, match="broke the port's protocol"):
            bench.client.receive(timeout=0)
        bench.close()


def test_a_received_queue_that_there_is_not(client: Client, driver: FakeRings) -> None:
    driver.deliver(frame_of(1, 60), queue=4)
    with pytest.raises(PortError, match="broke the port's protocol"):
        client.receive(timeout=0)


# ---- A wait of one kind while another is armed


def is_readable(client: Client) -> bool:
    return bool(select.select([client.fileno()], [], [], 0)[0])


def test_waiting_for_buffers_does_not_swallow_the_doorbell_of_a_frame(client: Client, driver: FakeRings) -> None:
    """`arm`, then a wait for something else on the same thread: it answers the one doorbell that there is."""
    held = client.allocate(most=8)
    assert client.arm()
    driver.deliver(frame_of(1, 60))
    assert client.allocate(timeout=0.01) == []
    assert is_readable(client)
    with client.receive(timeout=0)[0] as frame:
        assert bytes(frame.data) == frame_of(1, 60)
    assert client.arm()
    assert not is_readable(client)
    assert len(held) == 8


def test_waiting_for_frames_does_not_withdraw_what_was_armed(client: Client, driver: FakeRings) -> None:
    assert client.arm()
    assert client.receive(timeout=0.001) == []
    driver.deliver(frame_of(1, 60))
    assert is_readable(client)


# ---- A session that suits its client


def test_a_session_with_other_offloads_is_made_for_a_client_that_can_take_them(tmp_path: Path) -> None:
    path = tmp_path / "aethernet.sock"
    device = Offload.CSUM | Offload.HOST_TSO4 | Offload.GUEST_CSUM
    with (
        OfferedSession(1) as plain,
        OfferedSession(2, offloads=device) as offloading,
        OfferedSession(3) as plain_again,
        ServedPort(path, agree=lambda asked: asked & device) as port,
    ):

        def connect_to(offered: OfferedSession, offloads: Offload) -> None:
            with port.paused() as server:
                server.offer(offered.session)
            with connect(path, offloads=offloads) as client:
                assert isinstance(port.await_event(), ClientReady)
                assert client.session == offered.session.number
                assert client.offloads == offered.session.offloads
            port.await_event()

        connect_to(plain, Offload(0))
        connect_to(offloading, ALL_OFFLOADS)
        connect_to(plain_again, Offload.HOST_USO)


def test_a_client_waits_for_a_session_that_suits_it(tmp_path: Path) -> None:
    path = tmp_path / "aethernet.sock"
    with (
        OfferedSession(1, offloads=TX_OFFLOADS) as unsuitable,
        OfferedSession(2, offloads=RX_OFFLOADS) as suitable,
        ServedPort(path, agree=lambda asked: asked) as port,
    ):
        with port.paused() as server:
            server.offer(unsuitable.session)
            assert server.asked is None
        child = os.fork()
        if child == 0:
            try:
                with connect(path, offloads=RX_OFFLOADS) as client:
                    os._exit(0 if client.session == 2 and client.offloads == RX_OFFLOADS else 1)
            finally:
                os._exit(2)
        assert isinstance(port.await_event(), ClientWaits)
        with port.paused() as server:
            assert server.asked == RX_OFFLOADS
            # The old one is not offered any more; neither is one that the client cannot take.
            server.offer(unsuitable.session)
            assert server.asked == RX_OFFLOADS
            server.offer(suitable.session)
            assert server.asked is None
        assert isinstance(port.await_event(), ClientReady)
        assert os.waitpid(child, 0)[1] == 0
        port.await_event()


def test_unknown_offloads_of_a_client_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "aethernet.sock"
    with OfferedSession(1) as offered, ServedPort(path, agree=lambda asked: asked) as port:
        with port.paused() as server:
            server.offer(offered.session)
        with connect(path, offloads=Offload(1 << 2)) as client:
            assert client.offloads == Offload(0)
            port.await_event()
        port.await_event()
