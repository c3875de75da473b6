"""Vhost-user messages as plain data: what the front-end says, and what it accepts as an answer.

A message is a header of three 32-bit words (request, flags, bytes of payload) and a payload, all in the machine's byte
order. Nothing here touches a socket. Names and numbers are those of the specification (QEMU's
docs/interop/vhost-user.rst).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

from netbridge.virtio.errors import Misbehaved
from vfio._record import NamedTuple

HEADER = struct.Struct("=III")
VERSION = 1
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
_VRING_ADDRESS = struct.Struct("=IIQQQQ")
_MEMORY_HEAD = struct.Struct("=II")
_MEMORY_REGION = struct.Struct("=QQQQ")
_CONFIG_HEAD = struct.Struct("=III")

MOST_REGIONS = 8  # regions one SET_MEM_TABLE can carry
MOST_VRINGS = 256  # the index of a vring has eight bits where a file descriptor belongs to it
LONGEST_CONFIG = 256  # bytes of device configuration
NO_FD = 1 << 8  # VHOST_USER_VRING_NOFD_MASK: poll, there is no file descriptor

PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES, among the virtio feature bits
LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL, likewise


class Request(IntEnum):
    """Requests this front-end makes."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    GET_CONFIG = 24
    RESET_DEVICE = 34
    SET_STATUS = 39
    GET_STATUS = 40


class Protocol(IntFlag):
    """Protocol features this front-end has a use for."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    STATUS = 1 << 16


# The bytes of payload each answer has. With REPLY_ACK every other request is answered by a u64, 0 for success.
ANSWERS: dict[Request, int] = {
    Request.GET_FEATURES: U64.size,
    Request.GET_PROTOCOL_FEATURES: U64.size,
    Request.GET_QUEUE_NUM: U64.size,
    Request.GET_VRING_BASE: VRING_STATE.size,
    Request.GET_STATUS: U64.size,
}


class Region(NamedTuple):
    """Memory the back-end is to map. Guest address and user address are the same number here: this front-end is its own
    guest."""

    address: int
    size: int  # bytes
    offset: int  # in the file, bytes
    fd: int


class Header(NamedTuple):
    request: int
    flags: int
    size: int  # bytes of payload

    def pack(self) -> bytes:
        return HEADER.pack(self.request, self.flags, self.size)


def parse_answer(data: bytes, request: Request, size: int) -> None:
    """Checks the header of the answer to `request`, which must bring exactly `size` bytes. Raises Misbehaved."""
    header = Header(*HEADER.unpack(data))
    if header.request != request:
        raise Misbehaved(f"it answered request {_name(header.request)}, which nobody made")
    if header.flags & VERSION_MASK != VERSION:
        raise Misbehaved(f"its answer is of version {header.flags & VERSION_MASK}, not {VERSION}")
    if not header.flags & REPLY:
        raise Misbehaved("its answer is not marked as a reply")
    if header.size != size:
        raise Misbehaved(f"its answer brings {header.size} bytes where there are {size}")


def _name(number: int) -> str:
    return Request(number).name if number in tuple(Request) else str(number)


def u64(value: int) -> bytes:
    return U64.pack(value)


def vring_state(index: int, value: int) -> bytes:
    return VRING_STATE.pack(index, value)


def vring_file(index: int, *, has_fd: bool = True) -> bytes:
    """The payload of SET_VRING_KICK, CALL and ERR."""
    return U64.pack(index | (0 if has_fd else NO_FD))


def vring_address(index: int, descriptors: int, used: int, available: int) -> bytes:
    """Addresses in the back-end's memory table. No logging."""
    return _VRING_ADDRESS.pack(index, 0, descriptors, used, available, 0)


def memory_table(regions: Sequence[Region]) -> bytes:
    """SET_MEM_TABLE; the regions' files travel along with it, in this order."""
    return _MEMORY_HEAD.pack(len(regions), 0) + b"".join(
        _MEMORY_REGION.pack(region.address, region.size, region.address, region.offset) for region in regions
    )


def config_request(offset: int, size: int) -> bytes:
    """GET_CONFIG for `size` bytes from `offset`. The answer has the same head, then the bytes."""
    return _CONFIG_HEAD.pack(offset, size, 0) + bytes(size)


def parse_config(answer: bytes, offset: int, size: int) -> bytes:
    """The bytes of a GET_CONFIG's answer. Raises Misbehaved."""
    told_offset, told_size, _ = _CONFIG_HEAD.unpack_from(answer)
    if (told_offset, told_size) != (offset, size):
        raise Misbehaved(f"it tells {told_size} bytes of configuration from {told_offset}, not {size} from {offset}")
    return answer[_CONFIG_HEAD.size :]


def parse_vring_base(answer: bytes, index: int) -> int:
    """Where the back-end stopped in ring `index`. Raises Misbehaved for another ring's."""
    told, base = VRING_STATE.unpack(answer)
    if told != index:
        raise Misbehaved(f"it tells of ring {told}, not {index}")
    return int(base)


def first_base(*, packed: bool) -> int:
    """Where a fresh ring begins. Of a packed ring: available index and wrap counter in the lower half, used index and
    wrap counter in the upper; both wrap counters begin as 1 (virtio 1.3 §2.8.1)."""
    return 0x8000_8000 if packed else 0
