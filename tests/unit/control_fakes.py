"""The device's side of a control queue, a split one in a FakeDma's memory: it reads commands, keeps them, and answers.

The driver notifies by writing to memory, which nobody here could see; so the device is told by what stands between the
driver and the core: `watched` wraps the core for tests.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from netbridge.datapath._core import lib
from netbridge.virtio.interrupts import InterruptMode
from netbridge.virtio.net import NetDevice
from tests.unit.virtio_fakes import IOVA, FakeDma, FakeTransport, NetModel, mask_of

OK, ERR = 0, 1
CONTROL = mask_of(
    *("VERSION_1", "ACCESS_PLATFORM", "MAC", "STATUS", "MRG_RXBUF"),
    *("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "CTRL_GUEST_OFFLOADS", "GUEST_ANNOUNCE"),
)


class ControlDevice:
    """Answers what comes in queue `number` of `model`. `received` are the commands, as bytes. Switches for the answers
    that follow: `answer` the byte, `written` and `head` what the used ring says (None: the truth), `silent` none at
    all, `delay_s` from a thread and so much later, `config_changes` how often the vector rings before."""

    def __init__(self, model: NetModel, dma: FakeDma, number: int = 2) -> None:
        self._model, self._dma, self._number = model, dma, number
        self._taken = 0
        self.received: list[bytes] = []
        self.answer: int | Callable[[bytes], int] = OK
        self.written: int | None = None
        self.head: int | None = None
        self.silent = False
        self.delay_s = 0.0
        self.config_changes = 0
        self.ring: Callable[[], None] = lambda: None
        self._thread: threading.Timer | None = None

    def reset(self) -> None:
        self._taken = 0

    def _at(self, iova: int, size: int) -> memoryview:
        (block,) = self._dma.open
        return block.view[iova - IOVA : iova - IOVA + size]

    def notified(self) -> None:
        """The driver has published something."""
        for _ in range(self.config_changes):
            self.ring()
        if self.delay_s:
            self._thread = threading.Timer(self.delay_s, self._serve)
            self._thread.start()
        else:
            self._serve()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        queue = self._model.queues[self._number]
        (available,) = struct.unpack("<H", self._at(queue.driver_area + 2, 2))
        while self._taken != available:
            slot = self._taken % queue.size
            (head,) = struct.unpack("<H", self._at(queue.driver_area + 4 + 2 * slot, 2))
            command, answer_at = b"", 0
            following: int | None = head
            while following is not None:
                iova, length, flags, successor = struct.unpack(
                    "<QIHH", self._at(queue.descriptors + 16 * following, 16)
                )
                if flags & 2:
                    assert length == 1, "an answer is one byte"
                    answer_at = iova
                else:
                    assert not answer_at, "what is read comes before what is written"
                    command += bytes(self._at(iova, length))
                following = successor if flags & 1 else None
            assert answer_at, "there is no room for an answer"
            self.received.append(command)
            if self.silent:
                return
            answer = self.answer(command) if callable(self.answer) else self.answer
            self._at(answer_at, 1)[0] = answer
            said = (head if self.head is None else self.head, 1 if self.written is None else self.written)
            self._at(queue.device_area + 4 + 8 * slot, 8)[:] = struct.pack("<II", *said)
            self._taken = (self._taken + 1) % (1 << 16)
            self._at(queue.device_area + 2, 2)[:] = struct.pack("<H", self._taken)
            self.ring()


def watched(device: ControlDevice) -> Any:
    """The core as netbridge.virtio.control sees it, with `device` notified whenever a command is submitted."""

    class Watched:
        nb_control_poll = lib.nb_control_poll

        @staticmethod
        def nb_control_submit(*arguments: Any) -> int:
            code: int = lib.nb_control_submit(*arguments)
            if code == 0:
                device.notified()
            return code

    return Watched


def ringer(fd: int) -> Callable[[], None]:
    """Rings this eventfd."""
    return lambda: os.eventfd_write(fd, 1)


class Bench:
    """A network device in service, and the device's side of its control queue."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        offered: int = CONTROL,
        *,
        model: NetModel | None = None,
        control_number: int = 2,
        deadline_s: float = 1.0,
        **options: object,
    ) -> None:
        self.model = model or NetModel()
        self.model.offered = offered
        self.transport = FakeTransport(self.model)
        self.dma = FakeDma()
        self.net = NetDevice(self.transport, self.dma, control_deadline_s=deadline_s, **options)  # type: ignore[arg-type]
        self.device = ControlDevice(self.model, self.dma, control_number)
        fds = self.net.interrupts
        self.device.ring = ringer(fds.config_fd if fds.mode is InterruptMode.MSIX else fds.intx_fd)
        patch.setattr("netbridge.virtio.control.lib", watched(self.device))

    def start(self) -> None:
        self.device.reset()
        self.net.configure()
        self.net.start()
