"""Two guests with a cable between them: one has driver and tap service, the other its kernel's own virtio-net driver.

The cable is a bridge of two TAP devices of the host, so that frames which were never cut, and checksums which were
never made, pass from one guest to the other as they are. It takes root.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.guest import Guest, Nic
from qemu.guest_process import GuestProcess
from qemu.session import Session
from qemu.tap import Tap
from tests.e2e import testbed

OURS, THEIRS = "192.0.2.2", "192.0.2.1"
OURS_6, THEIRS_6 = "2001:db8::2", "2001:db8::1"
OURS_MAC, THEIRS_MAC = "52:54:00:00:00:02", "52:54:00:00:00:01"
INTERFACE = "nb0"
MTU = 9000
# The kernel says nothing by itself: so whatever is counted was asked for. Nor does it look for another who has its
# address, which it would not answer at until then.
QUIET = " && ".join(
    f"echo 0 >/proc/sys/net/ipv6/conf/{name}"
    for name in ("default/router_solicitations", "all/accept_ra", "default/accept_dad")
)


@dataclass
class Pair:
    """Guest `ours` has driver and tap service, guest `theirs` its kernel's driver. `name` is the latter's interface;
    `ours_end` and `theirs_end` are the host's ends of the cable."""

    ours: Guest
    theirs: Guest
    name: str
    ours_end: Tap
    theirs_end: Tap
    driver: GuestProcess
    tap: GuestProcess

    def counters(self) -> dict[str, Any]:
        """The driver's."""
        found: dict[str, Any] = json.loads(self.ours.run(testbed.netbridge("stats", "--json")).stdout)
        return found

    def restart_tap(self, *options: str) -> dict[str, Any]:
        """Another tap service; what the last one said at its end."""
        testbed.end(self.tap)
        closed: dict[str, Any] = json.loads(self.tap.stdout.splitlines()[-1])
        self.tap = start_tap(self.ours, *options)
        return closed


def start_tap(guest: Guest, *options: str) -> GuestProcess:
    """Returns when the interface has a session."""
    addresses = [f"--address={OURS}/24", f"--address={OURS_6}/64"]
    words = ["tap", "--name", INTERFACE, *addresses, "--json", "--wait", f"{testbed.START_SECONDS:g}", *options]
    process = guest.start(testbed.netbridge(*words), log=guest.artefacts / "tap.log")
    await_session(process)
    return process


def await_session(tap: GuestProcess) -> None:
    testbed.wait_for_line(tap, r'^{"event": "connected"')


def acquaint(guest: Guest, interface: str, neighbours: Sequence[str], mac: str) -> None:
    """Nobody has to ask for an address: questions are frames, too."""
    for address in neighbours:
        guest.run(["ip", "neigh", "replace", address, "lladdr", mac, "dev", interface, "nud", "permanent"])


@contextlib.contextmanager
def pair(guests: Session, name: str, recipe: Path | None = None) -> Iterator[Pair]:
    """Both guests up, and introduced to each other."""
    with contextlib.ExitStack() as stack:
        theirs_end = stack.enter_context(Tap(name="theirs", mtu=MTU))
        ours_end = stack.enter_context(Tap(name="ours", mtu=MTU, beside=theirs_end))
        theirs_end.join(ours_end)
        made = []
        for end, mac in ((ours_end, OURS_MAC), (theirs_end, THEIRS_MAC)):
            nic = Nic(wire=end, mac=mac, properties={"host_mtu": MTU})
            made.append(stack.enter_context(guests.boot(f"{name}-{end.name}", recipe, nics=[nic], snapshot=False)))
            made[-1].run(["sh", "-c", QUIET])
        ours, theirs = made
        (address, _), *_ = testbed.nics(theirs)
        interface = theirs.run(["sh", "-c", f"ls /sys/bus/pci/devices/{address}/virtio*/net"]).stdout.strip()
        for each in (f"{THEIRS}/24", f"{THEIRS_6}/64"):
            theirs.run(["ip", "address", "add", each, "dev", interface, *(["nodad"] if ":" in each else [])])
        theirs.bring_up(interface)
        acquaint(theirs, interface, (OURS, OURS_6), OURS_MAC)
        ours.put(testbed.manifest(testbed.nics(ours)[0][0]).encode(), testbed.MANIFEST)
        run = testbed.netbridge("run", testbed.MANIFEST, "--json")
        driver = stack.enter_context(ours.start(run, log=ours.artefacts / "driver.log"))
        testbed.wait_for_line(driver, r" prepared ")
        ours.run(["modprobe", "tun"])
        both = Pair(ours, theirs, interface, ours_end, theirs_end, driver, start_tap(ours))
        stack.callback(lambda: both.tap.__exit__(None, None, None))
        testbed.wait_for_line(driver, r" serving .*\bclient=netbridge-tap .*uid=1000")
        yield both
        testbed.end(both.tap)
        testbed.end(driver)
        for process in (both.tap, driver):
            assert "Traceback" not in process.stderr
        assert not ours.iommu_faults()


def ping(guest: Guest, address: str, size: int = 56, count: int = 5) -> None:
    words = ["-6"] if ":" in address else []
    done = guest.run(
        ["/usr/lib/guest/busybox", "ping", *words, "-c", str(count), "-i", "0.2", "-W", "10", "-s", str(size), address]
    )
    assert re.search(rf"{count} packets transmitted, {count} packets received, 0% packet loss", done.stdout), (
        done.stdout
    )


def statistic(guest: Guest, interface: str, name: str) -> int:
    return int(guest.run(["cat", f"/sys/class/net/{interface}/statistics/{name}"]).stdout)


def protocol_counts(guest: Guest, protocol: str) -> dict[str, int]:
    """Of /proc/net/snmp (RFC 1213's names), such as "Tcp"."""
    names, values = (
        line.split()[1:]
        for line in guest.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
        if line.startswith(f"{protocol}:")
    )
    return dict(zip(names, map(int, values), strict=True))


def backlog_drops(guest: Guest) -> int:
    """Frames that the kernel's own queue between a driver and the stack had no room for (/proc/net/softnet_stat)."""
    lines = guest.run(["cat", "/proc/net/softnet_stat"]).stdout.splitlines()
    return sum(int(line.split()[1], 16) for line in lines)
