"""Memory that two processes share: sealed memfds, and the checks a receiver makes before it maps one.

A memfd that can shrink under its reader is a SIGBUS waiting to happen, so nothing is mapped here that is not sealed
against it: by the driver when it makes the region, and once more by the client when it gets one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat

from netbridge.ipc.errors import BadGeometry
from netbridge.ipc.geometry import RING_NAMES, Geometry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Neither size nor seals can change any more.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Mappings that are there stay writable, new ones are not, and no hole can be punched (linux/fcntl.h; not in `fcntl`).
SEAL_FUTURE_WRITE = 0x10


def new_memfd(name: str, size: int) -> int:
    """A new memfd of `size` zero bytes, not sealed yet. The caller owns the fd. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # And no ftruncate: a driver in its sandbox has none, so that it cannot cut short what others have mapped.
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def sealed_memfd(name: str, size: int) -> int:
    """The same, which can neither grow nor shrink. Raises OSError."""
    fd = new_memfd(name, size)
    try:
        seal(fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int, *, read_only: bool = False) -> None:
    """Adds the seals a shared memfd must have, unless it has been sealed for good already. `read_only`: whoever maps it
    from now on can only read; mappings that exist keep what they may. Raises OSError."""
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | (SEAL_FUTURE_WRITE if read_only else 0))


def discard(memory: object) -> None:
    """Gives the pages of a mapped memfd back to the system, also where another process has mapped it, too, which sees
    zeroes then. Does nothing for one that was sealed with `read_only`: there the kernel has no way to."""
    assert isinstance(memory, mmap.mmap)
    try:
        memory.madvise(mmap.MADV_REMOVE)
    except PermissionError:
        pass


def verify_sealed(fd: int, size: int, what: str, *, read_only: bool = False) -> None:
    """Checks that `fd` is a memfd of exactly `size` bytes whose size can never change and, if `read_only`, that nobody
    can map for writing any more. Raises BadGeometry."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadGeometry(f"{what}: not a memfd")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise BadGeometry(f"{what}: not a memfd that can be sealed") from None
    missing = [name for name, one in _SEAL_NAMES if not seals & one]
    if missing:
        raise BadGeometry(f"{what}: not sealed ({', '.join(missing)} missing), its size could change under a reader")
    if read_only and not seals & SEAL_FUTURE_WRITE:
        raise BadGeometry(f"{what}: not sealed (F_SEAL_FUTURE_WRITE missing), it could be mapped for writing")
    # Only now: before the seals are known to be there, a size proves nothing.
    if os.fstat(fd).st_size != size:
        raise BadGeometry(f"{what}: {os.fstat(fd).st_size} bytes instead of {size}")


_SEAL_NAMES = (
    ("F_SEAL_SHRINK", fcntl.F_SEAL_SHRINK),
    ("F_SEAL_GROW", fcntl.F_SEAL_GROW),
    ("F_SEAL_SEAL", fcntl.F_SEAL_SEAL),
)


class Mapping:
    """A shared mapping of a whole memfd. Owns the mapping, not the fd."""

    def __init__(self, fd: int, size: int, *, writable: bool = True) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        self._pointer: tuple[Any, Any] | None = None

    def pointer(self, ffi: Any) -> Any:
        """The mapping's start as a `uint8_t *` of this cffi `ffi`; good until `close`."""
        if self._pointer is None:
            array = ffi.from_buffer("uint8_t[]", self.memory)
            self._pointer = (ffi, array)
        return self._pointer[0].cast("uint8_t *", self._pointer[1])

    def close(self) -> None:
        """Unmaps. Every pointer got from here is dead afterwards. Raises BufferError while a memoryview of `memory`
        lives."""
        if self._pointer is not None:
            ffi, array = self._pointer
            self._pointer = None
            ffi.release(array)
        self.memory.close()


def place_rings(ffi: Any, base: Any, geometry: Geometry, target: Any) -> None:
    """Fills the four `struct nb_ring_place` members of `target` (an nb_pump_config or an nb_client) for a rings region
    mapped at the `uint8_t *` `base`."""
    for name, ring in zip(RING_NAMES, geometry.rings, strict=True):
        place = getattr(target, name)
        place.header = ffi.cast("struct nb_ring_header *", base + ring.offset)
        place.slots = ring.slots
