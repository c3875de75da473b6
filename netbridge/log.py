"""Structured logs on stderr: a line each, an event's name and what belongs to it as key=value (logfmt).

Without CAP_LOG_WRITE nothing is logged; the error that ends the process is printed by the command line all the same.
"""

from __future__ import annotations

import json
import sys
import time

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:/+,@")


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
        sys.stderr.write(" ".join(words) + "\n")
        sys.stderr.flush()


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text)
