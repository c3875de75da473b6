"""The newer way in: a character device for each function (/dev/vfio/devices/vfioN), bound to an address space of
/dev/iommu. Source: <linux/iommufd.h>, <linux/vfio.h> and Documentation/userspace-api/iommufd.rst of the kernel.
"""

from __future__ import annotations

import errno
import mmap
import os

from vfio import _abi, _diagnose, _sys
from vfio._abi import ffi
from vfio._backend import Backend, IommuInfo
from vfio.errors import DeviceBusy, Malformed, Unsupported, VfioError
from vfio.iova import IovaRange
from vfio.pci import PciFunction

_EVERYTHING = (1 << 64) - 1
_MOST_RANGES = 4096


def available(function: PciFunction, dev_root: str) -> bool:
    """Whether this kernel offers iommufd and a character device for the function, and this process may use both."""
    cdev = function.vfio_cdev
    return cdev is not None and _usable(f"{dev_root}/iommu") and _usable(f"{dev_root}/vfio/devices/{cdev}")


def offered(dev_root: str) -> bool:
    """Whether this process may use iommufd and the character device of some function."""
    directory = f"{dev_root}/vfio/devices"
    try:
        names = os.listdir(directory)
    except OSError:
        return False
    return _usable(f"{dev_root}/iommu") and any(_usable(f"{directory}/{name}") for name in names)


def _usable(node: str) -> bool:
    return os.access(node, os.R_OK | os.W_OK, effective_ids=True)


class Ioas(Backend):
    """One I/O address space in an open /dev/iommu. Owns the file."""

    interface = "iommufd"

    def __init__(self, fd: int, ioas_id: int) -> None:
        self.fd = fd
        self.ioas_id = ioas_id

    @classmethod
    def open(cls, dev_root: str, sysfs_root: str) -> Ioas:
        """Open /dev/iommu and make an address space in it."""
        fd = _diagnose.open_iommufd(dev_root, sysfs_root)
        try:
            request = _sys.struct("iommu_ioas_alloc")
            _sys.call(fd, _abi.IOMMU_IOAS_ALLOC, request)
        except OSError as error:
            os.close(fd)
            raise VfioError("cannot make an I/O address space", errno=error.errno) from None
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, request.out_ioas_id)

    @classmethod
    def adopt(cls, fd: int, ioas_id: int) -> Ioas:
        """An address space that another process made. Takes ownership of the file."""
        return cls(fd, ioas_id)

    def attach(self, function: PciFunction, dev_root: str) -> tuple[int, int]:
        name = function.vfio_cdev
        if name is None:
            raise Unsupported(
                "it has no VFIO character device",
                device=function.address,
                cause="the kernel was built without CONFIG_VFIO_DEVICE_CDEV",
                fix='use interface="group"',
            )
        path = f"{dev_root}/vfio/devices/{name}"
        device = _diagnose.open_node(path, function.address, function.sysfs_root)
        try:
            self._bind(device, function, path)
            attach = _sys.struct("vfio_device_attach_iommufd_pt")
            attach.pt_id = self.ioas_id
            try:
                _sys.call(device, _abi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach)
            except OSError as error:
                raise _diagnose.iommu_refused(function, error, "iommufd") from None
        except BaseException:
            os.close(device)
            raise
        return device, -1

    def _bind(self, device: int, function: PciFunction, path: str) -> None:
        request = _sys.struct("vfio_device_bind_iommufd")
        request.iommufd = self.fd
        try:
            _sys.call(device, _abi.VFIO_DEVICE_BIND_IOMMUFD, request)
        except OSError as error:
            raise self._bind_refused(function, error, device, path) from None

    @staticmethod
    def _bind_refused(function: PciFunction, error: OSError, device: int, path: str) -> VfioError:
        """The kernel says EPERM or EBUSY when the group belongs to somebody else, the kernel's drivers included, and
        EPERM as well when interrupts are not remapped; EINVAL when this character device is bound already."""
        doing = "cannot bind it to the iommufd"
        if error.errno in (errno.EPERM, errno.EBUSY) and _diagnose.kernel_owned(function):
            return _diagnose.not_viable(function, error.errno)
        if error.errno in (errno.EPERM, errno.EBUSY, errno.EINVAL):
            directory = os.path.dirname(path)
            nodes = [f"{os.path.dirname(directory)}/{function.iommu_group}"]
            for member in function.group_members:
                cdev = PciFunction(member, sysfs_root=function.sysfs_root).vfio_cdev
                nodes.append(f"{directory}/{cdev}")
            held = _diagnose.describe_holders(nodes, but_not_fd=device)
            if held is not None:
                fix = "stop that process first"
                return DeviceBusy(doing, device=function.address, errno=error.errno, cause=held, fix=fix)
        if error.errno == errno.EPERM:
            return _diagnose.iommu_refused(function, error, "iommufd")
        return VfioError(doing, device=function.address, errno=error.errno)

    def empties(self, group_fd: int) -> bool:  # noqa: ARG002
        return False  # the address space and its mappings stay until /dev/iommu is closed

    def detach(self, group_fd: int) -> None:
        pass  # closing the device's file did it

    def group_fds(self) -> dict[int, int]:
        return {}  # with a character device the kernel knows the owner without them

    def info(self) -> IommuInfo:
        count = 16
        for _ in range(8):
            room = ffi.new("struct iommu_iova_range[]", count)
            request = _sys.struct("iommu_ioas_iova_ranges")
            request.ioas_id = self.ioas_id
            request.num_iovas = count
            request.allowed_iovas = int(ffi.cast("uintptr_t", room))
            try:
                _sys.call(self.fd, _abi.IOMMU_IOAS_IOVA_RANGES, request)
            except OSError as error:
                if error.errno != errno.EMSGSIZE or not count < request.num_iovas <= _MOST_RANGES:
                    raise
                count = request.num_iovas
                continue
            ranges = tuple(IovaRange(r.start, r.last) for r in room[0 : request.num_iovas])
            # iommufd tells the smallest alignment only, and that may be less than a page.
            return IommuInfo(ranges, (max(int(request.out_iova_alignment), mmap.PAGESIZE),), None)
        raise Malformed("the kernel does not settle on a number of IOVA ranges")

    def map(self, address: int, iova: int, size: int, read: bool, write: bool) -> None:
        request = _sys.struct("iommu_ioas_map")
        request.flags = (
            _abi.IOMMU_IOAS_MAP_FIXED_IOVA | read * _abi.IOMMU_IOAS_MAP_READABLE | write * _abi.IOMMU_IOAS_MAP_WRITEABLE
        )
        request.ioas_id = self.ioas_id
        request.user_va, request.length, request.iova = address, size, iova
        _sys.call(self.fd, _abi.IOMMU_IOAS_MAP, request)

    def unmap(self, iova: int, size: int) -> int:
        request = _sys.struct("iommu_ioas_unmap")
        request.ioas_id = self.ioas_id
        request.iova, request.length = iova, size
        _sys.call(self.fd, _abi.IOMMU_IOAS_UNMAP, request)
        return int(request.length)

    def unmap_all(self) -> int | None:
        try:
            return self.unmap(0, _EVERYTHING)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return 0
            raise

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        os.close(fd)
