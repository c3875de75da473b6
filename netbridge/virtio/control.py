"""The control queue: one command to the device, one answer, within a deadline (virtio 1.3 §5.1.6.5).

The exchange goes through the C core's virtqueue, with the checks that frames have. It is waited for here, on the
configuration vector's eventfd, which nobody's interrupt is taken from: a configuration change that comes meanwhile is
still there for whoever looks after those (interrupts.py).
"""

from __future__ import annotations

import time

from netbridge.datapath._core import ffi, lib
from netbridge.virtio.commands import Command
from netbridge.virtio.dma import Piece
from netbridge.virtio.errors import ControlRefused, ControlTimeout, Misbehaved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from netbridge.virtio.queues import VirtQueue
    from netbridge.virtio.transport import Transport

CONTROL_QUEUE_SIZE = 16  # entries
CHAIN = 2  # segments: a command, and room for the answer
COMMAND_BYTES = 4096  # more than the longest command: RSS with its table
DEADLINE_S = 2.0

OK, ERR = 0, 1
UNANSWERED = 0xFF  # neither of them


class ControlQueue:
    """Carries commands over `queue`. `memory` is private to it: COMMAND_BYTES, then room for the answer. `wait` returns
    when the device may have said something, or after so many seconds. All stay the caller's."""

    def __init__(
        self, name: str, queue: VirtQueue, memory: Piece, wait: Callable[[float], None], deadline_s: float = DEADLINE_S
    ) -> None:
        self._name = name
        self._queue = queue
        self._memory = memory
        self._view = ffi.buffer(ffi.cast("uint8_t *", memory.address), memory.size)
        self._wait = wait
        self._deadline_s = deadline_s
        self._written = ffi.new("uint32_t *")

    @staticmethod
    def memory_bytes() -> int:
        return COMMAND_BYTES + 1

    def carry(self, command: Command) -> None:
        """Returns when the device has done it. Raises ControlRefused when it says no. When it says nothing
        (ControlTimeout), or what no device may (Misbehaved), it must be reset."""
        data = command.pack()
        if len(data) > COMMAND_BYTES:
            raise ValueError(f"{command.name}: a command of {len(data)} bytes, {COMMAND_BYTES} at most")
        self._view[: len(data)] = data
        self._view[COMMAND_BYTES : COMMAND_BYTES + 1] = bytes([UNANSWERED])
        iova = self._memory.iova
        if lib.nb_control_submit(self._queue.handle, iova, len(data), iova + COMMAND_BYTES, 1):
            raise ControlTimeout(
                f"{self._name}: {command.name}: the control queue is still waiting for an earlier answer"
            )
        self._await(command)
        answer = self._view[COMMAND_BYTES][0]
        # Of a buffer nothing beyond the bytes that the device says it has written may be looked at (§2.7.8.2).
        if self._written[0] != 1 or answer not in (OK, ERR):
            raise Misbehaved(
                f"{self._name}: {command.name}: the device answered with {self._written[0]} bytes, the first of them "
                f"{answer}, where one byte is expected, {OK} (done) or {ERR} (refused)"
            )
        if answer == ERR:
            raise _refusal(self._name, command)

    def _await(self, command: Command) -> None:
        deadline = time.monotonic() + self._deadline_s
        while (came := lib.nb_control_poll(self._queue.handle, self._written)) == 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ControlTimeout(
                    f"{self._name}: {command.name}: the device did not answer on its control queue within "
                    f"{self._deadline_s:g} s"
                )
            self._wait(left)
        if came < 0:
            raise Misbehaved(f"{self._name}: {command.name}: the device broke its control queue's used ring")


class QueuelessControl:
    """Carries commands where the transport answers them itself. `transport` stays the caller's."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def carry(self, command: Command) -> None:
        """As a ControlQueue does. Raises ControlRefused, and whatever the transport does."""
        if self._transport.answer(command.pack()) != OK:
            raise _refusal(self._transport.name, command)


def _refusal(name: str, command: Command) -> ControlRefused:
    return ControlRefused(f"{name}: the device refuses {command.name}")
