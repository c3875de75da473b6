"""Where tests run: `--target ssh://root@box --nic 0000:03:00.0 --wire eth1` has them run on a box instead of in guests.

A target is one of

    ssh://[USER@]HOST[:PORT]      by ssh, with this user's keys and configuration
    FILE.toml                     a description of the box (box.py), which may have a console and a power switch
    lab:FILE.yaml[#NAME]          a target of a labgrid environment (lab.py)

All tests of a run share the box. Before one of them touches it, it is looked at (examine.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from qemu import examine, interface
from qemu.box import ADDRESS, SSH, Box, BoxDescription
from qemu.errors import HarnessError
from qemu.metal import Metal

if TYPE_CHECKING:
    from qemu.lab import Lab

POWER_UP_SECONDS = 600.0
NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]")
USER = re.compile(r"[A-Za-z0-9._-]+")


def add_options(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--target",
        metavar="BOX",
        help="run on a machine of metal: ssh://[user@]host[:port], a description FILE.toml, or lab:FILE.yaml",
    )
    group.addoption("--nic", metavar="ADDRESS", help="PCI address of the box's NIC that tests may take (0000:03:00.0)")
    group.addoption("--wire", metavar="INTERFACE", help="this machine's interface whose cable goes to that NIC")


def described(target: str, nic: str | None) -> BoxDescription:
    """The box that `target` speaks of, unless that is a labgrid environment. Raises ValueError, RecipeError."""
    if target.startswith("ssh://"):
        if nic is None:
            raise ValueError("--target ssh://… wants --nic, the PCI address of the NIC that tests may take")
        return _by_ssh(target, nic)
    if target.endswith(".toml"):
        made = BoxDescription.load(Path(target))
        return made if nic is None else dataclasses.replace(made, nic=nic)
    raise ValueError(f"--target is ssh://[user@]host[:port], FILE.toml or lab:FILE.yaml, not {target!r}")


def _by_ssh(target: str, nic: str) -> BoxDescription:
    wrong = f"--target {target}: expected ssh://[user@]host[:port]"
    parts = urlsplit(target)
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{wrong}; the port is a number") from error
    user, at, host = parts.netloc.rpartition("@")
    host = host.rpartition(":")[0] if port is not None else host.removesuffix(":")
    # What begins with a hyphen would be an option of ssh's.
    if not NAME.fullmatch(host) or host.startswith("-") or (at and (not USER.fullmatch(user) or user.startswith("-"))):
        raise ValueError(wrong)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"{wrong}, with nothing behind it")
    connect = list(SSH)
    if port is not None:
        connect[1:1] = ["-p", str(port)]
    host = host.strip("[]")
    return BoxDescription(name=host, host=f"{user}@{host}" if at else host, nic=nic, connect=tuple(connect))


class Target:
    """The box of a run: connected when the first test asks for it, and let go at the end of the run."""

    def __init__(self, config: pytest.Config, artefacts: Path, patience: float, say: Callable[[str], None]):
        self.wire: str | None = config.getoption("wire")
        self._artefacts = artefacts
        self._patience = patience
        self._say = say
        self._stack = ExitStack()
        self._lab: Lab | None = None
        self._box: Box | None = None
        self._mac = self._driver = ""
        target, nic = str(config.getoption("target")), config.getoption("nic")
        if nic is not None and not ADDRESS.fullmatch(nic):
            raise pytest.UsageError(f'--nic: expected a PCI address such as "0000:03:00.0", not {nic!r}')
        try:
            if target.startswith("lab:"):
                from qemu.lab import Lab  # labgrid is only there for those who have a lab

                self._lab = Lab(target, nic, self.wire)
                self.name = self._lab.name
            else:
                self._description = described(target, nic)
                self.name = self._description.name
        except (ValueError, HarnessError) as error:
            raise pytest.UsageError(str(error)) from None

    @classmethod
    def chosen(
        cls, config: pytest.Config, artefacts: Path, patience: float, say: Callable[[str], None]
    ) -> Target | None:
        """The target that the options name; None when tests run in guests. Raises UsageError."""
        if config.getoption("target") is not None:
            if hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None):
                raise pytest.UsageError("a box is one: with --target there are no parallel runs (leave out -n)")
            return cls(config, artefacts, patience, say)
        for option in ("nic", "wire"):
            if config.getoption(option) is not None:
                raise pytest.UsageError(f"--{option} is for a box: name it with --target")
        return None

    def connect(self, fill: Callable[[Box], None]) -> Box:
        """The box, looked at and given what `fill` puts there; connected anew, after a power cycle where it can be
        had, when it was lost. Raises HarnessError."""
        if self._box is not None and self._box.lost is None:
            return self._box
        if self._box is None:
            if self.wire is not None and (reason := interface.obstacle(self.wire, interface.interfaces())):
                raise HarnessError(f"--wire {self.wire}: {reason}")
            if self._lab is not None:
                self._description = self._stack.enter_context(self._lab.acquired(self._artefacts, self._say))
                self.wire = self._lab.wire
            self._box = self._stack.enter_context(Box(self._description, self._artefacts))
        else:
            self._say(f"{self._box.lost}; connecting anew")
            if self._description.power:
                self._box.power("cycle")
            self._box.reconnect(POWER_UP_SECONDS * self._patience)
        facts = examine.look(self._box)
        if reason := examine.obstacle(facts, self._description.nic):
            raise HarnessError(f"{self._description.name}: {reason}")
        # After a test has failed it may be VFIO's: then what was found out at first counts.
        self._mac = self._mac or examine.mac_address(facts, self._description.nic)
        self._driver = self._driver or facts["pci"][self._description.nic]["driver"]
        fill(self._box)
        return self._box

    def metal(self, artefacts: Path, fill: Callable[[Box], None], wired: bool = True) -> Metal:
        """The box for a test; to be closed by whoever asked for it."""
        box = self.connect(fill)
        return Metal(box, artefacts, self._mac, self._driver, self.wire if wired else None)

    def close(self) -> None:
        self._stack.close()
