"""The classic way in: a container (/dev/vfio/vfio), IOMMU groups put into it, and devices got from the groups.

Also iommufd's compatibility mode, in which /dev/iommu plays the container. Source: <linux/vfio.h> and
Documentation/driver-api/vfio.rst of the kernel.
"""

from __future__ import annotations

import errno
import mmap
import os

from vfio import _abi, _diagnose, _sys
from vfio._abi import ffi
from vfio._backend import Backend, IommuInfo
from vfio.errors import DeviceBusy, DeviceGone, NotPermitted, Unsupported, VfioError
from vfio.iova import IovaRange
from vfio.pci import PciFunction

# interface: (the IOMMU models to try in order, the node that plays the container)
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "group": (("type1v2", "type1"), "vfio/vfio"),
    "type1": (("type1",), "vfio/vfio"),
    "type1v2": (("type1v2",), "vfio/vfio"),
    "iommufd-compat-type1": (("type1",), "iommu"),
    "iommufd-compat-type1v2": (("type1v2",), "iommu"),
    "noiommu": (("noiommu",), "vfio/vfio"),
}
_MODELS = {
    "type1": _abi.VFIO_TYPE1_IOMMU,
    "type1v2": _abi.VFIO_TYPE1v2_IOMMU,
    "noiommu": _abi.VFIO_NOIOMMU_IOMMU,
}


class _Group:
    def __init__(self, fd: int, number: int) -> None:
        self.fd = fd
        self.number = number
        self.devices = 0


