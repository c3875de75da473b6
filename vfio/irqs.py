"""A device's interrupts: each arrives on an eventfd. Source: VFIO_DEVICE_SET_IRQS in <linux/vfio.h>."""

from __future__ import annotations

import errno

from vfio import _abi, _sys
from vfio._abi import ffi
from vfio._record import NamedTuple
from vfio.errors import DeviceGone, Unsupported, VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class HasFileno(Protocol):
        """Anything with a file descriptor, such as `vfio.EventFd`."""

        def fileno(self) -> int:
            """The file descriptor."""
            ...


INTX = _abi.VFIO_PCI_INTX_IRQ_INDEX
MSI = _abi.VFIO_PCI_MSI_IRQ_INDEX
MSIX = _abi.VFIO_PCI_MSIX_IRQ_INDEX
ERROR = _abi.VFIO_PCI_ERR_IRQ_INDEX
REQUEST = _abi.VFIO_PCI_REQ_IRQ_INDEX
_MOST_VECTORS = 1 << 16  # more than any kind of interrupt has
_NAMES = {INTX: "INTx", MSI: "MSI", MSIX: "MSI-X", ERROR: "error", REQUEST: "device-request"}


class IrqInfo(NamedTuple):
    """What the kernel says of a kind of interrupt.

    - `index`: `INTX`, `MSI`, `MSIX`, `ERROR` or `REQUEST`
    - `count`: how many vectors the device has of it, 0 for none
    - `eventfd`: whether it can arrive on eventfds
    - `maskable`: whether `mask` and `unmask` work
    - `automasked`: whether it is masked whenever it fires, until it is unmasked (INTx)
    - `noresize`: whether the number of vectors is fixed while it is enabled
    """

    # Named as in the header; tuple.index and tuple.count, which nobody needs here, give way.
    index: int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]
    eventfd: bool
    maskable: bool
    automasked: bool
    noresize: bool


