"""A desk with a box on it, for tests of tests on a machine of metal: a guest with sshd stands in for the box.

The guest has two NICs whose other ends are interfaces of one network namespace of this host: one is the way to sshd,
the other the wire. In that namespace a pytest of its own is started, as a person would at such a desk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qemu.guest import Guest, Nic
from qemu.guest_process import GuestProcess
from qemu.session import Session
from qemu.tap import Tap

ROOT = Path(__file__).parents[2]
HOST, BOX = "10.9.8.1", "10.9.8.2"
DRIVER_OF = "import os; os.path.basename(os.path.realpath('/sys/bus/pci/devices/{}/driver'))"
START_SECONDS = 60.0
RUN_SECONDS = 500.0
SSHD_CONFIG = """\
HostKey /run/box/host_key
AuthorizedKeysFile /run/box/authorized_keys
StrictModes no
UsePAM no
PidFile none
"""
SSH = """\
#!/bin/sh
# The user's own configuration of ssh would say this; whose machine this is has another.
exec {ssh} -F none -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


@dataclass
class Desk:
    """The box, and the namespace in which it can be reached."""

    guest: Guest
    office: Tap
    cable: Tap
    bin: Path
    nics: list[str]
    """PCI addresses: of the one that ssh comes by, and of the one that tests may take."""

    @property
    def enter(self) -> list[str]:
        """The words before a command that is to run in the namespace."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.office._namespace}"]

    def pytest(self, out: Path, *words: str, target: str = f"ssh://root@{BOX}") -> subprocess.CompletedProcess[str]:
        """A run on the box; what it printed."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--artefacts={out}", f"--target={target}"]
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "PYTEST_ADDOPTS": ""}
        return subprocess.run(
            [*self.enter, *command, *words],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=RUN_SECONDS,
        )


def outcomes(junit: Path) -> dict[str, str]:
    """What became of each test, by its name."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        tags = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        found[str(case.get("name"))] = tags[0] if tags else "passed"
    return found


@contextmanager
def set_up(guests: Session, here: Path) -> Iterator[Desk]:
    """The box up and to be reached by ssh; `here` is an empty directory for its keys."""
    for name in ("user_key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / name], check=True)
    (here / "bin").mkdir()
    program = here / "bin" / "ssh"
    program.write_text(SSH.format(ssh=shutil.which("ssh"), key=here / "user_key"))
    program.chmod(0o755)
    with (
        Tap(f"{HOST}/24", offloads=False, name="office") as office,
        Tap(offloads=False, name="eth1", beside=office) as cable,
        guests.boot(
            "box", ROOT / "images/box.toml", nics=[Nic("ssh", wire=office), Nic("nic0", wire=cable)], code=None
        ) as guest,
        serve_ssh(guest, here),
    ):
        yield Desk(guest, office, cable, here / "bin", guest.functions("0x02"))


def serve_ssh(guest: Guest, here: Path) -> GuestProcess:
    interface = guest.run(["sh", "-c", "ls /sys/bus/pci/devices/*/virtio*/net | grep ^e | head -n 1"]).stdout.strip()
    guest.run(["ip", "address", "add", f"{BOX}/24", "dev", interface])
    guest.bring_up(interface)
    guest.put((here / "host_key").read_bytes(), "/run/box/host_key", 0o600)
    guest.put((here / "user_key.pub").read_bytes(), "/run/box/authorized_keys", 0o600)
    guest.put(SSHD_CONFIG.encode(), "/run/box/sshd_config")
    guest.run(["mkdir", "-p", "/run/sshd"])
    sshd = guest.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/run/box/sshd_config"], log=guest.artefacts / "sshd.log")
    sshd.wait_for_line("Server listening", START_SECONDS)
    return sshd
