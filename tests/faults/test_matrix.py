"""What goes wrong around a driver at work: every fault at every moment, and the exact account afterwards.

Moments: idle; under load, frames coming all the while; starting, the driver standing still at a line of its log. A
fault is over when its verb has undone it; then driver and service have to be at work again, if need be after a new
start, and of the frames sent from then on each comes back, once, and is counted, once, on every side. `make qemu-test`
runs a few of these, `make faults` all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from qemu.agent import CommandError
from qemu.guest import Guest
from qemu.truth import DRIVERS
from qemu.wire import Wire, WireStalled
from tests.e2e import testbed
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import Generator, reflected

FRAMES = 128
DEVICE_GONE = 4
"""The exit code of a driver whose device was taken away: docs/manifest.md."""
STEPS = (" claimed ", " confined ", " prepared ", " up ")
"""Lines of the monitor's and the driver's log, in the order in which a start comes by them."""


class Load:
    """Frames sent all the while, and nothing read: what comes back is taken when the account is settled."""

    def __init__(self, wire: Wire, mac: str) -> None:
        self._wire, self._mac = wire, mac
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        frames = Generator(self._mac).udp(256)
        while not self._stop.is_set():
            for frame in frames:
                # A NIC without a driver, or with its link down or its machine paused, takes none: then they wait.
                with contextlib.suppress(WireStalled):
                    self._wire.send(frame, timeout=0.2)
                if self._stop.wait(0.002):
                    return

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass(frozen=True)
class Fault:
    """`happen` makes it happen and undoes it; `moments` are those at which it makes sense."""

    name: str
    happen: Callable[[Guest, Testbed | None], None]
    moments: tuple[str, ...] = ("idle", "load", "starting")
    leaves: tuple[str, ...] = ()
    """What of the guest may be different afterwards: see qemu/truth.py."""


def flap(guest: Guest, _: Testbed | None) -> None:
    for _n in range(3):
        guest.faults.link_down()
        guest.faults.link_up()


def stand_still(guest: Guest, _: Testbed | None) -> None:
    with guest.faults.paused():
        assert guest.qmp("query-status")["status"] == "paused"


def jump_ahead(guest: Guest, _: Testbed | None) -> None:
    guest.faults.clock_jump(86400.0)


def jump_back(guest: Guest, _: Testbed | None) -> None:
    guest.faults.clock_jump(-86400.0)


def interrupt(guest: Guest, _: Testbed | None) -> None:
    guest.faults.nmi()
    assert guest.agent.ping() < 20


def hog(guest: Guest, _: Testbed | None) -> None:
    with guest.faults.hog():
        guest.run(["true"])


def press(guest: Guest, _: Testbed | None) -> None:
    with guest.faults.memory_pressure():
        guest.run(["true"])


def kill_driver(guest: Guest, bed: Testbed | None) -> None:
    assert bed is not None
    guest.faults.kill(bed.driver_pid)
    testbed.wait_for_line(bed.driver, r" driver_died .*SIGKILL")
    testbed.wait_for_line(bed.driver, r" serving ")


def kill_service(guest: Guest, bed: Testbed | None) -> None:
    assert bed is not None
    assert bed.echo.pid is not None
    guest.faults.kill(bed.echo.pid)
    bed.echo.wait(testbed.STOP_SECONDS)
    bed.echo = testbed.start_echo(guest, bed.echo_log)
    testbed.wait_for_line(bed.driver, r" serving ")


def replug(guest: Guest, _: Testbed | None) -> None:
    guest.faults.unplug()
    guest.faults.replug()


RUNNING = ("idle", "load")
FAULTS = (
    Fault("link", flap),
    Fault("pause", stand_still),
    Fault("clock-ahead", jump_ahead),
    Fault("clock-back", jump_back),
    Fault("nmi", interrupt),
    Fault("hog", hog),
    Fault("memory", press, RUNNING),
    Fault("driver-killed", kill_driver, RUNNING),
    Fault("service-killed", kill_service, RUNNING),
    Fault("replug", replug, RUNNING, leaves=(DRIVERS,)),
)
QUICK = {("link", "load"), ("driver-killed", "load"), ("pause", "idle")}


def cases() -> Iterator[object]:
    for ring in ("split", "packed"):
        for fault in FAULTS:
            for moment in fault.moments:
                quick = ring == "split" and (fault.name, moment) in QUICK
                marks = [pytest.mark.guest_with(ring=ring), pytest.mark.guest_allows(*fault.leaves)]
                yield pytest.param(
                    fault,
                    moment,
                    ring,
                    id=f"{fault.name}-{moment}-{ring}",
                    marks=marks if quick else [*marks, pytest.mark.thorough],
                )


def agreed(guest: Guest) -> str:
    """The format of the rings that driver and device have agreed upon, as the device has it."""
    path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
    return (
        "packed" if "RING_PACKED" in str(guest.qmp("x-query-virtio-status", path=path)["guest-features"]) else "split"
    )


def account(guest: Guest, wire: Wire, bed: Testbed) -> None:
    """Frames each of which comes back once; the driver's counters, the wire and the capture agree on their number."""
    testbed.settle(wire, bed.mac)
    before, sent, received = bed.counters(), wire.sent, wire.received
    wire.exchange(Generator(bed.mac).udp(FRAMES), reply=reflected, window=32, timeout=20.0).check()
    assert not wire.drain()
    after = bed.counters()
    moved = {name: after[name] - before[name] for name in ("packets_rx", "packets_tx")}
    assert moved == {"packets_rx": wire.sent - sent, "packets_tx": wire.received - received}
    assert moved == {"packets_rx": FRAMES, "packets_tx": FRAMES}


