"""Where everything lies in the memory a session shares: plain numbers, and the one check that they hold together.

The driver makes a `Geometry` with `plan_geometry`; the client gets one in WELCOME and believes none of it before
`Geometry.check` has passed. No system call is made here.
"""

from __future__ import annotations

import itertools

from netbridge.ipc._record import NamedTuple
from netbridge.ipc.errors import BadGeometry

RING_HEADER_BYTES = 128
RING_ENTRY_BYTES = 16
RING_ALIGNMENT = 128
PAGE_BYTES = 4096

# A handle has 24 bits for the buffer's index.
MOST_BUFFERS = 1 << 24
MOST_STRIDE = 1 << 20
MOST_PIECES = 64
MOST_REGION_BYTES = 1 << 40
STRIDE_ALIGNMENT = 64
# Room for the shortest frame there is on Ethernet (without its check sequence) must be in every buffer.
LEAST_FRAME_ROOM = 60

DEFAULT_HEADROOM = 64
# 12 bytes in front of the headroom's end: where the device would put its header, a continuation has frame bytes.
DEFAULT_CONTINUATION_OFFSET = 52

RING_NAMES = ("rx_active", "rx_free", "tx_active", "tx_done")


class RingGeometry(NamedTuple):
    """One ring: its header's byte offset in the rings region, and how many entries it holds (a power of two)."""

    offset: int
    slots: int

    @property
    def size(self) -> int:
        return RING_HEADER_BYTES + RING_ENTRY_BYTES * self.slots

    @property
    def end(self) -> int:
        return self.offset + self.size


class RegionGeometry(NamedTuple):
    """`buffers` of `stride` bytes each, one behind the other, in a memfd of `size` bytes. `read_only`: the client
    may map it for reading only."""

    size: int
    buffers: int
    stride: int
    read_only: bool = False


class Geometry(NamedTuple):
    """All of a session's memory. `rx_limit`: RX buffers that the client may hold at one time; further frames are
    dropped until it gives some back. `tx_largest`: bytes of the longest frame that a client may send, in at most
    `tx_pieces` buffers."""

    rings_size: int
    rx_active: RingGeometry
    rx_free: RingGeometry
    tx_active: RingGeometry
    tx_done: RingGeometry
    rx: RegionGeometry
    tx: RegionGeometry
    headroom: int
    continuation_offset: int
    rx_limit: int
    tx_largest: int
    tx_pieces: int

    @property
    def ring_buffers(self) -> tuple[int, int, int, int]:
        """How many buffers can be in each of `rings` at one time."""
        return _ring_buffers(self.rx.buffers, self.tx.buffers)

    @property
    def rings(self) -> tuple[RingGeometry, RingGeometry, RingGeometry, RingGeometry]:
        """In the order of `RING_NAMES`, which is the order on the wire."""
        return (self.rx_active, self.rx_free, self.tx_active, self.tx_done)

    def check(self) -> None:
        """Raises BadGeometry, naming the first number that does not fit."""
        _check_size("rings region", self.rings_size)
        for name, ring, buffers in zip(RING_NAMES, self.rings, self.ring_buffers, strict=True):
            self._check_ring(name, ring, buffers)
        by_offset = sorted(zip(self.rings, RING_NAMES, strict=True), key=lambda pair: pair[0].offset)
        for (ring, name), (following, following_name) in itertools.pairwise(by_offset):
            if ring.end > following.offset:
                raise BadGeometry(f"rings {name} and {following_name} overlap")
        for name, region in (("rx", self.rx), ("tx", self.tx)):
            self._check_region(name, region)
        if self.continuation_offset > self.headroom:
            raise BadGeometry(f"continuation_offset {self.continuation_offset} is beyond headroom {self.headroom}")
        if self.tx.read_only:
            raise BadGeometry("tx region is read-only: a client could not write the frames it sends")
        if not 1 <= self.rx_limit <= self.rx.buffers:
            raise BadGeometry(f"rx_limit {self.rx_limit} is not between 1 and the {self.rx.buffers} RX buffers")

        if not 1 <= self.tx_pieces <= min(self.tx.buffers, MOST_PIECES):
            raise BadGeometry(
                f"tx_pieces {self.tx_pieces} is not between 1 and {min(self.tx.buffers, MOST_PIECES)}, "
                f"with {self.tx.buffers} TX buffers"
            )
        room = self.tx.stride - self.headroom
        if not room <= self.tx_largest <= room * self.tx_pieces:
            raise BadGeometry(
                f"tx_largest {self.tx_largest} is not between {room} and what {self.tx_pieces} buffers of {room} hold"
            )

    def _check_ring(self, name: str, ring: RingGeometry, buffers: int) -> None:
        if ring.offset < 0 or ring.offset % RING_ALIGNMENT:
            raise BadGeometry(f"ring {name}: offset {ring.offset} is not a multiple of {RING_ALIGNMENT}")
        if not 1 <= ring.slots <= MOST_BUFFERS or ring.slots & (ring.slots - 1):
            raise BadGeometry(f"ring {name}: {ring.slots} slots is no power of two from 1 to {MOST_BUFFERS}")
        if ring.end > self.rings_size:
            raise BadGeometry(f"ring {name} ends at byte {ring.end}, beyond the rings region of {self.rings_size}")
        if ring.slots < buffers:
            raise BadGeometry(f"ring {name}: {ring.slots} slots cannot hold {buffers} buffers")

    def _check_region(self, name: str, region: RegionGeometry) -> None:
        _check_size(f"{name} region", region.size)
        if not 1 <= region.buffers <= MOST_BUFFERS:
            raise BadGeometry(f"{name} region: {region.buffers} buffers is not between 1 and {MOST_BUFFERS}")
        if not STRIDE_ALIGNMENT <= region.stride <= MOST_STRIDE or region.stride % STRIDE_ALIGNMENT:
            raise BadGeometry(
                f"{name} region: stride {region.stride} is no multiple of {STRIDE_ALIGNMENT} up to {MOST_STRIDE}"
            )
        if region.buffers * region.stride > region.size:
            raise BadGeometry(
                f"{name} region: {region.buffers} buffers of {region.stride} bytes do not fit into {region.size}"
            )
        for what, offset in (("headroom", self.headroom), ("continuation_offset", self.continuation_offset)):
            if not 0 <= offset <= region.stride - LEAST_FRAME_ROOM:
                raise BadGeometry(f"{what} {offset} leaves no room for a frame in {name} buffers of {region.stride}")


