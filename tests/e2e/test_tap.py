"""The Linux stack behind the port talks to a second guest, whose kernel has a NIC with its own virtio-net driver: two
QEMUs with a cable between them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from qemu.agent import GuestProcess
from qemu.guest import Guest, Nic
from qemu.session import Session
from tests.e2e import testbed

pytestmark = pytest.mark.thorough

OURS, THEIRS = "192.0.2.2", "192.0.2.1"
OURS_6, THEIRS_6 = "2001:db8::2", "2001:db8::1"
DATAGRAMS, LENGTHS = 2000, (4, 512, 1472)
TRANSFER = int(os.environ.get("TRANSFER_MIB", "8")) << 20
SECONDS = 120.0 + (TRANSFER >> 20)


class CableEnd:
    """What a NIC is plugged into: one datagram is one frame."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def netdev(self, ident: str) -> str:
        return f"dgram,id={ident},local.type=fd,local.str={self._end.fileno()}"

    def fds(self) -> Sequence[int]:
        return (self._end.fileno(),)

    def attached(self) -> None:
        self._end.close()


@dataclass
class Pair:
    """Guest `ours` has driver and tap service, guest `theirs` its kernel's driver."""

    ours: Guest
    theirs: Guest
    driver: GuestProcess
    tap: GuestProcess

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ours.run(testbed.netbridge("stats", "--json")).stdout)
        return found


@pytest.fixture(scope="module")
def pair(guests: Session) -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.ExitStack() as stack:
        made = []
        for end, name, mac in zip(ends, ("ours", "theirs"), ("52:54:00:00:00:02", "52:54:00:00:00:01"), strict=True):
            stack.callback(end.close)
            made.append(stack.enter_context(guests.boot(f"tap-{name}", nics=[Nic(wire=CableEnd(end), mac=mac)])))
        ours, theirs = made
        (address, _), *_ = testbed.nics(theirs)
        name = theirs.run(["sh", "-c", f"ls /sys/bus/pci/devices/{address}/virtio*/net"]).stdout.strip()
        for each in (f"{THEIRS}/24", f"{THEIRS_6}/64"):
            theirs.run(["ip", "address", "add", each, "dev", name, *(["nodad"] if ":" in each else [])])
        theirs.run(["ip", "link", "set", name, "up"])
        ours.put(testbed.manifest(testbed.nics(ours)[0][0]).encode(), testbed.MANIFEST)
        run = testbed.netbridge("run", testbed.MANIFEST, "--json")
        driver = stack.enter_context(ours.start(run, log=ours.artefacts / "driver.log"))
        testbed.wait_for_line(driver, r" prepared ")
        ours.run(["modprobe", "tun"])
        addresses = [f"--address={OURS}/24", f"--address={OURS_6}/64"]
        command = testbed.netbridge("tap", "--name", "nb0", *addresses, "--json")
        tap = stack.enter_context(ours.start(command, log=ours.artefacts / "tap.log"))
        testbed.wait_for_line(driver, r" serving .*\bclient=netbridge-tap .*uid=1000")
        yield Pair(ours, theirs, driver, tap)
        testbed.end(tap)
        testbed.end(driver)
        for process in (tap, driver):
            assert "Traceback" not in process.stderr
        assert not ours.iommu_faults()


def ping(guest: Guest, address: str, size: int = 56, count: int = 5) -> None:
    words = ["-6"] if ":" in address else []
    done = guest.run(["/usr/lib/guest/busybox", "ping", *words, "-c", str(count), "-W", "10", "-s", str(size), address])
    assert re.search(rf"{count} packets transmitted, {count} packets received, 0% packet loss", done.stdout), (
        done.stdout
    )


@contextlib.contextmanager
def server(guest: Guest, address: str) -> Iterator[None]:
    with guest.start(["python3", "-m", "tests.e2e.peer", "serve", address]) as process:
        process.wait_for_line("serving", testbed.START_SECONDS)
        yield


def ask(guest: Guest, *words: object) -> dict[str, Any]:
    done = guest.run(["python3", "-m", "tests.e2e.peer", *map(str, words)], timeout=SECONDS)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("size", [56, 1472])
def test_ping_both_ways(pair: Pair, size: int) -> None:
    ping(pair.theirs, OURS, size)
    ping(pair.ours, THEIRS, size)


def test_ping_ipv6_both_ways(pair: Pair) -> None:
    ping(pair.theirs, OURS_6)
    ping(pair.ours, THEIRS_6)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_datagram_is_accounted_for(pair: Pair, length: int) -> None:
    """Those that came, and those that somebody says were dropped, are those that were sent."""
    before = pair.counters()
    with server(pair.ours, OURS):
        answer = ask(pair.theirs, "datagrams", OURS, DATAGRAMS, length)
    after = pair.counters()
    dropped = sum(after["drops"].values()) - sum(before["drops"].values())
    assert answer["came"] == answer["different"], "none came twice"
    assert answer["came"] + dropped == answer["sent"] == DATAGRAMS, f"{dropped} were dropped by the driver"
    with server(pair.theirs, THEIRS):
        answer = ask(pair.ours, "datagrams", THEIRS, DATAGRAMS, length)
    lost = int(pair.ours.run(["cat", "/sys/class/net/nb0/statistics/tx_dropped"]).stdout)
    assert answer["came"] == answer["different"]
    assert answer["came"] + lost >= DATAGRAMS


@pytest.mark.parametrize("address", [OURS, OURS_6])
@pytest.mark.parametrize("verb", ["take", "give"])
def test_a_tcp_transfer_is_unchanged(
    pair: Pair, verb: str, address: str, record_property: Callable[[str, object], None]
) -> None:
    with server(pair.ours, address):
        answer = ask(pair.theirs, verb, address, TRANSFER)
    assert answer["equal"]
    record_property("mbit_per_s", answer["mbit_per_s"])
    print(f"{verb}, {address}: {answer['mbit_per_s']} Mbit/s")


def test_the_service_has_one_capability(pair: Pair) -> None:
    lines = pair.ours.run(["cat", f"/proc/{pair.tap.pid}/status"]).stdout.splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert status["Uid"].split() == ["1000"] * 4
    assert {int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd")} == {1 << 12}
