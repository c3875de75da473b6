"""Everything that can go wrong, in turns and under traffic, for SOAK_SECONDS (20): `make soak` has an hour of it.

Kills of the service, the driver and the monitor, clients that lie, a link that flaps. After each of them frames have to
come back exactly, and in the end every account has to close. SOAK_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable

import pytest

from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.load import Load
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import Generator, reflected

pytestmark = pytest.mark.thorough

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)

LIAR = """
from netbridge.client import PortError, Reason, connect
from netbridge.datapath._core import ffi, lib
port = connect(wait=60, name="liar")
buffer = port.allocate(1, timeout=10)[0]
buffer.length = 60
piece = ffi.new("struct nb_piece *", {"dma_handle": buffer._piece[0] ^ %d, "len": 60})
lib.nb_client_send(port.native, piece, 1)
lib.nb_client_flush(port.native)
try:
    while True:
        port.wait(timeout=30)
        port.check()
except PortError as error:
    print(error.reason.name)
"""


class Soak:
    def __init__(self, guest: Guest, wire: Wire, bed: Testbed, choose: random.Random) -> None:
        self.guest, self.wire, self.bed, self.choose = guest, wire, bed, choose
        self.exchanged = 0

    def service_ends(self) -> None:
        self.bed.echo.kill(self.choose.choice([signal.SIGTERM, signal.SIGKILL]))
        self.bed.echo.wait(testbed.STOP_SECONDS)
        self.echo_again()

    def driver_dies(self) -> None:
        self.guest.run(["kill", "-KILL", str(self.bed.driver_pid)])
        testbed.wait_for_line(self.bed.driver, r" driver_died .*SIGKILL")
        testbed.wait_for_line(self.bed.driver, r" serving ")

    def monitor_dies(self) -> None:
        self.bed.driver.kill()
        self.bed.driver.wait()
        command = testbed.netbridge("run", testbed.MANIFEST, "--json")
        self.bed.driver = self.guest.start(command, log=self.guest.artefacts / "driver.log")
        testbed.wait_for_line(self.bed.driver, r" serving .*\bclient=netbridge-echo\b")

    def client_lies(self) -> None:
        self.bed.echo.kill(signal.SIGTERM)
        self.bed.echo.wait(testbed.STOP_SECONDS)
        # Not the lowest bits: they make it the handle of another buffer that is the client's as well.
        lie = 1 << self.choose.choice([9, 23, 24, 30, 33, 47, 48, 63])
        done = self.guest.run(["python3", "-c", LIAR % lie], user=testbed.SERVICE_USER, timeout=120.0)
        assert done.stdout == "RING_FAULT\n", f"{lie:#x}: {done}"
        testbed.wait_for_line(self.bed.driver, r" client_gone |client_refused ")
        self.echo_again()

    def link_flaps(self) -> None:
        nic = self.guest.machine.nics[0].id
        for up in (False, True):
            self.guest.qmp("set_link", name=nic, up=up)
            testbed.wait_for_line(self.bed.driver, rf" link .*\bup={up}\b")

    def standby_dies(self) -> None:
        """If there is one yet: it is started a while after the driver."""
        found = re.findall(r" standby driver=(\d+)", self.bed.driver.stderr)
        if found and int(found[-1]) != self.bed.driver_pid:
            self.guest.run(["kill", "-KILL", found[-1]], check=False)

    def client_keeps(self) -> None:
        testbed.end(self.bed.echo)
        assert self.hostile("keep", 8) == "done: 8 sessions"
        self.echo_again()

    def crowd_comes(self) -> None:
        assert self.hostile("crowd", 200) == "done: BUSY 200"

    def echo_again(self) -> None:
        self.bed.echo = testbed.start_echo(self.guest, self.bed.echo_log)
        testbed.wait_for_line(self.bed.driver, r" serving .*\bclient=netbridge-echo\b")

    def hostile(self, what: str, count: int) -> str:
        command = ["python3", "-m", "tests.e2e.hostile", what, str(count)]
        return self.guest.run(command, user=testbed.SERVICE_USER, timeout=240.0).stdout.strip()

    def exact(self) -> None:
        """What was on its way comes first; then every frame comes back once."""
        self.bed.settle(self.wire)
        before = self.bed.counters()
        frames = Generator(self.bed.mac).udp(self.choose.randrange(1, 513))
        self.wire.exchange(frames, reply=reflected, window=32, timeout=testbed.START_SECONDS).check()
        assert not self.wire.drain()
        after = self.bed.counters()
        for name in ("packets_rx", "packets_tx"):
            assert after[name] - before[name] == len(frames), name
        self.exchanged += len(frames)


def test_soak(guest: Guest, wire: Wire, record_property: Callable[[str, object], None]) -> None:
    print(f"SOAK_SEED={SEED}")
    choose = random.Random(SEED)
    done: dict[str, int] = {}
    with testbed.running(guest) as bed:
        soak = Soak(guest, wire, bed, choose)
        try:
            troubles = (
                *(soak.service_ends, soak.driver_dies, soak.standby_dies, soak.monitor_dies, soak.link_flaps),
                *(soak.client_lies, soak.client_keeps, soak.crowd_comes),
            )
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                trouble = choose.choice(troubles)
                print(f"{trouble.__name__} ({soak.exchanged} frames so far)", flush=True)
                with Load(wire, bed.mac):
                    trouble()
                done[trouble.__name__] = done.get(trouble.__name__, 0) + 1
                soak.exact()
            final = bed.counters()
            assert final["device_faults"] == dict.fromkeys(final["device_faults"], 0)
            bed.stop()
        finally:
            bed.driver.kill()
    record_property("troubles", done)
    record_property("frames", soak.exchanged)
    assert testbed.nics(guest)[0] == (bed.pci, "virtio-pci"), "whose driver it was before all this"
    assert not guest.iommu_faults()
