"""SIGTERM and SIGINT as something an event loop can wait for."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopping:
    """Readable once SIGTERM or SIGINT has come; `received` is the signal's number, 0 before."""

    def __init__(self, readable: socket.socket) -> None:
        self._readable = readable
        self.received = 0

    def fileno(self) -> int:
        return self._readable.fileno()

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Turns SIGTERM and SIGINT into a readable fd while the body runs. Main thread only."""
    readable, written = socket.socketpair()
    with readable, written:
        written.setblocking(False)
        stopping = Stopping(readable)
        before = {number: signal.signal(number, stopping.note) for number in (signal.SIGTERM, signal.SIGINT)}
        wakeup = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield stopping
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
