"""The Linux stack behind the port talks to a second guest, whose kernel has a NIC with its own virtio-net driver: with
offloads, frames of 9,000 bytes, and every datagram accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qemu.guest import Guest
from qemu.session import Session
from tests.e2e import testbed, two_guests
from tests.e2e.two_guests import (
    INTERFACE,
    MTU,
    OURS,
    OURS_6,
    OURS_MAC,
    THEIRS,
    THEIRS_6,
    THEIRS_MAC,
    Pair,
    backlog_drops,
    ping,
    protocol_counts,
    statistic,
)

pytestmark = pytest.mark.needs_root

LARGEST_PING = MTU - 28  # behind the headers of IPv4 and ICMP
# Each of these takes seconds: one of a kind in `make test`, the others where there is more time.
ALSO = pytest.mark.thorough
DATAGRAMS, LENGTHS = 2000, (pytest.param(4, marks=ALSO), 1472, pytest.param(LARGEST_PING, marks=ALSO))
TRANSFER = int(os.environ.get("TRANSFER_MIB", "8")) << 20
SECONDS = 120.0 + (TRANSFER >> 18)


@pytest.fixture(scope="module")
def pair(guests: Session) -> Iterator[Pair]:
    with two_guests.pair(guests, "tap") as both:
        two_guests.acquaint(both.ours, INTERFACE, (THEIRS, THEIRS_6), THEIRS_MAC)
        yield both


@contextlib.contextmanager
def server(guest: Guest, address: str) -> Iterator[None]:
    with guest.start(["python3", "-m", "tests.e2e.peer", "serve", address]) as process:
        process.wait_for_line("serving", testbed.START_SECONDS)
        yield


def ask(guest: Guest, *words: object) -> dict[str, Any]:
    done = guest.run(["python3", "-m", "tests.e2e.peer", *map(str, words)], timeout=SECONDS)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_interface_is_as_the_device_is(pair: Pair) -> None:
    (link,) = json.loads(pair.ours.run(["ip", "-json", "link", "show", INTERFACE]).stdout)
    assert (link["address"], link["mtu"], link["operstate"]) == (OURS_MAC, MTU, "UP")


@pytest.mark.parametrize("size", [56, 1472, LARGEST_PING])
def test_ping_both_ways(pair: Pair, size: int) -> None:
    ping(pair.theirs, OURS, size)
    ping(pair.ours, THEIRS, size)
    for guest in (pair.ours, pair.theirs):
        assert protocol_counts(guest, "Ip")["FragCreates"] == 0, "each was one frame"


def test_ping_ipv6_both_ways(pair: Pair) -> None:
    ping(pair.theirs, OURS_6)
    ping(pair.ours, THEIRS_6)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_datagram_is_accounted_for(pair: Pair, length: int) -> None:
    """Those that came, and those that somebody on their way says he dropped, are those that were sent."""

    def dropped_on_the_way_here() -> int:
        here: int = sum(pair.counters()["drops"].values()) + statistic(pair.ours, INTERFACE, "rx_dropped")
        here += backlog_drops(pair.ours) + protocol_counts(pair.ours, "Udp")["RcvbufErrors"]
        return here + pair.ours_end.dropped() + statistic(pair.theirs, pair.name, "tx_dropped")

    def dropped_on_the_way_there() -> int:
        there = statistic(pair.theirs, pair.name, "rx_dropped") + backlog_drops(pair.theirs)
        there += protocol_counts(pair.theirs, "Udp")["RcvbufErrors"]
        return there + pair.theirs_end.dropped() + statistic(pair.ours, INTERFACE, "tx_dropped")

    for dropped, taker, giver, address in (
        (dropped_on_the_way_here, pair.ours, pair.theirs, OURS),
        (dropped_on_the_way_there, pair.theirs, pair.ours, THEIRS),
    ):
        before = dropped()
        with taker.start(["python3", "-m", "tests.e2e.peer", "count", address], stdin=True) as counter:
            counter.wait_for_line("counting", testbed.START_SECONDS)
            sent = ask(giver, "datagrams", address, DATAGRAMS, length)["sent"]
            deadline = time.monotonic() + SECONDS
            while True:
                counter.write(b"\n")
                said = json.loads(counter.wait_for_line("came", testbed.START_SECONDS).string)
                lost = dropped() - before
                if said["came"] + lost >= sent or time.monotonic() > deadline:
                    break
        assert said["came"] == said["different"], "none came twice"
        assert said["came"] + lost == sent == DATAGRAMS, f"{said['came']} came, {lost} are known to be dropped"


@pytest.mark.parametrize("address", [OURS, pytest.param(OURS_6, marks=ALSO)])
@pytest.mark.parametrize("verb", ["take", "give"])
def test_a_tcp_transfer_is_unchanged_and_never_cut(pair: Pair, verb: str, address: str) -> None:
    way = "rx" if verb == "take" else "tx"
    before = [statistic(pair.ours, INTERFACE, f"{way}_{what}") for what in ("bytes", "packets")]
    with server(pair.ours, address):
        answer = ask(pair.theirs, verb, address, TRANSFER)
    data, frames = (
        statistic(pair.ours, INTERFACE, f"{way}_{what}") - was
        for what, was in zip(("bytes", "packets"), before, strict=True)
    )
    assert answer["equal"]
    assert data > TRANSFER
    assert data / frames > MTU + 18, f"{data} bytes in {frames} frames: TCP was cut into segments on the way"
    for guest in (pair.ours, pair.theirs):
        assert protocol_counts(guest, "Tcp")["InCsumErrors"] == 0
    print(f"{verb}, {address}: {answer['mbit_per_s']} Mbit/s, {data / frames:.0f} bytes a frame")


@ALSO
def test_without_offloads_the_kernel_cuts(pair: Pair) -> None:
    closed = pair.restart_tap("--no-offloads")
    assert (closed["refused"], closed["too_long"], closed["bad_headers"]) == (0, 0, 0)
    try:
        two_guests.acquaint(pair.ours, INTERFACE, (THEIRS, THEIRS_6), THEIRS_MAC)

        with server(pair.ours, OURS):
            for verb in ("take", "give"):
                assert ask(pair.theirs, verb, OURS, 1 << 20)["equal"]
        sent = [
            statistic(pair.ours, INTERFACE, f"{way}_{what}") for way in ("rx", "tx") for what in ("bytes", "packets")
        ]
        assert sent[0] / sent[1] <= MTU + 18
        assert sent[2] / sent[3] <= MTU + 18
    finally:
        closed = pair.restart_tap()
        two_guests.acquaint(pair.ours, INTERFACE, (THEIRS, THEIRS_6), THEIRS_MAC)
    assert (closed["refused"], closed["too_long"], closed["bad_headers"]) == (0, 0, 0)


def test_the_service_has_one_capability(pair: Pair) -> None:
    lines = pair.ours.run(["cat", f"/proc/{pair.tap.pid}/status"]).stdout.splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert status["Uid"].split() == ["1000"] * 4
    assert {int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd")} == {1 << 12}


def test_a_driver_that_died_comes_back_to_the_same_interface(pair: Pair) -> None:
    index = pair.ours.run(["cat", f"/sys/class/net/{INTERFACE}/ifindex"]).stdout
    pid = int(re.findall(r" claimed .*\bdriver=(\d+)", pair.driver.stderr)[-1])
    pair.ours.run(["kill", "-KILL", str(pid)])
    two_guests.await_session(pair.tap)
    ping(pair.theirs, OURS)
    ping(pair.ours, THEIRS_6)
    assert pair.ours.run(["cat", f"/sys/class/net/{INTERFACE}/ifindex"]).stdout == index


def test_a_service_that_was_killed_leaves_no_interface(pair: Pair) -> None:
    pair.tap.kill(signal.SIGKILL)
    pair.tap.wait(testbed.STOP_SECONDS)
    assert INTERFACE not in pair.ours.run(["ls", "/sys/class/net"]).stdout.split()
    pair.tap = two_guests.start_tap(pair.ours)
    ping(pair.theirs, OURS)
