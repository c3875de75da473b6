"""Tells a guest that is on its way up from one that does not get on: by what it prints and by what its QEMU does."""

from __future__ import annotations

IDLE_SECONDS = 4.0
"""A guest that was silent and idle for so long while it booted hangs."""
IDLE_SHARE = 0.1
"""Share of one processor below which a guest counts as idle."""
FLOOD_BYTES = 1 << 18
"""What no guest prints while it boots: the whole log of a kernel, of which the console gets little, is 30 KiB."""
LOOK_SECONDS = 0.25
"""How often it is to be looked at."""


class Stuck:
    """Of a guest that has begun to boot at `began`; all times are of the monotonic clock. It may take `timeout` seconds
    at all, and `spin` seconds of processor time without a word on the console."""

    def __init__(self, began: float, timeout: float, spin: float):
        self._began, self._timeout, self._spin = began, timeout, spin
        self._spoke = self._used_then = 0.0
        self._looked: list[tuple[float, float]] = []  # when, and the effort until then, since its last word

    def look(self, now: float, used: float, waited: float, spoke: float, printed: int) -> str | None:
        """What it does instead of coming up; None as long as it may be on its way.

        Its QEMU has used, and waited for, so many seconds of a processor; waiting is an effort, too, or a busy host
        would make every guest look idle. It spoke last at `spoke`, and has printed so many bytes.
        """
        if spoke != self._spoke:
            self._spoke, self._used_then = spoke, used
            self._looked.clear()
        self._looked.append((now, used + waited))
        while self._looked[0][0] < now - IDLE_SECONDS - LOOK_SECONDS:
            self._looked.pop(0)
        span, effort = now - self._looked[0][0], used + waited - self._looked[0][1]
        if span >= IDLE_SECONDS and effort < IDLE_SHARE * span:
            return f"it has been idle and silent for {span:.0f} s"
        if used - self._used_then >= self._spin:
            return f"it has used {self._spin:.0f} s of processor time without a word on the console"
        if printed > FLOOD_BYTES:
            return f"it has flooded its console with {printed >> 10} KiB"
        if now - self._began >= self._timeout:
            return f"its agent did not greet within {self._timeout:g} s"
        return None
