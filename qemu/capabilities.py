"""What a test may need of host and guest: probed when it is asked for, never assumed, and told when it is not there.

A marker of the same name stands before the test. A test whose need is not met is skipped with the reason, which the
last lines of the run repeat.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from qemu.inside import Inside

NETWORK = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000) != 0)"  # CLONE_NEWNET, linux/sched.h

HUGE_PAGES = """
def _huge_pages(wanted):
    path = "/proc/sys/vm/nr_hugepages"
    with open(path) as file:
        there = int(file.read())
    if there < wanted:
        with open(path, "w") as file:
            file.write(str(wanted))
        with open(path) as file:
            there = int(file.read())
    return there
"""


@functools.cache
def lacks_root() -> str | None:
    """Why interfaces and network namespaces cannot be made here; None when they can."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", NETWORK], check=False, capture_output=True)
    if done.returncode == 0:
        return None
    return f"needs root: this user ({os.geteuid()}) may make no network namespace"


def lacks_kvm(guest: Inside) -> str | None:
    # A box of metal has no accelerator, and is as fast.
    accelerator = getattr(guest, "accel", None)
    slow = accelerator is not None and accelerator.name != "kvm"
    return f"needs KVM: guests run under {accelerator}" if slow else None


def lacks_iommufd(guest: Inside) -> str | None:
    if guest.eval("import os; os.path.exists('/dev/iommu')"):
        return None
    kernel = guest.agent.hello["kernel"] if guest.agent.hello else "its kernel"
    return f"needs iommufd: the guest's kernel ({kernel}) has no /dev/iommu"


def lacks_hugepages(guest: Inside, wanted: int = 1) -> str | None:
    guest.eval(HUGE_PAGES)
    there = guest.eval(f"_huge_pages({wanted})")
    return None if there >= wanted else f"needs {wanted} huge pages: the guest could make {there}"


OF_HOST: dict[str, Callable[[], str | None]] = {"needs_root": lacks_root}
OF_GUEST: dict[str, Callable[..., str | None]] = {
    "needs_kvm": lacks_kvm,
    "needs_iommufd": lacks_iommufd,
    "needs_hugepages": lacks_hugepages,
}
MARKERS = (
    "needs_root: makes network interfaces of the host",
    "needs_kvm: would be too slow, or mean nothing, under emulation",
    "needs_iommufd: the guest's kernel has iommufd",
    "needs_hugepages(count): the guest has so many huge pages of 2 MiB (1)",
)


def lacking(item: pytest.Item, guest: Inside | None) -> str | None:
    """The first need of a test that is not met; without a guest, only those that the host can meet are looked at."""
    for name, probe in OF_HOST.items():
        if item.get_closest_marker(name) and (reason := probe()):
            return reason
    for name, lacks in OF_GUEST.items():
        marker = item.get_closest_marker(name)
        if guest is not None and marker is not None and (reason := lacks(guest, *marker.args)):
            return reason
    return None
