"""The driver's offer, checked before it is mapped: regions, rings and doorbells, and the C core's view of them."""

from __future__ import annotations

import os
import select
from contextlib import ExitStack

from netbridge.datapath._core import ffi, lib
from netbridge.ipc.errors import BadGeometry, PortError
from netbridge.ipc.messages import Welcome
from netbridge.ipc.regions import Mapping, place_rings, verify_sealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Mappings that something still looks into after its client was closed.
_KEPT_MAPPED: list[Mapping] = []


class SessionMemory:
    """What a session's WELCOME brought, mapped. `native`: the `struct nb_client *` (netbridge/datapath/core/api.h),
    good until `close`."""

    def __init__(self, welcome: Welcome, fds: list[int]) -> None:
        """`fds` stay the caller's: open as long as this is. Raises BadGeometry when the offer does not hold together,
        PortError when the system does not map it."""
        geometry = welcome.geometry
        rings_fd, rx_fd, tx_fd, client_doorbell_fd, driver_doorbell_fd = fds
        geometry.check()
        sizes = (geometry.rings_size, geometry.rx.size, geometry.tx.size)
        for fd, size, what in zip((rings_fd, rx_fd, tx_fd), sizes, ("rings", "rx", "tx"), strict=True):
            verify_sealed(fd, size, f"{what} region")
        if os.get_blocking(client_doorbell_fd):
            raise BadGeometry("client doorbell: not opened with O_NONBLOCK")
        _must_be_epoll(driver_doorbell_fd)
        with ExitStack() as stack:
            mappings = []
            for fd, size, writable in (
                (rings_fd, geometry.rings_size, True),
                (rx_fd, geometry.rx.size, not geometry.rx.read_only),
                (tx_fd, geometry.tx.size, True),
            ):
                try:
                    mapping = Mapping(fd, size, writable=writable)
                except OSError as error:
                    raise PortError(f"cannot map {size} bytes of the driver's memory: {error.strerror}") from None
                stack.callback(mapping.close)
                mappings.append(mapping)
            rings, rx, tx = (mapping.pointer(ffi) for mapping in mappings)
            self.native: Any = ffi.new("struct nb_client *")
            native = self.native
            place_rings(ffi, rings, geometry, native)
            native.rx_base, native.tx_base = rx, tx
            native.rx_writable = not geometry.rx.read_only
            native.rx_count, native.tx_count = geometry.rx.buffers, geometry.tx.buffers
            native.rx_stride, native.tx_stride = geometry.rx.stride, geometry.tx.stride
            native.headroom, native.continuation_offset = geometry.headroom, geometry.continuation_offset
            native.tx_largest_frame, native.tx_max_pieces = geometry.tx_largest, geometry.tx_pieces
            native.queue_pairs, native.offloads = welcome.queue_pairs, welcome.offloads
            native.client_doorbell_fd, native.driver_doorbell_fd = client_doorbell_fd, driver_doorbell_fd
            made = lib.nb_client_init(native)
            if made == -1:
                raise BadGeometry("refused by the data path")
            if made < 0:
                raise PortError(f"cannot wait for the driver: {os.strerror(ffi.errno)}")
            stack.pop_all()
        self._mappings = mappings

    def close(self, *, keep_mapped: bool = False) -> None:
        """Unmaps it. `keep_mapped`: somebody still looks into it, whom that would crash."""
        lib.nb_client_close(self.native)
        mappings, self._mappings = self._mappings, []
        if keep_mapped:
            _KEPT_MAPPED.extend(mappings)
        else:
            for mapping in mappings:
                mapping.close()


def _must_be_epoll(doorbell_fd: int) -> None:
    try:
        copy = os.dup(doorbell_fd)  # since what is made of it closes it
    except OSError as error:
        raise PortError(f"cannot look at the driver's doorbell: {error.strerror}") from None
    with select.epoll.fromfd(copy) as doorbell:
        try:
            doorbell.poll(0)
        except OSError as error:
            raise BadGeometry(f"driver doorbell: no epoll instance ({error.strerror})") from None
