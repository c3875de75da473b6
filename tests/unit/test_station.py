"""What a client asks of the device: in which order it is asked, what a refusal leaves, and that it is asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from netbridge.ipc.requests import Filter, Mac, Verdict
from netbridge.station import FATAL, Station
from netbridge.virtio import features
from tests.unit.control_fakes import CONTROL, ERR, OK, Bench

STATION, GROUP = bytes.fromhex("525400000001"), bytes.fromhex("01005e000001")
PROMISCUOUS_ON, PROMISCUOUS_OFF = b"\0\0\1", b"\0\0\0"
VLAN_ON, VLAN_OFF = b"\x02\x00", b"\x02\x01"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Bench]]:
    benches: list[Bench] = []

    def make_one(offered: int) -> Bench:
        benches.append(Bench(monkeypatch, offered))
        benches[-1].start()
        return benches[-1]

    yield make_one
    for bench in benches:
        bench.net.close()


@pytest.fixture
def bench(make: Callable[[int], Bench]) -> Bench:
    return make(CONTROL)


@pytest.fixture
def station(bench: Bench) -> Station:
    """A session that has begun; what that took is forgotten."""
    station = Station(bench.net)
    station.begin()
    bench.device.received.clear()
    return station


def test_a_session_begins_with_every_frame(bench: Bench) -> None:
    Station(bench.net).begin()
    assert bench.device.received == [PROMISCUOUS_ON]


def test_without_receive_modes_nothing_is_asked(make: Callable[[int], Bench]) -> None:
    bench = make(CONTROL & ~features.CTRL_RX.mask)
    station = Station(bench.net)
    station.begin()
    assert bench.device.received == []
    verdict, why = station.ask(Filter(1, promiscuous=True))
    assert (verdict, why) == (Verdict.NOT_OFFERED, "fake: CTRL_RX is not agreed with the device")


def test_what_lets_in_comes_before_what_keeps_out(bench: Bench, station: Station) -> None:
    assert station.ask(Filter(1, multicast=(GROUP,), vlans=frozenset({7}))) == (Verdict.DONE, "")
    assert bench.device.received == [
        bytes.fromhex("01 00 00000000 01000000") + GROUP,
        VLAN_ON + b"\x07\0",
        PROMISCUOUS_OFF,
    ]
    bench.device.received.clear()
    assert station.ask(Filter(2, all_multicast=True)) == (Verdict.DONE, "")
    assert bench.device.received == [
        bytes.fromhex("01 00 00000000 00000000"),
        b"\0\1\1",
        VLAN_OFF + b"\x07\0",
    ]


def test_the_same_again_asks_nothing(bench: Bench, station: Station) -> None:
    station.ask(Filter(1, unicast=(STATION,)))
    bench.device.received.clear()
    assert station.ask(Filter(2, unicast=(STATION,))) == (Verdict.DONE, "")
    assert bench.device.received == []


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        (Filter(1, vlans=frozenset({1})), "CTRL_VLAN"),
        (Filter(1, no_broadcast=True), "CTRL_RX_EXTRA"),
        (Mac(1, STATION), "CTRL_MAC_ADDR"),
    ],
)
def test_what_the_device_lacks_is_refused_and_nothing_is_asked(
    make: Callable[[int], Bench], wanted: Filter | Mac, missing: str
) -> None:
    bench = make(CONTROL & ~features.feature(missing).mask)
    verdict, why = Station(bench.net).ask(wanted)
    assert verdict is Verdict.NOT_OFFERED
    assert missing in why
    assert bench.device.received == []


@pytest.mark.parametrize("wanted", [Filter(1, unicast=(GROUP,)), Mac(1, GROUP), Mac(1, bytes(6))])
def test_what_can_never_be_is_refused(bench: Bench, station: Station, wanted: Filter | Mac) -> None:
    assert station.ask(wanted)[0] is Verdict.INVALID
    assert bench.device.received == []


def test_a_refusal_in_the_middle_changes_nothing(bench: Bench, station: Station) -> None:
    station.ask(Filter(1, multicast=(GROUP,), vlans=frozenset({1})))
    bench.device.received.clear()
    bench.device.answer = lambda command: ERR if command == VLAN_ON + b"\x03\0" else OK
    verdict, why = station.ask(Filter(2, all_multicast=True, vlans=frozenset({2, 3})))
    assert verdict is Verdict.REFUSED
    assert "refuses VLAN 3 on" in why
    bench.device.answer = OK
    # As it was: the table, and VLAN 2 out again.
    assert bytes.fromhex("01 00 00000000 01000000") + GROUP in bench.device.received[2:]
    assert VLAN_OFF + b"\x02\0" in bench.device.received
    bench.device.received.clear()
    station.ask(Filter(3, multicast=(GROUP,), vlans=frozenset({1})))
    assert bench.device.received == [], "nothing is different from what was wanted before"


def test_the_new_address_is_the_devices(bench: Bench, station: Station) -> None:
    assert station.mac == bench.model.mac
    assert station.ask(Mac(1, STATION)) == (Verdict.DONE, "")
    assert station.mac == STATION
    bench.device.answer = ERR
    assert station.ask(Mac(2, bytes.fromhex("525400000009")))[0] is Verdict.REFUSED
    assert station.mac == STATION


def test_after_a_reset_everything_is_asked_for_again(bench: Bench, station: Station) -> None:
    station.ask(Mac(1, STATION))
    station.ask(Filter(2, all_multicast=True, unicast=(STATION,), vlans=frozenset({5, 9})))
    bench.net.reset()
    bench.start()
    bench.device.received.clear()
    station.begin()
    assert bench.device.received == [
        b"\1\1" + STATION,
        bytes.fromhex("01 00 01000000") + STATION + bytes(4),
        VLAN_ON + b"\x05\0",
        VLAN_ON + b"\x09\0",
        PROMISCUOUS_OFF,
        b"\0\1\1",
    ]


@pytest.mark.parametrize("switch", [{"silent": True}, {"answer": 7}, {"head": 9}])
def test_a_device_that_answers_wrongly_or_not_at_all(bench: Bench, station: Station, switch: dict[str, object]) -> None:
    for name, value in switch.items():
        setattr(bench.device, name, value)
    with pytest.raises(FATAL):
        station.ask(Filter(1))
