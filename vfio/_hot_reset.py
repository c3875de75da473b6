"""Resetting a whole slot or bus: which functions that concerns, and the proof that they are all ours.

Source: VFIO_DEVICE_GET_PCI_HOT_RESET_INFO and VFIO_DEVICE_PCI_HOT_RESET in <linux/vfio.h>.
"""

from __future__ import annotations

import errno

from vfio import _abi, _diagnose, _sys
from vfio._record import NamedTuple
from vfio.errors import DeviceGone, Malformed, NotPermitted, Unsupported
from vfio.pci import PciAddress

_MOST_DEPENDENTS = 65536


class HotResetDependent(NamedTuple):
    """A function that a hot reset of the bus or slot resets along with the device.

    - `address`: the function
    - `group`: its IOMMU group, or None with iommufd
    - `owned`: with iommufd, whether it is bound to the same iommufd, or in its group; None with groups, where the
      kernel finds out at the reset
    """

    address: PciAddress
    group: int | None
    owned: bool | None


def dependents_of(fd: int, device: PciAddress) -> tuple[HotResetDependent, ...]:
    """Ask the kernel. Raises `Unsupported`, `DeviceGone`, `Malformed` or another `VfioError`."""
    count = 8
    while count <= _MOST_DEPENDENTS:
        request = _sys.struct("vfio_pci_hot_reset_info", devices=count)
        try:
            _sys.call(fd, _abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, request)
        except OSError as error:
            if error.errno == errno.ENOSPC and request.count > count:
                count = request.count
                continue
            if error.errno in (errno.ENODEV, errno.ENOTTY):
                doing = "the kernel can reset neither its slot nor its bus"
                raise Unsupported(doing, device=device, errno=error.errno) from None
            raise _diagnose.failed(device, "cannot ask what a hot reset would reset", error) from None
        if request.count > count:
            break
        by_id = bool(request.flags & _abi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID)
        found = []
        for entry in request.devices[0 : request.count]:
            address = PciAddress(entry.segment, entry.bus, entry.devfn >> 3, entry.devfn & 7)
            # The same field is a device id, of which -1 means that it is not ours.
            owned = entry.group_id != _abi.VFIO_PCI_DEVID_NOT_OWNED & 0xFFFFFFFF
            found.append(HotResetDependent(address, None if by_id else entry.group_id, owned if by_id else None))
        return tuple(found)
    raise Malformed("the kernel does not settle on what a hot reset would reset", device=device)


def hot_reset(fd: int, device: PciAddress, dependents: tuple[HotResetDependent, ...], groups: dict[int, int]) -> None:
    """Do it. `groups` are the files, by number, of groups that are ours: those concerned are shown to the kernel, which
    refuses more files than there are functions."""
    concerned = {d.group for d in dependents}
    files = [group_fd for number, group_fd in groups.items() if number in concerned]
    request = _sys.struct("vfio_pci_hot_reset", group_fds=len(files))
    request.count = len(files)
    for i, group_fd in enumerate(files):
        request.group_fds[i] = group_fd
    doing = "cannot reset its slot or bus"
    try:
        _sys.call(fd, _abi.VFIO_DEVICE_PCI_HOT_RESET, request)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EINVAL, errno.EACCES):
            others = [str(d.address) for d in dependents if not (d.owned or d.group in groups)]
            raise NotPermitted(
                doing,
                device=device,
                errno=error.errno,
                cause=f"it would reset {', '.join(others)} too" if others else None,
                fix="bind those to vfio-pci and open them in the same Iommu" if others else None,
            ) from None
        if error.errno == errno.ENOTTY:
            raise DeviceGone(
                "it did not come back after its slot or bus was reset",
                device=device,
                errno=error.errno,
                cause="the link to it stays down; the end of the kernel log (dmesg) says more",
                fix="use reset if can_reset, else restart the machine",
            ) from None
        raise _diagnose.failed(device, doing, error) from None
