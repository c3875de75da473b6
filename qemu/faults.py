"""What may go wrong around a guest, as verbs: `guest.faults.link_down()`, `with guest.faults.hog(): ...`.

Each does one thing and returns when it is done, not when the guest has noticed. What lasts is a context manager, or has
a verb that ends it.
"""

from __future__ import annotations

import contextlib
import signal as signals
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qemu.command import Nic, nic_device
from qemu.errors import HarnessError
from qemu.wire import Wire

if TYPE_CHECKING:
    from qemu.guest import Guest

UNPLUG_SECONDS = 30.0
REPLUG_SECONDS = 30.0
RESET_SECONDS = 180.0
HOLD_SECONDS = 60.0
DMA_SECONDS = 30.0

NAMED = """
def _named(name):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().decode(errors="replace").split("\\0")
                with open(f"/proc/{entry}/comm") as file:
                    comm = file.read().strip()
            except OSError:
                continue
            if comm == name or name in words or any(os.path.basename(word) == name for word in words[:1]):
                found.append(int(entry))
    return found
"""

HOG = "import os\nprint('busy', flush=True)\nwhile True: pass"
PRESS = """
import sys
pages = bytearray(int(sys.argv[1]) << 20)
for at in range(0, len(pages), 4096):
    pages[at] = 1
print("held", flush=True)
sys.stdin.read()
"""

# The edu device (docs/specs/edu.rst of QEMU): a buffer of 4 KiB at 0x40000, and a DMA engine with four registers. A
# tenth of a second of the guest's time after it was started it makes its access, and clears the bit that started it.
EDU = ("0x1234", "0x11e8")
EDU_MASK = (1 << 28) - 1
EDU_DMA = """
import mmap, os, struct, time
def _edu_dma(address, iova, seconds):
    device = "/sys/bus/pci/devices/" + address
    with open(device + "/enable", "w") as file:
        file.write("1")
    with open(device + "/config", "r+b", buffering=0) as file:
        command, = struct.unpack("<H", os.pread(file.fileno(), 2, 4))
        os.pwrite(file.fileno(), struct.pack("<H", command | 6), 4)
    deadline = time.monotonic() + seconds
    with open(device + "/resource0", "r+b", buffering=0) as file:
        registers = mmap.mmap(file.fileno(), 4096)
        words, identity = memoryview(registers).cast("Q"), memoryview(registers).cast("I")
        try:
            if identity[0] & 0xff != 0xed:
                return f"its identification register reads {identity[0]:#x}"
            words[0x80 // 8], words[0x88 // 8], words[0x90 // 8] = 0x40000, iova, 64
            words[0x98 // 8] = 3  # start, from the device to memory
            while words[0x98 // 8] & 1:
                if time.monotonic() > deadline:
                    return f"it has not done its DMA within {seconds} s"
                time.sleep(0.01)
        finally:
            words.release()
            identity.release()
            registers.close()
"""


