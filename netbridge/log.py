"""Structured logs on stderr: a line each, an event's name and what belongs to it as key=value (logfmt).

Without CAP_LOG_WRITE nothing is logged; the error that ends the process is printed by the command line all the same.
"""

from __future__ import annotations

import select
import sys
import time

MOST_A_SECOND = 20
"""Lines of one event. Devices and clients cause events, and may do so without end."""
_PIPE_BUF = 4096  # what a pipe with any room takes without making the writer wait: pipe(7)
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:/+,@")
# As in JSON, but without its module: the driver process has little memory.
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}


class Log:
    """`log("client_ready", uid=1000)` writes `netbridge: 12.345 client_ready uid=1000`; the time is CLOCK_MONOTONIC in
    seconds, as in the kernel's log.

    Nobody waits for the log. Lines are left out when stderr's reader does not read, or when there were MOST_A_SECOND of
    the event within the second; the next one that is written says how many, as `left_out=`."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._second = 0
        self._lines: dict[str, int] = {}  # of each event, within that second
        self._left_out = 0

    def __call__(self, event: str, **fields: object) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        if self._too_many(event, int(now)) or not _has_room():
            self._left_out += 1
            return
        if self._left_out:
            fields = {"left_out": self._left_out, **fields}
        line = " ".join([f"netbridge: {now:.3f} {event}", *(f"{k}={_quoted(v)}" for k, v in fields.items())])
        if len(line.encode(errors="replace")) >= _PIPE_BUF:
            line = f"{line[: _PIPE_BUF // 4 - 4]} ..."
        # One write: lines of two processes on one stream stay whole.
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except BlockingIOError:  # somebody made it non-blocking
            self._left_out += 1
        except OSError:
            # Whoever read it is gone; that must not end a driver.
            self.enabled = False
        else:
            self._left_out = 0

    def _too_many(self, event: str, second: int) -> bool:
        if second != self._second:
            self._second = second
            self._lines.clear()
        self._lines[event] = self._lines.get(event, 0) + 1
        return self._lines[event] > MOST_A_SECOND


def _has_room() -> bool:
    """Whether a line can be written to stderr without waiting for its reader."""
    try:
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is no file, or closed: what writes finds out
        return True
    return bool(poll.poll(0))


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else f'"{"".join(_ESCAPES.get(c) or _visible(c) for c in text)}"'


def _visible(character: str) -> str:
    return character if character.isprintable() else f"\\u{ord(character):04x}"
