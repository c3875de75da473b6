"""The device's and the wire's view of the frames that went by."""

from pathlib import Path

import pytest

from qemu.capture import INBOUND, OUTBOUND, Capture, Tally
from qemu.views import DeviceView, Queue, WireView, advanced, wire_view
from qemu.wire import Wire


def test_a_capture_is_counted_while_it_is_written(tmp_path: Path) -> None:
    capture, tally = Capture(tmp_path / "x.pcap", "x"), Tally(tmp_path / "x.pcap")
    assert tally.look() == (0, 0)
    for length in range(1, 200):
        capture.write(b"\1" * length, length, OUTBOUND if length % 3 else INBOUND)
    capture.flush()
    assert tally.look() == (133, 66)
    capture.write(b"last", 1, INBOUND)
    capture.close()
    assert tally.look() == (133, 67)


def test_what_is_not_whole_yet_is_counted_later(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "whole", "x")
    capture.write(b"one" * 20, 1, INBOUND)
    capture.write(b"two" * 20, 2, OUTBOUND)
    capture.close()
    data = (tmp_path / "whole").read_bytes()
    part = tmp_path / "part"
    part.write_bytes(data[:-20])
    tally = Tally(part)
    assert tally.look() == (0, 1)
    part.write_bytes(data)
    assert tally.look() == (1, 1)
    part.write_bytes(data + b"\6\0\0\0" + b"\x10\0\0\0" + bytes(8))
    with pytest.raises(ValueError, match=rf"part: the block at byte {len(data)} is broken"):
        tally.look()


def test_the_wire_and_its_capture(tmp_path: Path) -> None:
    with Wire(tmp_path / "x.pcap") as wire:
        wire.send(b"\1" * 60)
        wire.guest_end.send(b"\2" * 60)
        assert wire.take(10)
        view = wire_view(wire)
        assert view[:2] == (1, 1)
        assert view.captured_sent == 1
    with Wire() as bare:
        bare.send(b"\1" * 60)
        assert wire_view(bare) == WireView(1, 0, 1, 0)


@pytest.mark.parametrize(
    ("before", "after", "packed", "moved"),
    [
        (Queue(256, 65_530, 0), Queue(256, 4, 0), False, (10, 65_536)),
        (Queue(256, 250, 0), Queue(256, 4, 0), True, (10, 256)),
        (Queue(512, 0, 0), Queue(512, 511, 0), True, (511, 512)),
    ],
)
def test_indices_come_round(before: Queue, after: Queue, packed: bool, moved: tuple[int, int]) -> None:
    assert advanced(before, after, packed) == moved


@pytest.mark.parametrize(
    ("count", "receive", "transmit"), [(2, [0], [1]), (3, [0], [1]), (9, [0, 2, 4, 6], [1, 3, 5, 7])]
)
def test_the_control_queue_is_none_of_the_data_queues(count: int, receive: list[int], transmit: list[int]) -> None:
    view = DeviceView("", "", False, tuple(Queue(256, number, 0) for number in range(count)))
    assert [queue.used for queue in view.receive] == receive
    assert [queue.used for queue in view.transmit] == transmit
