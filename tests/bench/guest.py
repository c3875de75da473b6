"""Whole drivers in one guest, in turns, on the same function, the same wire and the same processor.

    wire_load (host) ═══ QEMU's virtio-net ═══ Net-Bridge and a client of its port
                                               or DPDK's testpmd on vfio-pci
                                               or the driver with its work in its own process
                                               or the kernel's driver and AF_PACKET
                                               or the kernel's driver and AF_XDP

For each visit the function is bound to the driver whose turn it is, which then receives, transmits and echoes for a
second each, and answers one frame at a time for another. What a guest receives is counted in the guest, since there may
be drops on the way to whoever wants the frame; what it sends is counted by the host.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from qemu.codedisk import build_code_disk
from qemu.command import default_mac
from qemu.errors import HarnessError
from qemu.guest import Guest, Nic, boot
from qemu.images import Recipe, ensure_image
from tests.bench import native
from tests.bench.contest import Pair, Series, Unavailable
from tests.bench.guest_testpmd import GuestTestpmd
from tests.bench.wire import Ceiling, LoadWire
from tests.e2e import testbed

SUMMARY = (
    "Net-Bridge, DPDK on vfio-pci, the kernel's driver with AF_PACKET and AF_XDP, in turns in one guest; QEMU alone"
)
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "images" / "bench.toml"
CODE = ROOT / "images" / "code.toml"
MAC = default_mac(0)
LENGTH = 64
SECONDS, SETTLE_SECONDS = 1.0, 0.3
SPIN_US = 100_000
TALLY, LOAD = "/run/bench.tally", "/run/vhost_load.so"
FLAGS = ("-static", "-march=x86-64", "-fno-strict-aliasing")  # for the guest's processor, and without its libraries
CORE = ROOT / "netbridge/datapath/core"
CLIENT = ROOT / "client"
XDP_LIBRARIES = ("-lxdp", "-lbpf", "-lelf", "-lz")
LOAD_FLAGS = ("-fPIC", "-shared", "-march=x86-64", "-fno-strict-aliasing", f"-I{CORE}")
LIBRARY = [*(CORE / f"{name}.c" for name in ("client", "capture", "counting"))]
LIBRARY += sorted(CLIENT.glob("*.c"))

INTERRUPTS, POLLING = "Net-Bridge on interrupts", "Net-Bridge polling"
IN_PROCESS = "Net-Bridge in one process"
OURS = (INTERRUPTS, POLLING, IN_PROCESS)
DPDK, KERNEL, PYTHON = "DPDK testpmd", "AF_PACKET in C", "AF_PACKET in Python"
XDP = "AF_XDP"
CEILING = "QEMU alone"
RATES = ("receive", "transmit", "echo")


def contests(quick: bool) -> Iterator[Series]:
    with ExitStack() as stack:
        directory, wire, guest = stack.enter_context(guest_on_wire())
        drivers: dict[str, _Driver] = {
            INTERRUPTS: _Netbridge(guest, directory, spin_us=0),
            POLLING: _Netbridge(guest, directory, spin_us=SPIN_US),
            DPDK: _Dpdk(guest),
            IN_PROCESS: _InProcess(guest, directory),
            KERNEL: _Packet(guest, ["/run/frames_packet"]),
            PYTHON: _Packet(guest, ["python3", "/run/frames_packet.py"]),
        }
        missing = []
        try:
            socket = _Xdp(guest)
            drivers[socket.name] = socket
        except Unavailable as reason:
            missing.append(f"{XDP}: {reason}")
        ceiling = stack.enter_context(Ceiling())
        series = Series(
            bench="guest",
            visits={name: _visit(driver, wire) for name, driver in drivers.items()}
            | {CEILING: lambda: dict.fromkeys(("receive", "transmit"), ceiling.carry(LENGTH, MAC, SECONDS))},
            pairs=_pairs([name for name in (*drivers, CEILING) if name not in OURS]),
            commands=(
                f"# {guest.accel}",
                *(driver.command for driver in drivers.values()),
                " ".join(ceiling.command),
            ),
        )
        yield series
    missing += [f"{name}: {why}" for name, why in series.absent.items()]
    if missing:
        raise Unavailable("; ".join(missing))


@contextmanager
def guest_on_wire() -> Iterator[tuple[Path, LoadWire, Guest]]:
    """A directory for what is left of it, the load at the other end of its NIC, and the guest, with the programs that
    it wants in /run. Raises Unavailable."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netbridge-bench-")))
        wire = stack.enter_context(contextlib.closing(LoadWire()))
        try:
            guest = stack.enter_context(_boot(directory, wire))
        except HarnessError as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        yield directory, wire, guest


