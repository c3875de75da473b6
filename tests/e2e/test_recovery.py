"""A device that fails under a session, QEMU's own: reset and back in service, the client's session goes on.

The client keeps its connection and what it has asked for; every frame is accounted for.
"""

from __future__ import annotations

import re
import time

from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.asking import Asking, asking
from tests.e2e.traffic import reflected

STRANGER, ANOTHER = "52:54:00:00:0a:01", "52:54:00:00:0a:02"


def provoke(bed: Asking) -> None:
    """Has the device ask for a reset, and waits until it was recovered from."""
    pid = str(testbed.driver_pid(bed.driver))
    bed.guest.run(["python3", "-m", "tests.e2e.break_ring", pid])
    bed.wire.send(bed.frame(bed.mac))  # has the device look at its receive queue
    path = f"/machine/peripheral/{bed.guest.machine.nics[0].id}/virtio-backend"
    deadline = time.monotonic() + testbed.START_SECONDS
    while not bed.guest.qmp("x-query-virtio-status", path=path)["broken"]:  # no event tells
        assert time.monotonic() < deadline, "QEMU has not looked at the broken ring"
    bed.guest.run(["kill", "-CONT", pid])
    testbed.wait_for_line(bed.driver, r" recovered .*\bcause=needs_reset\b")


def settle(bed: Asking, to: str) -> None:
    """Takes everything up to the answer to a frame like no other."""
    sentinel = bed.frame(to)
    bed.wire.send(sentinel)
    bed.until(reflected(sentinel))


def test_a_device_that_needs_a_reset_is_recovered_within_the_session(guest: Guest, wire: Wire) -> None:
    with asking(guest, wire) as bed:
        session = bed.ask(facts=True)["session"]
        assert bed.filter(unicast=[STRANGER], vlans=[7]) == "DONE"
        assert bed.ask(mac=ANOTHER) == {"verdict": "DONE"}
        for round_ in range(1, 4):
            provoke(bed)
            settle(bed, STRANGER)
            facts = bed.ask(facts=True)
            assert (facts["session"], facts["mac"]) == (session, ANOTHER), "the client noticed nothing"
            assert bed.passes(STRANGER)
            assert bed.passes(ANOTHER, vlan=7)
            assert not bed.passes(bed.mac), "what was asked for before still holds"
            counters = bed.counters()
            assert counters["recoveries"]["needs_reset"] == counters["recovery_ns"]["count"] == round_
        counters = bed.stop()
        assert counters["sessions"] == 1
        assert counters["recoveries_failed"] == 0
        print(f"recovered within {counters['recovery_ns']['max'] / 1e6:.1f} ms at most")
        ended = re.findall(r" session_ended .*", bed.driver.stderr)[-1]
        buffers = {name: int(count) for name, count in re.findall(r"\b([rt]x_\w+)=(\d+)", ended)}
        assert sum(count for name, count in buffers.items() if name.startswith("rx_")) == 1024
        assert sum(count for name, count in buffers.items() if name.startswith("tx_")) == 512
    assert not guest.iommu_faults()


def test_recovery_under_load_loses_only_what_is_counted(guest: Guest, wire: Wire) -> None:
    with asking(guest, wire) as bed:
        before = wire.received
        for _ in range(3):
            for _ in range(200):
                wire.send(bed.frame(bed.mac), timeout=testbed.START_SECONDS)
            provoke(bed)
        settle(bed, bed.mac)
        assert not wire.drain()
        counters = bed.stop()
    assert counters["packets_tx"] == wire.received - before, "what was sent came out on the wire"
    assert counters["packets_rx"] == counters["packets_tx"] + counters["drops"]["device_reset"]
    assert counters["drops"]["client_slow"] == counters["drops"]["too_short"] == 0
    assert not guest.iommu_faults()


def test_the_link_goes_down_and_up(guest: Guest, wire: Wire) -> None:
    with asking(guest, wire) as bed:
        nic = guest.machine.nics[0].id
        for _ in range(3):
            guest.qmp("set_link", name=nic, up=False)
            bed.wait_for_facts(link_up=False)
            guest.qmp("set_link", name=nic, up=True)
            bed.wait_for_facts(link_up=True)
            assert bed.passes(bed.mac)
        counters = bed.stop()
    assert counters["link_changes"] == 6
    assert counters["sessions"] == 1
    assert not any(counters["recoveries"].values())


def test_the_device_wants_to_be_announced(guest: Guest, wire: Wire) -> None:
    with asking(guest, wire) as bed:
        bed.account.strangers()
        assert bed.ask(facts=True)["announcements"] == 0
        for announcements in (1, 2):
            guest.qmp("announce-self", initial=20, max=100, rounds=1, step=20)
            bed.wait_for_facts(announcements=announcements)
        settle(bed, bed.mac)  # QEMU sends an announcement of its own besides
        assert bed.passes(bed.mac)
        bed.stop()


def test_a_device_that_does_not_send_is_reset(guest: Guest, wire: Wire) -> None:
    """Nobody takes what it sends, so it holds it: to the driver no different from a device that is stuck."""
    with asking(guest, wire, options=["--stall-ms", "300"]) as bed:
        session = bed.ask(facts=True)["session"]
        with wire.deaf():
            # More than the wire holds, which of short frames takes nearly 300.
            for _ in range(300):
                wire.send(bed.frame(bed.mac) + bytes(1400), timeout=testbed.START_SECONDS)
            testbed.wait_for_line(bed.driver, r" recovered .*\bcause=stalled reset=device\b")
        wire.drain()
        settle(bed, bed.mac)
        assert bed.ask(facts=True)["session"] == session
        counters = bed.stop()
    assert counters["recoveries"]["stalled"] >= 1
    assert counters["device_faults"]["stalled"] >= 1
    assert counters["queue_resets"] == 0


def test_a_queue_that_does_not_move_is_reset_alone(guest: Guest, wire: Wire) -> None:
    """The device seems to want no notifications, so it never learns of a frame. (Where it holds one because its wire is
    full, QEMU 7.2 aborts when the queue is reset.)"""
    with asking(guest, wire, options=["--stall-ms", "2000", "--queue-reset", "--without", "EVENT_IDX"]) as bed:
        session = bed.ask(facts=True)["session"]
        settle(bed, bed.mac)
        path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
        queues = [guest.qmp("x-query-virtio-queue-status", path=path, queue=number) for number in (0, 1)]
        pid = str(testbed.driver_pid(bed.driver))
        places = [str(queues[0]["vring-desc"]), str(queues[1]["vring-used"])]
        guest.run(["python3", "-m", "tests.e2e.hush_queue", pid, *places])
        wire.send(bed.frame(bed.mac))
        testbed.wait_for_line(bed.driver, r" recovered .*\bcause=stalled reset=queue lost=1\b")
        settle(bed, bed.mac)
        assert bed.ask(facts=True)["session"] == session
        counters = bed.stop()
    assert (counters["queue_resets"], counters["resets"]) == (1, 1)  # the latter at the session's end
    assert counters["recoveries"]["stalled"] == counters["drops"]["device_reset"] == 1
    assert counters["recovery_ns"]["count"] == 1
    print(f"the queue was back after {counters['recovery_ns']['max'] / 1e6:.1f} ms")
    assert counters["packets_rx"] == counters["packets_tx"] + 1
    assert not guest.iommu_faults()
