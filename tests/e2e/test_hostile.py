"""Clients that mean no good, on a real driver held to its 16 MiB: it lives, and the next client starts clean."""

from __future__ import annotations

import re

import pytest

from netbridge.errors import ExitCode
from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.load import Load
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import Generator, reflected

pytestmark = pytest.mark.thorough

STRANGER = "nobody"
PATIENCE_SECONDS = 240.0


def hostile(guest: Guest, what: str, count: int, user: str = testbed.SERVICE_USER) -> str:
    command = ["python3", "-m", "tests.e2e.hostile", what, str(count)]
    return guest.run(command, user=user, timeout=PATIENCE_SECONDS).stdout.strip()


def echoed_exactly(wire: Wire, bed: Testbed, count: int = 256) -> None:
    """So many frames there and back, and the driver's counters say the same."""
    bed.settle(wire)
    before = bed.counters()
    wire.exchange(Generator(bed.mac).udp(count), reply=reflected, window=32, timeout=20.0).check()
    assert not wire.drain()
    after = bed.counters()
    moved = {name: after[name] - before[name] for name in ("packets_rx", "packets_tx")}
    assert moved == {"packets_rx": count, "packets_tx": count}


def change_places(bed: Testbed, what: str, count: int) -> str:
    """The echo service leaves the port to a hostile client, and has it again afterwards."""
    testbed.end(bed.echo)
    said = hostile(bed.guest, what, count)
    bed.echo = testbed.start_echo(bed.guest, bed.echo_log)
    testbed.wait_for_line(bed.driver, r" serving .*client=netbridge-echo")
    return said


def test_a_client_that_keeps_all_it_was_sent(guest: Guest, wire: Wire, bed: Testbed) -> None:
    """Thirty sessions' memory is six times what the driver may have: it must not be the driver's any more."""
    driver = bed.driver_pid
    assert change_places(bed, "keep", 30) == "done: 30 sessions"
    assert bed.driver_pid == driver, "the same process"
    assert int(testbed.in_cgroup(guest, bed.pci, "memory.peak")) <= 16 << 20
    echoed_exactly(wire, bed)
    assert not guest.iommu_faults()


def test_a_client_that_wrecks_all_it_can_reach(guest: Guest, wire: Wire, bed: Testbed) -> None:
    driver = bed.driver_pid
    with Load(wire, bed.mac):
        said = change_places(bed, "wreck", 5)
    assert bed.driver_pid == driver, "the same process"
    echoed_exactly(wire, bed)
    # Each session whose rings were wrecked ended with that, and every one of them was counted.
    ended = int(re.search(r"\bRING_FAULT (\d+)", said)[1])  # type: ignore[index]
    assert sum(bed.counters()["refused_handles"].values()) == ended
    assert not guest.iommu_faults()


def test_a_crowd_at_the_door_under_traffic(guest: Guest, wire: Wire) -> None:
    """A thousand callers without the right, and as many with it who find the port busy: not a frame is lost by them.
    Two users may connect, so the door is open to all."""
    users = [word for name in (testbed.SERVICE_USER, "daemon") for word in ("--service-uid", name)]
    with testbed.running(guest, options=users) as bed:
        bed.settle(wire)
        before = bed.counters()
        sent = wire.sent
        for user, heard in ((STRANGER, "NOT_PERMITTED"), (testbed.SERVICE_USER, "BUSY")):
            command = ["python3", "-m", "tests.e2e.hostile", "crowd", "1000"]
            with guest.start(command, user=user) as callers:
                while callers.running:
                    wire.exchange(Generator(bed.mac).udp(64), reply=reflected, window=8, timeout=60.0).check()
                assert callers.wait(PATIENCE_SECONDS) == 0, callers.stderr
                assert callers.stdout.strip() == f"done: {heard} 1000"
        assert not wire.drain()
        after = bed.counters()
        moved = {name: after[name] - before[name] for name in ("packets_rx", "packets_tx", "sessions")}
        assert moved == {"packets_rx": wire.sent - sent, "packets_tx": wire.sent - sent, "sessions": 0}
        bed.stop()


def test_a_stranger_does_not_even_reach_the_door_of_a_single_user(guest: Guest, wire: Wire, bed: Testbed) -> None:
    listing = guest.run(["stat", "-c", "%U %a", testbed.SOCKET]).stdout.strip()
    assert listing == f"{testbed.SERVICE_USER} 600"
    command = ["python3", "-m", "netbridge.services.echo", "--once", "--socket", testbed.SOCKET]
    done = guest.run(command, user=STRANGER, check=False)
    assert done.returncode == ExitCode.PORT
    assert "--service-uid" in done.stderr
    echoed_exactly(wire, bed, 64)
