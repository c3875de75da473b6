"""What the VFIO tests share: the ways into VFIO that a kernel may offer, the test devices, and drivers for them.

The guest is best given QEMU's `edu` (docs/specs/edu.txt of QEMU: registers, DMA to and from a buffer of its own, INTx
and MSI) and `nvme`, both behind the IOMMU; QEMU_DEVICES has the arguments. Tests of devices that are not there are
skipped, and say which.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vfio
from vfio import _abi, _sys

QEMU_DEVICES = (
    # An NVMe drive of its own behind a root port, where it has MSI-X, a function level reset and an IOMMU group.
    "-device pcie-root-port,id=vfio-rp0,chassis=20,slot=20,addr=0x10",
    "-drive file=null-co://,if=none,id=vfio-nvme,format=raw",
    "-device nvme,serial=vfio-test,drive=vfio-nvme,bus=vfio-rp0",
    # edu on the root bus: alone in its group, without a reset method.
    "-device edu,addr=0x12",
    "-device pci-testdev,addr=0x13",
    # Two functions behind a bridge to conventional PCI: one group, and a bus that can be reset.
    "-device pcie-root-port,id=vfio-rp1,chassis=21,slot=21,addr=0x11",
    "-device pcie-pci-bridge,id=vfio-pci,bus=vfio-rp1",
    "-device edu,bus=vfio-pci,addr=1",
    "-device virtio-rng-pci,bus=vfio-pci,addr=2,disable-legacy=on,iommu_platform=on",
    # A function with PCI Express extended capabilities.
    "-device pcie-root-port,id=vfio-rp2,chassis=22,slot=22,addr=0x14",
    "-device virtio-rng-pci,bus=vfio-rp2,disable-legacy=on,iommu_platform=on,aer=on",
)

needs_devices = pytest.mark.guest_needs(
    devices=QEMU_DEVICES,
    # One page of 1 GiB, which can only be had at boot. Kernel and initramfs may lie in either half of the 2 GiB below
    # 4 GiB that the machine has, so the page is to be had above. What is not used costs the host nothing.
    words=("hugepagesz=1G", "hugepages=1"),
    memory_mb=3328,
)
"""The mark of tests that want these devices: the guest is given them when such a test is run."""

MODES = ("type1", "type1v2", "iommufd-compat-type1", "iommufd-compat-type1v2", "iommufd")
EDU = (0x1234, 0x11E8)
NVME = (0x1B36, 0x0010)
TESTDEV = (0x1B36, 0x0005)
RNG = (0x1AF4, 0x1044)
PAGE = 4096
KMSG = Path("/dev/kmsg")


def why_not(mode: str) -> str | None:
    """Why this kernel does not offer a way in, or None when it does."""
    node = Path("/dev/iommu" if mode.startswith("iommufd") else "/dev/vfio/vfio")
    if not node.exists():
        option = "CONFIG_IOMMUFD" if mode.startswith("iommufd") else "CONFIG_VFIO_CONTAINER"
        return f"this kernel has no {node} ({option} is off)"
    if mode == "iommufd":
        return None if (Path("/sys/class/vfio-dev")).exists() else "this kernel has no VFIO character devices"
    fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        number = _abi.VFIO_TYPE1v2_IOMMU if mode.endswith("v2") else _abi.VFIO_TYPE1_IOMMU
        if _sys.ioctl(fd, _abi.VFIO_CHECK_EXTENSION, number):
            return None
        return f"{node} does not offer {mode}"
    except OSError as error:
        return f"{node} is no VFIO container ({errno.errorcode[error.errno or 0]})"
    finally:
        os.close(fd)


def usable(mode: str) -> str:
    """The mode; the test is skipped where this kernel does not offer it."""
    reason = why_not(mode)
    if reason is not None:
        pytest.skip(reason)
    return mode


def find(ids: tuple[int, int], *, alone: bool = True) -> vfio.PciFunction | None:
    """The first function with these ids behind an IOMMU; `alone`: none but bridges share its group.

    Of NICs only the one that tests may take, where that is said: on a box, another may be what one is connected by.
    """
    nic = os.environ.get("HARNESS_NIC", "")
    for address in vfio.functions():
        function = vfio.PciFunction(address)
        if nic not in ("", str(address)) and function.class_code >> 16 == 0x02:
            continue
        if (function.vendor_id, function.device_id) != ids or function.iommu_group is None:
            continue
        others = [vfio.PciFunction(other) for other in function.group_members if other != address]
        if alone == all(other.is_bridge for other in others):
            return function
    return None


class Edu:
    """QEMU's educational device. DMA goes to and from a buffer of 4096 bytes in it, with addresses of 28 bits.

    QEMU ends itself when a transfer reaches the last byte of the buffer (it takes that for one too far), so CHUNK is
    what is moved at once.
    """

    BELOW = 1 << 28
    CHUNK = 2048
    BUFFER = 0x40000
    ID, LIVENESS, IRQ_STATUS, IRQ_RAISE, IRQ_ACK = 0x00, 0x04, 0x24, 0x60, 0x64
    SOURCE, TARGET, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
    RUN, TO_MEMORY, INTERRUPT = 1, 2, 4
    DMA_DONE = 0x100

    def __init__(self, device: vfio.Device) -> None:
        self.device = device
        self.registers = device.bar(0)
        assert self.registers.read32(self.ID) & 0xFFFF == 0x00ED
        self.registers.write32(self.LIVENESS, 0x12345678)
        assert self.registers.read32(self.LIVENESS) == 0xEDCBA987
        device.set_bus_master(True)

    def to_device(self, iova: int, size: int, *, interrupt: bool = False) -> None:
        """Start to read memory into the buffer."""
        self._start(iova, self.BUFFER, size, self.RUN, interrupt)

    def to_memory(self, iova: int, size: int, *, interrupt: bool = False) -> None:
        """Start to write the buffer to memory."""
        self._start(self.BUFFER, iova, size, self.RUN | self.TO_MEMORY, interrupt)

    def _start(self, source: int, target: int, size: int, command: int, interrupt: bool) -> None:
        self.registers.write64(self.SOURCE, source)
        self.registers.write64(self.TARGET, target)
        self.registers.write64(self.COUNT, size)
        self.registers.write64(self.COMMAND, command | (self.INTERRUPT if interrupt else 0))

    def finish(self, seconds: float = 20.0) -> None:
        """Wait until the transfer is over (a tenth of a second of the guest's time)."""
        deadline = time.monotonic() + seconds
        while self.registers.read64(self.COMMAND) & self.RUN:
            assert time.monotonic() < deadline, f"edu's DMA did not end within {seconds} s"
            time.sleep(0.005)

    def memcpy(self, target: int, source: int, size: int) -> None:
        """Copy memory to memory by way of the device."""
        self.to_device(source, size)
        self.finish()
        self.to_memory(target, size)
        self.finish()

    def raise_interrupt(self, bits: int = 1) -> None:
        self.registers.write32(self.IRQ_RAISE, bits)

    def acknowledge(self) -> int:
        """Quiet the device; what it had raised."""
        raised = self.registers.read32(self.IRQ_STATUS)
        self.registers.write32(self.IRQ_ACK, raised)
        return raised


class Nvme:
    """An NVMe controller with its admin queue, polled. Each Identify makes it write a page of 4096 bytes."""

    CAP, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x14, 0x1C, 0x24, 0x28, 0x30
    DOORBELLS = 0x1000
    ENTRIES = 64

    def __init__(self, device: vfio.Device, queues: vfio.DmaMapping, memory: vfio.Memory) -> None:
        self.registers = device.bar(0)
        self.memory = memory
        self.registers.write32(self.CC, 0)
        self._wait(0)
        self.registers.write32(self.AQA, (self.ENTRIES - 1) << 16 | (self.ENTRIES - 1))
        self.registers.write64(self.ASQ, queues.iova)
        self.registers.write64(self.ACQ, queues.iova + PAGE)
        device.set_bus_master(True)
        self.registers.write32(self.CC, 1 | 6 << 16 | 4 << 20)
        self._wait(1)
        self.tail = 0
        self.head = 0
        self.phase = 1

    def _wait(self, ready: int, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while self.registers.read32(self.CSTS) & 1 != ready:
            assert time.monotonic() < deadline, "the NVMe controller does not react"
            time.sleep(0.002)

    def identify(self, *iovas: int) -> list[int]:
        """Send an Identify for each address, all at once; the status codes of the answers, by address."""
        assert len(iovas) < self.ENTRIES
        for number, iova in enumerate(iovas):
            at = self.tail * 64
            self.memory.view[at : at + 64] = bytes(64)
            struct.pack_into("<IIQQQQI", self.memory.view, at, 6 | number << 16, 0, 0, 0, iova, 0, 1)
            self.tail = (self.tail + 1) % self.ENTRIES
        self.registers.write32(self.DOORBELLS, self.tail)
        statuses = dict.fromkeys(range(len(iovas)), -1)
        deadline = time.monotonic() + 20.0
        for _ in iovas:
            at = PAGE + self.head * 16
            while struct.unpack_from("<H", self.memory.view, at + 14)[0] & 1 != self.phase:
                assert time.monotonic() < deadline, "the NVMe controller does not answer"
                time.sleep(0.001)
            number, status = struct.unpack_from("<HH", self.memory.view, at + 12)
            statuses[number] = status >> 1
            self.head = (self.head + 1) % self.ENTRIES
            if self.head == 0:
                self.phase ^= 1
        self.registers.write32(self.DOORBELLS + 4, self.head)
        return list(statuses.values())


class KernelLog:
    """The kernel's messages from when this is made on."""

    def __init__(self) -> None:
        self._fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def find(self, word: str, seconds: float) -> str | None:
        """The next message with `word`, or None when there is none in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                line = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except BrokenPipeError:
                continue
            if word in line:
                return line.partition(";")[2].splitlines()[0]
        return None

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> KernelLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def huge_pages(size: int, count: int) -> Iterator[str | None]:
    """Reserve huge pages for a while; gives why not, or None when there are enough."""
    directory = Path(f"/sys/kernel/mm/hugepages/hugepages-{size // 1024}kB")
    if not directory.exists():
        yield f"this kernel has no huge pages of {size >> 20} MiB"
        return
    total, free = directory / "nr_hugepages", directory / "free_hugepages"
    before = int(total.read_text())
    missing = count - int(free.read_text())
    changed = False
    try:
        if missing > 0:
            try:
                total.write_text(str(before + missing))
                changed = True
            except OSError:
                pass  # this kernel reserves pages of that size at boot only
        got = int(free.read_text())
        yield None if got >= count else f"{count} huge pages of {size >> 20} MiB are needed, {got} are to be had"
    finally:
        if changed:
            total.write_text(str(before))
