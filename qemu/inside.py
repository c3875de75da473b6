"""What one does inside a machine that has an agent: a guest, or a box on the desk; the same verbs for both."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.agent import Agent
from qemu.completed import Completed
from qemu.errors import HarnessError
from qemu.guest_process import GuestProcess

FAULT = re.compile(r"DMAR:.*\bfault addr\b|virtio_iommu.*\bfault\b")

REBIND = """
set -e
cd /sys/bus/pci/devices/$1
[ ! -e driver ] || basename $(readlink driver)
[ ! -e driver ] || echo $1 >driver/unbind
echo $2 >driver_override
[ -z "$2" ] || { echo $1 >/sys/bus/pci/drivers_probe; [ "$(basename $(readlink driver))" = $2 ]; }
[ "$2" = vfio-pci ] || echo >driver_override
"""

READ_KERNEL_LOG = """
import os
def _kernel_log():
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    records = []
    try:
        while True:
            try:
                records.append(os.read(fd, 8192).decode(errors="replace"))
            except BrokenPipeError:
                continue
            except BlockingIOError:
                return records
    finally:
        os.close(fd)
_kernel_log()
"""

# Until the kernel has noticed the carrier, a moment after the command has returned, the interface has a queueing
# discipline that drops all there is (net/core/link_watch.c): what is asked of it is heard, and the answer lost.
BRING_UP = """
ip link set dev "$1" up || exit
until ip -o link show dev "$1" | grep -q "state UP"; do sleep 0.02; done
"""


class Inside:
    """The verbs. Whoever inherits them has an `agent`, and knows whether the machine is `lost`."""

    agent: Agent

    @property
    def lost(self) -> HarnessError | None:
        """Why this machine is gone, or None while it is there."""
        raise NotImplementedError

    def kernel_trouble(self) -> list[str]:
        """Lines in which the kernel complains of itself."""
        raise NotImplementedError

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        user: str | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | str | None = None,
    ) -> Completed:
        """Run a command to its end: see Agent.run()."""
        return self.agent.run(argv, check=check, timeout=timeout, user=user, env=env, cwd=cwd, stdin=stdin)

    def start(self, argv: Sequence[str], **options: Any) -> GuestProcess:
        """Start a command whose output is streamed: see Agent.start()."""
        return self.agent.start(argv, **options)

    def put(self, source: bytes | Path, target: str, mode: int | None = None) -> None:
        """Write bytes, or a file or directory of the host, to a path in the guest: see Agent.put()."""
        self.agent.put(source, target, mode)

    def get(self, path: str, to: Path | None = None) -> bytes:
        """The content of a file in the guest: see Agent.get()."""
        return self.agent.get(path, to)

    def eval(self, source: str, timeout: float = 20.0) -> Any:
        """Run Python in the agent's own interpreter, in well under a millisecond: see Agent.eval()."""
        return self.agent.eval(source, timeout)

    def kernel_records(self) -> list[tuple[int, str]]:
        """The messages that the kernel's log still holds, each with its number since the boot and as a line with its
        time in seconds of the guest."""
        records = []
        for record in self.agent.eval(READ_KERNEL_LOG, timeout=10.0):
            head, _, message = record.partition(";")
            fields = head.split(",")
            if len(fields) > 2 and fields[1].isdigit() and fields[2].isdigit():
                text = message.splitlines()[0] if message else ""
                records.append((int(fields[1]), f"[{int(fields[2]) / 1e6:12.6f}] {text}"))
        return records

    def dmesg(self) -> str:
        """The kernel's log, a line each message, with times in seconds of the guest."""
        return "\n".join(line for _, line in self.kernel_records())

    @staticmethod
    def is_fault(line: str) -> bool:
        """Whether the kernel reports in it a DMA access that the IOMMU refused."""
        return FAULT.search(line) is not None

    def may_take(self, address: str) -> bool:  # noqa: ARG002 - a guest is there to be used up
        """Whether tests may take that NIC from its driver."""
        return True

    def functions(self, kind: str) -> list[str]:
        """Addresses of the PCI functions whose class begins so, such as "0x02" for network controllers."""
        found: list[str] = self.eval(
            "import glob, os\n[os.path.basename(path) for path in sorted(glob.glob('/sys/bus/pci/devices/*')) "
            f"if open(path + '/class').read().startswith({kind!r})]"
        )
        return found

    def rebind(self, address: str, driver: str) -> str:
        """Give a PCI function to that driver, "" for none; returns the name of the one that it had."""
        return str(self.run(["sh", "-c", REBIND, "rebind", address, driver]).stdout.strip())

    def bring_up(self, interface: str, timeout: float = 30.0) -> None:
        """Have the kernel bring a network interface up; returns when what is sent by it goes out. Raises CommandFailed,
        or CommandTimedOut where nothing is at its other end."""
        self.run(["sh", "-c", BRING_UP, "bring_up", interface], timeout=timeout)

    def iommu_faults(self) -> list[str]:
        """The lines in which the kernel reports a DMA access that the IOMMU refused."""
        return [line for line in self.kernel_log().splitlines() if self.is_fault(line)]

    def wait_for_iommu_faults(self, count: int = 1, timeout: float = 30.0) -> list[str]:
        """The same once there are so many. Raises HarnessError when there are not in time."""
        deadline = time.monotonic() + timeout
        while len(found := self.iommu_faults()) < count:
            if time.monotonic() > deadline:
                raise HarnessError(f"{len(found)} of {count} IOMMU faults are in the kernel's log after {timeout:g} s")
            time.sleep(0.02)
        return found

    def kernel_log(self) -> str:
        """The kernel's log, by whatever way it can be had."""
        return self.dmesg()