class Faults:
    """The faults of one guest. A NIC is named by its id."""

    def __init__(self, guest: Guest):
        self._guest = guest

    # The NIC

    def _plan(self, nic: str) -> tuple[int, Nic]:
        nics = self._guest.machine.nics
        for index, plan in enumerate(nics):
            if plan.id == nic:
                return index, plan
        raise ValueError(f"this guest has no NIC {nic!r}; it has: {', '.join(plan.id for plan in nics) or 'none'}")

    def link_down(self, nic: str = "nic0") -> None:
        """The device says that its link is down; frames for it are dropped by QEMU."""
        self._guest.qmp("set_link", name=nic, up=False)

    def link_up(self, nic: str = "nic0") -> None:
        self._guest.qmp("set_link", name=nic, up=True)

    def unplug(self, nic: str = "nic0", timeout: float = UNPLUG_SECONDS) -> None:
        """Ask the guest to part with the NIC and wait until it has. Raises HarnessError when it does not in time.

        Only a NIC behind a root port can be unplugged.
        """
        mark = self._guest.event_mark()
        self._guest.qmp("device_del", id=nic)
        self._guest.wait_event("DEVICE_DELETED", lambda data: data.get("device") == nic, timeout, since=mark)

    def replug(self, nic: str = "nic0", timeout: float = REPLUG_SECONDS) -> None:
        """Put the NIC back where it was, and wait until the guest sees a function at its port."""
        index, plan = self._plan(nic)
        device = nic_device(plan, index, self._guest.machine)[-1]
        before = len(self._guest.functions("0x02"))
        said = self._guest.qmp("human-monitor-command", command_line=f"device_add {device}")
        if said:
            raise HarnessError(f"QEMU did not plug {nic} in again: {said.strip()}")
        script = f"until [ $(grep -l ^0x02 /sys/bus/pci/devices/*/class | wc -l) -gt {before} ]; do sleep 0.05; done"
        self._guest.run(["sh", "-c", script], timeout=timeout)

    def close_wire(self, nic: str = "nic0") -> None:
        """The host's end of the NIC's wire is closed, for good."""
        wire = self._plan(nic)[1].wire
        if not isinstance(wire, Wire):
            raise HarnessError(f"{nic} has no wire: its other end, in the host's kernel, is QEMU's to close")
        wire.close()

    def iommu_fault(self, iova: int = 0x0234_5000) -> None:
        """A device writes to an address that nobody has mapped. The guest needs `-device edu` for that.

        Returns when the access was made; that the IOMMU has refused it, the kernel's log says a moment later, for
        instance in `guest.wait_for_iommu_faults()`. Raises HarnessError when the guest has no such device, ValueError
        for an address that it cannot form.
        """
        if iova & ~EDU_MASK:
            raise ValueError(f"the edu device has 28 bits of address: {iova:#x} is beyond them")
        found = self._guest.eval(
            "import glob, os\n[os.path.basename(path) for path in glob.glob('/sys/bus/pci/devices/*') if "
            f"(open(path + '/vendor').read().strip(), open(path + '/device').read().strip()) == {EDU!r}]"
        )
        if not found:
            raise HarnessError("this guest has no device to do DMA with: boot it with extra_args=['-device', 'edu']")
        self._guest.eval(EDU_DMA)
        trouble = self._guest.eval(f"_edu_dma({found[0]!r}, {iova}, {DMA_SECONDS})", DMA_SECONDS + 10)
        if trouble:
            raise HarnessError(f"the edu device at {found[0]}: {trouble}")

    # The machine

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The machine stands still within the block; frames sent to it wait."""
        self._guest.qmp("stop")
        try:
            yield
        finally:
            self._guest.qmp("cont")

    def reset(self, timeout: float = RESET_SECONDS) -> None:
        """The reset button: everything in the guest is lost. Returns when it has booted again."""
        self._guest.qmp("set-action", reboot="reset")
        self._guest.reboot(lambda: self._guest.qmp("system_reset"), timeout)

    def nmi(self) -> None:
        """A non-maskable interrupt for every processor; Linux tells of it in its log and goes on."""
        self._guest.qmp("inject-nmi")

    # What runs in it

    def kill(self, target: int | str, signal: int = signals.SIGKILL) -> list[int]:
        """Signal a process by its id, or all of this name; returns whom. Raises HarnessError when there is none."""
        if isinstance(target, int):
            pids = [target]
        else:
            self._guest.eval(NAMED)
            pids = self._guest.eval(f"_named({target!r})")
        if not pids:
            raise HarnessError(f"no process in the guest has the name {target!r}")
        self._guest.eval(f"import os\nfor pid in {pids!r}: os.kill(pid, {int(signal)})")
        return pids

    @contextlib.contextmanager
    def hog(self, count: int = 1) -> Iterator[None]:
        """So many processes that do nothing but use the processor."""
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                process = stack.enter_context(self._guest.start(["python3", "-I", "-S", "-c", HOG]))
                process.wait_for_line("busy", HOLD_SECONDS)
            yield

    @contextlib.contextmanager
    def memory_pressure(self, leave_mb: int = 48) -> Iterator[int]:
        """Memory is taken until only so much is available; yields how many MiB were taken."""
        words = self._guest.get("/proc/meminfo").decode().split()
        available = int(words[words.index("MemAvailable:") + 1]) >> 10
        taken = max(0, available - leave_mb)
        argv = ["python3", "-I", "-S", "-c", PRESS, str(taken)]
        with self._guest.start(argv, stdin=True) as process:
            process.wait_for_line("held", HOLD_SECONDS)
            yield taken

    def clock_jump(self, seconds: float) -> None:
        """The wall clock jumps; CLOCK_MONOTONIC, as ever, does not."""
        self._guest.eval(f"import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time() + {seconds!r})")
