"""Frames from scapy to a service in the guest and back: every one, once, unchanged, and all counts agree."""

from __future__ import annotations

import pytest

from qemu.guest import Guest
from tests.e2e import testbed
from tests.e2e.traffic import BURST, LONGEST, SHORTEST, Generator, Phase, reflected

REPLY_SECONDS = 10.0
SIZES = LONGEST - SHORTEST + 1


def phase(guest: Guest, kind: str) -> Phase:
    make = Generator(guest.machine.nics[0].mac or "")
    return {
        "arp": Phase("ARP", make.arp(BURST), 1),
        "icmp": Phase("ICMP echo", make.icmp(BURST), 1),
        "udp": Phase("UDP in bursts", make.udp(4 * BURST), BURST),
        "raw": Phase("every size", make.raw(SIZES), 32),
    }[kind]


@pytest.mark.parametrize("irq", ["msix"])
@pytest.mark.parametrize("kind", ["arp", "icmp", "udp", "raw"])
def test_every_frame_comes_back_once_and_unchanged(guest: Guest, irq: str, kind: str) -> None:
    wire = guest.wire
    wire.drain()
    sent_before, received_before = wire.sent, wire.received
    with testbed.running(guest, irq=irq) as bed:
        traffic = phase(guest, kind)
        for burst in traffic.bursts():
            wire.exchange(burst, reply=reflected, window=traffic.window, timeout=REPLY_SECONDS).check()
        last = Generator(guest.machine.nics[0].mac or "").raw(1)
        wire.exchange(last, reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        assert not wire.drain()
        bed.stop()
    expected = len(traffic.frames) + len(last)
    driver, echo = bed.final["driver"], bed.final["echo"]
    assert {
        "sent": wire.sent - sent_before,
        "packets_rx": driver["packets_rx"],
        "echoed": echo["frames"],
        "packets_tx": driver["packets_tx"],
        "received": wire.received - received_before,
    } == dict.fromkeys(("sent", "packets_rx", "echoed", "packets_tx", "received"), expected)
    assert driver["bytes_rx"] == driver["bytes_tx"] == echo["bytes"]
    assert not any(driver["drops"].values())
    assert not any(driver["refused_handles"].values())
    assert not any(driver["device_faults"].values())
    assert not guest.iommu_faults()


def test_the_device_agrees_with_the_driver(guest: Guest) -> None:
    """QEMU's own view of the virtqueues: as many chains used as the driver counted frames."""
    wire = guest.wire
    wire.drain()
    with testbed.running(guest) as bed:
        frames = Generator(guest.machine.nics[0].mac or "").udp(300)
        wire.exchange(frames, reply=reflected, window=64, timeout=REPLY_SECONDS).check()
        path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
        used = [guest.qmp("x-query-virtio-queue-status", path=path, queue=queue)["used-idx"] for queue in (0, 1)]
        counters = bed.counters()
        bed.stop()
    assert used == [counters["packets_rx"], counters["packets_tx"]] == [300, 300]


def test_the_nic_goes_back_to_its_driver_and_works_again(guest: Guest) -> None:
    before = testbed.nics(guest)
    with testbed.running(guest) as bed:
        assert testbed.nics(guest)[0] == (bed.pci, "vfio-pci")
        bed.stop()
    assert testbed.nics(guest) == before == [(bed.pci, "virtio-pci")]
    assert guest.run(["sh", "-c", f"ls /sys/bus/pci/devices/{bed.pci}/virtio*/net"]).stdout.strip()


def test_a_second_client_gets_a_fresh_session(guest: Guest) -> None:
    wire = guest.wire
    wire.drain()
    make = Generator(guest.machine.nics[0].mac or "")
    with testbed.running(guest) as bed:
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.restart_echo()
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        counters = bed.counters()
        bed.stop()
    assert counters["sessions"] == 2
    assert counters["packets_rx"] == counters["packets_tx"] == 20


def test_a_killed_service_leaves_the_driver_ready_for_the_next(guest: Guest) -> None:
    wire = guest.wire
    wire.drain()
    make = Generator(guest.machine.nics[0].mac or "")
    with testbed.running(guest) as bed:
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.echo.kill()
        bed.restart_echo()
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.stop()
    assert bed.final["driver"]["sessions"] == 2
    assert not guest.iommu_faults()


def test_a_killed_driver_leaves_the_nic_quiet_and_restore_gives_it_back(guest: Guest) -> None:
    wire = guest.wire
    wire.drain()
    with testbed.running(guest) as bed:
        make = Generator(guest.machine.nics[0].mac or "")
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.driver.kill()
        bed.driver.wait()
    assert testbed.nics(guest) == [(bed.pci, "vfio-pci")]
    assert bed.pci in guest.run(testbed.netbridge("restore")).stdout
    assert testbed.nics(guest) == [(bed.pci, "virtio-pci")]
    assert not guest.iommu_faults()
    # And the next driver claims it as if nothing had happened.
    with testbed.running(guest) as bed:
        wire.drain()
        wire.exchange(make.raw(10), reply=reflected, window=1, timeout=REPLY_SECONDS).check()
        bed.stop()