def _check_size(what: str, size: int) -> None:
    if not PAGE_BYTES <= size <= MOST_REGION_BYTES or size % PAGE_BYTES:
        raise BadGeometry(f"{what}: size {size} is no multiple of {PAGE_BYTES} up to {MOST_REGION_BYTES}")


def plan_geometry(
    rx: RegionGeometry,
    tx: RegionGeometry,
    *,
    headroom: int = DEFAULT_HEADROOM,
    continuation_offset: int = DEFAULT_CONTINUATION_OFFSET,
    rx_limit: int | None = None,
    tx_largest: int = 0,
    tx_pieces: int = 1,
) -> Geometry:
    """Lays the rings out for these two regions: as many slots as buffers can be in each, rounded up to a power of two,
    so that putting an entry in cannot fail. `rx_limit`: three quarters of the RX buffers if not said, so that the
    device always has some. `tx_largest`: at least what one buffer holds, at most what `tx_pieces` do. Raises
    BadGeometry."""
    offset = 0
    rings = []
    for buffers in _ring_buffers(rx.buffers, tx.buffers):
        ring = RingGeometry(offset, _power_of_two_from(buffers))
        rings.append(ring)
        offset = _round_up(ring.end, RING_ALIGNMENT)
    room = tx.stride - headroom
    geometry = Geometry(
        rings_size=_round_up(offset, PAGE_BYTES),
        rx_active=rings[0],
        rx_free=rings[1],
        tx_active=rings[2],
        tx_done=rings[3],
        rx=rx,
        tx=tx,
        headroom=headroom,
        continuation_offset=continuation_offset,
        rx_limit=max(1, rx.buffers * 3 // 4) if rx_limit is None else rx_limit,
        tx_largest=min(max(tx_largest, room), room * tx_pieces),
        tx_pieces=tx_pieces,
    )
    geometry.check()
    return geometry


def _ring_buffers(rx: int, tx: int) -> tuple[int, int, int, int]:
    # A client may also send what it received from where it is.
    return rx, rx, tx + rx, tx


def _power_of_two_from(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