def _boot(directory: Path, wire: LoadWire) -> Guest:
    image = ensure_image(Recipe.load(RECIPE))
    code = build_code_disk(image, CODE, directory / "code.img")
    guest = boot(
        image,
        artefacts=directory,
        code=code,
        nics=[Nic(wire=wire)],
        memory_mb=1024,
        append=["hugepages=160"],  # for DPDK; ours takes some of them, too
        accel=os.environ.get("ACCEL", "auto"),
    )
    programs = {
        "frames_packet": native.build("frames_packet", flags=FLAGS),
        "frames_port": native.build("frames_port", sources=LIBRARY, flags=(*FLAGS, f"-I{CLIENT}", f"-I{CORE}")),
    }
    for name, program in programs.items():
        guest.put(program, f"/run/{name}", 0o755)
    load = native.build("vhost_load", flags=LOAD_FLAGS)
    guest.put(load, LOAD, 0o644)
    for script in ("frames_packet.py", "inprocess.py", "load.py"):
        guest.put(ROOT / "tests/bench" / script, f"/run/{script}", 0o644)
    guest.run(["sh", "-c", "mkdir -p /run/huge && mount -t hugetlbfs none /run/huge"])
    guest.put(bytes(8), TALLY, 0o666)
    return guest


def _pairs(peers: Sequence[str]) -> list[Pair]:
    """Goals: in one process as fast as DPDK; through the port nine tenths of its rates and twice the kernel's; a round
    trip no longer than DPDK's when polling, nor than the kernel's on interrupts."""
    polls = ((IN_PROCESS, DPDK), (POLLING, DPDK))
    pairs = []
    for figure in (*RATES, "p50", "p99"):
        rate = figure in RATES
        for ours, how in ((INTERRUPTS, "interrupts"), (POLLING, "polling"), (IN_PROCESS, "one process, polling")):
            for peer in peers:
                if rate:
                    goal = {DPDK: 1.0 if ours == IN_PROCESS else 0.9, KERNEL: 2.0}.get(peer)
                else:
                    goal = 1.0 if (ours, peer) in (*polls, (INTERRUPTS, KERNEL)) else None
                metric = f"{figure if rate else f'round trip, {figure}'}, {LENGTH} B, {how}"
                unit, better = ("frames/s", "higher") if rate else ("µs", "lower")
                pairs.append(Pair(metric, unit, figure, ours, peer, "higher" if better == "higher" else "lower", goal))
    return pairs


class _Driver(ABC):
    """One that can have the function. `command` is what a reader would type in the guest."""

    command = ""

    @abstractmethod
    def driving(self) -> AbstractContextManager[None]:
        """The function is bound to it, and it is ready to work."""

    @abstractmethod
    def working(self, what: str) -> AbstractContextManager[Callable[[], int]]:
        """It receives, transmits or echoes. Yields what tells how many frames it has had."""


def _visit(driver: _Driver, wire: LoadWire) -> Callable[[], dict[str, float]]:
    def visit() -> dict[str, float]:
        try:
            return work()
        except HarnessError as error:
            raise RuntimeError(str(error)) from error

    def work() -> dict[str, float]:
        found = {}
        with driver.driving():
            with driver.working("receive") as count, wire.flood(LENGTH, MAC):
                time.sleep(SETTLE_SECONDS)
                first, began = count(), time.monotonic()
                time.sleep(SECONDS)
                last, ended = count(), time.monotonic()
                found["receive"] = (last - first) / (ended - began)
            with driver.working("transmit"):
                found["transmit"] = wire.sink(SECONDS)
            with driver.working("echo"):
                found["echo"] = wire.window(LENGTH, MAC, SECONDS)
                found["p50"], found["p99"] = wire.roundtrip(LENGTH, MAC, SECONDS)
        return found

    return visit


def _tally(guest: Guest) -> int:
    return int(guest.eval(f"int.from_bytes(open({TALLY!r}, 'rb').read(8), 'little')", timeout=30.0))


class _Netbridge(_Driver):
    def __init__(self, guest: Guest, directory: Path, spin_us: int) -> None:
        self._guest, self._directory, self._options = guest, directory, ["--spin-us", str(spin_us)]
        self._pci = testbed.nics(guest)[0][0]
        self.command = " ".join(testbed.netbridge("run", "vnode.yml", *self._options))

    @contextmanager
    def driving(self) -> Iterator[None]:
        self._guest.put(testbed.manifest(self._pci).encode(), testbed.MANIFEST)
        command = testbed.netbridge("run", testbed.MANIFEST, "--json", *self._options)
        with self._guest.start(command, log=self._directory / "driver.log") as self._process:
            testbed.wait_for_line(self._process, r" prepared ")
            yield
            testbed.end(self._process)

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[], int]]:
        if what == "echo":
            client = testbed.start_echo(self._guest, self._directory / "client.log")
        else:
            words = ["/run/frames_port", what, str(LENGTH), TALLY]
            client = self._guest.start(words, user=testbed.SERVICE_USER, log=self._directory / "client.log")
        with client:
            testbed.wait_for_line(self._process, r" serving ")
            yield lambda: _tally(self._guest)
        # Only then is it over, and another client let in.
        testbed.wait_for_line(self._process, r" prepared ")