@pytest.mark.parametrize(("fault", "moment", "ring"), [*cases()])
def test_fault(guest: Guest, wire: Wire, fault: Fault, moment: str, ring: str) -> None:
    if moment == "starting":
        for step in STEPS[:1]:
            with testbed.running(guest, halt_at=step, halted=lambda: fault.happen(guest, None)) as bed:
                check(guest, wire, bed, ring)
        return
    with testbed.running(guest) as bed:
        if agreed(guest) != ring:
            pytest.skip(f"the driver does not agree to {ring} rings")
        account(guest, wire, bed)
        with Load(wire, bed.mac) if moment == "load" else contextlib.nullcontext():
            fault.happen(guest, bed)
        if DRIVERS not in fault.leaves:
            check(guest, wire, bed, ring)
            return
        bed.driver.wait(testbed.STOP_SECONDS)
        # Unplugged: the driver has ended of its own will, and says so. The NIC that came back is another.
        assert bed.driver.returncode == DEVICE_GONE, bed.driver.stderr
        bed.echo.kill()
    with testbed.running(guest) as again:
        check(guest, wire, again, ring)


def check(guest: Guest, wire: Wire, bed: Testbed, ring: str) -> None:
    if agreed(guest) != ring:
        pytest.skip(f"the driver does not agree to {ring} rings")
    account(guest, wire, bed)
    bed.stop()


@pytest.mark.thorough
@pytest.mark.parametrize("end", ["killed", "goes on"])
@pytest.mark.parametrize("step", STEPS, ids=str.strip)
def test_a_start_that_stands_still(guest: Guest, wire: Wire, step: str, end: str) -> None:
    """Halted at a step: killed there, it leaves a NIC that the next start takes; let go, it gets to work."""
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci).encode(), testbed.MANIFEST)
    with guest.start(testbed.netbridge("run", testbed.MANIFEST, "--json"), halt_at=step) as driver:
        driver.wait_halted(testbed.START_SECONDS)
        if end == "goes on":
            driver.go_on()
            testbed.wait_for_line(driver, r" prepared ")
            testbed.end(driver)
        else:
            driver.kill()
            driver.wait(testbed.STOP_SECONDS)
            testbed.wait_until_driver_is_gone(guest)
    with testbed.running(guest) as bed:
        account(guest, wire, bed)
        bed.stop()


@pytest.mark.thorough
def test_a_reset_of_the_machine(guest: Guest, wire: Wire) -> None:
    with contextlib.suppress(CommandError), testbed.running(guest) as bed:
        account(guest, wire, bed)
        guest.faults.reset()
    with testbed.running(guest) as again:
        account(guest, wire, again)
        again.stop()


@pytest.mark.thorough
@pytest.mark.guest_with(devices=("-device edu",))
@pytest.mark.guest_allows("iommu-faults")
def test_a_fault_of_another_device_is_not_ours(guest: Guest, wire: Wire) -> None:
    with testbed.running(guest) as bed:
        guest.faults.iommu_fault()
        account(guest, wire, bed)
        bed.stop()
    assert len(guest.iommu_faults()) == 1
