"""What a virtio transport does for the network device, and the two rules that hold on every transport.

PCI, and whatever else can carry a virtio device, implements `Transport`: plain register operations, no policy. The
order of operations is the network device's business (net.py). Here too: reading the configuration so that it hangs
together (virtio 1.3 §2.5.1), and waiting for a reset to be done (§2.4).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from enum import IntFlag

from netbridge.virtio.errors import ConfigUnstable, Gone, ResetTimeout
from vfio._record import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object  # the driver process does without `typing`, which is a megabyte of it

NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR (virtio 1.3 §4.1.5.1.2)
CONFIG_ATTEMPTS = 64
RESET_DEADLINE_S = 2.0


class Status(IntFlag):
    """The device status field (virtio 1.3 §2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


# What a register of a PCI function that is not there any more reads as. No device has all status bits set.
STATUS_OF_NOTHING = 0xFF


class QueueSetup(NamedTuple):
    """What the device is told of one virtqueue. Addresses as the device sees them (IOVAs)."""

    size: int  # entries
    descriptors: int
    driver_area: int  # available ring
    device_area: int  # used ring
    vector: int  # interrupt vector, or NO_VECTOR


class Transport(Protocol):
    """One virtio device behind some bus. Not thread-safe. Owns what it has opened or mapped itself; see `close`."""

    @property
    def name(self) -> str:
        """For messages, such as the PCI address."""

    @property
    def num_queues(self) -> int:
        """Virtqueues the device has."""

    @property
    def vectors(self) -> int:
        """Interrupt vectors (MSI-X) the device has; 0 where there are none."""

    @property
    def isr_address(self) -> int:
        """Address in this process of the ISR status byte, for C. Reading it acknowledges INTx. 0: there is none."""

    def read_status(self) -> int: ...

    def write_status(self, value: int) -> None: ...

    def reset(self, deadline_s: float = RESET_DEADLINE_S) -> None:
        """Reset the device and wait until it says that it is reset. Raises ResetTimeout, or Gone."""

    def read_device_features(self) -> int:
        """Offered features, bits 0 to 63."""

    def write_driver_features(self, features: int) -> None:
        """Accepted features, bits 0 to 63."""

    def read_config(self, offset: int, width: int) -> int:
        """One field of the device configuration, `width` 1, 2 or 4 bytes, in exactly one access.

        Raises Misbehaved when the device's configuration ends before the field does.
        """

    def config_generation(self) -> int: ...

    def set_config_vector(self, vector: int) -> int:
        """Map configuration changes to a vector. Returns what the device reads back: NO_VECTOR means refused."""

    def queue_max_size(self, index: int) -> int:
        """Entries the device allows in a queue, valid after a reset; 0: there is no such queue."""

    def queue_enabled(self, index: int) -> bool: ...

    def set_up_queue(self, index: int, setup: QueueSetup) -> int:
        """Program a queue, without enabling it. Returns the vector the device reads back, as set_config_vector."""

    def enable_queue(self, index: int) -> None: ...

    def reset_queue(self, index: int, deadline_s: float = RESET_DEADLINE_S) -> None:
        """Reset one queue and wait until the device says that it is (§2.6.1): it is then as after a reset of the
        device, to be set up and enabled again. Only with RING_RESET. Raises ResetTimeout, Misbehaved or Gone."""

    @property
    def answers_commands(self) -> bool:
        """Whether `answer` does what a control queue is for, so that there is none although CTRL_VQ is offered."""

    def answer(self, command: bytes) -> int:
        """What a control queue would answer to a command (§5.1.6.5), once it is carried out. Only where
        `answers_commands`."""

    def notify(self, index: int, data: int | None = None) -> None:
        """Tell the device that a queue has new buffers. Not before DRIVER_OK. `data`: with NOTIFICATION_DATA, the 32
        bits to say it by (§4.1.5.2)."""

    def notify_address(self, index: int, width: int = 2) -> int:
        """Address in this process where C notifies of a queue by a write of `width` bytes, 4 with NOTIFICATION_DATA; 0:
        there is none. Valid until `close`.

        Raises Misbehaved when it would lie outside the notification structure.
        """

    def notify_fd(self, index: int) -> int:
        """Eventfd to notify by where there is no such address, else -1. Owned by the transport until `close`."""

    def enable_vectors(self, eventfds: Sequence[int]) -> None:
        """Deliver vector i to `eventfds[i]`. The transport does not own them."""

    def enable_intx(self, eventfd: int, unmask_eventfd: int) -> None:
        """Deliver the line interrupt to `eventfd`, masked on delivery; a write to `unmask_eventfd` unmasks it."""

    def disable_interrupts(self) -> None:
        """Undo either; nothing happens when none are enabled."""

    def allow_dma(self, allowed: bool) -> None:
        """Let the device reach memory and send interrupts, or cut it off, whatever state it is in."""

    def close(self) -> None:
        """Unmap what was mapped. Does not touch the device. Doing it twice is harmless."""


class ConfigField(NamedTuple):
    """A field of the device configuration: `values` values of `width` bytes each, read one access each."""

    name: str
    offset: int
    width: int
    values: int = 1


def read_consistently(transport: Transport, fields: Sequence[ConfigField]) -> dict[str, tuple[int, ...]]:
    """Several fields as they were at one moment: read again while the generation changes (virtio 1.3 §2.5.1).

    Raises ConfigUnstable after CONFIG_ATTEMPTS attempts.
    """
    for _ in range(CONFIG_ATTEMPTS):
        before = transport.config_generation()
        values = {
            field.name: tuple(
                transport.read_config(field.offset + i * field.width, field.width) for i in range(field.values)
            )
            for field in fields
        }
        if transport.config_generation() == before:
            return values
    names = ", ".join(field.name for field in fields)
    raise ConfigUnstable(
        f"{transport.name}: the configuration changed during each of {CONFIG_ATTEMPTS} attempts to read {names}; "
        "a device changes it now and then, not all the time: the device is broken"
    )


def await_reset(read_status: Callable[[], int], name: str, deadline_s: float) -> None:
    """Wait until the status reads 0 after 0 was written (virtio 1.3 §4.1.4.3.2).

    The specification gives no event for this, so the register is polled, the processor given away in between, and
    `deadline_s` seconds are the most it may take. Raises ResetTimeout, or Gone.
    """
    deadline = time.monotonic() + deadline_s
    while (status := read_status()) != 0:
        if status == STATUS_OF_NOTHING:
            raise Gone(f"{name}: the device does not answer any more; it was unplugged or has lost power")
        if time.monotonic() >= deadline:
            raise ResetTimeout(
                f"{name}: the device was told to reset, and after {deadline_s:g} s its status still reads "
                f"{describe_status(status)} instead of 0; it is stuck: reset the function, or the machine it is in"
            )
        os.sched_yield()


def await_queue_reset(read_register: Callable[[], int], name: str, index: int, deadline_s: float) -> None:
    """Wait until queue_reset reads 0 after 1 was written (virtio 1.3 §2.6.1.2, §4.1.4.3.2): as `await_reset`."""
    deadline = time.monotonic() + deadline_s
    while (value := read_register()) != 0:
        if value == 0xFFFF:
            raise Gone(f"{name}: the device does not answer any more; it was unplugged or has lost power")
        if time.monotonic() >= deadline:
            raise ResetTimeout(
                f"{name}: the device was told to reset queue {index}, and after {deadline_s:g} s its queue_reset still "
                f"reads {value} instead of 0; reset the whole device"
            )
        os.sched_yield()


def describe_status(status: int) -> str:
    """A status byte in words: `0x0f (ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK)`."""
    names = [bit.name or "" for bit in Status if status & bit]
    unknown = status & ~sum(Status)
    if unknown:
        names.append(f"unknown {unknown:#04x}")
    return f"{status:#04x} ({', '.join(names)})" if names else f"{status:#04x}"
