"""One session's shared memory and doorbells, as the driver's end owns them.

A session is made before a client comes, offered to exactly one, and never to a second: whoever saw WELCOME may have
kept a mapping.
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack

from netbridge.ipc.geometry import (
    DEFAULT_CONTINUATION_OFFSET,
    DEFAULT_HEADROOM,
    Geometry,
    RegionGeometry,
    plan_geometry,
)
from netbridge.ipc.regions import Mapping, place_rings, seal, sealed_memfd, verify_sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

LAST_SESSION = 0xFFFF


class SharedMemory(Protocol):
    """What is needed of a region's memory (a `vfio.Memory.memfd` has it)."""

    @property
    def fd(self) -> int: ...

    @property
    def size(self) -> int: ...


def next_session(number: int) -> int:
    """The session number that follows: 1 to 65535, then 1 again (0 is no session)."""
    return number % LAST_SESSION + 1


class PortSession:
    """Owns the rings region (mapped here) and the two doorbells. The RX and TX memory stays the caller's, mapped by it
    already: it must outlive the session, and be replaced before the next one. Close this after the pump is gone."""

    def __init__(
        self,
        number: int,
        rx: SharedMemory,
        tx: SharedMemory,
        *,
        rx_count: int,
        tx_count: int,
        stride: int,
        rx_stride: int | None = None,
        headroom: int = DEFAULT_HEADROOM,
        continuation_offset: int = DEFAULT_CONTINUATION_OFFSET,
        rx_limit: int | None = None,
        rx_read_only: bool = False,
        tx_largest: int = 0,
        tx_pieces: int = 1,
        offloads: int = 0,
        queue_pairs: int = 1,
    ) -> None:
        """`rx_stride`: of the RX buffers, where it is another than `stride`. `rx_limit`, `tx_largest`, `tx_pieces`: as
        for `plan_geometry`. `offloads` (a bit set of `Offload`) and `queue_pairs` are what the device has for it.
        `rx_read_only`: a client can only read received frames; for this the RX memory must come unsealed, so that it
        can be sealed here in a way that leaves the mapping there is writable.
        Raises BadGeometry when the numbers or the memory's seals do not hold, OSError when the system gives no more."""
        if not 1 <= number <= LAST_SESSION:
            raise ValueError(f"session number {number} is not between 1 and {LAST_SESSION}")
        self.number = number
        self.offloads = offloads
        self.queue_pairs = queue_pairs
        self.geometry: Geometry = plan_geometry(
            RegionGeometry(rx.size, rx_count, rx_stride or stride, rx_read_only),
            RegionGeometry(tx.size, tx_count, stride),
            headroom=headroom,
            continuation_offset=continuation_offset,
            rx_limit=rx_limit,
            tx_largest=tx_largest,
            tx_pieces=tx_pieces,
        )
        seal(rx.fd, read_only=rx_read_only)
        seal(tx.fd)
        verify_sealed(rx.fd, rx.size, "rx region", read_only=rx_read_only)
        verify_sealed(tx.fd, tx.size, "tx region")
        self._rx, self._tx = rx, tx
        with ExitStack() as stack:
            self._rings_fd = sealed_memfd("netbridge-rings", self.geometry.rings_size)
            stack.callback(os.close, self._rings_fd)
            self.rings = Mapping(self._rings_fd, self.geometry.rings_size)
            stack.callback(self.rings.close)
            self.client_doorbell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self.client_doorbell_fd)
            # O_NONBLOCK belongs to the eventfd, not to the process: a client that had this one could clear it, fill the
            # counter, and let the driver sleep for ever. So it gets an epoll instance that watches it, and only that.
            self.driver_doorbell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self.driver_doorbell_fd)
            self._watched_doorbell = stack.enter_context(select.epoll())
            self._watched_doorbell.register(self.driver_doorbell_fd, select.EPOLLIN | select.EPOLLET)
            self._stack = stack.pop_all()

    def fds(self) -> tuple[int, ...]:
        """What WELCOME carries, in the order of `messages.FD_NAMES`."""
        doorbells = (self.client_doorbell_fd, self._watched_doorbell.fileno())
        return (self._rings_fd, self._rx.fd, self._tx.fd, *doorbells)

    def place_rings(self, ffi: Any, config: Any) -> None:
        """Fills rx_active, rx_free, tx_active and tx_done of an nb_pump_config; good until `close`."""
        place_rings(ffi, self.rings.pointer(ffi), self.geometry, config)

    def close(self) -> None:
        """Closes and unmaps what is owned. More than once does no harm."""
        self._stack.close()

    def __enter__(self) -> PortSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
