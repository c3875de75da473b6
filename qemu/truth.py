"""What has to be true of a guest after a test, whatever the test was about: the one place where it is looked at.

No DMA that the IOMMU refused, no complaint of the kernel, every NIC with the driver that it had at first, and no VFIO
file left open. A test during which something of this is to be expected says so: see the marker `guest_allows`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from qemu.console import TROUBLE

if TYPE_CHECKING:
    from qemu.guest import Guest

FAULTS, KERNEL, DRIVERS, FILES = "iommu-faults", "kernel-trouble", "drivers", "vfio-files"
KINDS = (FAULTS, KERNEL, DRIVERS, FILES)

STALL = re.compile(r"blocked|stall|lockup")
"""Of a kernel's complaints, what a busy host alone can cause."""

LOOK_SECONDS = 60.0
LOOK = """
import glob, os
def _drivers():
    found = {}
    for path in glob.glob("/sys/bus/pci/devices/*"):
        with open(path + "/class") as file:
            if not file.read().startswith("0x02"):
                continue
        driver = path + "/driver"
        found[os.path.basename(path)] = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else ""
    return found
def _vfio_files():
    found = []
    for process in glob.glob("/proc/[0-9]*"):
        try:
            for name in os.listdir(process + "/fd"):
                target = os.readlink(f"{process}/fd/{name}")
                if target.startswith(("/dev/vfio/", "anon_inode:[vfio", "/dev/iommu")):
                    with open(process + "/cmdline") as file:
                        command = " ".join(file.read().split("\\0")[:6])
                    found.append(f"{target} in process {os.path.basename(process)} ({command})")
        except OSError:
            pass  # it has ended
    return sorted(found)
def _boot():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read()
[_drivers(), _vfio_files(), _boot()]
"""


class Truth:
    """What `guest` was like at a moment, to be held against what it is like later."""

    def __init__(self, guest: Guest):
        self._guest = guest
        self._drivers, _, self._boot = guest.eval(LOOK, LOOK_SECONDS)
        self._console = len(guest.kernel_trouble())
        self._seen = max((number for number, _ in guest.kernel_records()), default=-1)

    def problems(self, allowed: Collection[str] = ()) -> list[str]:
        """All that is wrong, a line each; empty when all is well. `allowed` are some of KINDS that may be.

        A guest that is lost or paused can only be judged by its console.
        """
        found: list[tuple[str, str]] = []
        if self._guest.lost is None and self._guest.agent.ready:
            drivers, files, boot = self._guest.eval(LOOK, LOOK_SECONDS)
            for address, before in self._drivers.items():
                now = drivers.get(address)
                if now != before:
                    has = "is gone" if now is None else f"has the driver {now or 'none'}"
                    found.append((DRIVERS, f"the NIC {address} {has}; it had {before or 'none'}"))
            found += [(FILES, f"left open: {file}") for file in files]
            seen = self._seen if boot == self._boot else -1
            fresh = [line for number, line in self._guest.kernel_records() if number > seen]
        else:
            fresh = self._guest.kernel_trouble()[self._console :]
        found += [(FAULTS, f"the IOMMU refused: {line}") for line in fresh if self._guest.is_fault(line)]
        found += [(KERNEL, f"the kernel: {line}") for line in fresh if TROUBLE.search(line) and not STALL.search(line)]
        return [line for kind, line in found if kind not in allowed]