class Irqs:
    """The interrupts of a device, `Device.irqs`.

    Wherever an eventfd is asked for, give a file descriptor or an object with `fileno()`, such as `vfio.EventFd`. It
    stays the caller's; the kernel keeps a reference of its own until the interrupt is disabled. Enabling again
    replaces what was there. INTx, MSI and MSI-X exclude each other: disable one before enabling another.

    All calls raise `Unsupported` when the device does not have the interrupt, `DeviceGone` when it was unplugged, and
    `VfioError` otherwise.
    """

    def __init__(self, fd: int, device: object = None) -> None:
        self._fd = fd
        self._device = device

    def info(self, index: int) -> IrqInfo:
        """What there is of a kind of interrupt: `vfio.INTX`, `MSI`, `MSIX`, `ERROR` or `REQUEST`."""
        if index not in _NAMES:
            raise VfioError(f"there is no kind of interrupt {index}", device=self._device)
        self._check_open("cannot ask about", index)
        request = _sys.struct("vfio_irq_info")
        request.index = index
        try:
            _sys.call(self._fd, _abi.VFIO_DEVICE_GET_IRQ_INFO, request)
        except OSError as error:
            # The kernel refuses the error interrupt of a device that is not PCI Express, where it could say none.
            if error.errno != errno.EINVAL:
                raise self._failed("cannot ask about", index, 0, error) from None
            return IrqInfo(index, 0, False, False, False, False)
        flags = request.flags
        return IrqInfo(
            index,
            request.count,
            bool(flags & _abi.VFIO_IRQ_INFO_EVENTFD),
            bool(flags & _abi.VFIO_IRQ_INFO_MASKABLE),
            bool(flags & _abi.VFIO_IRQ_INFO_AUTOMASKED),
            bool(flags & _abi.VFIO_IRQ_INFO_NORESIZE),
        )

    # INTx

    def enable_intx(self, eventfd: int | HasFileno) -> None:
        """Have INTx arrive on an eventfd. It is masked by the kernel each time it fires: quiet the device, then
        `unmask_intx`."""
        self._enable(INTX, [eventfd])

    def mask_intx(self) -> None:
        """Keep INTx from firing."""
        self._act(INTX, _abi.VFIO_IRQ_SET_ACTION_MASK, "cannot mask")

    def unmask_intx(self) -> None:
        """Let INTx fire again; if the line is still asserted it does at once."""
        self._act(INTX, _abi.VFIO_IRQ_SET_ACTION_UNMASK, "cannot unmask")

    def set_intx_unmask(self, eventfd: int | HasFileno | None) -> None:
        """Have the kernel unmask INTx whenever this eventfd is signalled (a resample eventfd), or no longer, with None.
        INTx must be enabled."""
        self._set_eventfds(INTX, _abi.VFIO_IRQ_SET_ACTION_UNMASK, 0, [eventfd], "cannot set the unmask eventfd of")

    def trigger_intx(self) -> None:
        """Signal INTx's eventfd as if the device had raised it (the kernel's loop-back)."""
        self._act(INTX, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, "cannot trigger")

    def disable_intx(self) -> None:
        """Turn INTx off. Harmless when it is off."""
        self._disable(INTX)

    # MSI

    def enable_msi(self, eventfds: Sequence[int | HasFileno | None]) -> None:
        """Turn MSI on with as many vectors as there are eventfds; None leaves a vector without one."""
        self._enable(MSI, eventfds)

    def set_msi(self, vector: int, eventfd: int | HasFileno | None) -> None:
        """Give one vector of the enabled MSI another eventfd, or none."""
        self._set_vector(MSI, vector, eventfd)

    def trigger_msi(self, vector: int) -> None:
        """Signal the vector's eventfd as if the device had sent the message (the kernel's loop-back)."""
        self._act(MSI, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, "cannot trigger", vector)

    def disable_msi(self) -> None:
        """Turn MSI off. Harmless when it is off."""
        self._disable(MSI)

    # MSI-X

    def enable_msix(self, eventfds: Sequence[int | HasFileno | None]) -> None:
        """Turn MSI-X on with as many vectors as there are eventfds; None reserves a vector that gets its eventfd later,
        with `set_msix`, which is the way to add vectors at run time on any kernel."""
        self._enable(MSIX, eventfds)

    def set_msix(self, vector: int, eventfd: int | HasFileno | None) -> None:
        """Enable one more vector while MSI-X is on, give it another eventfd, or disable it with None. A vector beyond
        those of `enable_msix` needs a kernel that can add some (6.5; `info(MSIX).noresize` is False)."""
        self._set_vector(MSIX, vector, eventfd)

    def trigger_msix(self, vector: int) -> None:
        """Signal the vector's eventfd as if the device had sent the message (the kernel's loop-back)."""
        self._act(MSIX, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, "cannot trigger", vector)

    def trigger_msix_vectors(self, vectors: Sequence[bool]) -> None:
        """Signal several vectors with one call: those whose place in the sequence, counted from vector 0, is true."""
        self._trigger_some(MSIX, vectors)

    def disable_msix(self) -> None:
        """Turn MSI-X off. Harmless when it is off."""
        self._disable(MSIX)

    # Error and device request

    def enable_error(self, eventfd: int | HasFileno) -> None:
        """Be told of uncorrectable errors that the device reports (PCI Express AER)."""
        self._enable(ERROR, [eventfd])

    def trigger_error(self) -> None:
        """Signal the error eventfd (the kernel's loop-back)."""
        self._act(ERROR, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, "cannot trigger")

    def disable_error(self) -> None:
        """Be told no longer. Harmless when it is off."""
        self._disable(ERROR)

    def enable_request(self, eventfd: int | HasFileno) -> None:
        """Be asked for the device: it is about to be unplugged, or unbound from vfio-pci. The answer is to close it
        soon; the kernel waits, and asks again every ten seconds or so."""
        self._enable(REQUEST, [eventfd])

    def trigger_request(self) -> None:
        """Signal the device-request eventfd (the kernel's loop-back)."""
        self._act(REQUEST, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, "cannot trigger")

    def disable_request(self) -> None:
        """Be asked no longer. Harmless when it is off."""
        self._disable(REQUEST)

    # How it is done

    def _need(self, index: int, count: int) -> IrqInfo:
        info = self.info(index)
        if info.count < count or not count:
            raise Unsupported(
                f"{count} {_NAMES[index]} vectors asked for, the device has {info.count}",
                device=self._device,
            )
        return info

    def _enable(self, index: int, eventfds: Sequence[int | HasFileno | None]) -> None:
        self._need(index, len(eventfds))
        self._set_eventfds(index, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, eventfds, "cannot enable")

    def _set_vector(self, index: int, vector: int, eventfd: int | HasFileno | None) -> None:
        self._check_vector(index, vector)
        info = self._need(index, vector + 1)
        fix = None
        if info.noresize:
            fix = "on this kernel, reserve the vector with None when enabling"
        self._set_eventfds(index, _abi.VFIO_IRQ_SET_ACTION_TRIGGER, vector, [eventfd], "cannot set a vector of", fix)

    def _set_eventfds(
        self,
        index: int,
        action: int,
        start: int,
        eventfds: Sequence[int | HasFileno | None],
        doing: str,
        fix: str | None = None,
    ) -> None:
        fds = [-1 if e is None else file_number(e) for e in eventfds]
        data = bytes(ffi.buffer(ffi.new("int32_t[]", fds)))
        self._set(index, _abi.VFIO_IRQ_SET_DATA_EVENTFD | action, start, len(fds), data, doing, fix)

    def _act(self, index: int, action: int, doing: str, vector: int = 0) -> None:
        self._check_vector(index, vector)
        self._set(index, _abi.VFIO_IRQ_SET_DATA_NONE | action, vector, 1, b"", doing)

    def _trigger_some(self, index: int, vectors: Sequence[bool]) -> None:
        flags = _abi.VFIO_IRQ_SET_DATA_BOOL | _abi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set(index, flags, 0, len(vectors), bytes(map(bool, vectors)), "cannot trigger")

    def _disable(self, index: int) -> None:
        flags = _abi.VFIO_IRQ_SET_DATA_NONE | _abi.VFIO_IRQ_SET_ACTION_TRIGGER
        try:
            self._set(index, flags, 0, 0, b"", "cannot disable")
        except VfioError as error:
            # What is not enabled, or not there at all, is disabled already.
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise

    def _set(
        self, index: int, flags: int, start: int, count: int, data: bytes, doing: str, fix: str | None = None
    ) -> None:
        self._check_open(doing, index)
        request = _sys.struct("vfio_irq_set", data=len(data))
        request.flags, request.index, request.start, request.count = flags, index, start, count
        ffi.memmove(request.data, data, len(data))
        try:
            had = _sys.call(self._fd, _abi.VFIO_DEVICE_SET_IRQS, request)
        except OSError as error:
            raise self._failed(doing, index, flags, error, fix) from None
        if had > 0:  # the kernel's way to say that the machine has fewer vectors free, and that none is enabled
            raise Unsupported(
                f"{doing} {count} {_NAMES[index]} vectors",
                device=self._device,
                cause=f"the machine has {had} for it",
                fix="ask for fewer",
            )

    def _check_vector(self, index: int, vector: int) -> None:
        if not 0 <= vector < _MOST_VECTORS:
            raise VfioError(f"there is no {_NAMES[index]} vector {vector}", device=self._device)

    def _check_open(self, doing: str, index: int) -> None:
        if self._fd < 0:
            raise VfioError(f"{doing} {_NAMES[index]}", device=self._device, cause="the device is closed")

    def _failed(self, doing: str, index: int, flags: int, error: OSError, fix: str | None = None) -> VfioError:
        doing = f"{doing} {_NAMES[index]}"
        if error.errno == errno.ENODEV:
            return DeviceGone(doing, device=self._device, errno=error.errno, cause="the device was removed")
        if error.errno == errno.ENOTTY:
            return Unsupported(doing, device=self._device, errno=error.errno)
        cause = None
        if error.errno == errno.EINVAL:
            if not flags & _abi.VFIO_IRQ_SET_DATA_EVENTFD:
                cause = "it is not enabled, or not that vector"
                fix = "enable it first"
            elif index in (INTX, MSI, MSIX):
                cause = "another kind of interrupt is enabled, or that is no eventfd"
                fix = fix or "disable the other kind first"
            else:
                cause = "that is no eventfd"
        elif error.errno == errno.EBADF:
            cause = "that is not an open file descriptor"
        elif error.errno == errno.ENOSPC:
            cause = "the machine has not that many interrupts free"
            fix = "ask for fewer"
        elif error.errno == errno.EBUSY:
            cause = "the interrupt line is shared with another driver, and the device cannot mask its part"
        return VfioError(doing, device=self._device, errno=error.errno, cause=cause, fix=fix)


def file_number(eventfd: int | HasFileno) -> int:
    """The file descriptor of an eventfd, however it was given. Raises `VfioError` for a number that can be none."""
    fd = eventfd if isinstance(eventfd, int) else eventfd.fileno()
    if not 0 <= fd < 1 << 31:
        raise VfioError(f"{fd} is not a file descriptor", fix="give an open eventfd; None leaves a vector without one")
    return fd
