"""A driver that is held still half way through each step of bringing its device into service, and goes on, or is killed
there: afterwards the device serves, whatever state it was left in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qemu.guest import Guest
from qemu.wire import Wire
from tests.e2e import testbed
from tests.faults.test_matrix import account

PROGRAM = Path(__file__).with_name("stepwise.py")
PLACE = "/tmp/stepwise"
FEWEST = 20
FRAMES = 16

pytestmark = pytest.mark.thorough


@pytest.fixture
def vnode(guest: Guest) -> str:
    """A vnode.yml whose program tells of each step, in place."""
    guest.run(["mkdir", "-m", "755", PLACE])
    guest.put(PROGRAM.read_bytes(), f"{PLACE}/stepwise.vnode", mode=0o644)
    return testbed.manifest(testbed.nics(guest)[0][0]).replace("bin/net-bridge", "stepwise/stepwise")


@pytest.mark.parametrize(
    ("ring", "end"),
    [
        pytest.param(ring, end, marks=pytest.mark.guest_with(ring=ring))
        for ring, end in (("split", "goes-on"), ("split", "killed"), ("packed", "killed"))
    ],
)
def test_each_step(guest: Guest, wire: Wire, vnode: str, ring: str, end: str) -> None:
    def halted() -> None:
        if end == "killed":
            guest.faults.kill("netbridge-drv")

    with testbed.running(guest, vnode=vnode) as bed:
        steps = re.findall(r"^step \d+ (.*)", bed.driver.stderr.partition(" up ")[0], re.MULTILINE)
        bed.stop()
    assert len(steps) >= FEWEST, steps
    for number, step in enumerate(steps, 1):
        print(f"{ring}, {end}, {number} of {len(steps)}: {step}", flush=True)
        with testbed.running(guest, vnode=vnode, halt_at=f"step {number} ", halted=halted) as bed:
            assert (" driver_died " in bed.driver.stderr) == (end == "killed")
            account(wire, bed, FRAMES)
            bed.stop()
