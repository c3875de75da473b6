"""Frames from scapy to a service in the guest and back: every one, once, unchanged, and all counts agree."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence

import pytest

from netbridge.datapath._core import ffi
from qemu.guest import Guest
from qemu.views import device_view
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.account import COUNTERS, check_echoed
from tests.e2e.traffic import BURST, LONGEST, SHORTEST, Generator, Phase, reflected

REPLY_SECONDS = 10.0
SIZES = LONGEST - SHORTEST + 1


def phase(make: Generator, kind: str) -> Phase:
    return {
        "arp": Phase("ARP", make.arp(BURST), 1),
        "icmp": Phase("ICMP echo", make.icmp(BURST), 1),
        "udp": Phase("UDP in bursts", make.udp(4 * BURST), BURST),
        "raw": Phase("every size", make.raw(SIZES), 32),
    }[kind]


def echoed(wire: Wire, frames: Sequence[bytes], window: int = 1) -> None:
    """Every frame comes back once, unchanged but for its MAC addresses, in order."""
    wire.exchange(frames, reply=reflected, window=window, timeout=REPLY_SECONDS).check()


@pytest.mark.parametrize("kind", ["arp", "icmp", "udp", "raw"])
def test_every_frame_comes_back_once_and_unchanged(guest: Guest, wire: Wire, kind: str) -> None:
    before = wire.sent, wire.received
    with testbed.running(guest) as bed:
        make = Generator(bed.mac)
        traffic = phase(make, kind)
        for burst in traffic.bursts():
            echoed(wire, burst, traffic.window)
        # Frames keep their order: anything extra has come before the answer to this one.
        echoed(wire, make.raw(1))
        assert not wire.drain()
        bed.stop()
    check_echoed(len(traffic.frames) + 1, wire, before, bed.final["driver"], bed.final["echo"])
    # None was copied by the service: they went out from where the device had put them.
    assert bed.final["echo"]["forwarded"] == bed.final["echo"]["frames"]
    assert not guest.iommu_faults()


@pytest.mark.parametrize(
    "pins",
    [
        pytest.param(pins, id="-".join(str(value) for value in pins.values()), marks=pytest.mark.guest_with(**pins))
        for pins in (
            {"irq": "intx"},
            {"iommu": "virtio"},
            {"place": "root-bus", "queue_size": 512},
            {"ring": "packed", "irq": "intx", "iommu": "virtio"},
        )
    ],
)
def test_guests_of_every_shape(guest: Guest, wire: Wire, pins: dict[str, object]) -> None:
    with testbed.running(guest) as bed:
        view = device_view(guest)
        assert view.packed == (pins.get("ring") == "packed")
        assert ("irq=msix" in bed.driver.stderr.lower().replace("-", "")) == ("irq" not in pins)
        assert guest.run(["sh", "-c", "ls /sys/class/iommu"]).stdout.startswith("dmar") == ("iommu" not in pins)
        echoed(wire, Generator(bed.mac).udp(BURST), window=32)
        bed.stop()
    assert not guest.iommu_faults()


def test_driver_device_and_wire_have_one_account(guest: Guest, wire: Wire) -> None:
    """Every stop() holds the driver's counters against QEMU's queues and the wire: here each is made to differ once."""
    with testbed.running(guest) as bed:
        echoed(wire, Generator(bed.mac).udp(300), window=64)
        bed.account.check()
        device = device_view(guest)
        assert [device.receive[0].used, device.transmit[0].used] == [300, 300]
        told = json.loads(guest.run(testbed.netbridge("stats", "--json"), timeout=testbed.START_SECONDS).stdout)
        assert (told["packets_rx"], told["packets_tx"]) == (300, 300)
        wire.sent += 1
        with pytest.raises(AssertionError, match=r"(?s)its capture \[300, 300\].*301 frames went to the guest"):
            bed.account.check(within=0.1)
        wire.sent -= 1
        page = guest.get(COUNTERS)
        at = ffi.offsetof("struct nb_counters", "packets_tx")
        one_more = (int.from_bytes(page[at : at + 8], "little") + 1).to_bytes(8, "little")
        guest.eval(f"with open({COUNTERS!r}, 'r+b') as file:\n    file.seek({at})\n    file.write({one_more!r})")
        with pytest.raises(AssertionError, match=r"sent: the driver counted 301 frames, the device used 300 chains"):
            bed.account.check(within=0.1)
        guest.eval(f"with open({COUNTERS!r}, 'r+b') as file:\n    file.write({page!r})")
        bed.stop()


def test_the_nic_goes_back_to_its_driver_and_works_again(guest: Guest) -> None:
    before = testbed.nics(guest)
    with testbed.running(guest) as bed:
        assert testbed.nics(guest)[0] == (bed.pci, "vfio-pci")
        bed.stop()
    assert testbed.nics(guest) == before == [(bed.pci, "virtio-pci")]
    assert guest.run(["sh", "-c", f"ls /sys/bus/pci/devices/{bed.pci}/virtio*/net"]).stdout.strip()


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
def test_the_next_service_gets_a_fresh_session(guest: Guest, wire: Wire, end: str) -> None:
    with testbed.running(guest) as bed:
        make = Generator(bed.mac)
        echoed(wire, make.raw(10))
        bed.restart_echo(signal.Signals[end])
        echoed(wire, make.raw(10))
        counters = bed.counters()
        bed.stop()
    assert counters["sessions"] == 2
    assert counters["packets_rx"] == counters["packets_tx"] == 20
    assert not guest.iommu_faults()


def test_a_killed_driver_leaves_the_nic_quiet_and_restore_gives_it_back(guest: Guest, wire: Wire) -> None:
    with testbed.running(guest) as bed:
        make = Generator(bed.mac)
        echoed(wire, make.raw(10))
        bed.driver.kill()
        bed.driver.wait()
        testbed.wait_until_driver_is_gone(guest)
    assert testbed.nics(guest) == [(bed.pci, "vfio-pci")]
    assert bed.pci in guest.run(testbed.netbridge("restore")).stdout
    assert testbed.nics(guest) == [(bed.pci, "virtio-pci")]
    assert not guest.iommu_faults()
    # And the next driver claims it as if nothing had happened.
    with testbed.running(guest) as bed:
        wire.drain()
        echoed(wire, make.raw(10))
        bed.stop()
