"""A deadline that an event loop can wait for: a timerfd.

`os.timerfd_create` is there from Python 3.13 on; before that libc is asked through ctypes.
"""

from __future__ import annotations

import os
import sys
import time

_CLOCK = time.CLOCK_MONOTONIC
# TFD_NONBLOCK and TFD_CLOEXEC are defined as these.
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

if sys.version_info >= (3, 13):

    def _create() -> int:
        return os.timerfd_create(_CLOCK, flags=_FLAGS)

    def _set(fd: int, seconds: float) -> None:
        os.timerfd_settime(fd, initial=seconds)

else:
    import ctypes

    class _Timespec(ctypes.Structure):
        _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    class _Itimerspec(ctypes.Structure):
        _fields_ = (("interval", _Timespec), ("value", _Timespec))

    _libc = ctypes.CDLL(None, use_errno=True)

    def _create() -> int:
        fd = int(_libc.timerfd_create(_CLOCK, _FLAGS))
        if fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        return fd

    def _set(fd: int, seconds: float) -> None:
        value = _Timespec(int(seconds), int(seconds % 1 * 1e9))
        if _libc.timerfd_settime(fd, 0, ctypes.byref(_Itimerspec(_Timespec(0, 0), value)), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")


class Deadline:
    """Readable (`fileno`) once the time that `arm` was given has passed."""

    def __init__(self) -> None:
        self._fd = _create()

    def fileno(self) -> int:
        return self._fd

    def arm(self, seconds: float) -> None:
        """Expires `seconds` (more than 0) from now; an earlier deadline is forgotten."""
        _set(self._fd, seconds)

    def disarm(self) -> None:
        _set(self._fd, 0)

    def expired(self) -> bool:
        """Whether the time has passed since the last call or `arm`; makes the fd unreadable again."""
        try:
            return bool(os.read(self._fd, 8))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._fd)
