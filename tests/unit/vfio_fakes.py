"""Stand-ins for the kernel under `vfio`: a sysfs tree, device nodes, and an ioctl that answers as VFIO and iommufd do.

Files and file descriptors are real (a node is a plain file, a device is a sparse one), so leaks can be counted and
mapping a BAR maps something. Only `vfio._sys.ioctl` and `vfio._sys.write_file` are replaced.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfio import _abi
from vfio._abi import ffi

CONFIG_OFFSET = 0x100000
BAR_OFFSET = 0x200000  # of BAR 0; the others follow at the same distance
BAR_STEP = 0x100000


class FakeSysfs:
    """PCI functions in a directory; `write` plays the driver core."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writes: list[str] = []
        self.before_write: Callable[[str], None] = lambda path: None
        self.ids: dict[str, str] = {}  # which driver matches a function by its ids
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "bus/pci/drivers").mkdir(parents=True)
        (root / "bus/pci/drivers_probe").write_text("")
        (root / "class/iommu/dmar0").mkdir(parents=True)

    def driver(self, name: str) -> Path:
        path = self.root / "bus/pci/drivers" / name
        path.mkdir(exist_ok=True)
        (path / "unbind").write_text("")
        return path

    def function(
        self,
        address: str,
        *,
        vendor: int = 0x1AF4,
        device: int = 0x1041,
        class_code: int = 0x020000,
        driver: str | None = None,
        group: int | None = None,
        cdev: str | None = None,
    ) -> Path:
        path = self.root / "bus/pci/devices" / address
        path.mkdir()
        for name, text in (
            ("vendor", f"{vendor:#06x}"),
            ("device", f"{device:#06x}"),
            ("class", f"{class_code:#08x}"),
            ("revision", "0x01"),
            ("subsystem_vendor", f"{vendor:#06x}"),
            ("subsystem_device", "0x1100"),
            ("numa_node", "-1"),
            ("driver_override", "(null)"),
        ):
            (path / name).write_text(f"{text}\n")
        if driver is not None:
            self.ids[address] = driver
            self._bind(path, driver)
        if group is not None:
            home = self.root / f"kernel/iommu_groups/{group}"
            (home / "devices").mkdir(parents=True, exist_ok=True)
            (home / "devices" / address).symlink_to(path)
            (home / "name").write_text("DMAR\n")
            (path / "iommu_group").symlink_to(home)
        if cdev is not None:
            (path / "vfio-dev" / cdev).mkdir(parents=True)
        return path

    def _bind(self, function: Path, driver: str) -> None:
        (function / "driver").symlink_to(self.driver(driver))

    def write(self, path: str, text: str) -> None:
        self.before_write(path)
        self.writes.append(f"{path.removeprefix(str(self.root))}={text.strip()}")
        target = Path(path)
        if not target.exists():
            raise FileNotFoundError(errno.ENOENT, "no such attribute", path)
        word = text.strip()
        if target.name == "driver_override":
            target.write_text(f"{word or '(null)'}\n")
        elif target.name == "unbind":
            (self.root / "bus/pci/devices" / word / "driver").unlink()
        elif target.name == "drivers_probe":
            self._probe(self.root / "bus/pci/devices" / word)
        else:
            raise AssertionError(f"nobody writes {path}")

    def _probe(self, function: Path) -> None:
        if (function / "driver").exists():
            return
        override = (function / "driver_override").read_text().strip()
        wanted = self.ids.get(function.name) if override == "(null)" else override
        if wanted is not None and (self.root / "bus/pci/drivers" / wanted).exists():
            self._bind(function, wanted)


