"""The rung above the harness's own fixtures: a guest in which the bridge is at work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu.guest import Guest
from tests.e2e import testbed
from tests.e2e.testbed import Testbed


@pytest.fixture
def bed(guest: Guest) -> Iterator[Testbed]:
    """Driver and echo service on the NIC of the test's guest. Afterwards both have to end well, and driver, device and
    wire to have the same account."""
    with testbed.running(guest) as bed:
        yield bed
        bed.stop()
