"""A device that is reset under a session: what is done in which order, what is counted, when it is given up on.

The buffers' side of it is tested in C (core/recovery.c), the whole on QEMU's device (e2e/test_recovery.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from netbridge.datapath._core import ffi
from netbridge.errors import DeviceError
from netbridge.ipc.requests import Filter
from netbridge.log import Log
from netbridge.recovery import MOST_ATTEMPTS, Cause, Recovery
from netbridge.session import _Promises
from netbridge.station import Station
from netbridge.virtio import features
from netbridge.virtio.errors import Gone
from netbridge.virtio.states import State
from netbridge.virtio.transport import Status
from tests.unit.control_fakes import CONTROL, Bench

LOST = 5


class FakeSession:
    """Records what is done to it, and whether the device was quiet then."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.is_salvaged = False
        self.done: list[str] = []
        self.fails = 0
        self.queue_fails: Exception | None = None
        self.queue_was_reset_in_vain = False

    def reset_stalled_queue(self) -> int | None:
        assert self.bench.net.state is State.LIVE
        if self.queue_was_reset_in_vain:
            return None
        self.done.append("queue")
        if self.queue_fails is not None:
            raise self.queue_fails
        return LOST

    def salvage(self) -> int:
        assert self.bench.model.status == 0, "the device still runs"
        assert self.bench.net.pairs, "the queues are gone"
        self.is_salvaged = True
        self.done.append("salvage")
        return LOST

    def resume(self) -> None:
        assert self.bench.net.state is State.CONFIGURED
        self.done.append("resume")
        if self.fails:
            self.fails -= 1
            raise DeviceError("not as it was")
        self.is_salvaged = False


class Fixture:
    def __init__(self, bench: Bench) -> None:
        bench.start()
        self.bench = bench
        self.session: Any = FakeSession(bench)
        self.station = Station(bench.net)
        self.station.begin()
        self.counters = ffi.new("struct nb_counters *")
        self.recovery = Recovery(bench.net, self.counters, Log(False))

    def attempt(self, cause: Cause = Cause.FAULT) -> bool:
        self.bench.device.reset()
        return self.recovery.attempt(self.session, self.station, cause, 0)


