"""What a frame may leave undone for somebody else to do: checksums, and cutting it into segments.

A client says in HELLO which of these it can take; WELCOME says which the session has. The bits are those of the virtio
features of the same names (virtio 1.3 §5.1.3), and the words for them are `VirtioNetHeader`'s (§5.1.6).
"""

from __future__ import annotations

import struct
from enum import IntFlag

from netbridge.ipc._record import NamedTuple

HEADER_BYTES = 12
_HEADER = struct.Struct("<BBHHHHH")

# A header's flags, and its gso_type.
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 4, 5, 0x80


class Offload(IntFlag):
    """On the transmit side CSUM and HOST_*, done by the device for the client. On the receive side GUEST_*: the client
    takes frames that were never cut, or whose checksum was never made."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56


NO_OFFLOADS = Offload(0)
TX_OFFLOADS = Offload.CSUM | Offload.HOST_TSO4 | Offload.HOST_TSO6 | Offload.HOST_ECN | Offload.HOST_USO
RX_OFFLOADS = (
    Offload.GUEST_CSUM
    | Offload.GUEST_TSO4
    | Offload.GUEST_TSO6
    | Offload.GUEST_ECN
    | Offload.GUEST_USO4
    | Offload.GUEST_USO6
)
ALL_OFFLOADS = TX_OFFLOADS | RX_OFFLOADS
# With one of these a frame can be as long as an IP packet.
TX_SEGMENTATION = Offload.HOST_TSO4 | Offload.HOST_TSO6 | Offload.HOST_USO
RX_SEGMENTATION = Offload.GUEST_TSO4 | Offload.GUEST_TSO6 | Offload.GUEST_USO4 | Offload.GUEST_USO6


class VirtioNetHeader(NamedTuple):
    """A frame's `struct virtio_net_hdr` (virtio 1.3 §5.1.6): offsets and lengths in bytes, from the frame's start."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0  # of all headers, in front of what is cut
    gso_size: int = 0  # payload of each segment
    csum_start: int = 0  # where the checksum begins to count
    csum_offset: int = 0  # from there to where it is put
    num_buffers: int = 0

    @property
    def leaves_work(self) -> bool:
        """Whether something of the frame is still to be done: a checksum to be made, or segments to be cut."""
        return bool(self.flags & NEEDS_CSUM) or self.gso_type != GSO_NONE

    def pack(self) -> bytes:
        """Raises ValueError for a number that does not fit its field."""
        try:
            return _HEADER.pack(*self)
        except struct.error as error:
            raise ValueError(f"{self}: {error}") from None

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> VirtioNetHeader:
        return cls(*_HEADER.unpack(data))
