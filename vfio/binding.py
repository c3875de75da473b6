"""Lending a PCI function to user space (binding it to vfio-pci) and giving it back.

`driver_override` names the one driver that may bind, and is set before anything is unbound, so neither udev nor the
kernel can put another driver in between. What was there before is first written to a small file under /run, so that
a process killed at any point leaves enough behind for `restore` (or the next `bind`) to put right. Source:
Documentation/ABI/testing/sysfs-bus-pci and Documentation/driver-api/vfio.rst of the kernel.
"""

from __future__ import annotations

import errno
import os

from vfio import _diagnose, _disks, _notes, _sys
from vfio.errors import BadAddress, DeviceBusy, DeviceNotFound, DriverMissing, NotPermitted, Unsupported, VfioError
from vfio.pci import PciAddress, PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

STATE_DIR = "/run/vfio-bind"


class Binding:
    """A function that `bind` lent to user space. As a context manager it gives the function back at the end, except in
    a forked child that leaves the block: there it is the parent's.

    - `address`: the function
    - `driver`: the VFIO driver it is bound to
    - `previous`: the driver it had before and goes back to, None if it had none
    """

    def __init__(self, function: PciFunction, driver: str, previous: str | None, roots: _Roots) -> None:
        self.address = function.address
        self.driver = driver
        self.previous = previous
        self._roots = roots
        self._done = previous == driver
        self._pid = os.getpid()

    def restore(self) -> None:
        """Give the function back to the driver it had before. Doing it twice is harmless, and so is a function that
        was unplugged in the meantime. Every `Device` on it must be closed first: `DeviceBusy` otherwise."""
        if not self._done:
            _restore(self.address, self._roots)
            self._done = True

    def __enter__(self) -> Binding:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._pid == os.getpid():
            self.restore()

    def __repr__(self) -> str:
        return f"<Binding {self.address} {self.previous or 'no driver'} -> {self.driver}>"


def bind(
    address: PciAddress | str,
    driver: str = "vfio-pci",
    *,
    sysfs_root: str = "/sys",
    state_dir: str = STATE_DIR,
    dev_root: str = "/dev",
) -> Binding:
    """Bind a PCI function to `driver`, taking it away from the one it has. Needs root.

    Gives a `Binding`, whose `restore()` (or the end of the `with` block) undoes it. A function that was bound to
    `driver` all along is left so. If anything fails on the way, what was done is undone before the error is raised.

    Raises `DeviceNotFound`, `DeviceBusy` (a disk of it is mounted), `DriverMissing` (the module is not loaded),
    `NoIommu`, `NotPermitted`, `Unsupported` (a bridge), or `VfioError` when the driver refuses the function.
    """
    roots = _Roots(sysfs_root, state_dir, dev_root)
    function = PciFunction(address, sysfs_root=sysfs_root)
    if function.is_bridge:
        raise Unsupported("a PCI bridge cannot be lent to user space", device=function.address)
    used = _disks.in_use(function)
    if used is not None:
        raise DeviceBusy(
            "it is not taken away from the kernel",
            device=function.address,
            cause=used,
            fix="unmount it (umount, swapoff, and what is built on it), then bind again",
        )
    if not os.path.isdir(roots.driver(driver)):
        raise DriverMissing(
            f"the driver {driver} is not there", device=function.address, fix=f"load it: modprobe {driver}"
        )
    if function.iommu_group is None and not _noiommu_allowed(sysfs_root):
        raise _diagnose.no_iommu(function.address, sysfs_root)
    with _notes.Lock(roots.state):
        current = function.driver
        record = _notes.load(roots.state, function.address)
        if record is not None and not _concerns(record, function):
            record = None  # of an earlier life: the function was unplugged and came back under a driver of its own
        if current == driver:
            return Binding(function, driver, record[0] if record else driver, roots)
        if record is None:
            record = (current, function.driver_override)
            _notes.save(roots.state, function.address, *record)
        try:
            _switch(function, driver, roots)
        except BaseException:
            _give_back(function, *record, roots)
            _notes.forget(roots.state, function.address)
            raise
        return Binding(function, driver, record[0], roots)


def restore(
    address: PciAddress | str,
    *,
    sysfs_root: str = "/sys",
    state_dir: str = STATE_DIR,
    dev_root: str = "/dev",
) -> str | None:
    """Put right what a crash left: give the function back to the driver it had, and gives that driver's name or None.

    What it had is read from the file that `bind` left; without one, the kernel picks the driver that matches the
    device. A function that is not lent to user space is left alone; of one that was unplugged meanwhile the file is
    removed. Raises `DeviceBusy` while somebody uses it, `DeviceNotFound` where neither function nor file is.
    """
    parsed = PciAddress.parse(address)
    roots = _Roots(sysfs_root, state_dir, dev_root)
    if not os.path.exists(_notes.path_of(state_dir, parsed)):
        PciFunction(parsed, sysfs_root=sysfs_root)
    _restore(parsed, roots)
    try:
        return PciFunction(parsed, sysfs_root=sysfs_root).driver
    except DeviceNotFound:
        return None


def leftovers(*, state_dir: str = STATE_DIR) -> tuple[PciAddress, ...]:
    """Functions that some `bind` lent out and nobody gave back yet, in use or forgotten. Needs root, as `bind` does:
    raises `NotPermitted`."""
    found = []
    try:
        names = os.listdir(state_dir)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _notes.refused(state_dir, error) from None
    for name in names:
        try:
            found.append(PciAddress.parse(name))
        except BadAddress:
            continue
    return tuple(sorted(found))