class _InProcess(_Driver):
    """Polls, as testpmd does. Started anew for each kind of work."""

    def __init__(self, guest: Guest, directory: Path) -> None:
        self._guest, self._directory = guest, directory
        self._pci = testbed.nics(guest)[0][0]
        self.command = " ".join(self._words("receive|transmit|echo"))

    def _words(self, what: str) -> list[str]:
        return ["python3", "/run/inprocess.py", LOAD, self._pci, what, str(LENGTH), TALLY]

    @contextmanager
    def driving(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "vfio-pci")
        try:
            yield
        finally:
            self._guest.rebind(self._pci, "virtio-pci")

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[], int]]:
        with self._guest.start(self._words(what), log=self._directory / "inprocess.log") as process:
            testbed.wait_for_line(process, r" serving ")
            yield lambda: _tally(self._guest)
            if not process.running:
                raise RuntimeError(f"{' '.join(self._words(what))} ended: {process.stderr}")


class _Packet(_Driver):
    """The kernel's driver, and a program with a socket."""

    def __init__(self, guest: Guest, program: list[str]) -> None:
        self._guest, self._program = guest, program
        self._pci = testbed.nics(guest)[0][0]
        self._interface = ""
        self.command = " ".join([*program, "receive|transmit|echo", str(LENGTH), TALLY, "INTERFACE"])

    @contextmanager
    def driving(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "virtio-pci")
        self._interface = self._guest.eval(
            f"import glob, os; os.path.basename(glob.glob('/sys/bus/pci/devices/{self._pci}/virtio*/net/*')[0])"
        )
        self._guest.run(["ip", "link", "set", self._interface, "addrgenmode", "none"])
        self._guest.bring_up(self._interface)
        yield

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[], int]]:
        words = [*self._program, what, str(LENGTH), TALLY, self._interface]
        with self._guest.start(words) as process:
            if self._program[0] == "python3":  # which takes its time to begin
                testbed.wait_for_line(process, r" serving ")
            yield lambda: _tally(self._guest)
            if not process.running:
                raise RuntimeError(f"{' '.join(words)} ended: {process.stderr}")


class _Xdp(_Packet):
    """`name` says how its frames reach the socket, which the kernel decides. Raises Unavailable with its reasons."""

    def __init__(self, guest: Guest) -> None:
        try:
            program = native.build("frames_xdp", flags=FLAGS, libraries=XDP_LIBRARIES)
        except native.CompilationFailed as error:
            raise Unavailable(f"needs libxdp-dev on the host: {str(error).splitlines()[1]}") from error
        guest.put(program, "/run/frames_xdp", 0o755)
        super().__init__(guest, ["/run/frames_xdp"])
        with self.driving():
            words = [*self._program, "probe", str(LENGTH), TALLY, self._interface]
            probe = guest.run(words, check=False)
        if probe.returncode:
            raise Unavailable(probe.stderr.strip().replace("\n", "; "))
        mode = probe.stdout.strip()
        self.name = f"{XDP}, {mode}"
        self.command += f"  # {mode}"

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[], int]]:
        with self._guest.start([*self._program, what, str(LENGTH), TALLY, self._interface]) as process:
            testbed.wait_for_line(process, r" serving ")
            yield lambda: _tally(self._guest)
            testbed.end(process)  # so that it detaches its XDP program


_MODES = {"receive": "rxonly", "transmit": "txonly", "echo": "macswap"}


class _Dpdk(_Driver):
    def __init__(self, guest: Guest) -> None:
        self._guest, self._pci = guest, testbed.nics(guest)[0][0]
        self.command = " ".join(GuestTestpmd.words(self._pci))

    @contextmanager
    def driving(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "vfio-pci")
        with GuestTestpmd(self._guest, self._pci) as self._testpmd:
            yield
            self._testpmd.quit()
        self._guest.rebind(self._pci, "virtio-pci")

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[], int]]:
        self._testpmd.tell(f"set fwd {_MODES[what]}")
        self._testpmd.tell(f"set txpkts {LENGTH}")
        self._testpmd.tell("start")
        try:
            yield lambda: self._testpmd.received()
        finally:
            self._testpmd.tell("stop")
