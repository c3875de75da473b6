"""Waiting for the driver's doorbell: inside a call, or in an event loop that waits for `fileno`.

The two may be mixed: a wait inside a call ends with nothing asked of the driver, so it then asks anew for the event
loop, and rings a bell of its own, the reminder, for what came meanwhile.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack

from netbridge.datapath._core import ffi, lib
from netbridge.ipc.errors import PortError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Waiting:
    """`native`: the session's `struct nb_client *`; it, the doorbell and the control socket stay the caller's."""

    def __init__(self, native: Any, control_fd: int, driver_doorbell_fd: int) -> None:
        """Raises PortError when the system does not let it watch them."""
        self._native = native
        # `arm` was called, so somebody may be waiting on `fileno`.
        self._armed = False
        try:
            self._watch(control_fd, driver_doorbell_fd)
        except OSError as error:
            raise PortError(f"cannot watch the session: {error.strerror}") from None

    def fileno(self) -> int:
        return self._poller.fileno()

    def frames_wait(self) -> bool:
        """Whether there is a frame to receive."""
        return bool(self._native.rx_active.header.produced != self._native.rx_active_taken)

    def arm(self) -> bool:
        """Asks the driver to ring when a frame comes; False when there is one already."""
        self._doorbell.poll(0)
        try:
            os.eventfd_read(self._reminder)
        except BlockingIOError:
            pass
        self._armed = True
        self._ask_to_ring()
        return not self.frames_wait()

    def wait(self, wanted: int, deadline: float | None) -> bool:
        """Waits for what is wanted (NB_WAIT_ bits) or for a word on the control socket; False when the deadline, on the
        monotonic clock, has passed. Raises PortError."""
        timeout_ms = -1
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            timeout_ms = min(int(left * 1000) + 1, 1 << 30)
        found = lib.nb_client_wait(self._native, wanted | lib.NB_WAIT_CONTROL, timeout_ms)
        if found & lib.NB_WAIT_FAILED:
            raise PortError(f"cannot wait for the driver: {os.strerror(ffi.errno)}")
        if self._armed:
            # It may have withdrawn the wish to be woken, too.
            self._ask_to_ring()
            if self.frames_wait():
                os.eventfd_write(self._reminder, 1)
        return True

    def close(self) -> None:
        self._stack.close()

    def _watch(self, control_fd: int, driver_doorbell_fd: int) -> None:
        with ExitStack() as stack:
            # A copy, since this object closes what it has.
            self._doorbell = stack.enter_context(select.epoll.fromfd(os.dup(driver_doorbell_fd)))
            self._poller = stack.enter_context(select.epoll())
            self._poller.register(control_fd, select.EPOLLIN)
            # Makes `fileno` readable for frames that the driver rang no bell for.
            self._reminder = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._reminder)
            self._poller.register(self._reminder, select.EPOLLIN)
            self._poller.register(self._doorbell.fileno(), select.EPOLLIN)
            if lib.nb_client_watch(self._native, control_fd) == lib.NB_WATCH_FAILED:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            self._stack = stack.pop_all()

    def _ask_to_ring(self) -> None:
        self._native.rx_active.header.wake = 1
        # It has the full fence that must stand between asking and looking; that it may ring the driver does no harm.
        lib.nb_client_flush(self._native)
