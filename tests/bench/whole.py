"""What a whole driver takes of its machine: memory, processor time at several loads, and the time to its first frame.

    wire_load (host) ═══ QEMU's virtio-net ═══ Net-Bridge and the C library's example of an echo
                                               or DPDK's testpmd on vfio-pci (macswap)
                                               or the kernel's driver with AF_PACKET in C

In turns on one function of one guest, which are those of the bench `guest`. Each visit begins with the function at
another driver and nobody running, and with frames coming: the first that comes back ends the start. Then frames come at
a tenth and at half of what Net-Bridge carries, as many as will go, and none. Processor time is that of the thread that
is the guest's processor, as the host accounts it: so it is whoever used it, in whatever context, and is not sampled.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from qemu.errors import HarnessError
from qemu.guest import Guest
from tests.bench import native
from tests.bench.contest import Pair, Series, Unavailable
from tests.bench.guest import CLIENT, CORE, FLAGS, LENGTH, LIBRARY, MAC, TALLY, guest_on_wire
from tests.bench.guest_testpmd import GuestTestpmd
from tests.bench.wire import LoadWire
from tests.e2e import testbed

SUMMARY = "the whole driver in a guest: memory, processor idle and under load, start to first frame"
SECONDS, SETTLE_SECONDS = 1.5, 0.5
FIRST_FRAME_SECONDS = 120.0
PARTS = (0.1, 0.5)
"""Of what Net-Bridge carried when it was asked at the beginning."""
MEMORY_MB = 16
OURS, DPDK, KERNEL, LIMIT = "Net-Bridge", "DPDK testpmd", "AF_PACKET in C", "the manifest's limit"
FASTER_START, LEAST_IDLE = 1.0, 1e-4


def contests(quick: bool) -> Iterator[Series]:
    del quick
    with guest_on_wire() as (directory, wire, guest):
        ours = _Netbridge(guest, directory)
        drivers: dict[str, _Driver] = {OURS: ours, DPDK: _Dpdk(guest), KERNEL: _Packet(guest)}
        try:
            with ours.serving():
                carries = wire.window(LENGTH, MAC, SECONDS)
        except HarnessError as error:
            raise RuntimeError(str(error)) from error
        series = Series(
            bench="whole",
            visits={name: _visit(driver, guest, wire, carries) for name, driver in drivers.items()}
            | {LIMIT: lambda: {"peak": float(MEMORY_MB)}},
            pairs=_pairs(),
            commands=(f"# {guest.accel}", *(driver.command for driver in drivers.values())),
        )
        yield series
    if series.absent:
        raise Unavailable("; ".join(f"{name}: {why}" for name, why in series.absent.items()))


def _pairs() -> list[Pair]:
    """Goals: no more memory than its manifest says, nor than DPDK's process; a start no longer than DPDK's, and no more
    of the processor than DPDK takes, which polls."""
    pairs = [
        Pair("driver's cgroup at most, while it serves", "MiB", "peak", OURS, LIMIT, "lower", 1.0),
        Pair("memory of the driver's process", "MiB", "memory", OURS, DPDK, "lower", 1.0),
    ]
    for peer in (DPDK, KERNEL):
        start_goal = FASTER_START if peer == DPDK else None
        pairs.append(Pair("start to first frame", "s", "start", OURS, peer, "lower", start_goal))
        pairs.append(Pair("processor when idle", "of one", "idle", OURS, peer, "lower", 1.0 if peer == DPDK else None))
        for name in (*map(_at, PARTS), _at(1.0)):
            goal = 1.0 if peer == DPDK and name != _at(1.0) else None
            pairs.append(Pair(f"processor time {name}", "µs a frame", name, OURS, peer, "lower", goal))
    return pairs


def _at(part: float) -> str:
    return f"at {part:.0%} load"


def _visit(driver: _Driver, guest: Guest, wire: LoadWire, carries: float) -> Callable[[], dict[str, float]]:
    processor = _Processor(guest)

    def visit() -> dict[str, float]:
        try:
            return work()
        except HarnessError as error:
            raise RuntimeError(str(error)) from error

    def a_frame(load: Callable[[], float]) -> float:
        """Microseconds of processor time for each frame that came back."""
        used, began = processor.seconds(), time.monotonic()
        rate = load()
        share = (processor.seconds() - used) / (time.monotonic() - began)
        return 1e6 * share / rate

    def work() -> dict[str, float]:
        found = {}
        driver.stand_back()
        with wire.first(LENGTH, MAC, FIRST_FRAME_SECONDS) as came:
            began = time.monotonic()
            with driver.serving():
                found["start"] = came() - began
                driver.settle()
                for part in PARTS:
                    found[_at(part)] = a_frame(partial(wire.paced, LENGTH, MAC, SECONDS, part * carries))
                found[_at(1.0)] = a_frame(partial(wire.window, LENGTH, MAC, SECONDS))
                found |= driver.memory()
                time.sleep(SETTLE_SECONDS)
                used, began = processor.seconds(), time.monotonic()
                time.sleep(SECONDS)
                idle = (processor.seconds() - used) / (time.monotonic() - began)
                found["idle"] = max(idle, LEAST_IDLE)
        return found

    return visit


class _Processor:
    """The guest's only one."""

    def __init__(self, guest: Guest) -> None:
        (processor,) = guest.qmp("query-cpus-fast")
        self._account = Path(f"/proc/{processor['thread-id']}/schedstat")

    def seconds(self) -> float:
        """Of the host's processors, that it has run for so far."""
        return int(self._account.read_text().split()[0]) / 1e9


