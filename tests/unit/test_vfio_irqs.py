"""Interrupts: what is asked of the kernel, and what is said when it refuses."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

import vfio
from tests.unit.test_vfio_device import Machine
from vfio import _abi
from vfio._abi import ffi

NONE, BOOL, EVENTFD = (_abi.VFIO_IRQ_SET_DATA_NONE, _abi.VFIO_IRQ_SET_DATA_BOOL, _abi.VFIO_IRQ_SET_DATA_EVENTFD)
MASK, UNMASK, TRIGGER = (
    _abi.VFIO_IRQ_SET_ACTION_MASK,
    _abi.VFIO_IRQ_SET_ACTION_UNMASK,
    _abi.VFIO_IRQ_SET_ACTION_TRIGGER,
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def fds(*numbers: int) -> bytes:
    return bytes(ffi.buffer(ffi.new("int32_t[]", list(numbers))))


CALLS: list[tuple[str, Callable[[vfio.Irqs], None], tuple[int, int, int, int, bytes]]] = [
    ("enable_intx", lambda i: i.enable_intx(9), (EVENTFD | TRIGGER, vfio.INTX, 0, 1, fds(9))),
    ("mask_intx", lambda i: i.mask_intx(), (NONE | MASK, vfio.INTX, 0, 1, b"")),
    ("unmask_intx", lambda i: i.unmask_intx(), (NONE | UNMASK, vfio.INTX, 0, 1, b"")),
    ("resample", lambda i: i.set_intx_unmask(9), (EVENTFD | UNMASK, vfio.INTX, 0, 1, fds(9))),
    ("no resample", lambda i: i.set_intx_unmask(None), (EVENTFD | UNMASK, vfio.INTX, 0, 1, fds(-1))),
    ("trigger_intx", lambda i: i.trigger_intx(), (NONE | TRIGGER, vfio.INTX, 0, 1, b"")),
    ("disable_intx", lambda i: i.disable_intx(), (NONE | TRIGGER, vfio.INTX, 0, 0, b"")),
    ("enable_msi", lambda i: i.enable_msi([9]), (EVENTFD | TRIGGER, vfio.MSI, 0, 1, fds(9))),
    ("set_msi", lambda i: i.set_msi(0, None), (EVENTFD | TRIGGER, vfio.MSI, 0, 1, fds(-1))),
    ("trigger_msi", lambda i: i.trigger_msi(0), (NONE | TRIGGER, vfio.MSI, 0, 1, b"")),
    ("disable_msi", lambda i: i.disable_msi(), (NONE | TRIGGER, vfio.MSI, 0, 0, b"")),
    ("enable_msix", lambda i: i.enable_msix([9, None, 11]), (EVENTFD | TRIGGER, vfio.MSIX, 0, 3, fds(9, -1, 11))),
    ("set_msix", lambda i: i.set_msix(3, 12), (EVENTFD | TRIGGER, vfio.MSIX, 3, 1, fds(12))),
    ("trigger_msix", lambda i: i.trigger_msix(2), (NONE | TRIGGER, vfio.MSIX, 2, 1, b"")),
    (
        "trigger_msix_vectors",
        lambda i: i.trigger_msix_vectors([True, False, True, True]),
        (BOOL | TRIGGER, vfio.MSIX, 0, 4, b"\x01\x00\x01\x01"),
    ),
    ("disable_msix", lambda i: i.disable_msix(), (NONE | TRIGGER, vfio.MSIX, 0, 0, b"")),
    ("enable_error", lambda i: i.enable_error(9), (EVENTFD | TRIGGER, vfio.ERROR, 0, 1, fds(9))),
    ("trigger_error", lambda i: i.trigger_error(), (NONE | TRIGGER, vfio.ERROR, 0, 1, b"")),
    ("disable_error", lambda i: i.disable_error(), (NONE | TRIGGER, vfio.ERROR, 0, 0, b"")),
    ("enable_request", lambda i: i.enable_request(9), (EVENTFD | TRIGGER, vfio.REQUEST, 0, 1, fds(9))),
    ("trigger_request", lambda i: i.trigger_request(), (NONE | TRIGGER, vfio.REQUEST, 0, 1, b"")),
    ("disable_request", lambda i: i.disable_request(), (NONE | TRIGGER, vfio.REQUEST, 0, 0, b"")),
]


@pytest.mark.parametrize(("call", "asked"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_is_asked_of_the_kernel(
    machine: Machine, call: Callable[[vfio.Irqs], None], asked: tuple[int, int, int, int, bytes]
) -> None:
    machine.kernel.irq_counts[vfio.MSI] = 1
    with machine.open() as device:
        call(device.irqs)
        flags, index, start, count, data = machine.kernel.irq_sets.pop()
        assert (flags, index, start, count, data[: len(asked[4])]) == asked


def test_eventfd_objects_are_taken(machine: Machine) -> None:
    with machine.open() as device, vfio.EventFd() as event:
        device.irqs.enable_intx(event)
        assert machine.kernel.irq_sets.pop()[4] == fds(event.fileno())


def test_info(machine: Machine) -> None:
    with machine.open() as device:
        info = device.irqs.info(vfio.MSIX)
        assert (info.index, info.count, info.eventfd, info.noresize) == (vfio.MSIX, 4, True, False)
        machine.kernel.fail[_abi.VFIO_DEVICE_GET_IRQ_INFO] = errno.EINVAL
        assert device.irqs.info(vfio.ERROR).count == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda i: i.enable_msix([1] * 5), "5 MSI-X vectors asked for, the device has 4"),
        (lambda i: i.enable_msix([]), "0 MSI-X vectors asked for"),
        (lambda i: i.enable_msi([1]), "1 MSI vectors asked for, the device has 0"),
        (lambda i: i.set_msix(4, None), "5 MSI-X vectors asked for, the device has 4"),
        (lambda i: i.set_msix(-1, None), "no MSI-X vector -1"),
    ],
)
def test_vectors_that_are_not_there(machine: Machine, call: Callable[[vfio.Irqs], None], says: str) -> None:
    with machine.open() as device, pytest.raises(vfio.VfioError, match=says):
        call(device.irqs)
    assert machine.kernel.irq_sets == []


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.ENODEV, vfio.DeviceGone, "cannot enable INTx: ENODEV"),
        (errno.ENOTTY, vfio.Unsupported, "cannot enable INTx"),
        (errno.EINVAL, vfio.VfioError, "another kind of interrupt is enabled.*; disable the other kind first"),
        (errno.EBADF, vfio.VfioError, "not an open file descriptor"),
        (errno.ENOSPC, vfio.VfioError, "ask for fewer"),
        (errno.EBUSY, vfio.VfioError, "line is shared with another driver"),
        (errno.EIO, vfio.VfioError, "EIO"),
    ],
)
def test_the_kernels_refusals_in_words(machine: Machine, code: int, kind: type[vfio.VfioError], says: str) -> None:
    with machine.open() as device:
        machine.kernel.fail[_abi.VFIO_DEVICE_SET_IRQS] = code
        with pytest.raises(kind, match=says) as caught:
            device.irqs.enable_intx(3)
        assert type(caught.value) is kind
        assert caught.value.device == str(device.address)


def test_disabling_what_is_off_is_no_error(machine: Machine) -> None:
    with machine.open() as device:
        machine.kernel.fail[_abi.VFIO_DEVICE_SET_IRQS] = errno.EINVAL
        device.irqs.disable_msix()
        machine.kernel.fail[_abi.VFIO_DEVICE_SET_IRQS] = errno.ENODEV
        with pytest.raises(vfio.DeviceGone):
            device.irqs.disable_msix()


def test_a_vector_beyond_on_an_old_kernel_says_how(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.open() as device:
        info = device.irqs.info(vfio.MSIX)._replace(noresize=True)
        monkeypatch.setattr(device.irqs, "info", lambda index: info)
        machine.kernel.fail[_abi.VFIO_DEVICE_SET_IRQS] = errno.EINVAL
        with pytest.raises(vfio.VfioError, match="on this kernel, reserve the vector with None"):
            device.irqs.set_msix(3, 4)


def test_fewer_vectors_than_asked_for_is_no_success(machine: Machine) -> None:
    """The kernel then enables none, and answers with how many there are instead of an error."""
    with machine.open() as device:
        machine.kernel.irqs_free = 2
        with pytest.raises(vfio.Unsupported, match="cannot enable 4 MSI-X vectors: the machine has 2"):
            device.irqs.enable_msix([9, 10, 11, 12])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda i: i.trigger_msix(-1), "no MSI-X vector -1"),
        (lambda i: i.trigger_msi(1 << 40), "no MSI vector 1099511627776"),
        (lambda i: i.set_msix(1 << 32, 3), "no MSI-X vector 4294967296"),
        (lambda i: i.enable_msix([-1]), "-1 is not a file descriptor; give an open eventfd; None leaves"),
        (lambda i: i.enable_intx(1 << 31), "2147483648 is not a file descriptor"),
        (lambda i: i.info(-1), "no kind of interrupt -1"),
        (lambda i: i.info(5), "no kind of interrupt 5"),
    ],
)
def test_numbers_that_cannot_be(machine: Machine, call: Callable[[vfio.Irqs], None], says: str) -> None:
    with machine.open() as device, pytest.raises(vfio.VfioError, match=says):
        call(device.irqs)
    assert machine.kernel.irq_sets == []


def test_triggering_what_is_off_says_what_to_do(machine: Machine) -> None:
    with machine.open() as device:
        machine.kernel.fail[_abi.VFIO_DEVICE_SET_IRQS] = errno.EINVAL
        for call in (device.irqs.trigger_error, device.irqs.unmask_intx, lambda: device.irqs.trigger_msix(0)):
            with pytest.raises(vfio.VfioError, match="it is not enabled, or not that vector; enable it first"):
                call()
        with pytest.raises(vfio.VfioError, match=r"cannot enable error: EINVAL .*: that is no eventfd$"):
            device.irqs.enable_error(9)


def test_interrupts_of_a_closed_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.open() as device:
        pass
    monkeypatch.undo()  # what Python's own ioctl says of a closed file is no OSError
    for late in (device.irqs.unmask_intx, device.irqs.disable_msix, lambda: device.irqs.info(vfio.MSI)):
        with pytest.raises(vfio.VfioError, match="the device is closed"):
            late()
