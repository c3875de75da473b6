"""An open VFIO device: its regions, interrupts, resets, power, and the I/O address space it is in."""

from __future__ import annotations

import errno
import os
import sys

from vfio import _abi, _diagnose, _sys
from vfio._backend import DeviceFds
from vfio._hot_reset import HotResetDependent, dependents_of, hot_reset
from vfio.config import ConfigSpace
from vfio.errors import NotBound, Unsupported, VfioError
from vfio.iommu import INTERFACES, Iommu, is_of, open_for
from vfio.irqs import Irqs, file_number
from vfio.pci import PciAddress, PciFunction
from vfio.region import Area, Bar, RegionInfo, query_region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vfio.irqs import HasFileno

_CONFIG = _abi.VFIO_PCI_CONFIG_REGION_INDEX


class Device:
    """A PCI function in user space's hands. Made by `open_device` or `Device.from_fds`; `close()` it, or use it as a
    context manager. Not for use from several threads at once.

    - `address`: its `PciAddress`
    - `interface`: the way it was opened: "type1v2", "iommufd", …
    - `fd`: its file descriptor, owned by this object
    - `iommu`: the `Iommu` it is in
    - `config`: its `ConfigSpace`
    - `irqs`: its `Irqs`
    - `num_regions`, `num_irqs`: how many region and interrupt indices the kernel knows
    - `can_reset`: whether `reset` has a way to reset it

    Errors of every method: `DeviceGone` when it was unplugged, `VfioError` otherwise. A forked child shares the device:
    closing it there closes the child's files, and neither stops the parent's DMA nor unmaps its memory.
    """

    def __init__(
        self, address: PciAddress, fd: int, iommu: Iommu, group_fd: int, *, owns_iommu: bool, adopted: bool = False
    ) -> None:
        # Takes ownership of fd (and of iommu, if so told) only when it succeeds: until then it has no fd to close.
        self.fd = -1
        self._pid = os.getpid()
        self.address = address
        self.iommu = iommu
        self.interface = iommu.interface
        self._group_fd = group_fd
        self._owns_iommu = owns_iommu
        self._adopted = adopted  # another process opened it: nobody else here closes the group's file
        self._bars: dict[int, Bar] = {}
        self._msix_table: tuple[int, Area] | bool | None = False  # False: not looked up yet
        try:
            info, _ = _sys.query(fd, _abi.VFIO_DEVICE_GET_INFO, "vfio_device_info")
            if not info.flags & _abi.VFIO_DEVICE_FLAGS_PCI:
                raise Unsupported("it is a VFIO device, but not a PCI one", device=address)
            self.num_regions = int(info.num_regions)
            self.num_irqs = int(info.num_irqs)
            self.can_reset = bool(info.flags & _abi.VFIO_DEVICE_FLAGS_RESET)
            region = query_region(fd, _CONFIG)
        except OSError as error:
            raise self._failed("cannot ask about it", error) from None
        self.config = ConfigSpace(fd, region.offset, region.size, address)
        self.irqs = Irqs(fd, address)
        self.fd = fd

    @classmethod
    def from_fds(cls, address: PciAddress | str, fds: DeviceFds) -> Device:
        """A device that another process opened and sent the files of (`Device.fds`, over SCM_RIGHTS). Takes ownership
        of them all, even when it fails. Touches neither sysfs nor /dev, so it works in a sandbox."""
        iommu: Iommu | None = None
        try:
            parsed = PciAddress.parse(address)
            iommu = Iommu.from_fds(fds)
            return cls(parsed, fds.device, iommu, fds.group, owns_iommu=True, adopted=True)
        except BaseException:
            _sys.close_all([fd for fd in (fds.group, fds.device) if fd >= 0])
            if iommu is not None:
                iommu.close()
            elif fds.iommu >= 0:
                os.close(fds.iommu)
            raise

    @property
    def fds(self) -> DeviceFds:
        """The files behind it, for sending them to another process. They stay this object's; the receiver's are
        copies, and the device stays open until both are closed."""
        self._open()
        self.iommu._check_open()
        backend = self.iommu._backend
        return DeviceFds(self.interface, self.fd, backend.fd, self._group_fd, backend.ioas_id)

    # Regions

    def region_info(self, index: int) -> RegionInfo:
        """What the kernel says of a region: 0-5 the BARs, 6 the ROM, 7 configuration space, 8 VGA, 9 and up others."""
        self._open()
        if not 0 <= index < self.num_regions:
            raise VfioError(f"there is no region {index}, only 0 to {self.num_regions - 1}", device=self.address)
        try:
            return query_region(self.fd, index)
        except OSError as error:
            if error.errno == errno.EINVAL:  # VGA on a device that is none
                return RegionInfo(index, 0, 0, False, False, False)
            raise self._failed(f"cannot ask about region {index}", error) from None

    @property
    def regions(self) -> tuple[RegionInfo, ...]:
        """All regions, those of size 0 too, so that `regions[i].index == i`."""
        return tuple(self.region_info(index) for index in range(self.num_regions))

    def bar(self, index: int) -> Bar:
        """The registers behind BAR `index` (0 to 5, or another region), mapped; memory or I/O decoding is turned on
        for it. The same object again while it is open. Raises `Unsupported` for one that is not implemented."""
        self._open()
        found = self._bars.get(index)
        if found is not None and not found.closed:
            return found
        info = self.region_info(index)
        if not info.size:
            raise Unsupported(
                f"BAR {index} is not implemented" if index < 6 else f"region {index} is not there",
                device=self.address,
                cause="it has " + (", ".join(str(r.index) for r in self.regions[:6] if r.size) or "none"),
            )
        if index < 6:
            is_io = self.config.read32(_abi.PCI_BASE_ADDRESS_0 + 4 * index) & 1
            self.config.update16(_abi.PCI_COMMAND, 0, _abi.PCI_COMMAND_IO if is_io else _abi.PCI_COMMAND_MEMORY)
        table = self.msix_table
        bar = Bar(self.fd, info, table[1] if table and table[0] == index else None, self.address)
        self._bars[index] = bar
        return bar

    @property
    def msix_table(self) -> tuple[int, Area] | None:
        """Where the MSI-X table is: the BAR's index, and the part of it; None on a device without MSI-X."""
        if isinstance(self._msix_table, bool):
            self._msix_table = self._find_msix_table()
        return self._msix_table

    def _find_msix_table(self) -> tuple[int, Area] | None:
        found = self.config.find(_abi.PCI_CAP_ID_MSIX)
        if found is None:
            return None
        where = self.config.read32(found.offset + _abi.PCI_MSIX_TABLE)
        vectors = (self.config.read16(found.offset + _abi.PCI_MSIX_FLAGS) & _abi.PCI_MSIX_FLAGS_QSIZE) + 1
        area = Area(where & _abi.PCI_MSIX_TABLE_OFFSET, vectors * _abi.PCI_MSIX_ENTRY_SIZE)
        return where & _abi.PCI_MSIX_TABLE_BIR, area

    # Configuration

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA and send MSI and MSI-X messages."""
        return bool(self.config.read16(_abi.PCI_COMMAND) & _abi.PCI_COMMAND_MASTER)

    def set_bus_master(self, on: bool) -> None:
        """Let the device do DMA and send MSI and MSI-X messages, or forbid it."""
        self._set_command(_abi.PCI_COMMAND_MASTER, on)

    def set_memory_decoding(self, on: bool) -> None:
        """Let the device answer at its memory BARs, or not. While it does not, mapped registers must not be touched."""
        self._set_command(_abi.PCI_COMMAND_MEMORY, on)

    def set_intx_disable(self, disable: bool) -> None:
        """Set or clear the INTx-disable bit of the command register. It must be clear for INTx to arrive."""
        self._set_command(_abi.PCI_COMMAND_INTX_DISABLE, disable)

    def _set_command(self, bit: int, on: bool) -> None:
        self.config.update16(_abi.PCI_COMMAND, 0 if on else bit, bit if on else 0)

    @property
    def power_state(self) -> int:
        """The D-state that the PCI power management capability shows, 0 (on) to 3 (D3hot); 0 without one."""
        found = self.config.find(_abi.PCI_CAP_ID_PM)
        if found is None:
            return 0
        return self.config.read16(found.offset + _abi.PCI_PM_CTRL) & _abi.PCI_PM_CTRL_STATE_MASK

    def set_power_state(self, state: int) -> None:
        """Put the device into D-state 0 (on) to 3 (D3hot). Leaving D3hot may lose its state, and mapped registers must
        not be touched below 0. Raises `Unsupported` when it does not go there."""
        if not 0 <= state <= 3:
            raise VfioError(f"there is no power state D{state}", device=self.address)
        found = self.config.find(_abi.PCI_CAP_ID_PM)
        if found is None:
            if state == 0:
                return
            raise Unsupported("it has no power management capability", device=self.address)
        self.config.update16(found.offset + _abi.PCI_PM_CTRL, _abi.PCI_PM_CTRL_STATE_MASK, state)
        now = self.power_state
        if now != state:
            raise Unsupported(f"it did not go to power state D{state} but is in D{now}", device=self.address)

    def feature_supported(self, feature: int) -> bool:
        """Whether the kernel has a VFIO_DEVICE_FEATURE for this device, by its number in <linux/vfio.h>."""
        if not 0 <= feature <= 0xFFFF:
            return False
        request = _sys.struct("vfio_device_feature")
        request.flags = feature | _abi.VFIO_DEVICE_FEATURE_PROBE
        try:
            _sys.call(self._open(), _abi.VFIO_DEVICE_FEATURE, request)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise self._failed(f"cannot ask about feature {feature}", error) from None
        return True

    def enter_low_power(self, wakeup: int | HasFileno | None = None) -> None:
        """Allow the kernel to power the device down as far as the platform can (runtime power management; kernel 6.1).
        Mapped registers must not be touched until `exit_low_power`. `wakeup`: an eventfd to signal when the device was
        woken, by itself or by somebody's access, and stays on; it is the caller's. Raises `Unsupported`."""
        if wakeup is None:
            self._feature_set(_abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, "cannot enter low power")
            return
        entry: Any = _abi.ffi.new("struct vfio_device_low_power_entry_with_wakeup *")
        entry.wakeup_eventfd = file_number(wakeup)
        data = bytes(_abi.ffi.buffer(entry))
        self._feature_set(_abi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, "cannot enter low power", data)

    def exit_low_power(self) -> None:
        """Forbid it again, and wake the device."""
        self._feature_set(_abi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, "cannot leave low power")

    def _feature_set(self, feature: int, doing: str, data: bytes = b"") -> None:
        request = _sys.struct("vfio_device_feature", data=len(data))
        request.flags = feature | _abi.VFIO_DEVICE_FEATURE_SET
        _abi.ffi.memmove(request.data, data, len(data))
        try:
            _sys.call(self._open(), _abi.VFIO_DEVICE_FEATURE, request)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                raise Unsupported(doing, device=self.address, errno=error.errno) from None
            raise self._failed(doing, error) from None

    # Reset

    def reset(self) -> None:
        """Reset the function (VFIO_DEVICE_RESET). Its registers are as after power-on; the kernel puts configuration
        space back as it was, bus mastering included. BARs stay mapped, and interrupts enabled. Raises `Unsupported`
        when it has no reset method."""
        fd = self._open()
        if not self.can_reset:
            raise Unsupported(
                "the kernel knows no way to reset it",
                device=self.address,
                fix="use the device's own reset register, or hot_reset",
            )
        try:
            _sys.ioctl(fd, _abi.VFIO_DEVICE_RESET)
        except OSError as error:
            raise self._failed("cannot reset it", error) from None

    def hot_reset_dependents(self) -> tuple[HotResetDependent, ...]:
        """The functions that `hot_reset` resets, this one among them. Raises `Unsupported` where the kernel can reset
        neither its slot nor its bus."""
        return dependents_of(self._open(), self.address)

    def hot_reset(self) -> None:
        """Reset the slot or bus the device is in (VFIO_DEVICE_PCI_HOT_RESET), with all the functions that
        `hot_reset_dependents` lists: they must all be bound to vfio-pci, and their groups open in the same `Iommu`.
        Raises `NotPermitted`, which names those that are not."""
        dependents = self.hot_reset_dependents()
        groups = self.iommu._backend.group_fds()
        if self._adopted:
            # Its number is with the others; there is none with iommufd, which needs no file.
            own = next((d.group for d in dependents if d.address == self.address), None)
            if own is not None and self._group_fd < 0:
                raise Unsupported(
                    "cannot reset its slot or bus",
                    device=self.address,
                    cause="it was handed over without its group's file",
                    fix="send DeviceFds.group along with the others",
                )
            groups = {} if own is None else {own: self._group_fd}
        hot_reset(self._open(), self.address, dependents, groups)

    # The end

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self.fd < 0

    def close(self) -> None:
        """Stop its DMA, unmap its BARs, close its files, and its address space unless that is shared. Interrupts are
        disabled by the kernel. Doing it twice is harmless."""
        if self.fd < 0:
            return
        try:
            # Before anything is unmapped: a device that is still busy must not run into IOMMU faults.
            if self._pid == os.getpid():
                self.set_bus_master(False)
        except VfioError:
            pass  # it is gone; there is nothing to stop
        finally:
            fd, self.fd = self.fd, -1
            for bar in self._bars.values():
                bar.close()
            self._bars.clear()
            self.config._fd = self.irqs._fd = -1
            os.close(fd)
            if self._adopted and self._group_fd >= 0:
                os.close(self._group_fd)
            if self._owns_iommu:
                self.iommu.close()
            elif not self._adopted:
                self.iommu._detach(self._group_fd)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Device {self.address} {'closed' if self.closed else self.interface}>"

    def _open(self) -> int:
        if self.fd < 0:
            raise VfioError("the device is closed", device=self.address)
        return self.fd

    def _failed(self, doing: str, error: OSError) -> VfioError:
        return _diagnose.failed(self.address, doing, error)


def open_device(
    address: PciAddress | str,
    interface: str = "auto",
    *,
    iommu: Iommu | None = None,
    sysfs_root: str = "/sys",
    dev_root: str = "/dev",
) -> Device:
    """Open a function that is bound to vfio-pci (see `bind`).

    `interface`: "auto" takes iommufd where kernel and permissions offer it, else "group"; "group" is a container with
    type1v2 (or type1); "iommufd" a character device; "type1", "type1v2", "iommufd-compat-type1" and
    "iommufd-compat-type1v2" name one exactly. "noiommu" opens a device that no IOMMU guards: only by this name.
    `iommu`: put it into this address space, along with other devices; it stays the caller's to close, and `interface`
    is that of the address space.

    Raises `DeviceNotFound`, `NotBound`, `NoIommu`, `GroupNotViable`, `DeviceBusy`, `NotPermitted`, `DriverMissing`,
    `Unsupported`, or another `VfioError`; nothing stays open then.
    """
    function = PciFunction(address, sysfs_root=sysfs_root)
    if interface not in INTERFACES:
        raise Unsupported(f"there is no interface {interface!r}", fix=f"give one of {', '.join(INTERFACES)}")
    if iommu is not None and not is_of(iommu.interface, interface):
        raise Unsupported(
            f"it cannot be opened as {interface!r} into an address space that is {iommu.interface!r}",
            device=function.address,
            fix="leave the interface out where an iommu is given",
        )
    if sys.byteorder != "little":
        raise Unsupported("register access is written for little-endian machines")
    driver = function.driver
    if not _diagnose.is_vfio_driver(driver):
        raise NotBound(
            "it is not lent to user space",
            device=function.address,
            cause=f"it is bound to {driver}" if driver else "it is bound to no driver",
            fix=f"vfio.bind('{function.address}') first",
        )
    if function.iommu_group is None:
        raise _diagnose.no_iommu(function.address, sysfs_root)
    own = iommu is None
    space = open_for(function, interface, dev_root) if iommu is None else iommu
    try:
        fd, group_fd = space._attach(function, dev_root)
        try:
            return Device(function.address, fd, space, group_fd, owns_iommu=own)
        except BaseException:
            os.close(fd)
            space._detach(group_fd)
            raise
    except BaseException:
        if own:
            space.close()
        raise
