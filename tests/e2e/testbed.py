"""A driver and an echo service in a guest that is up: what the demo and the end-to-end tests have in common.

The harness (`qemu/`) knows nothing of netbridge; what there is to know about starting it in a guest is here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.guest import Guest
from qemu.guest_process import GuestProcess
from qemu.views import device_status
from qemu.wire import Wire
from tests.e2e.account import Account

SOCKET = "/run/netbridge/aethernet.sock"
MANIFEST = "/tmp/vnode.yml"
SERVICE_USER = "aethernet"
CAPABILITIES, INTERRUPT_LINE, MSIX = 0x34, 0x3C, 0x11  # of the configuration space (PCI 3.0, 6.1 and appendix H)
START_SECONDS = 60.0
STOP_SECONDS = 60.0

FIND_NICS = """
import glob, os
def _nics():
    found = []
    for path in sorted(glob.glob("/sys/bus/pci/devices/*")):
        read = lambda name: open(f"{path}/{name}").read().strip()
        if (read("vendor"), read("device")) == ("0x1af4", "0x1041"):
            driver = f"{path}/driver"
            driver = os.path.basename(os.readlink(driver)) if os.path.islink(driver) else None
            found.append((os.path.basename(path), driver))
    return found
_nics()
"""

AWAIT_EMPTY_CGROUP = """
import glob, select
for path in glob.glob("/sys/fs/cgroup/netbridge-*/cgroup.events"):
    with open(path) as events:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            poller.poll()
            events.seek(0)
"""

GRANTS = (
    "NetworkAccess",
    'CAP_HARDWARE_IO_PCI: "{pci}"',
    "CAP_IRQ_REGISTER: {irq}",
    "CAP_DMA_ALLOC",
    "CAP_MEM_SHARE",
    "CAP_LOG_WRITE",
)


def manifest(
    pci: str,
    *,
    irq: str = "msix",
    without: Sequence[str] = (),
    more: Sequence[str] = (),
    mem_mb: int = 16,
    cpu_share: float = 1.0,
    mode: str = "strict",
) -> str:
    """A vnode.yml for the NIC at this address; `without` are capabilities to leave out, `more` lines to put in."""
    grants = [grant.format(pci=pci, irq=irq) for grant in (*GRANTS, *more)]
    kept = [grant for grant in grants if grant.partition(":")[0] not in without]
    lines = "".join(f"  - {grant}\n" for grant in kept)
    return f"""\
vnode:
  name: "net-bridge"
  version: "0.1.0"
  mode: {mode}
runtime:
  entrypoint: "bin/net-bridge.vnode"
  required_mem_mb: {mem_mb}
  max_cpu_share: {cpu_share}
capabilities:
{lines}storage:
  mounts: []
observability:
  metrics: ["packets_rx", "packets_tx", "irq_latency_ns"]
"""


def nics(guest: Guest) -> list[tuple[str, str | None]]:
    """The guest's virtio-net functions that tests may take: PCI address and present driver."""
    return [(address, driver) for address, driver in guest.eval(FIND_NICS) if guest.may_take(address)]


def best_irq(guest: Guest, pci: str) -> str:
    """What a manifest has to say for the best interrupt that the function has: "msix", or the number of its line."""
    config = guest.get(f"/sys/bus/pci/devices/{pci}/config")
    at = config[CAPABILITIES]
    while at:
        if config[at] == MSIX:
            return "msix"
        at = config[at + 1]
    return str(config[INTERRUPT_LINE])


def netbridge(*words: str) -> list[str]:
    return ["python3", "-m", "netbridge", *words]


@dataclass
class Testbed:
    """A running driver and its echo service. Their output is kept in the guest's artefacts."""

    __test__ = False  # it is no test, whatever its name

    guest: Guest
    pci: str
    mac: str
    driver: GuestProcess
    echo: GuestProcess
    echo_log: Path
    final: dict[str, Any] = field(default_factory=dict)  # from `stop` on: counters of "driver" and "echo"

    def __post_init__(self) -> None:
        self.account = Account(self.guest, lambda: self.driver_pid)  # opened when frames may come, checked by `stop`

    @property
    def driver_pid(self) -> int:
        """The driver process that runs now; `driver` is its monitor."""
        return driver_pid(self.driver)

    def counters(self) -> dict[str, Any]:
        """The driver's counters, read from outside, once all is counted that is on its way."""
        return self.account.counters()

    def settle(self, wire: Wire) -> None:
        """Sends a frame like no other and takes everything up to its answer: frames stay in order, so nothing that was
        sent earlier comes later. The account begins anew."""
        address = bytes.fromhex(self.mac.replace(":", ""))
        sentinel = address + bytes.fromhex("020000000001") + b"\x88\xb5" + os.urandom(46)
        wire.send(sentinel, START_SECONDS)
        deadline = time.monotonic() + START_SECONDS
        while (frame := wire.recv_raw(timeout=max(deadline - time.monotonic(), 0))[1]) is not None:
            if frame[12:] == sentinel[12:]:
                self.account.open()
                return
        raise AssertionError(f"the answer to a frame did not come within {START_SECONDS:g} s")

    def restart_echo(self, end: signal.Signals = signal.SIGTERM, options: Sequence[str] = ()) -> None:
        """Ends the echo service with this signal and starts another, with more options; returns when that one is
        served."""
        self.echo.kill(end)
        self.echo.wait(STOP_SECONDS)
        self.echo = start_echo(self.guest, self.echo_log, options)
        wait_for_line(self.driver, r" serving ")
        self.account.open()

    def stop(self) -> None:
        """Ends service and driver politely; both must end well, and until then driver, device and wire must have the
        same account of what went by. Raises AssertionError, CommandTimedOut."""
        self.account.check()
        for name, process in (("echo", self.echo), ("driver", self.driver)):
            process.kill(signal.SIGTERM)
            code = process.wait(STOP_SECONDS)
            assert code == 0, f"{name} ended with {code}:\n{process.stderr}"
            self.final[name] = json.loads(process.stdout.splitlines()[-1])


