"""TCP through the tap service, and through the kernel's own virtio-net driver, in turns in one guest.

    iperf3 (host) ═ TAP device ═ QEMU's virtio-net ═══ Net-Bridge ═ port ═ tap service ═ TCP ═ iperf3 (guest)
                                                       or the kernel's driver ════════ TCP ═ iperf3 (guest)

Both have the same offloads, which is looked at in each visit: frames that are not cut, and checksums that are not made,
go from one kernel to the other as they are. iperf3 in the guest is the server both times; it sends, and it receives.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from qemu.codedisk import build_code_disk
from qemu.command import default_mac
from qemu.errors import HarnessError
from qemu.guest import Guest, Nic, boot
from qemu.images import Recipe, ensure_image
from qemu.tap import Tap
from tests.bench.contest import Pair, Series, Unavailable
from tests.e2e import testbed

SUMMARY = "TCP through the tap service and through the kernel's driver, with iperf3 in one guest"
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "images" / "bench.toml"
CODE = ROOT / "images" / "code.toml"
HOST, GUEST, LENGTH = "10.9.8.2", "10.9.8.1", 24
INTERFACE = "nb0"
SECONDS, OMITTED_SECONDS = 3, 1
GOAL = 0.8
OURS, KERNEL = "Net-Bridge and tap", "kernel's virtio-net"
OFFLOADS = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN")
# The client's words for the two directions, as the guest sees them.
WAYS = {"receive": [], "send": ["--reverse"]}


def contests(quick: bool) -> Iterator[Series]:
    del quick
    if shutil.which("iperf3") is None:
        raise Unavailable("iperf3 is missing on the host: apt-get install iperf3")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netbridge-bench-")))
        try:
            tap = stack.enter_context(Tap(f"{HOST}/{LENGTH}", captured=False))
            guest = stack.enter_context(_boot(directory, tap))
        except HarnessError as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        stacks: dict[str, _Stack] = {OURS: _Netbridge(guest, directory), KERNEL: _Kernel(guest)}
        yield Series(
            bench="tcp",
            visits={name: _visit(one, tap, guest) for name, one in stacks.items()},
            pairs=[Pair(f"guest {way}s, MTU 1500", "Mbit/s", way, OURS, KERNEL, goal=GOAL) for way in WAYS],
            commands=(f"# {guest.accel}", *(one.command for one in stacks.values()), " ".join(_client("send"))),
        )


def _boot(directory: Path, tap: Tap) -> Guest:
    image = ensure_image(Recipe.load(RECIPE))
    code = build_code_disk(image, CODE, directory / "code.img")
    nic = Nic(wire=tap, mac=default_mac(0))
    return boot(
        image,
        artefacts=directory,
        code=code,
        nics=[nic],
        memory_mb=1024,
        accel=os.environ.get("ACCEL", "auto"),
    )


def _client(way: str) -> list[str]:
    words = ["iperf3", "--client", GUEST, "--time", str(SECONDS), "--omit", str(OMITTED_SECONDS), "--json"]
    return [*words, *WAYS[way]]


class _Stack(ABC):
    """Linux's TCP in the guest, by way of one driver. `command` is what a reader would type in the guest."""

    command = ""

    @abstractmethod
    def up(self) -> AbstractContextManager[None]:
        """The guest has its address."""


def _visit(stack: _Stack, tap: Tap, guest: Guest) -> Callable[[], dict[str, float]]:
    def visit() -> dict[str, float]:
        found = {}
        with stack.up():
            _must_have_offloads(guest)
            for way in WAYS:
                # A server for each: one that has just served may be busy for a while yet.
                words = ["iperf3", "--server", "--one-off", "--forceflush", "--bind", GUEST]
                with guest.start(words) as server:
                    server.wait_for_line("Server listening", testbed.START_SECONDS)
                    found[way] = _measure(tap, way)
                    server.wait(testbed.START_SECONDS)
        return found

    return visit


def _measure(tap: Tap, way: str) -> float:
    """Mbit/s that arrived."""
    try:
        done = tap.run(_client(way), timeout=60.0)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"iperf3, guest {way}s: {error.stdout}{error.stderr}") from None
    told = json.loads(done.stdout)
    if "error" in told:  # which its exit code does not say with --json
        raise RuntimeError(f"iperf3, guest {way}s: {told['error']}")
    return float(told["end"]["sum_received"]["bits_per_second"]) / 1e6


def _must_have_offloads(guest: Guest) -> None:
    path = f"/machine/peripheral/{guest.machine.nics[0].id}/virtio-backend"
    agreed = str(guest.qmp("x-query-virtio-status", path=path)["guest-features"])
    lacking = [name for name in OFFLOADS if f"VIRTIO_NET_F_{name}:" not in agreed]
    if lacking:
        raise RuntimeError(f"the driver has not taken {', '.join(lacking)}, so this is no comparison: {agreed}")


class _Netbridge(_Stack):
    def __init__(self, guest: Guest, directory: Path) -> None:
        self._guest, self._directory = guest, directory
        self._pci = testbed.nics(guest)[0][0]
        self._tap = testbed.netbridge("tap", "--name", INTERFACE, "--address", f"{GUEST}/{LENGTH}")
        self.command = f"{' '.join(testbed.netbridge('run', 'vnode.yml'))} & {' '.join(self._tap)}"

    @contextmanager
    def up(self) -> Iterator[None]:
        self._guest.put(testbed.manifest(self._pci).encode(), testbed.MANIFEST)
        self._guest.run(["modprobe", "tun"])
        command = testbed.netbridge("run", testbed.MANIFEST, "--json")
        with self._guest.start(command, log=self._directory / "driver.log") as driver:
            testbed.wait_for_line(driver, r" prepared ")
            with self._guest.start([*self._tap, "--json"], log=self._directory / "tap.log") as service:
                testbed.wait_for_line(service, '"connected"')
                yield
                testbed.end(service)
            testbed.end(driver)


class _Kernel(_Stack):
    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._pci = testbed.nics(guest)[0][0]
        self.command = f"ip address add {GUEST}/{LENGTH} dev INTERFACE"

    @contextmanager
    def up(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "virtio-pci")
        interface = self._guest.eval(
            f"import glob, os; os.path.basename(glob.glob('/sys/bus/pci/devices/{self._pci}/virtio*/net/*')[0])"
        )
        self._guest.run(["ip", "address", "add", f"{GUEST}/{LENGTH}", "dev", interface])
        self._guest.bring_up(interface)
        yield
        with contextlib.suppress(HarnessError):
            self._guest.run(["ip", "address", "flush", "dev", interface])
