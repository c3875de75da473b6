"""Structured logs on stderr: a line each, an event's name and what belongs to it as key=value (logfmt).

Without CAP_LOG_WRITE nothing is logged; the error that ends the process is printed by the command line all the same.
"""

from __future__ import annotations

import sys
import time

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:/+,@")
# As in JSON, but without its module: the driver process has little memory.
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}


class Log:
    """`log("client_ready", uid=1000)` writes `netbridge: 12.345 client_ready uid=1000`; the time is CLOCK_MONOTONIC in
    seconds, as in the kernel's log."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, event: str, **fields: object) -> None:
        if not self.enabled:
            return
        words = [f"netbridge: {time.monotonic():.3f} {event}", *(f"{k}={_quoted(v)}" for k, v in fields.items())]
        # One write: lines of two processes on one stream stay whole.
        try:
            sys.stderr.write(" ".join(words) + "\n")
            sys.stderr.flush()
        except BlockingIOError:
            pass  # somebody made it non-blocking, and nobody reads: this line is lost
        except OSError:
            # Whoever read it is gone; that must not end a driver.
            self.enabled = False


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else f'"{"".join(_ESCAPES.get(c) or _visible(c) for c in text)}"'


def _visible(character: str) -> str:
    return character if character.isprintable() else f"\\u{ord(character):04x}"
