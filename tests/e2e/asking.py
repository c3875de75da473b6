"""The host's end of asking_echo.py: a driver in the guest, with an echo service that asks the device for things."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qemu.guest import Guest
from qemu.guest_process import GuestProcess
from qemu.wire import Wire
from tests.e2e import testbed
from tests.e2e.account import Account
from tests.e2e.traffic import HOST_MAC, RAW_ETHERTYPE, reflected

ANSWER_SECONDS = 60.0


class Asking:
    """A running driver and asking_echo. `mac` is the device's own address as it was at first."""

    def __init__(self, guest: Guest, wire: Wire, driver: GuestProcess, service: GuestProcess, mac: str) -> None:
        self.guest, self.wire, self.driver, self.service, self.mac = guest, wire, driver, service, mac
        self._lines = service.lines(timeout=ANSWER_SECONDS)
        self._number = 0
        self.account = Account(guest, lambda: testbed.driver_pid(driver))
        self.account.loses()  # what is asked of the device is, mostly, to let frames by or not

    def next_line(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(next(self._lines))
        return said

    def ask(self, **asked: object) -> dict[str, Any]:
        self.service.write(json.dumps(asked).encode() + b"\n")
        return self.next_line()

    def filter(self, **fields: object) -> str:
        """Asks for a filter; the driver's verdict."""
        verdict: str = self.ask(filter=fields)["verdict"]
        return verdict

    def frame(self, to: str, vlan: int | None = None, priority: int = 0) -> bytes:
        """A frame unlike every other, with a VLAN tag (IEEE 802.1Q) if one is named."""
        self._number += 1
        tag = b"" if vlan is None else b"\x81\x00" + (priority << 13 | vlan).to_bytes(2, "big")
        ethernet = bytes.fromhex((to + HOST_MAC).replace(":", ""))
        return ethernet + tag + RAW_ETHERTYPE.to_bytes(2, "big") + self._number.to_bytes(46, "big")

    def passes(self, to: str, vlan: int | None = None, *, count: int = 4) -> bool:
        """Sends frames there; True if every one comes back, False if none does. Anything else fails the test."""
        frames = [self.frame(to, vlan) for _ in range(count)]
        # Broadcast comes through every filter that is used here, and frames keep their order.
        sentinel = self.frame("ff:ff:ff:ff:ff:ff")
        for frame in (*frames, sentinel):
            self.wire.send(frame)
        back = self.until(reflected(sentinel))
        if not back:
            return False
        assert back == [reflected(frame) for frame in frames]
        return True

    def until(self, last: bytes) -> list[bytes]:
        """Everything that comes before this frame."""
        came: list[bytes] = []
        while True:
            frame = self.wire.recv_raw(timeout=ANSWER_SECONDS)[1]
            assert frame is not None, f"{len(came)} frames came, and not the last"
            if frame == last:
                return came
            came.append(frame)

    def wait_for_facts(self, **wanted: object) -> None:
        """Until the client's facts are these. Asked again and again: they come by themselves, but nobody tells here."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not wanted.items() <= (facts := self.ask(facts=True)).items():
            assert time.monotonic() < deadline, f"the facts are {facts}, {wanted} were awaited"

    def counters(self) -> dict[str, Any]:
        return self.account.counters()

    def stop(self) -> dict[str, Any]:
        """Ends both politely; the driver's last counters. Driver, device and wire must agree."""
        self.account.check()
        self.service.close_stdin()
        assert self.service.wait(testbed.STOP_SECONDS) == 0, self.service.stderr
        testbed.end(self.driver)
        counters: dict[str, Any] = json.loads(self.driver.stdout.splitlines()[-1])
        return counters


@contextlib.contextmanager
def asking(guest: Guest, wire: Wire, *, irq: str = "msix", options: Sequence[str] = ()) -> Iterator[Asking]:
    """Starts driver and service for the guest's first NIC."""
    pci = testbed.nics(guest)[0][0]
    guest.put(testbed.manifest(pci, irq=irq).encode(), testbed.MANIFEST)
    command = testbed.netbridge("run", testbed.MANIFEST, "--json", *options)
    with guest.start(command, log=guest.artefacts / "driver.log") as driver:
        mac = testbed.wait_for_line(driver, r" prepared .*\bmac=(\S+)")[1]
        service = ["python3", "-m", "tests.e2e.asking_echo", testbed.SOCKET]
        log = guest.artefacts / "service.log"
        with guest.start(service, user=testbed.SERVICE_USER, stdin=True, log=log) as process:
            bed = Asking(guest, wire, driver, process, mac)
            assert bed.next_line() == {"ready": True}
            assert bed.next_line()["session"]
            testbed.wait_for_line(driver, r" serving ")
            wire.drain()
            bed.account.open()
            yield bed
