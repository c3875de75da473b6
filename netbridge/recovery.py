"""Recovery: the device is reset under a session that goes on.

Where it was asked for (`--queue-reset`), a transmit queue that does not move is reset alone if the device can
(RING_RESET), and the others go on; the whole device only where that fails or does not help.

The client keeps its connection, its memory and the buffers it holds. What the device held is taken from it: receive
buffers are given to it again, frames that it had not sent are acknowledged to the client and counted as lost
(`drops.device_reset`). What the client had asked of the device is asked again. How long that took is in the counters.

A device that comes back other than it was (fewer queue pairs, features withdrawn, a smaller MTU) cannot go on with a
session that was promised more; nor can one that fails again and again without having moved a frame.
"""

from __future__ import annotations

import time
from enum import Enum

import vfio
from netbridge.datapath._core import ffi, lib
from netbridge.errors import DeviceError
from netbridge.virtio import features
from netbridge.virtio.errors import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from netbridge.log import Log
    from netbridge.session import Session
    from netbridge.station import Station
    from netbridge.virtio.net import NetDevice

MOST_ATTEMPTS = 3  # in a row, without a frame in between


class Cause(Enum):
    """Why a device is reset. The value is its counter's place."""

    NEEDS_RESET = lib.NB_RECOVERY_NEEDS_RESET
    FAULT = lib.NB_RECOVERY_FAULT
    STALLED = lib.NB_RECOVERY_STALLED
    CONTROL = lib.NB_RECOVERY_CONTROL
    CONFIG = lib.NB_RECOVERY_CONFIG


class Recovery:
    """Recovers `net` for one session after the other. Everything stays the caller's."""

    def __init__(self, net: NetDevice, counters: Any, log: Log, *, queue_reset: bool = False) -> None:
        self._net = net
        self._counters = counters
        self._log = log
        self._queue_reset = queue_reset
        self._in_a_row = 0
        self._frames = -1

    def attempt(self, session: Session, station: Station, cause: Cause, offloads: int) -> bool:
        """Resets the device and puts it back into service; whether it is. If not, the session must end, and the device
        is out of service. Raises Gone when the device is."""
        began = time.monotonic_ns()
        frames = self._counters.packets_rx + self._counters.packets_tx
        if frames != self._frames:
            self._in_a_row = 0
        self._frames = frames
        if self._try_queue(session, cause, began):
            return True
        while self._in_a_row < MOST_ATTEMPTS:
            self._in_a_row += 1
            try:
                lost = self._attempt(session, station, offloads)
            except Gone:
                raise
            except (DeviceError, vfio.VfioError) as error:
                self._log("recovery_failed", cause=cause.name.lower(), attempt=self._in_a_row, why=error)
                continue
            self._counters.resets += 1
            self._recovered(cause, "device", lost, began)
            return True
        self._counters.recoveries_failed += 1
        return False

    def _try_queue(self, session: Session, cause: Cause, began: int) -> bool:
        """Resets the queue that does not move, unless that was done and it has sent nothing since."""
        if cause is not Cause.STALLED or not self._queue_reset or not self._net.negotiation.has(features.RING_RESET):
            return False
        try:
            lost = session.reset_stalled_queue()
        except Gone:
            raise
        except (DeviceError, vfio.VfioError) as error:
            self._log("queue_reset_failed", why=error)
            return False
        if lost is None:
            return False
        self._counters.queue_resets += 1
        self._recovered(cause, "queue", lost, began)
        return True

    def _recovered(self, cause: Cause, what: str, lost: int, began: int) -> None:
        took = time.monotonic_ns() - began
        self._counters.recoveries[cause.value] += 1
        lib.nb_histogram_add(ffi.addressof(self._counters, "recovery_ns"), took)
        self._log("recovered", cause=cause.name.lower(), reset=what, lost=lost, us=took // 1000)

    def _attempt(self, session: Session, station: Station, offloads: int) -> int:
        lost = 0
        if session.is_salvaged:
            self._net.reset()
        else:
            self._net.halt()
            lost = session.salvage()
        self._net.configure(offloads)
        session.resume()
        self._net.start()
        station.begin()
        return lost
