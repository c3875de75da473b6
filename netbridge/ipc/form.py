"""What every control message has: its header, and the ways to put one on and to check a field."""

from __future__ import annotations

import struct
from enum import IntEnum

from netbridge.ipc.errors import BadMessage

MAGIC = int.from_bytes(b"NBPT", "little")
VERSION = 1
HEADER = struct.Struct("<IHHII")


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    READY = 3
    LINK = 4
    BYE = 5
    FILTER = 6
    MAC = 7
    ANSWER = 8


def message(kind: Kind, body: bytes) -> bytes:
    """The whole message."""
    return HEADER.pack(MAGIC, kind, VERSION, HEADER.size + len(body), 0) + body


def must(holds: bool, otherwise: str) -> None:
    """Raises BadMessage with what is wrong unless it holds."""
    if not holds:
        raise BadMessage(otherwise)


def printable(padded: bytes) -> str:
    """Text of a stranger's, without its padding and what could not be printed."""
    text = padded.rstrip(b"\0").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def cut(text: str, room: int) -> bytes:
    """As much of a text as fits into so many bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:room].decode("utf-8", "ignore").encode()
