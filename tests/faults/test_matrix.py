"""What goes wrong around a driver at work: every fault at every moment, and the exact account afterwards.

Moments: idle; under load, frames coming all the while; starting, the driver standing still at a line of its log. A
fault is over when its verb has undone it; then driver and service have to be at work again, if need be after a new
start, and of the frames sent from then on each comes back, once, and is counted, once, on every side. `make qemu-test`
runs a few of these, `make faults` all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from qemu.errors import GuestLost
from qemu.guest import Guest
from qemu.truth import DRIVERS
from qemu.truth import FAULTS as IOMMU
from qemu.views import agreed_ring
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.load import Load
from tests.e2e.testbed import Testbed
from tests.e2e.traffic import Generator, reflected

FRAMES = 128
ANSWERS = 64
REPLY_SECONDS = 60.0
OUT_OF_REACH = 0x234_5000
"""A bus address that no device has memory at."""
DEVICE_GONE = 4
"""The exit code of a driver whose device was taken away: docs/manifest.md."""
STEPS = ("claimed", "confined", "prepared", "up")
"""Lines of the monitor's and the driver's log, in the order in which a start comes by them: both stand still there. The
steps between them are in test_initialisation.py."""


@dataclass(frozen=True)
class Fault:
    """`happen` makes it happen and undoes it; `moments` are those at which it makes sense."""

    name: str
    happen: Callable[[Guest, Testbed | None], None]
    moments: tuple[str, ...] = ("idle", "load", *STEPS)
    leaves: tuple[str, ...] = ()
    """What of the guest may be different afterwards: see qemu/truth.py."""
    devices: tuple[str, ...] = ()
    """What the guest has to have for it: see qemu/dimensions.py."""


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


def kill_monitor(guest: Guest, bed: Testbed | None) -> None:
    assert bed is not None
    bed.driver.kill()
    bed.driver.wait(testbed.STOP_SECONDS)
    testbed.wait_until_driver_is_gone(guest)
    command = testbed.netbridge("run", testbed.MANIFEST, "--json")
    bed.driver = guest.start(command, log=guest.artefacts / "driver-again.log")
    testbed.wait_for_line(bed.driver, r" serving .*\bclient=netbridge-echo\b")


def refused_dma(guest: Guest, _: Testbed | None) -> None:
    guest.faults.iommu_fault(OUT_OF_REACH)
    (line,) = guest.wait_for_iommu_faults()
    assert f"fault addr {OUT_OF_REACH:#x}" in line


def replug(guest: Guest, bed: Testbed | None) -> None:
    """The driver ends of its own will, and says so. The NIC that comes back is another."""
    assert bed is not None
    guest.faults.unplug()
    guest.faults.replug()
    bed.driver.wait(testbed.STOP_SECONDS)
    assert bed.driver.returncode == DEVICE_GONE, bed.driver.stderr


def close_wire(guest: Guest, bed: Testbed | None) -> None:
    """Nobody is there any more to settle an account with; the device's and the driver's still have to be the same."""
    assert bed is not None
    guest.faults.close_wire()
    bed.stop()


def reset(guest: Guest, _: Testbed | None) -> None:
    """The reset button: nothing in the guest outlives it."""
    guest.faults.reset()


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
    Fault("monitor-killed", kill_monitor, RUNNING),
    Fault("service-killed", kill_service, RUNNING),
    Fault("iommu-fault", refused_dma, leaves=(IOMMU,), devices=("-device edu",)),
    Fault("replug", replug, RUNNING, leaves=(DRIVERS,)),
    Fault("wire-closed", close_wire, RUNNING),
    Fault("reset", reset),
)
QUICK = {("link", "load"), ("driver-killed", "load"), ("pause", "idle")}


def cases() -> Iterator[object]:
    for ring in ("split", "packed"):
        for fault in FAULTS:
            for moment in fault.moments:
                quick = ring == "split" and (fault.name, moment) in QUICK
                marks = [
                    pytest.mark.guest_with(ring=ring, devices=fault.devices),
                    pytest.mark.guest_allows(*fault.leaves),
                ]
                yield pytest.param(
                    fault,
                    moment,
                    ring,
                    id=f"{fault.name}-{moment}-{ring}",
                    marks=marks if quick else [*marks, pytest.mark.thorough],
                )


def account(wire: Wire, bed: Testbed, frames: int = FRAMES) -> None:
    """Frames each of which comes back once; driver, device, wire and capture agree on their number."""
    bed.settle(wire)
    wire.exchange(Generator(bed.mac).udp(frames), reply=reflected, window=32, timeout=REPLY_SECONDS).check()
    assert not wire.drain()
    bed.account.check()


@pytest.mark.parametrize(("fault", "moment", "ring"), [*cases()])
def test_fault(guest: Guest, wire: Wire, fault: Fault, moment: str, ring: str) -> None:
    happened = False

    def happen(bed: Testbed | None = None) -> None:
        nonlocal happened
        fault.happen(guest, bed)
        happened = True

    halt_at = f" {moment} " if moment in STEPS else None
    try:
        with testbed.running(guest, halt_at=halt_at, halted=happen) as bed:
            assert agreed_ring(guest) == ring
            if halt_at is None:
                account(wire, bed)
                with contextlib.ExitStack() as stack:
                    if moment == "load":
                        stack.enter_context(Load(wire, bed.mac)).wait_for_answers(ANSWERS)
                    happen(bed)
            if fault.happen not in (close_wire, replug, reset):
                account(wire, bed)
                bed.stop()
    except GuestLost:
        # What was asked of the guest before the reset was, the reset has left unanswered.
        if fault.happen is not reset or not happened:
            raise
    if fault.happen in (replug, reset):
        with testbed.running(guest) as again:
            assert agreed_ring(guest) == ring
            account(wire, again)
            again.stop()