class _Roots:
    """Where sysfs, the state files and the device nodes are."""

    def __init__(self, sysfs: str, state: str, dev: str) -> None:
        self.sysfs = sysfs
        self.state = state
        self.dev = dev

    def driver(self, name: str) -> str:
        return f"{self.sysfs}/bus/pci/drivers/{name}"


def _write(path: str, text: str, doing: str, address: PciAddress) -> None:
    try:
        _sys.write_file(path, text)
    except PermissionError as error:
        raise NotPermitted(
            doing, device=address, errno=error.errno, cause=f"{path} is not writable", fix="binding drivers needs root"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            raise DeviceNotFound(doing, device=address, errno=error.errno, cause="was it unplugged?") from None
        raise VfioError(doing, device=address, errno=error.errno) from None


def _switch(function: PciFunction, driver: str, roots: _Roots) -> None:
    """Move a function to `driver`: name it in driver_override, unbind what is there, have the kernel probe."""
    address = function.address
    _write(f"{function.path}/driver_override", f"{driver}\n", f"cannot set driver_override to {driver}", address)
    current = function.driver
    if current == driver:
        return
    if current is not None:
        _unbind(function, current, roots)
    # The kernel answers EINVAL or similar when the driver refuses; what counts is who is bound afterwards.
    refused: int | None = None
    try:
        _sys.write_file(f"{roots.sysfs}/bus/pci/drivers_probe", f"{address}\n")
    except OSError as error:
        refused = error.errno
    if function.driver != driver:
        raise VfioError(
            f"{driver} did not take it",
            device=address,
            errno=refused,
            cause=None if function.driver is None else f"{function.driver} has it",
            fix="the end of the kernel log (dmesg) says why",
        )


def _unbind(function: PciFunction, driver: str, roots: _Roots) -> None:
    _refuse_if_held(function, driver, roots)
    try:
        _write(
            f"{roots.driver(driver)}/unbind",
            f"{function.address}\n",
            f"cannot unbind it from {driver}",
            function.address,
        )
    except DeviceNotFound:
        if function.driver == driver or not function.exists:
            raise
        # Somebody else did the same at the same time.


def _give_back(function: PciFunction, driver: str | None, override: str | None, roots: _Roots) -> None:
    """Bring a function to a driver, or to none, and leave driver_override as it was."""
    address = function.address
    try:
        if driver is None:
            current = function.driver
            if current is not None:
                _refuse_if_held(function, current, roots)
                # An override that no driver has keeps others away between the unbind and the end.
                _write(f"{function.path}/driver_override", "none\n", "cannot set driver_override", address)
                _unbind(function, current, roots)
        else:
            if not os.path.isdir(roots.driver(driver)):
                raise DriverMissing(
                    f"cannot give it back to {driver}: that driver is not loaded any more",
                    device=address,
                    fix=f"modprobe {driver}, then restore again",
                )
            _switch(function, driver, roots)
        _write(f"{function.path}/driver_override", f"{override or ''}\n", "cannot reset driver_override", address)
    except DeviceNotFound:
        if function.exists:
            raise


def _restore(address: PciAddress, roots: _Roots) -> None:
    with _notes.Lock(roots.state):
        try:
            function = PciFunction(address, sysfs_root=roots.sysfs)
        except DeviceNotFound:
            _notes.forget(roots.state, address)  # unplugged: there is nothing left to give back
            return
        record = _notes.load(roots.state, address)
        current = function.driver
        if record is not None:
            if _concerns(record, function):
                _give_back(function, *record, roots)
            _notes.forget(roots.state, address)
        elif _diagnose.is_vfio_driver(current):
            # Nobody wrote down what was there: let the kernel choose by the device's ids.
            _refuse_if_held(function, current or "", roots)
            _write(f"{function.path}/driver_override", "\n", "cannot clear driver_override", address)
            _unbind(function, current or "", roots)
            _probe_any(function, roots)
        elif _overridden(function):
            _write(f"{function.path}/driver_override", "\n", "cannot clear driver_override", address)
            if current is None:
                _probe_any(function, roots)


def _concerns(record: tuple[str | None, str | None], function: PciFunction) -> bool:
    """Whether notes fit what is there now: somewhere on the way between the driver they name and a VFIO driver."""
    driver = function.driver
    return driver in (None, record[0]) or _diagnose.is_vfio_driver(driver) or _overridden(function)


def _overridden(function: PciFunction) -> bool:
    return _diagnose.is_vfio_driver(function.driver_override)


def _probe_any(function: PciFunction, roots: _Roots) -> None:
    try:
        _sys.write_file(f"{roots.sysfs}/bus/pci/drivers_probe", f"{function.address}\n")
    except OSError:
        pass  # no driver wants it, which is a fine state to be in


def _refuse_if_held(function: PciFunction, driver: str, roots: _Roots) -> None:
    """Unbinding vfio-pci waits, without end, until the last user closes the device: refuse instead of hanging."""
    if not _diagnose.is_vfio_driver(driver):
        return
    nodes = [f"{roots.dev}/vfio/{function.iommu_group}", f"{roots.dev}/vfio/noiommu-{function.iommu_group}"]
    if function.vfio_cdev is not None:
        nodes.append(f"{roots.dev}/vfio/devices/{function.vfio_cdev}")
    held = _diagnose.describe_holders(nodes)
    if held is not None:
        raise DeviceBusy(
            "cannot take it back from user space",
            device=function.address,
            cause=held,
            fix="close every Device on it, or stop that process, then restore",
        )


def _noiommu_allowed(sysfs_root: str) -> bool:
    try:
        return _sys.read_file(f"{sysfs_root}/module/vfio/parameters/enable_unsafe_noiommu_mode") in ("Y", "1")
    except OSError:
        return False
