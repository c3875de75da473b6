"""The specification's example manifest, byte for byte, on the machine that it was written for.

There function 00:1f.0 has IRQ 11: QEMU's machine "pc", whose IOMMU is virtio-iommu. The driver is strict, takes INTx,
is held to 16 MiB and a twentieth of the processor, and says nothing, for want of CAP_LOG_WRITE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from netbridge.vnode.capabilities import MIB
from qemu.dimensions import UNSAFE_INTERRUPTS
from qemu.guest import Guest, Nic
from qemu.session import Session
from tests.e2e import testbed
from tests.e2e.account import check_echoed
from tests.e2e.traffic import Generator, reflected

pytestmark = pytest.mark.thorough

PCI = "0000:00:1f.0"
PACKAGED = "netbridge/vnode/net-bridge/vnode.yml"
PRINTED = "0810ba7c63272d15f981b6ac88d1668055a244b12b7510c551672b62f63ddb07"
REPLY_SECONDS = 30.0


@pytest.fixture(scope="module")
def pc(guests: Session) -> Iterator[Guest]:
    with guests.boot("printed-manifest", nics=[Nic()], machine="pc", append=UNSAFE_INTERRUPTS) as guest:
        yield guest


def test_it_is_the_printed_one() -> None:
    assert hashlib.sha256(Path(PACKAGED).read_bytes()).hexdigest() == PRINTED


@pytest.mark.parametrize("named", [f"/code/{PACKAGED}", "net-bridge"])
def test_frames_go_through_exactly(pc: Guest, named: str) -> None:
    wire = pc.wire
    wire.drain()
    before = wire.sent, wire.received
    with (
        pc.start(testbed.netbridge("run", named, "--json"), log=pc.artefacts / "driver.log") as driver,
        testbed.start_echo(pc, pc.artefacts / "echo.log") as echo,
    ):
        mac = echo.wait_for_line(r'"connected".*"mac": "([^"]+)"', testbed.START_SECONDS)[1]
        testbed.wait_until_driven(pc)
        make = Generator(mac)
        wire.exchange(make.arp(64), reply=reflected, timeout=REPLY_SECONDS).check()
        wire.exchange(make.udp(512), reply=reflected, window=32, timeout=REPLY_SECONDS).check()
        wire.exchange(make.raw(1), reply=reflected, timeout=REPLY_SECONDS).check()
        assert not wire.drain()

        assert testbed.nics(pc) == [(PCI, "vfio-pci")]
        pid = testbed.in_cgroup(pc, PCI, "cgroup.procs")
        lines = read(pc, f"/proc/{pid}/status").splitlines()
        facts = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert (facts["Name"], facts["NoNewPrivs"], facts["Seccomp"]) == ("netbridge-drv", "1", "2"), "mode: strict"
        assert int(facts["CapEff"], 16) == 0
        assert int(testbed.in_cgroup(pc, PCI, "memory.max")) == 16 * MIB
        assert int(testbed.in_cgroup(pc, PCI, "memory.peak")) <= 16 * MIB
        assert testbed.in_cgroup(pc, PCI, "cpu.max") == "5000 100000"
        program = read(pc, f"/proc/{pid}/cmdline").split("\0")
        assert f"/code/{Path(PACKAGED).parent}/bin/net-bridge.vnode" in program

        testbed.end(echo)
        testbed.end(driver)
        assert driver.stderr == "", "CAP_LOG_WRITE is not granted"
        counters, echoes = (json.loads(process.stdout.splitlines()[-1]) for process in (driver, echo))
    check_echoed(64 + 512 + 1, wire, before, counters, echoes)
    assert counters["interrupts"] > 0
    assert testbed.nics(pc) == [(PCI, "virtio-pci")], "given back"
    assert not pc.iommu_faults()


def read(guest: Guest, path: str) -> str:
    return guest.run(["cat", path]).stdout.strip()
