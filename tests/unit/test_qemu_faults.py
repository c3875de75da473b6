"""What the verbs for faults refuse, without a guest."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu.command import Machine, Nic
from qemu.errors import HarnessError
from qemu.faults import Faults
from qemu.wire import Wire


def of(*nics: Nic) -> Faults:
    guest: Any = SimpleNamespace(machine=Machine(kernel=Path("vmlinuz"), nics=nics))
    return Faults(guest)


def test_a_wire_is_closed_whoever_made_it() -> None:
    with Wire() as wire:
        of(Nic(wire=wire)).close_wire()
        assert wire.closed


def test_another_end_is_not_ours_to_close() -> None:
    with pytest.raises(HarnessError, match="nic0 has no wire"):
        of(Nic(wire=None)).close_wire()


@pytest.mark.parametrize("verb", ["close_wire", "replug"])
def test_a_nic_that_is_not_there_is_named(verb: str) -> None:
    with pytest.raises(ValueError, match="this guest has no NIC 'nic7'; it has: nic0, nic1"):
        getattr(of(Nic(), Nic("nic1")), verb)("nic7")
