"""Stops a command, with all that it has started, where it stands."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def send_signal(send: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        send(target, number)
    except ProcessLookupError:
        pass


def stop_with_children(first: int) -> list[int]:
    """Stop a process and its descendants, those in sessions of their own, too; returns them once they stand still."""
    stopped: list[int] = []
    fresh = [first]
    while fresh:
        for pid in fresh:
            send_signal(os.kill, pid, 19)  # SIGSTOP
        stopped += fresh
        # Only what stands still cannot start another process.
        while any(_stat(pid)[0] not in "TtZX" for pid in fresh):
            time.sleep(0.001)
        everybody = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        fresh = [pid for pid in everybody if pid not in stopped and _stat(pid)[1] in stopped]
    return stopped


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; "X" when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)
