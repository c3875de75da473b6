"""How the network device calls: its eventfds, and which queue rings which.

With MSI-X vector 0 is for configuration changes and the control queue, and every data queue has one of its own; where
the device has too few, the two queues of a pair share one, and where it has fewer still, all of them do. With INTx
there is one line for everything, and the ISR status byte says what for.
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack
from enum import Enum

import vfio
from netbridge.datapath._core import ffi
from netbridge.virtio.errors import VectorRefused
from netbridge.virtio.transport import NO_VECTOR, Transport
from vfio._record import NamedTuple

CONFIG_VECTOR = 0
FIRST_QUEUE_VECTOR = 1
ISR_CONFIG_CHANGE = 2  # §4.1.4.5


class InterruptMode(Enum):
    """How the device calls."""

    MSIX = "msix"  # a vector for configuration changes, and some for the queues
    INTX = "intx"  # one line for all; the ISR status byte says what for


class Interrupts(NamedTuple):
    """The eventfds on which interrupts arrive; -1 or none where the mode has none. A queue's own is its `irq_fd`. The
    network device owns them all and keeps them, the same ones, until it is closed."""

    mode: InterruptMode
    config_fd: int  # configuration changes; with INTx those that were noticed while waiting for an answer
    queue_fds: tuple[int, ...] = ()  # of the vectors from FIRST_QUEUE_VECTOR on
    intx_fd: int = -1
    intx_unmask_fd: int = -1  # written to by the driver, to have the line again


class Wiring:
    """Opens the eventfds for `queues` data queues, and connects them. Owns them until `close`."""

    def __init__(self, mode: InterruptMode, queues: int) -> None:
        """Raises OSError when the system gives no more file descriptors."""
        with ExitStack() as stack:
            count = queues if mode is InterruptMode.MSIX else 2
            self._eventfds = [stack.enter_context(vfio.EventFd()) for _ in range(1 + count)]
            config_fd, *others = (eventfd.fileno() for eventfd in self._eventfds)
            if mode is InterruptMode.MSIX:
                self.interrupts = Interrupts(mode, config_fd, queue_fds=tuple(others))
            else:
                self.interrupts = Interrupts(mode, config_fd, intx_fd=others[0], intx_unmask_fd=others[1])
            # Edge-triggered, and the eventfd is never read for it: who looks after configuration changes still sees it.
            self._answers = stack.enter_context(select.epoll())
            waited_for = config_fd if mode is InterruptMode.MSIX else self.interrupts.intx_fd
            self._answers.register(waited_for, select.EPOLLIN | select.EPOLLET)
            self._stack = stack.pop_all()

    def connect(self, transport: Transport, queues: int) -> list[int]:
        """Enables the interrupts, maps configuration changes, and says which vector each of the first `queues` data
        queues is to have: NO_VECTOR with INTx. Raises VectorRefused; vfio.VfioError."""
        fds = self.interrupts
        if fds.mode is InterruptMode.INTX:
            transport.enable_intx(fds.intx_fd, fds.intx_unmask_fd)
            require_vector(transport, "configuration changes", NO_VECTOR, transport.set_config_vector(NO_VECTOR))
            return [NO_VECTOR] * queues
        vectors = share_out(transport.vectors - FIRST_QUEUE_VECTOR, queues)
        if not vectors:
            raise VectorRefused(
                f"{transport.name}: MSI-X needs 2 vectors (configuration, queues) and the device has "
                f"{transport.vectors}; use INTx, or with QEMU add vectors={1 + queues} to its -device option"
            )
        transport.enable_vectors((fds.config_fd, *fds.queue_fds[: max(vectors)]))
        require_vector(transport, "configuration changes", CONFIG_VECTOR, transport.set_config_vector(CONFIG_VECTOR))
        return vectors

    def fd_of(self, vector: int) -> int:
        """The eventfd of a queue's vector; -1 for NO_VECTOR."""
        return -1 if vector == NO_VECTOR else self.interrupts.queue_fds[vector - FIRST_QUEUE_VECTOR]

    def await_answer(self, transport: Transport, seconds: float) -> None:
        """Returns when the device has interrupted since the last time, as it does when it has used the control queue or
        changed its configuration, or after so many seconds. No data queue's MSI-X interrupt is taken; with INTx the
        queues must be looked at before anybody sleeps."""
        if self._answers.poll(seconds) and self.interrupts.mode is InterruptMode.INTX:
            fds = self.interrupts
            try:
                os.eventfd_read(fds.intx_fd)
            except BlockingIOError:
                pass
            # Reading it lets go of the line, then VFIO may unmask it.
            isr = ffi.cast("volatile uint8_t *", transport.isr_address)[0]
            if isr & ISR_CONFIG_CHANGE:
                os.eventfd_write(fds.config_fd, 1)
            os.eventfd_write(fds.intx_unmask_fd, 1)

    def drain(self) -> None:
        """Forgets what has arrived."""
        for eventfd in self._eventfds:
            eventfd.drain()

    def close(self) -> None:
        """Doing it twice is harmless."""
        self._stack.close()


def share_out(available: int, queues: int) -> list[int]:
    """Vectors for data queues (receive, transmit, receive, ...) when so many are `available` for them: one each, or one
    for each pair, or one for all. Empty when there is none."""
    if available >= queues:
        return [FIRST_QUEUE_VECTOR + queue for queue in range(queues)]
    if available >= queues // 2:
        return [FIRST_QUEUE_VECTOR + queue // 2 for queue in range(queues)]
    return [FIRST_QUEUE_VECTOR] * queues if available >= 1 else []


def require_vector(transport: Transport, what: str, vector: int, granted: int) -> None:
    """Raises VectorRefused unless the device took the vector that it was given (§4.1.5.1.2)."""
    if granted != vector:
        asked, taken = ("no vector" if number == NO_VECTOR else f"vector {number}" for number in (vector, granted))
        raise VectorRefused(
            f"{transport.name}: for {what} the device was given {asked} and took {taken} (§4.1.5.1.2); try INTx"
        )
