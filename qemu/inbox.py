"""Frames that have come and that nobody has asked for yet."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

QUEUE = 1 << 19
"""Frames that wait for a reader before the oldest are dropped (and counted in `overflowed`)."""


class Frame(NamedTuple):
    """A frame off the wire and when it was taken off, in nanoseconds of the monotonic clock."""

    data: bytes
    time_ns: int


class Inbox:
    """Filled by one thread and emptied by any; readable, for poll(2), while frames wait in it."""

    def __init__(self) -> None:
        self.received = self.overflowed = 0
        self._closed = False
        self._frames: collections.deque[Frame] = collections.deque()
        self._arrived = threading.Condition()
        self._readable = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Not to be read from."""
        return self._readable

    def add(self, frames: Sequence[Frame]) -> None:
        with self._arrived:
            if not self._frames:
                os.eventfd_write(self._readable, 1)
            # Counted with the lock held: whoever has seen the number finds the frames, and the other way round.
            self.received += len(frames)
            self._frames.extend(frames)
            while len(self._frames) > QUEUE:
                self._frames.popleft()
                self.overflowed += 1
            self._arrived.notify_all()

    def take(self, timeout: float | None = 0.0, limit: int = QUEUE) -> list[Frame]:
        """The frames that have come, at most `limit`; waits up to `timeout` seconds (None: for ever) for a first."""
        with self._arrived:
            if not self._frames and timeout != 0.0:
                self._arrived.wait_for(lambda: self._frames or self._closed, timeout)
            if len(self._frames) <= limit:
                frames = list(self._frames)
                self._frames.clear()
            else:
                frames = [self._frames.popleft() for _ in range(limit)]
            if not self._frames and not self._closed:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._readable)
            return frames

    def close(self) -> None:
        """Who waits for a frame waits no longer; what has come can still be taken."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        os.close(self._readable)
