"""Watches a guest's serial console: keeps its last lines, knows a panic when it sees one, and never lets it fill up.

QEMU itself writes the whole of it to a file; what passes here is for looking at while it happens.
"""

from __future__ import annotations

import collections
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable

PANIC = re.compile(r"Kernel panic - not syncing.*|kernel BUG at .*")
TROUBLE = re.compile(
    r"Kernel panic|Oops:|\bBUG:|kernel BUG at|general protection fault|WARNING: (CPU|possible|suspicious)"
    r"|INFO: task .* blocked|rcu.*stall|soft lockup"
)
"""What a healthy kernel never prints."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Za-z0-9]|[\x00-\x08\x0b-\x1f\x7f]")
LINES = 2000
LINE_LENGTH = 4096


class Console:
    """The console on a connected socket, which it owns. `on_panic` gets the panic's line, from a thread."""

    def __init__(self, channel: socket.socket, on_panic: Callable[[str], None] = lambda _: None):
        self.last_activity = time.monotonic()
        self.size = 0
        """Bytes that have come so far."""
        self.trouble: list[str] = []
        """Lines that speak of a fault of the kernel, the first hundred of them."""
        self._on_panic = on_panic
        self._channel = channel
        self._changed = threading.Condition()
        self._lines: collections.deque[str] = collections.deque(maxlen=LINES)
        self._count = 0
        self._partial = b""
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="console reader", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = self._channel.recv(1 << 16)
            except OSError:
                data = b""
            with self._changed:
                if data:
                    self.last_activity = time.monotonic()
                    self.size += len(data)
                    panics = self._take(data)
                else:
                    panics = self._take(b"\n") if self._partial else []
                self._changed.notify_all()
            for line in panics:
                self._on_panic(line)
            if not data:
                with self._changed:
                    self._ended = True
                    self._changed.notify_all()
                return

    def _take(self, data: bytes) -> list[str]:
        *whole, self._partial = (self._partial + data).split(b"\n")
        while len(self._partial) > LINE_LENGTH:
            whole.append(self._partial[:LINE_LENGTH])
            self._partial = self._partial[LINE_LENGTH:]
        panics = []
        for raw in whole:
            line = CONTROL.sub("", raw[: 4 * LINE_LENGTH].decode(errors="replace"))
            self._lines.append(line)
            self._count += 1
            if TROUBLE.search(line) and len(self.trouble) < 100:
                self.trouble.append(line)
            if PANIC.search(line):
                panics.append(line)
        return panics

    def lines(self) -> list[str]:
        """The last lines, at most LINES of them, with a last one that is not complete yet."""
        with self._changed:
            lines = list(self._lines)
            if self._partial:
                lines.append(CONTROL.sub("", self._partial.decode(errors="replace")))
            return lines

    def tail(self, count: int = 30) -> str:
        return "\n".join(self.lines()[-count:])

    def wait_for(self, pattern: str | re.Pattern[str], timeout: float) -> re.Match[str] | None:
        """The first match among the lines kept and those to come; None when none comes in time."""
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout
        seen = 0
        with self._changed:
            while True:
                fresh = min(self._count - seen, len(self._lines))
                for line in list(self._lines)[len(self._lines) - fresh :]:
                    if match := wanted.search(line):
                        return match
                seen = self._count
                if self._ended or not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    return None

    def wait_ended(self, timeout: float) -> bool:
        """Whether the last of it has come within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout)

    def write(self, data: bytes) -> None:
        """Type something at the console."""
        self._channel.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._channel.close()
