"""The switch between guests, the guests played by the other ends of the wires."""

import socket
from collections.abc import Iterator

import pytest

from qemu.switch import Harm, Switch
from qemu.wire import Wire

MACS = [bytes.fromhex(f"02000000000{n}") for n in range(3)]
EVERYBODY = b"\xff" * 6


def frame(source: int, target: bytes, number: int = 0) -> bytes:
    return target + MACS[source] + b"\x88\xb5" + number.to_bytes(4, "big") + b"x" * 46


@pytest.fixture
def wires() -> Iterator[list[Wire]]:
    made = [Wire(name=f"port{n}") for n in range(3)]
    for wire in made:
        wire.guest_end.settimeout(5)
    yield made
    for wire in made:
        wire.close()


def quiet(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        end.recv(100)
    except BlockingIOError:
        return True
    finally:
        end.settimeout(5)
    return False


def test_it_floods_learns_and_then_sends_to_one(wires: list[Wire]) -> None:
    ends = [wire.guest_end for wire in wires]
    with Switch(wires) as switch:
        ends[0].send(frame(0, EVERYBODY))
        assert ends[1].recv(100) == ends[2].recv(100) == frame(0, EVERYBODY)
        ends[1].send(frame(1, MACS[0]))
        assert ends[0].recv(100) == frame(1, MACS[0])
        ends[0].send(frame(0, MACS[1]))
        assert ends[1].recv(100) == frame(0, MACS[1])
        # The third has seen neither: the next that it sees is this one.
        ends[0].send(frame(0, EVERYBODY, 9))
        assert ends[2].recv(100) == frame(0, EVERYBODY, 9)
        assert switch.counters.received == 4
        assert quiet(ends[0])


def through(seed: int, **harm: float) -> list[int]:
    """The numbers of forty frames as they come out at the other side; the last is sent till it comes."""
    wires = [Wire(), Wire()]
    one, other = (wire.guest_end for wire in wires)
    other.settimeout(0.5)
    came = []
    with Switch(wires, Harm(seed=seed, **harm)) as switch:
        for number in range(40):
            one.send(frame(0, EVERYBODY, number))
        try:
            while True:
                came.append(int.from_bytes(other.recv(100)[14:18], "big"))
        except TimeoutError:
            pass
        assert len(came) == 40 - switch.counters.lost + switch.counters.duplicated
        assert (came != sorted(came)) == (switch.counters.reordered > 0) or "reordering" not in harm
    for wire in wires:
        wire.close()
    return came


def test_without_harm_every_frame_comes_once_in_order() -> None:
    assert through(1) == list(range(40))


@pytest.mark.thorough  # waits for silence, as only that tells that no more will come
@pytest.mark.parametrize("kind", ["loss", "duplication", "reordering"])
def test_harm_is_done_as_the_seed_says(kind: str) -> None:
    first = through(1, **{kind: 0.3})
    assert first != list(range(40))
    assert through(1, **{kind: 0.3}) == first
    assert through(2, **{kind: 0.3}) != first


def test_everything_may_be_lost_and_nothing_else_happens_then() -> None:
    assert through(1, loss=1.0, duplication=1.0, reordering=1.0) == []


def test_a_delay_keeps_the_order() -> None:
    assert through(1, delay=0.02) == list(range(40))


def test_a_cut_port_is_silent_until_it_is_mended(wires: list[Wire]) -> None:
    ends = [wire.guest_end for wire in wires]
    with Switch(wires) as switch:
        switch.cut(1)
        ends[0].send(frame(0, EVERYBODY, 1))
        assert ends[2].recv(100) == frame(0, EVERYBODY, 1)
        ends[1].send(frame(1, EVERYBODY, 2))
        switch.mend(1)
        ends[0].send(frame(0, EVERYBODY, 3))
        assert ends[1].recv(100) == frame(0, EVERYBODY, 3)


def test_a_port_that_takes_nothing_holds_nobody_up(wires: list[Wire]) -> None:
    ends = [wire.guest_end for wire in wires]
    with Switch(wires) as switch:
        for number in range(5000):
            ends[0].send(frame(0, EVERYBODY, number))
            assert ends[2].recv(100) == frame(0, EVERYBODY, number)
            if switch.counters.stalled:
                return
    pytest.fail("nothing was dropped at the port that takes nothing")


def test_wrong_harm_is_refused() -> None:
    with pytest.raises(ValueError, match="loss is a chance from 0 to 1, not 2"):
        Harm(loss=2)
    with pytest.raises(ValueError, match="a delay is at least 0 seconds"):
        Harm(delay=-1)
