"""VFIO for Python: PCI devices in user space's hands, on Linux.

    import vfio

    address = vfio.PciAddress.parse("0000:00:1f.0")
    with vfio.bind(address), vfio.open_device(address) as device:
        device.set_bus_master(True)
        registers = device.bar(0)
        with vfio.Memory.memfd(1 << 20) as memory, device.iommu.map(memory) as dma:
            registers.write64(0x10, dma.iova)

The guide is docs/vfio.md. Everything below is the whole public interface; modules whose names begin with an underscore
are not. Every error is a `VfioError`; only waiting on a closed `EventFd` is a ValueError, as with any file of Python's.
"""

from vfio._backend import DeviceFds
from vfio._hot_reset import HotResetDependent
from vfio.binding import Binding, bind, leftovers, restore
from vfio.config import Capability, ConfigSpace, ExtendedCapability
from vfio.device import Device, open_device
from vfio.errors import (
    BadAddress,
    DeviceBusy,
    DeviceGone,
    DeviceNotFound,
    DriverMissing,
    GroupNotViable,
    IovaError,
    LockedMemoryLimit,
    Malformed,
    MappingLimit,
    NoIommu,
    NotBound,
    NotPermitted,
    Unsupported,
    VfioError,
)
from vfio.eventfd import EventFd
from vfio.iommu import INTERFACES, DmaMapping, Iommu
from vfio.iova import IovaAllocator, IovaRange
from vfio.irqs import ERROR, INTX, MSI, MSIX, REQUEST, IrqInfo, Irqs
from vfio.memory import HUGE_1G, HUGE_2M, Memory
from vfio.pci import PciAddress, PciFunction, functions
from vfio.region import Area, Bar, RegionInfo

__all__ = [
    "ERROR",
    "HUGE_1G",
    "HUGE_2M",
    "INTERFACES",
    "INTX",
    "MSI",
    "MSIX",
    "REQUEST",
    "Area",
    "BadAddress",
    "Bar",
    "Binding",
    "Capability",
    "ConfigSpace",
    "Device",
    "DeviceBusy",
    "DeviceFds",
    "DeviceGone",
    "DeviceNotFound",
    "DmaMapping",
    "DriverMissing",
    "EventFd",
    "ExtendedCapability",
    "GroupNotViable",
    "HotResetDependent",
    "Iommu",
    "IovaAllocator",
    "IovaError",
    "IovaRange",
    "IrqInfo",
    "Irqs",
    "LockedMemoryLimit",
    "Malformed",
    "MappingLimit",
    "Memory",
    "NoIommu",
    "NotBound",
    "NotPermitted",
    "PciAddress",
    "PciFunction",
    "RegionInfo",
    "Unsupported",
    "VfioError",
    "bind",
    "functions",
    "leftovers",
    "open_device",
    "restore",
]
