"""The wire without QEMU: a test plays the guest at the other end of the socket pair."""

import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import PcapNgReader

from qemu.exactness import WireMismatch
from qemu.wire import LONGEST, Wire, WireClosed, WireStalled

MAC = "52:54:00:12:34:56"


def frames(count: int, size: int = 60) -> list[bytes]:
    return [
        bytes(Ether(dst=MAC, src="02:00:00:00:00:01", type=0x88B5)) + n.to_bytes(size - 14, "big") for n in range(count)
    ]


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    with Wire(tmp_path / "wire.pcap") as it:
        yield it


@pytest.fixture
def guest(wire: Wire) -> socket.socket:
    wire.guest_end.settimeout(5)
    return wire.guest_end


class Echo:
    """A guest that answers every frame with what `change` makes of it: a list of frames."""

    def __init__(self, end: socket.socket, change: Callable[[bytes], list[bytes]] = lambda data: [data]):
        self.end = end
        self.change = change
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while data := self.end.recv(70000):
            if data == b"stop":
                return
            for answer in self.change(data):
                self.end.send(answer)

    def __enter__(self) -> None:
        self.end.settimeout(None)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        # The test's own end of the pair is closed by the fixture only after this.
        self.stop(b"stop")
        self.thread.join(5)
        assert not self.thread.is_alive()

    stop: Callable[[bytes], object]


@pytest.fixture
def echo(wire: Wire, guest: socket.socket) -> Callable[..., Echo]:
    def make(change: Callable[[bytes], list[bytes]] = lambda data: [data]) -> Echo:
        it = Echo(guest, change)
        it.stop = wire.send
        return it

    return make


def test_frames_pass_whole_both_ways(wire: Wire, guest: socket.socket) -> None:
    for size in (14, 60, 1514, 9014, LONGEST):
        data = os.urandom(size)
        assert wire.send(data) == size
        assert guest.recv(70000) == data
        guest.send(data)
        (frame,) = wire.take(5)
        assert frame.data == data
    assert (wire.sent, wire.received) == (5, 5)
    assert wire.sent_bytes == wire.received_bytes == 14 + 60 + 1514 + 9014 + LONGEST


def test_an_empty_or_too_long_frame_is_refused_and_breaks_nothing(wire: Wire, guest: socket.socket) -> None:
    with pytest.raises(ValueError, match="an empty frame"):
        wire.send(b"")
    with pytest.raises(ValueError, match="65001 bytes"):
        wire.send(bytes(LONGEST + 1))
    wire.send(b"x" * 60)
    assert guest.recv(100) == b"x" * 60
    assert wire.sent == 1


def test_sending_waits_until_there_is_room(wire: Wire, guest: socket.socket) -> None:
    sent = frames(500)
    sender = threading.Thread(target=lambda: [wire.send(frame) for frame in sent])
    sender.start()
    time.sleep(0.05)  # so that the queue is full for a while: the outcome does not depend on it
    assert [guest.recv(100) for _ in sent] == sent
    sender.join(30)
    assert wire.sent == 500


@pytest.mark.thorough
def test_a_guest_that_takes_nothing_is_told(wire: Wire) -> None:
    with pytest.raises(WireStalled, match=r"took no frame for 0\.2 s"):
        for frame in frames(2000):
            wire.send(frame, timeout=0.2)
    assert wire.sent < 2000


@pytest.mark.thorough
def test_the_guest_never_waits_for_a_test_that_is_busy(wire: Wire, guest: socket.socket) -> None:
    sent = frames(5000)
    for frame in sent:
        guest.send(frame)
    deadline = time.monotonic() + 5
    while wire.received < 5000 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [frame.data for frame in wire.take()] == sent


def test_a_deaf_wire_takes_nothing(wire: Wire, guest: socket.socket) -> None:
    guest.setblocking(False)
    sent = 0
    with wire.deaf(), pytest.raises(BlockingIOError):
        while sent < 1000:
            guest.send(b"\1" * 1514)
            sent += 1
    assert 50 < sent < 100
    deadline = time.monotonic() + 10
    while wire.received < sent:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_qemu_gone_is_told(wire: Wire) -> None:
    wire.attached()
    with pytest.raises(WireClosed, match="QEMU is not at the other end"):
        wire.send(b"x" * 60)


def test_frames_have_the_time_they_came_at(wire: Wire, guest: socket.socket) -> None:
    before = time.monotonic_ns()
    guest.send(b"x" * 60)
    frame = wire.take(5)[0]
    assert before < frame.time_ns < time.monotonic_ns()
    assert wire.take(0.01) == []