class Type1(Backend):
    """A container with its groups. Owns their files."""

    def __init__(self, fd: int, interface: str, model: str, ready: bool) -> None:
        self.fd = fd
        self.interface = interface
        self._model = model
        self._ready = ready  # whether the IOMMU is set: that needs a group first
        self._groups: list[_Group] = []

    @classmethod
    def open(cls, interface: str, dev_root: str, sysfs_root: str) -> Type1:
        """Open a container for `interface`, one of `KINDS`."""
        models, node = KINDS[interface]
        if node == "iommu":
            fd = _diagnose.open_iommufd(dev_root, sysfs_root)
        else:
            fd = _diagnose.open_node(f"{dev_root}/{node}", None, sysfs_root)
        try:
            version = _sys.ioctl(fd, _abi.VFIO_GET_API_VERSION)
            if version != _abi.VFIO_API_VERSION:
                raise Unsupported(f"this kernel's VFIO has API version {version}, known is {_abi.VFIO_API_VERSION}")
            for model in models:
                if _sys.ioctl(fd, _abi.VFIO_CHECK_EXTENSION, _MODELS[model]):
                    name = model if interface == "group" else interface
                    return cls(fd, name, model, ready=False)
        except OSError as error:
            os.close(fd)
            raise Unsupported(f"{dev_root}/{node} cannot serve as a VFIO container", errno=error.errno) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        fix = "load the module (modprobe vfio_iommu_type1)"
        if interface == "noiommu":
            fix = "it needs a kernel with CONFIG_VFIO_NOIOMMU and vfio.enable_unsafe_noiommu_mode=1"
        raise Unsupported(f"this kernel offers no VFIO IOMMU of kind {' or '.join(models)}", fix=fix)

    @classmethod
    def adopt(cls, fd: int, interface: str) -> Type1:
        """A container that another process opened, with its groups in it and its IOMMU set. Takes ownership."""
        return cls(fd, interface, KINDS[interface][0][0], ready=True)

    def attach(self, function: PciFunction, dev_root: str) -> tuple[int, int]:
        group = self._enter_group(function, dev_root)
        try:
            if not self._ready:
                self._set_iommu(function)
            name = bytearray(str(function.address).encode() + b"\0")
            try:
                device = _sys.ioctl(group.fd, _abi.VFIO_GROUP_GET_DEVICE_FD, name)
            except OSError as error:
                raise _device_refused(function, error) from None
        except BaseException:
            self._leave_if_empty(group)
            raise
        group.devices += 1
        return device, group.fd

    def empties(self, group_fd: int) -> bool:
        return [(group.fd, group.devices) for group in self._groups] == [(group_fd, 1)]

    def detach(self, group_fd: int) -> None:
        for group in self._groups:
            if group.fd == group_fd:
                group.devices -= 1
                self._leave_if_empty(group)
                return

    def group_fds(self) -> dict[int, int]:
        return {group.number: group.fd for group in self._groups}

    def _enter_group(self, function: PciFunction, dev_root: str) -> _Group:
        number = function.iommu_group
        if number is None:
            raise _diagnose.no_iommu(function.address, function.sysfs_root)
        for group in self._groups:
            if group.number == number:
                return group
        noiommu = self._model == "noiommu"
        path = f"{dev_root}/vfio/{'noiommu-' if noiommu else ''}{number}"
        fd = _diagnose.open_node(path, function.address, function.sysfs_root)
        try:
            status = _sys.struct("vfio_group_status")
            _sys.call(fd, _abi.VFIO_GROUP_GET_STATUS, status)
            if not status.flags & _abi.VFIO_GROUP_FLAGS_VIABLE:
                raise _diagnose.not_viable(function)
            container = ffi.new("int32_t *", self.fd)
            _sys.ioctl(fd, _abi.VFIO_GROUP_SET_CONTAINER, ffi.buffer(container))
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EPERM:
                raise self._group_refused(function, error) from None
            raise VfioError(
                f"cannot put IOMMU group {number} into the container", device=function.address, errno=error.errno
            ) from None
        except BaseException:
            os.close(fd)
            raise
        group = _Group(fd, number)
        self._groups.append(group)
        return group

    def _group_refused(self, function: PciFunction, error: OSError) -> VfioError:
        if self._model != "noiommu":
            return _diagnose.iommu_refused(function, error, "vfio_iommu_type1")
        doing = "cannot open it without an IOMMU"
        return NotPermitted(doing, device=function.address, errno=error.errno, fix="that needs CAP_SYS_RAWIO")

    def _leave_if_empty(self, group: _Group) -> None:
        if group.devices == 0:
            self._groups.remove(group)
            os.close(group.fd)  # which takes it out of the container
            if not self._groups:
                self._ready = False  # the kernel drops the IOMMU, and all mappings, with the last group

    def _set_iommu(self, function: PciFunction) -> None:
        try:
            _sys.ioctl(self.fd, _abi.VFIO_SET_IOMMU, _MODELS[self._model])
        except OSError as error:
            raise _diagnose.iommu_refused(function, error, "vfio_iommu_type1") from None
        self._ready = True

    def info(self) -> IommuInfo:
        if self._model == "noiommu":
            return IommuInfo((), (mmap.PAGESIZE,), None)
        info, raw = _sys.query(self.fd, _abi.VFIO_IOMMU_GET_INFO, "vfio_iommu_type1_info")
        sizes: tuple[int, ...] = (mmap.PAGESIZE,)
        if info.flags & _abi.VFIO_IOMMU_INFO_PGSIZES and info.iova_pgsizes:
            sizes = tuple(1 << bit for bit in range(64) if info.iova_pgsizes >> bit & 1)
        ranges = [IovaRange(0, (1 << 64) - 1)]  # a kernel before 5.4 does not tell
        avail: int | None = None
        if info.flags & _abi.VFIO_IOMMU_INFO_CAPS:
            for kind, offset in _sys.capabilities(raw, info.cap_offset):
                if kind == _abi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                    name = "struct vfio_iommu_type1_info_cap_iova_range"
                    count = _sys.at(name, raw, offset).nr_iovas
                    found = _sys.array_at("struct vfio_iova_range", raw, offset + ffi.sizeof(name), count)
                    ranges = [IovaRange(r.start, r.end) for r in found]
                elif kind == _abi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                    avail = _sys.at("struct vfio_iommu_type1_info_dma_avail", raw, offset).avail
        return IommuInfo(tuple(ranges), sizes, avail)

    def map(self, address: int, iova: int, size: int, read: bool, write: bool) -> None:
        request = _sys.struct("vfio_iommu_type1_dma_map")
        request.flags = read * _abi.VFIO_DMA_MAP_FLAG_READ | write * _abi.VFIO_DMA_MAP_FLAG_WRITE
        request.vaddr, request.iova, request.size = address, iova, size
        _sys.call(self.fd, _abi.VFIO_IOMMU_MAP_DMA, request)

    def unmap(self, iova: int, size: int) -> int:
        request = _sys.struct("vfio_iommu_type1_dma_unmap")
        request.iova, request.size = iova, size
        _sys.call(self.fd, _abi.VFIO_IOMMU_UNMAP_DMA, request)
        return int(request.size)

    def unmap_all(self) -> int | None:
        if not _sys.ioctl(self.fd, _abi.VFIO_CHECK_EXTENSION, _abi.VFIO_UNMAP_ALL):
            return None
        request = _sys.struct("vfio_iommu_type1_dma_unmap")
        request.flags = _abi.VFIO_DMA_UNMAP_FLAG_ALL
        _sys.call(self.fd, _abi.VFIO_IOMMU_UNMAP_DMA, request)
        return int(request.size)

    def close(self) -> None:
        _sys.close_all([self.fd, *(group.fd for group in self._groups)])
        self._groups.clear()
        self.fd = -1


def _device_refused(function: PciFunction, error: OSError) -> VfioError:
    doing = "cannot get the device from its group"
    if error.errno == errno.EBUSY:
        return DeviceBusy(
            doing,
            device=function.address,
            errno=error.errno,
            cause="it is open already",
            fix="close the Device that has it, in whichever process",
        )
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return DeviceGone(
            doing, device=function.address, errno=error.errno, cause="it was unplugged or taken from vfio-pci"
        )
    if error.errno == errno.EPERM:
        return NotPermitted(doing, device=function.address, errno=error.errno)
    if error.errno == errno.EACCES:
        return NotPermitted(
            doing,
            device=function.address,
            errno=error.errno,
            cause="it is a virtual function, and its physical function, which is lent to user space too, wants a token",
            fix="leave the physical function with its kernel driver: VF tokens are not supported",
        )
    return VfioError(
        doing,
        device=function.address,
        errno=error.errno,
        cause="vfio-pci could not turn the device on",
        fix="the end of the kernel log (dmesg) says why",
    )