@contextlib.contextmanager
def running(
    guest: Guest,
    *,
    irq: str | None = None,
    options: Sequence[str] = (),
    vnode: str | None = None,
    log_directory: Path | None = None,
    halt_at: str | None = None,
    halted: Callable[[], object] = lambda: None,
) -> Iterator[Testbed]:
    """Starts driver and echo service for the guest's first NIC, with this vnode.yml or one that grants all that is
    needed; kills what is left of them at the end. With `halt_at` the start stands still when it logs that, `halted` is
    called, and it goes on."""
    logs = log_directory or guest.artefacts
    pci = nics(guest)[0][0]
    guest.put((vnode or manifest(pci, irq=irq or best_irq(guest, pci))).encode(), MANIFEST)
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(
            guest.start(netbridge("run", MANIFEST, "--json", *options), log=logs / "driver.log", halt_at=halt_at)
        )
        if halt_at is not None:
            driver.wait_halted(START_SECONDS)
            halted()
            driver.go_on()
        mac = wait_for_line(driver, r" prepared .*\bmac=(\S+)")[1]
        bed = Testbed(guest, pci, mac, driver, start_echo(guest, logs / "echo.log"), logs / "echo.log")
        stack.callback(lambda: bed.echo.__exit__(None, None, None))
        wait_for_line(driver, r" serving ")
        bed.account.open()
        yield bed


def driver_pid(monitor: GuestProcess) -> int:
    """The driver process that this monitor has started last."""
    return int(re.findall(r" claimed .*\bdriver=(\d+)", monitor.stderr)[-1])


def start_echo(guest: Guest, log: Path, options: Sequence[str] = ()) -> GuestProcess:
    """The echo service under a uid of its own; it waits for the driver to be ready for it."""
    command = ["python3", "-m", "netbridge.services.echo", "--json", "--socket", SOCKET, "--wait", f"{START_SECONDS:g}"]
    return guest.start([*command, *options], user=service_user(guest), log=log)


def service_user(guest: Guest) -> str:
    """Whose the service is: the image's user for it, or where there is none, as on a box, nobody."""
    known = guest.run(["getent", "passwd", SERVICE_USER], check=False).returncode == 0
    return SERVICE_USER if known else "nobody"


def in_cgroup(guest: Guest, pci: str, file: str) -> str:
    """A file of the cgroup of the driver that has the device: the only one, until another stands by beside it."""
    slots = f"/sys/fs/cgroup/netbridge-{pci}/driver-*"
    return guest.run(["sh", "-c", f"cat $(ls -dv {slots} | head -n 1)/{file}"]).stdout.strip()


def end(process: GuestProcess) -> None:
    """Ends a process politely; it must end well."""
    process.kill(signal.SIGTERM)
    code = process.wait(STOP_SECONDS)
    assert code == 0, f"ended with {code}:\n{process.stderr}"


def wait_until_driven(guest: Guest) -> None:
    """Waits until the first NIC has a driver: DRIVER_OK as QEMU sees it, which has no event for it. For a driver that
    may not log. A frame that comes just before, QEMU takes from the wire and drops."""
    deadline = time.monotonic() + START_SECONDS
    while "DRIVER_OK" not in str(device_status(guest)["status"]):
        assert time.monotonic() < deadline, f"the driver did not set DRIVER_OK within {START_SECONDS:g} s"
        time.sleep(0.02)


def wait_until_driver_is_gone(guest: Guest) -> None:
    """For the end of a driver process whose monitor was killed: waits in the guest for the kernel to say so."""
    guest.run(["python3", "-c", AWAIT_EMPTY_CGROUP], timeout=STOP_SECONDS)


def wait_for_line(process: GuestProcess, pattern: str) -> re.Match[str]:
    """Waits for a line on the process's stderr."""
    return process.wait_for_line(pattern, START_SECONDS)
