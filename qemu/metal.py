"""A box as tests see it: the verbs of a guest, for the length of one test.

What only a guest of QEMU's has (QMP, its devices, a machine made to measure) raises NotOnMetal when it is asked for,
and the test that asked is skipped. Artefacts and captures are each test's own; the box is everybody's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NoReturn, Self

from qemu.agent import Agent
from qemu.box import Box
from qemu.completed import CommandError
from qemu.errors import HarnessError, NotOnMetal
from qemu.faults import Faults
from qemu.inside import Inside
from qemu.interface import InterfaceWire

OF_QEMU = ("argv", "console_tail", "event_mark", "machine", "qmp", "reboot", "wait_event", "wait_for_console")

DRIVER = "import os; os.path.basename(os.path.realpath('/sys/bus/pci/devices/{}/driver'))"


class Metal(Inside):
    """A box, the NIC that a test may take, and the wire to that. Ended by close() or by leaving the with block."""

    accel = None
    """It emulates nothing."""

    def __init__(self, box: Box, artefacts: Path, mac: str, driver: str, interface: str | None):
        """`mac` is the NIC's address, `driver` the one that it has outside of tests, `interface` the one of this host
        that is its wire. Raises HarnessError."""
        self.box = box
        self.artefacts = artefacts
        self.mac = mac
        self._driver = driver
        self.nic = box.description.nic
        self.origin = f"the box {box.description.name}"
        self.refused = False
        """Whether the test has asked for something that is not here: then it ended where it had not meant to."""
        artefacts.mkdir(parents=True, exist_ok=True)
        self._log_before = len(box.dmesg().splitlines())
        self.wires: dict[str, InterfaceWire] = {}
        if interface is not None:
            self.wires["nic0"] = InterfaceWire(interface, mac, artefacts / "wire.pcap")

    @property
    def agent(self) -> Agent:  # type: ignore[override] # the box has another one after it was connected anew
        return self.box.agent

    @property
    def lost(self) -> HarnessError | None:
        return self.box.lost

    def kernel_trouble(self) -> list[str]:
        return self.box.kernel_trouble()

    def may_take(self, address: str) -> bool:
        return address == self.nic

    def functions(self, kind: str) -> list[str]:
        return [address for address in super().functions(kind) if self.may_take(address)]

    @property
    def wire(self) -> InterfaceWire:
        """The wire to the NIC."""
        if not self.wires:
            raise NotOnMetal(f"{self.origin} has no wire: name this machine's interface with --wire")
        return self.wires["nic0"]

    @property
    def faults(self) -> Faults:
        """What may go wrong inside the box; what would take QEMU raises NotOnMetal."""
        return Faults(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> NoReturn:
        if name in OF_QEMU:
            self.refused = True
            raise NotOnMetal(f"needs a guest of QEMU's: {self.__dict__.get('origin', 'a box')} has no {name}")
        raise AttributeError(f"a box has no {name!r}")

    def close(self) -> None:
        """Keep what the kernel has said, give the NIC back, and let go of the wire. May be called again."""
        if self.agent.ready:
            with contextlib.suppress(HarnessError, CommandError):
                if self.eval(DRIVER.format(self.nic)) != self._driver:
                    self.rebind(self.nic, self._driver)
            with contextlib.suppress(HarnessError, OSError):
                lines = self.box.dmesg().splitlines()[self._log_before :]
                (self.artefacts / "dmesg.log").write_text("\n".join(lines) + "\n")
        for wire in self.wires.values():
            wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unpinned(pinned: Any, default: Any) -> str | None:
    """Why a test whose guest is pinned so has no business on a box; None when nothing is pinned."""
    for name, value in vars(pinned).items():
        if value != getattr(default, name):
            return f"needs a guest of QEMU's, with {name}={value!r}"
    return None