@pytest.fixture
def it(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    bench = Bench(monkeypatch, CONTROL | features.RING_RESET.mask, reset_deadline_s=0.01)
    yield Fixture(bench)
    bench.model.gone, bench.model.reset_reads = False, 0
    bench.net.close()


@pytest.mark.parametrize("cause", list(Cause))
def test_the_session_goes_on_and_it_is_counted(it: Fixture, cause: Cause) -> None:
    assert it.attempt(cause)
    assert it.session.done == ["salvage", "resume"]
    assert it.bench.net.state is State.LIVE
    assert list(it.counters.recoveries) == [int(other is cause) for other in Cause]
    assert (it.counters.resets, it.counters.recoveries_failed) == (1, 0)
    assert it.counters.recovery_ns.count == 1


@pytest.fixture
def by_queue(it: Fixture) -> Fixture:
    """A driver that was told to reset a queue alone."""
    it.recovery = Recovery(it.bench.net, it.counters, Log(False), queue_reset=True)
    return it


def test_a_queue_that_does_not_move_is_reset_alone(by_queue: Fixture) -> None:
    assert by_queue.attempt(Cause.STALLED)
    assert by_queue.session.done == ["queue"]
    counters = by_queue.counters
    assert (counters.queue_resets, counters.resets) == (1, 0)
    assert counters.recoveries[Cause.STALLED.value] == counters.recovery_ns.count == 1


def test_the_whole_device_is_reset_where_that_did_not_help(by_queue: Fixture) -> None:
    assert by_queue.attempt(Cause.STALLED)
    by_queue.session.queue_was_reset_in_vain = True
    assert by_queue.attempt(Cause.STALLED)
    assert by_queue.session.done == ["queue", "salvage", "resume"]
    assert (by_queue.counters.queue_resets, by_queue.counters.resets) == (1, 1)


def test_the_whole_device_is_reset_where_it_cannot_reset_a_queue(by_queue: Fixture) -> None:
    by_queue.bench.net.reset()
    by_queue.bench.model.offered = CONTROL
    by_queue.bench.start()
    assert by_queue.attempt(Cause.STALLED)
    assert by_queue.session.done == ["salvage", "resume"]


def test_the_whole_device_is_reset_where_the_queue_cannot_be(by_queue: Fixture) -> None:
    by_queue.session.queue_fails = DeviceError("the queue does not let go")
    assert by_queue.attempt(Cause.STALLED)
    assert by_queue.session.done == ["queue", "salvage", "resume"]
    assert (by_queue.counters.queue_resets, by_queue.counters.resets) == (0, 1)


def test_other_causes_are_the_whole_device_s(by_queue: Fixture) -> None:
    assert by_queue.attempt(Cause.FAULT)
    assert by_queue.session.done == ["salvage", "resume"]


def test_no_queue_is_reset_alone_unasked(by_queue: Fixture) -> None:
    by_queue.recovery = Recovery(by_queue.bench.net, by_queue.counters, Log(False))
    assert by_queue.attempt(Cause.STALLED)
    assert by_queue.session.done == ["salvage", "resume"]


def test_what_the_client_asked_for_is_asked_again(it: Fixture) -> None:
    it.station.ask(Filter(1, all_multicast=True, vlans=frozenset({5})))
    it.bench.device.received.clear()
    assert it.attempt()
    assert it.bench.device.received == [b"\x02\x00\x05\x00", b"\x00\x00\x00", b"\x00\x01\x01"]


def test_a_device_in_needs_reset_is_recovered(it: Fixture) -> None:
    it.bench.model.status |= Status.NEEDS_RESET
    assert it.bench.net.needs_reset()
    assert it.attempt(Cause.NEEDS_RESET)
    assert it.bench.net.state is State.LIVE


def test_an_attempt_that_fails_is_repeated_without_salvaging_twice(it: Fixture) -> None:
    it.session.fails = 1
    assert it.attempt()
    assert it.session.done == ["salvage", "resume", "resume"]
    assert it.counters.recovery_ns.count == 1


def test_it_is_given_up_on_after_a_few_attempts(it: Fixture) -> None:
    it.session.fails = 99
    assert not it.attempt()
    assert it.session.done == ["salvage", *["resume"] * MOST_ATTEMPTS]
    assert it.counters.recoveries_failed == 1
    assert not any(it.counters.recoveries)


def test_a_device_that_fails_again_and_again_without_a_frame_is_given_up_on(it: Fixture) -> None:
    for _ in range(MOST_ATTEMPTS):
        assert it.attempt()
    assert not it.attempt()
    it.counters.packets_tx += 1
    assert it.attempt(), "a frame has gone through: it is worth trying again"


def test_a_device_that_does_not_reset_is_given_up_on(it: Fixture) -> None:
    it.bench.model.reset_reads = -1
    assert not it.attempt()
    assert it.session.done == []
    assert not it.bench.transport.dma, "it was cut off from memory"


def test_a_device_that_is_gone_is_somebody_elses_business(it: Fixture) -> None:
    it.bench.model.gone = True
    with pytest.raises(Gone):
        it.attempt()


def test_a_device_that_stops_answering_commands_is_given_up_on(it: Fixture) -> None:
    it.bench.device.silent = True
    assert not it.attempt()


PROMISED = _Promises(pairs=2, offloads=3, header_bytes=12, merges=True, mtu=1500)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pairs": 1}, "pairs 1 instead of 2"),
        ({"offloads": 1}, "offloads 1 instead of 3"),
        ({"merges": False}, "merges False instead of True"),
        ({"mtu": 1400}, "mtu 1400 instead of 1500"),
        ({"mtu": 9000}, ""),
        ({}, ""),
    ],
)
def test_features_withdrawn_after_a_reset(change: dict[str, int], said: str) -> None:
    changed: Callable[..., _Promises] = PROMISED._replace
    assert PROMISED.broken_by(changed(**change)) == said
