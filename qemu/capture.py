"""Writes frames to a pcapng file with time and direction, fast enough to be always on.

Format: draft-ietf-opsawg-pcapng, one section, one Ethernet interface, times in nanoseconds. "Inbound" is what the
host received from the guest.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from pathlib import Path

SECTION, INTERFACE, STATISTICS, ENHANCED_PACKET = 0x0A0D0D0A, 1, 5, 6
OPT_END, OPT_IF_NAME, OPT_IF_TSRESOL, OPT_EPB_FLAGS = 0, 2, 9, 2
OPT_IF_RECEIVED, OPT_IF_DROPPED = 4, 5
NANOSECONDS = 9
ETHERNET = 1
INBOUND, OUTBOUND = 1, 2
PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


def _block(kind: int, body: bytes) -> bytes:
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + PADDING[len(value) % 4]


class Capture:
    """An open capture file. `write` may be called from any thread; frames are in the order of the calls."""

    _packet = struct.Struct("<IIIIIII")
    _tails = {  # noqa: RUF012 - never changed
        flags: _option(OPT_EPB_FLAGS, struct.pack("<I", flags)) + _option(OPT_END, b"") for flags in (INBOUND, OUTBOUND)
    }

    def __init__(self, path: Path, interface: str, kept: int = 0):
        """`kept` is how many bytes of a frame write() gets at the most; 0: all of it."""
        self.path = path
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=1 << 18)
        options = _option(OPT_IF_NAME, interface.encode()) + _option(OPT_IF_TSRESOL, bytes([NANOSECONDS]))
        self._file.write(_block(SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)))
        self._file.write(_block(INTERFACE, struct.pack("<HHI", ETHERNET, 0, kept) + options + _option(OPT_END, b"")))
        self._file.flush()

    def write(self, frame: bytes, time_ns: int, direction: int, whole: int = 0) -> None:
        """Append one frame, or the beginning of one of `whole` bytes; `time_ns` counts from the epoch. After close() it
        does nothing."""
        length = len(frame)
        whole = whole or length
        padding = PADDING[length % 4]
        tail = self._tails[direction]
        total = 32 + length + len(padding) + len(tail)
        head = self._packet.pack(ENHANCED_PACKET, total, 0, time_ns >> 32, time_ns & 0xFFFFFFFF, length, whole)
        block = b"".join((head, frame, padding, tail, total.to_bytes(4, "little")))
        with self._lock:
            if not self._file.closed:
                self._file.write(block)

    def count(self, seen: int, missing: int) -> None:
        """Append what there is to say of the interface: frames that it has had, and those of them that are not here."""
        now = time.time_ns()
        values = ((OPT_IF_RECEIVED, seen), (OPT_IF_DROPPED, missing))
        options = b"".join(_option(code, struct.pack("<Q", value)) for code, value in values) + _option(OPT_END, b"")
        with self._lock:
            if not self._file.closed:
                self._file.write(_block(STATISTICS, struct.pack("<III", 0, now >> 32, now & 0xFFFFFFFF) + options))

    def flush(self) -> None:
        """Bring all that was written so far to the file."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()


class Tally:
    """Counts the frames in a capture that is still being written, by their direction, from the file alone."""

    _head = struct.Struct("<II")

    def __init__(self, path: Path):
        self._path = path
        self._at = 0
        self._counts = {OUTBOUND: 0, INBOUND: 0}

    def look(self) -> tuple[int, int]:
        """Frames to the guest and from it, of those that are in the file whole. Raises ValueError when it is broken."""
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while self._at + self._head.size <= len(data):
                kind, size = self._head.unpack_from(data, self._at)
                end = self._at + size
                if end > len(data):
                    break  # the rest of it is on its way
                if size < 12 or int.from_bytes(data[end - 4 : end], "little") != size:
                    raise ValueError(f"{self._path}: the block at byte {self._at} is broken")
                if kind == ENHANCED_PACKET:
                    # The one option that is there is the last: its value, the end of options, the block's size.
                    self._counts[int.from_bytes(data[end - 12 : end - 8], "little")] += 1
                self._at = end
        return self._counts[OUTBOUND], self._counts[INBOUND]