def test_drain_forgets(wire: Wire, guest: socket.socket) -> None:
    guest.send(b"x" * 60)
    while not wire.received:
        time.sleep(0.001)
    assert wire.drain() == [b"x" * 60]
    assert wire.drain() == []


# As scapy's socket


def test_recv_dissects(wire: Wire, guest: socket.socket) -> None:
    guest.send(bytes(Ether(dst=MAC) / IP(dst="10.0.0.1") / UDP(dport=7) / b"hello"))
    packet = wire.recv(timeout=5)
    assert packet is not None
    assert packet[UDP].dport == 7
    assert abs(float(packet.time) - time.time()) < 5
    assert wire.recv(timeout=0.01) is None


def test_sniff_and_sr1(wire: Wire, echo: Callable[..., Echo]) -> None:
    def answer(data: bytes) -> list[bytes]:
        packet = Ether(data)
        if ARP not in packet:
            return []
        reply = ARP(op=2, psrc=packet[ARP].pdst, pdst=packet[ARP].psrc, hwsrc=MAC)
        return [bytes(Ether(dst=packet.src, src=MAC) / reply)]

    with echo(answer):
        request = Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:01") / ARP(pdst="10.0.0.1", psrc="10.0.0.2")
        answered = wire.sr1(request, timeout=5, verbose=False)
        assert answered is not None
        assert answered[ARP].hwsrc == MAC
        assert request.sent_time
        wire.send(request)
        assert wire.sniff(count=1, timeout=5)[0][ARP].op == 2


# The capture


def test_the_capture_has_every_frame_with_direction_and_time(wire: Wire, guest: socket.socket) -> None:
    sizes = (14, 15, 16, 17, 1514)
    for size in sizes:
        wire.send(bytes([1]) * size)
        guest.recv(2000)
        guest.send(bytes([2]) * size)
        assert wire.take(5)
    wire.close()
    assert wire.pcap is not None
    with PcapNgReader(str(wire.pcap)) as reader:
        packets = list(reader)
    assert [bytes(packet) for packet in packets] == [bytes([way]) * size for size in sizes for way in (1, 2)]
    assert [packet.direction for packet in packets] == [2, 1] * len(sizes)
    assert all(abs(float(packet.time) - time.time()) < 30 for packet in packets)
    assert packets[0].sniffed_on == "wire"


def test_the_capture_is_sound_to_the_last_byte(wire: Wire, guest: socket.socket) -> None:
    for size in range(14, 80):
        wire.send(bytes(size))
        guest.recv(100)
    wire.close()
    assert wire.pcap is not None
    content = wire.pcap.read_bytes()
    at = 0
    kinds = []
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        assert size % 4 == 0
        assert struct.unpack_from("<I", content, at + size - 4) == (size,)
        kinds.append(kind)
        at += size
    assert kinds == [0x0A0D0D0A, 1] + [6] * 66


# Exactness


def test_an_exchange_matches_every_reply(wire: Wire, echo: Callable[..., Echo]) -> None:
    with echo():
        outcome = wire.exchange(frames(3000), window=64)
    outcome.check()
    assert (outcome.sent, outcome.received, len(outcome.rtt_ns)) == (3000, 3000, 3000)
    assert min(outcome.rtt_ns) > 0


def test_an_exchange_of_equal_frames(wire: Wire, echo: Callable[..., Echo]) -> None:
    with echo():
        outcome = wire.exchange([b"x" * 60] * 100)
    outcome.check()
    assert outcome.received == 100


def test_an_exchange_with_other_replies(wire: Wire, echo: Callable[..., Echo]) -> None:
    def swap(data: bytes) -> bytes:
        return data[6:12] + data[:6] + data[12:]

    with echo(lambda data: [swap(data)]):
        wire.exchange(frames(100), reply=swap).check()


def test_an_exchange_counts_what_went_wrong(wire: Wire, echo: Callable[..., Echo]) -> None:
    sent = frames(6)
    held: list[bytes] = []

    def misbehave(data: bytes) -> list[bytes]:
        match sent.index(data):
            case 0:
                return []
            case 1:
                return [data, data]
            case 2:
                return [data, b"\x99" * 60]
            case 3:
                held.append(data)
                return []
            case 4:
                return [data, *held]
        return [data]

    with echo(misbehave):
        outcome = wire.exchange(sent, timeout=0.3)
    assert (outcome.sent, outcome.received, outcome.reordered) == (6, 5, 1)
    assert (outcome.lost, outcome.twice, outcome.extra) == ([sent[0]], [sent[1]], [b"\x99" * 60])
    with pytest.raises(WireMismatch, match=r"6 frames sent, 5 came back: 1 lost, 1 extra, 1 twice, 1 out of order"):
        outcome.check()