class _Driver(ABC):
    """`command` is what a reader would type in the guest."""

    command = ""

    def __init__(self, guest: Guest) -> None:
        self._guest, self._pci = guest, testbed.nics(guest)[0][0]

    def stand_back(self) -> None:
        """The function is another driver's."""
        self._guest.rebind(self._pci, "virtio-pci")

    @abstractmethod
    def serving(self) -> AbstractContextManager[None]:
        """Started, from the function's binding on; frames may come back from before the block begins."""

    def settle(self) -> None:
        """Whatever it does only once, after its start, it has done."""
        return

    def memory(self) -> dict[str, float]:
        """What it holds of memory, MiB: `memory`, its process; `peak`, its cgroup. What it has of these."""
        return {}

    def _resident(self, pid: int | None) -> float:
        """MiB of the process's memory, huge pages among it."""
        lines = self._guest.run(["cat", f"/proc/{pid}/smaps_rollup"]).stdout
        kinds = re.findall(r"^(?:Rss|Shared_Hugetlb|Private_Hugetlb): +(\d+) kB", lines, re.MULTILINE)
        return sum(map(int, kinds)) / 1024


class _Netbridge(_Driver):
    def __init__(self, guest: Guest, directory: Path) -> None:
        super().__init__(guest)
        self._directory = directory
        self.command = f"{' '.join(testbed.netbridge('run', 'vnode.yml'))} & /run/echo"
        flags = (*FLAGS, f"-I{CLIENT}", f"-I{CORE}")
        guest.put(native.build("echo", where=CLIENT / "examples", sources=LIBRARY, flags=flags), "/run/echo", 0o755)
        guest.put(testbed.manifest(self._pci, mem_mb=MEMORY_MB).encode(), testbed.MANIFEST)

    @contextmanager
    def serving(self) -> Iterator[None]:
        command = testbed.netbridge("run", testbed.MANIFEST, "--json")
        with self._guest.start(command, log=self._directory / "driver.log") as self._process:
            testbed.wait_for_line(self._process, r" up ")
            with self._guest.start(["/run/echo"], user=testbed.SERVICE_USER, log=self._directory / "echo.log") as echo:
                testbed.wait_for_line(self._process, r" serving ")
                yield
                testbed.end(echo)
            testbed.end(self._process)

    def settle(self) -> None:
        testbed.wait_for_line(self._process, r" standby ")

    def memory(self) -> dict[str, float]:
        peak = int(testbed.in_cgroup(self._guest, self._pci, "memory.peak"))
        return {"memory": self._resident(testbed.driver_pid(self._process)), "peak": peak / (1 << 20)}


class _Dpdk(_Driver):
    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.command = " ".join(GuestTestpmd.words(self._pci, *self._OPTIONS))

    _OPTIONS = ("--forward-mode=macswap", "--auto-start")

    @contextmanager
    def serving(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "vfio-pci")
        with GuestTestpmd(self._guest, self._pci, *self._OPTIONS) as self._testpmd:
            yield
            self._testpmd.quit()

    def memory(self) -> dict[str, float]:
        return {"memory": self._resident(self._testpmd.pid)}


class _Packet(_Driver):
    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self.command = f"/run/frames_packet echo {LENGTH} {TALLY} INTERFACE"

    def stand_back(self) -> None:
        self._guest.rebind(self._pci, "vfio-pci")

    @contextmanager
    def serving(self) -> Iterator[None]:
        self._guest.rebind(self._pci, "virtio-pci")
        interface = self._guest.eval(
            f"import glob, os; os.path.basename(glob.glob('/sys/bus/pci/devices/{self._pci}/virtio*/net/*')[0])"
        )
        # So that nothing but the bench's own frames comes from it.
        up = f"ip link set {interface} addrgenmode none && ip link set {interface} up"
        self._guest.run(["sh", "-c", up])
        with self._guest.start(["/run/frames_packet", "echo", str(LENGTH), TALLY, interface]) as process:
            yield
            if not process.running:
                raise RuntimeError(f"{self.command} ended: {process.stderr}")