class FakeKernel:
    """VFIO and iommufd behind one device, with BAR 0 (16 KiB) and BAR 4 (64 bytes of I/O ports, not mappable).

    `fail` maps a request number to the errno it fails with, or `fail_at` a call's number, counted from 1. `calls` is
    what was asked, in order.
    """

    def __init__(self, dev: Path, group: int = 7, cdev: str = "vfio0") -> None:
        self.dev = dev
        self.calls: list[int] = []
        self.fail: dict[int, int] = {}
        self.fail_at: tuple[int, int] | None = None
        self.viable = True
        self.extensions = {_abi.VFIO_TYPE1_IOMMU, _abi.VFIO_TYPE1v2_IOMMU, _abi.VFIO_UNMAP_ALL}
        self.api_version = 0
        self.ranges = [(0, 0xFEDFFFFF), (0xFEF00000, 0x7FFFFFFFFF)]
        self.avail = 65535
        self.mapped: dict[int, int] = {}
        self.irq_counts = {0: 1, 1: 0, 2: 4, 3: 1, 4: 1}
        self.irq_sets: list[tuple[int, int, int, int, bytes]] = []
        self.irqs_free = 0  # what SET_IRQS returns: with 0 there are enough
        self.features: list[tuple[int, bytes]] = []
        self.device_flags = _abi.VFIO_DEVICE_FLAGS_PCI | _abi.VFIO_DEVICE_FLAGS_RESET
        self.hot_reset: list[tuple[int, int, int, int]] = []
        self.hot_reset_flags = 0
        self.hot_reset_groups: list[int] = []  # the files that proved ownership
        (dev / "vfio/devices").mkdir(parents=True)
        for node in ("vfio/vfio", f"vfio/{group}", "iommu"):
            (dev / node).write_bytes(b"")
        self.device = dev / "device"
        (dev / "vfio/devices" / cdev).symlink_to(self.device)
        with self.device.open("wb") as file:
            file.truncate(BAR_OFFSET + 9 * BAR_STEP)
        self.poke(0x00, bytes.fromhex("f41a4110"))
        self.poke(0x3C, b"\x0b\x01")
        self.bars = {0: 0x4000, 4: 0x40}
        self.poke(0x20, b"\x01")  # BAR 4 is I/O

    def poke(self, offset: int, data: bytes) -> None:
        """Set bytes of configuration space."""
        with self.device.open("r+b") as file:
            file.seek(CONFIG_OFFSET + offset)
            file.write(data)

    def peek(self, offset: int, length: int) -> bytes:
        with self.device.open("rb") as file:
            file.seek(CONFIG_OFFSET + offset)
            return file.read(length)

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        self.calls.append(request)
        if self.fail_at is not None and self.fail_at[0] == len(self.calls):
            raise OSError(self.fail_at[1], os.strerror(self.fail_at[1]))
        if request in self.fail:
            raise OSError(self.fail[request], os.strerror(self.fail[request]))
        # Some numbers mean one thing to a device, another to a container. A closed descriptor fails here, as it should.
        to_device = Path(f"/proc/self/fd/{fd}").readlink() == self.device
        handler = (self._device_handlers if to_device else self._handlers).get(request)
        if handler is None:
            raise OSError(errno.ENOTTY, "fake")
        return handler(self, argument)

    def _status(self, argument: Any) -> int:
        status = _view("vfio_group_status", argument)
        status.flags = _abi.VFIO_GROUP_FLAGS_VIABLE if self.viable else 0
        return 0

    def _device_fd(self, argument: Any) -> int:
        assert isinstance(argument, bytearray)
        assert argument.endswith(b"\0")
        return os.open(self.device, os.O_RDWR | os.O_CLOEXEC)

    def _device_info(self, argument: Any) -> int:
        info = _view("vfio_device_info", argument)
        info.flags, info.num_regions, info.num_irqs = self.device_flags, 9, 5
        return 0

    def _region_info(self, argument: Any) -> int:
        info = _view("vfio_region_info", argument)
        if info.index == 7:
            info.size, info.offset, info.flags = 256, CONFIG_OFFSET, 3
        elif info.index == 8:
            raise OSError(errno.EINVAL, "fake")
        else:
            info.size = self.bars.get(info.index, 0)
            info.offset = BAR_OFFSET + info.index * BAR_STEP
            info.flags = (7 if info.index == 0 else 3) if info.size else 0
        return 0

    def _irq_info(self, argument: Any) -> int:
        info = _view("vfio_irq_info", argument)
        info.count = self.irq_counts[info.index]
        info.flags = 1
        return 0

    def _set_irqs(self, argument: Any) -> int:
        head = _view("vfio_irq_set", argument)
        data = bytes(argument)[ffi.sizeof("struct vfio_irq_set") :][: 4 * head.count]
        self.irq_sets.append((head.flags, head.index, head.start, head.count, data))
        return self.irqs_free

    def _feature(self, argument: Any) -> int:
        head = _view("vfio_device_feature", argument)
        self.features.append((head.flags, bytes(argument)[ffi.sizeof("struct vfio_device_feature") :]))
        return 0

    def _iommu_info(self, argument: Any) -> int:
        head = ffi.sizeof("struct vfio_iommu_type1_info")
        ranges_at = head
        ranges_size = ffi.sizeof("struct vfio_iommu_type1_info_cap_iova_range") + 16 * len(self.ranges)
        avail_at = ranges_at + ranges_size
        total = avail_at + ffi.sizeof("struct vfio_iommu_type1_info_dma_avail")
        info = _view("vfio_iommu_type1_info", argument)
        room = info.argsz
        info.argsz, info.flags, info.iova_pgsizes = total, 3, 0x40201000
        if room < total:
            return 0
        info.cap_offset = ranges_at
        cap = _view("vfio_iommu_type1_info_cap_iova_range", memoryview(argument)[ranges_at:])
        cap.header.id, cap.header.version, cap.header.next, cap.nr_iovas = 1, 1, avail_at, len(self.ranges)
        for i, (start, end) in enumerate(self.ranges):
            cap.iova_ranges[i].start, cap.iova_ranges[i].end = start, end
        avail = _view("vfio_iommu_type1_info_dma_avail", memoryview(argument)[avail_at:])
        avail.header.id, avail.header.version, avail.avail = 3, 1, self.avail
        return 0

    def _map(self, argument: Any) -> int:
        request = _view("vfio_iommu_type1_dma_map", argument)
        self.mapped[request.iova] = request.size
        return 0

    def _unmap(self, argument: Any) -> int:
        request = _view("vfio_iommu_type1_dma_unmap", argument)
        if request.flags & _abi.VFIO_DMA_UNMAP_FLAG_ALL:
            request.size = sum(self.mapped.values())
            self.mapped.clear()
        else:
            request.size = self._take(request.iova, request.size)
        return 0

    def _take(self, iova: int, size: int) -> int:
        inside = [at for at, length in self.mapped.items() if iova <= at and at + length <= iova + size]
        return sum(self.mapped.pop(at) for at in inside)

    def _ioas_alloc(self, argument: Any) -> int:
        _view("iommu_ioas_alloc", argument).out_ioas_id = 5
        return 0

    def _ioas_ranges(self, argument: Any) -> int:
        request = _view("iommu_ioas_iova_ranges", argument)
        room, request.num_iovas, request.out_iova_alignment = request.num_iovas, len(self.ranges), 4096
        if room < len(self.ranges):
            raise OSError(errno.EMSGSIZE, "fake")
        out = ffi.cast("struct iommu_iova_range *", request.allowed_iovas)
        for i, (start, end) in enumerate(self.ranges):
            out[i].start, out[i].last = start, end
        return 0

    def _ioas_map(self, argument: Any) -> int:
        request = _view("iommu_ioas_map", argument)
        assert request.ioas_id == 5
        self.mapped[request.iova] = request.length
        return 0

    def _ioas_unmap(self, argument: Any) -> int:
        request = _view("iommu_ioas_unmap", argument)
        if request.length == (1 << 64) - 1:
            request.length = sum(self.mapped.values())
            self.mapped.clear()
        else:
            request.length = self._take(request.iova, request.length)
        return 0

    def _hot_reset(self, argument: Any) -> int:
        request = _view("vfio_pci_hot_reset", argument)
        self.hot_reset_groups = list(request.group_fds[0 : request.count])
        if request.count > len(self.hot_reset):
            raise OSError(errno.EINVAL, "fake")
        return 0

    def _hot_reset_info(self, argument: Any) -> int:
        info = _view("vfio_pci_hot_reset_info", argument)
        room = (info.argsz - ffi.sizeof("struct vfio_pci_hot_reset_info")) // 8
        info.count, info.flags = len(self.hot_reset), self.hot_reset_flags
        if room < len(self.hot_reset):
            raise OSError(errno.ENOSPC, "fake")
        for i, entry in enumerate(self.hot_reset):
            found = info.devices[i]
            found.group_id, found.segment, found.bus, found.devfn = entry
        return 0

    _handlers: dict[int, Callable[[FakeKernel, Any], int]] = {  # noqa: RUF012
        _abi.VFIO_GET_API_VERSION: lambda self, _: self.api_version,
        _abi.VFIO_CHECK_EXTENSION: lambda self, which: int(which in self.extensions),
        _abi.VFIO_SET_IOMMU: lambda self, _: 0,
        _abi.VFIO_GROUP_GET_STATUS: _status,
        _abi.VFIO_GROUP_SET_CONTAINER: lambda self, _: 0,
        _abi.VFIO_GROUP_GET_DEVICE_FD: _device_fd,
        _abi.VFIO_IOMMU_GET_INFO: _iommu_info,
        _abi.VFIO_IOMMU_MAP_DMA: _map,
        _abi.VFIO_IOMMU_UNMAP_DMA: _unmap,
        _abi.IOMMU_IOAS_ALLOC: _ioas_alloc,
        _abi.IOMMU_IOAS_IOVA_RANGES: _ioas_ranges,
        _abi.IOMMU_IOAS_MAP: _ioas_map,
        _abi.IOMMU_IOAS_UNMAP: _ioas_unmap,
    }
    _device_handlers: dict[int, Callable[[FakeKernel, Any], int]] = {  # noqa: RUF012
        _abi.VFIO_DEVICE_GET_INFO: _device_info,
        _abi.VFIO_DEVICE_GET_REGION_INFO: _region_info,
        _abi.VFIO_DEVICE_GET_IRQ_INFO: _irq_info,
        _abi.VFIO_DEVICE_SET_IRQS: _set_irqs,
        _abi.VFIO_DEVICE_RESET: lambda self, _: 0,
        _abi.VFIO_DEVICE_FEATURE: _feature,
        _abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: _hot_reset_info,
        _abi.VFIO_DEVICE_PCI_HOT_RESET: _hot_reset,
        _abi.VFIO_DEVICE_BIND_IOMMUFD: lambda self, _: 0,
        _abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT: lambda self, _: 0,
    }


def _view(name: str, argument: Any) -> Any:
    return ffi.from_buffer(f"struct {name} *", argument, require_writable=True)