def test_flows_overtake_each_other_and_within_one_nothing_does(wire: Wire, echo: Callable[..., Echo]) -> None:
    sent = frames(4)

    def displaced(order: Sequence[int], **options: Any) -> int:
        held: list[bytes] = []

        def when_all_are_there(data: bytes) -> list[bytes]:
            held.append(data)
            return [sent[at] for at in order] if len(held) == len(sent) else []

        with echo(when_all_are_there):
            return wire.exchange(sent, **options).reordered

    assert displaced((2, 3, 0, 1)) == 2
    assert displaced((2, 3, 0, 1), flow=lambda data: sent.index(data) // 2) == 0
    assert displaced((3, 2, 0, 1), flow=lambda data: sent.index(data) // 2) == 1


def test_an_exchange_ignores_what_it_is_told_to(wire: Wire, echo: Callable[..., Echo]) -> None:
    noise = b"\x33\x33" + bytes(58)
    with echo(lambda data: [noise, data]):
        wire.exchange(frames(10), ignore=lambda data: data[:2] == b"\x33\x33").check()
        assert not wire.exchange(frames(10)).exact


def test_expecting_exactly(wire: Wire, guest: socket.socket) -> None:
    some = frames(3)
    for frame in some:
        guest.send(frame)
    assert [frame.data for frame in wire.expect(some)] == some
    for frame in (some[1], some[0]):
        guest.send(frame)
    wire.expect([some[0], some[1]], ordered=False)


def test_a_missing_frame(wire: Wire, guest: socket.socket) -> None:
    some = frames(3)
    guest.send(some[0])
    guest.send(some[2])
    with pytest.raises(
        WireMismatch,
        match=r"3 frames expected, 2 came within 0\.1 s: 1 missing, 0 extra, 0 twice\nmissing: .*88b5|0x88b5",
    ):
        wire.expect(some, timeout=0.1)


def test_a_frame_that_came_twice(wire: Wire, guest: socket.socket) -> None:
    some = frames(2)
    for frame in (some[0], some[0]):
        guest.send(frame)
    with pytest.raises(WireMismatch, match="1 missing, 0 extra, 1 twice"):
        wire.expect(some, timeout=0.1)


def test_an_extra_frame_before_the_sentinel(wire: Wire, guest: socket.socket) -> None:
    some, sentinel = frames(2), b"\xee" * 60
    for frame in (*some, b"\x99" * 60, sentinel):
        guest.send(frame)
    with pytest.raises(WireMismatch, match="0 missing, 1 extra, 0 twice\nextra: "):
        wire.expect(some, until=sentinel)
    for frame in (*some, sentinel):
        guest.send(frame)
    wire.expect(some, until=sentinel)


def test_a_sentinel_that_does_not_come(wire: Wire, guest: socket.socket) -> None:
    guest.send(b"x" * 60)
    with pytest.raises(WireMismatch, match="the sentinel that was to close the account did not come"):
        wire.expect([b"x" * 60], until=b"\xee" * 60, timeout=0.1)


def test_another_order(wire: Wire, guest: socket.socket) -> None:
    some = frames(3)
    for frame in (some[0], some[2], some[1]):
        guest.send(frame)
    with pytest.raises(WireMismatch, match=r"the order differs from frame 1 on:\n  expected .*\n  came "):
        wire.expect(some)


def test_the_difference_is_shown_field_by_field(wire: Wire, guest: socket.socket) -> None:
    wanted = Ether(dst=MAC, src="02:00:00:00:00:01") / IP(src="10.0.0.2", dst="10.0.0.1") / UDP(dport=7) / Raw(b"hello")
    came = wanted.copy()
    came[UDP].dport = 9
    guest.send(bytes(came))
    with pytest.raises(WireMismatch) as caught:
        wire.expect([wanted], timeout=0.1)
    text = str(caught.value)
    assert re.search(r"- +dport += (echo|7)\n", text)
    assert re.search(r"\+ +dport += (discard|9)\n", text)
    assert "hello" not in text.split("expected (-)")[1]


def test_closing_ends_a_wait_and_the_thread(tmp_path: Path) -> None:
    wire = Wire()
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(wire.take(30)))
    waiter.start()
    wire.close()
    wire.close()
    waiter.join(5)
    assert got == [[]]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wire")]
