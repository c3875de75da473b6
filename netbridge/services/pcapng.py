"""Capture files: pcapng (draft-ietf-opsawg-pcapng), as Wireshark and tshark read them.

The core writes the packet blocks (core/capture.c); here are the few around them: one section, an interface for each
session (its MAC address and speed may be others), and that interface's statistics when the session has ended.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time

from netbridge import metrics
from netbridge.client import Client
from netbridge.datapath._core import ffi
from netbridge.errors import NetbridgeError
from netbridge.services.arguments import MOST_SNAP_LENGTH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SECTION, _INTERFACE, _STATISTICS = 0x0A0D0D0A, 1, 5
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_UNKNOWN_LENGTH = -1
_LINKTYPE_ETHERNET = 1
_END = 0
_SECTION_APPLICATION = 4
_IF_NAME, _IF_DESCRIPTION, _IF_MAC, _IF_SPEED, _IF_TIMESTAMP_RESOLUTION = 2, 3, 6, 8, 9
_NANOSECONDS = 9  # a power of ten
_IS_START, _IS_END, _IS_RECEIVED, _IS_DROPPED, _IS_DELIVERED = 2, 3, 4, 5, 8


class CaptureFailed(NetbridgeError):
    """The capture file cannot be made, or takes no more."""


class Capture:
    """A capture file. Use it in a `with`, one session after another between `begin` and `end`.

    `counters`: the path of the driver's counters page, for what the driver received and dropped in a session; without
    one, or while it cannot be read, the statistics tell of captured frames only."""

    def __init__(self, fd: int, path: str, *, snap_length: int = MOST_SNAP_LENGTH, counters: str | None = None) -> None:
        """Takes `fd` over, a blocking one. Raises CaptureFailed, and closes it, when it cannot be written to."""
        self._path = path
        self._counters = counters
        self._snap_length = snap_length
        self._native = ffi.new("struct nb_capture *", {"fd": fd, "snap_length": snap_length})
        self._client: Client | None = None
        self._interfaces = 0
        self._before: dict[str, Any] | None = None
        self._captured_before = (0, 0)
        self._began = 0
        try:
            self._write(
                _SECTION,
                struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, _UNKNOWN_LENGTH),
                [(_SECTION_APPLICATION, b"netbridge")],
            )
        except CaptureFailed:
            os.close(fd)
            raise

    @classmethod
    def open(cls, path: str, **options: Any) -> Capture:
        """Makes the file, or overwrites it; "-" is standard output. Raises CaptureFailed."""
        if path == "-":
            sys.stdout.flush()
            return cls(os.dup(sys.stdout.fileno()), "standard output", **options)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CaptureFailed(f"cannot write the capture {path}: {error.strerror}") from None
        return cls(fd, path, **options)

    @property
    def received(self) -> int:
        """Frames captured that came from the driver, in all sessions."""
        return int(self._native.received)

    @property
    def sent(self) -> int:
        """Frames captured that went to the driver."""
        return int(self._native.sent)

    @property
    def state(self) -> str:
        """For people: how much was captured, or why no more is."""
        if self._native.error:
            return f"ended: {os.strerror(self._native.error)}"
        return f"{self.received} received, {self.sent} sent"

    @property
    def reader_left(self) -> bool:
        """Whether the file is a pipe that nobody reads any more."""
        return int(self._native.error) == errno.EPIPE

    def begin(self, client: Client) -> None:
        """Captures all frames of this session from here on, unless the file took no more in an earlier one. Raises
        CaptureFailed when it takes no more from now on."""
        if self._native.error:
            return
        self._before = self._read_counters()
        self._captured_before = (self.received, self.sent)
        self._began = time.time_ns()
        state = f"session {client.session}, MTU {client.mtu}, link {'up' if client.link_up else 'down'}"
        options = [
            (_IF_NAME, b"aethernet"),
            (_IF_DESCRIPTION, f"Net-Bridge, {state}".encode()),
            (_IF_MAC, client.mac),
            (_IF_TIMESTAMP_RESOLUTION, bytes([_NANOSECONDS])),
        ]
        if client.speed_mbps:
            options.append((_IF_SPEED, struct.pack("<Q", client.speed_mbps * 1_000_000)))
        self._write(_INTERFACE, struct.pack("<HHI", _LINKTYPE_ETHERNET, 0, self._snap_length), options)
        self._native.interface = self._interfaces
        self._interfaces += 1
        client.native.capture = self._native
        self._client = client

    def end(self) -> None:
        """Writes the statistics of the session that has ended, unless the file takes no more: `check` tells."""
        client, self._client = self._client, None
        if client is None:
            return
        client.native.capture = ffi.NULL
        if self._native.error:
            return
        now = time.time_ns()
        captured = self.received - self._captured_before[0]
        received, options = captured, []
        after = self._read_counters()
        if self._before is not None and after is not None:
            dropped = sum(after["drops"].values()) - sum(self._before["drops"].values())
            # Counters that went back are another driver's.
            if dropped >= 0:
                received = captured + dropped
                options.append((_IS_DROPPED, struct.pack("<Q", dropped)))
        options = [
            (_IS_START, _timestamp(self._began)),
            (_IS_END, _timestamp(now)),
            (_IS_RECEIVED, struct.pack("<Q", received)),
            *options,
            (_IS_DELIVERED, struct.pack("<Q", captured)),
        ]
        try:
            self._write(_STATISTICS, struct.pack("<I", self._interfaces - 1) + _timestamp(now), options)
        except CaptureFailed:
            pass  # it is in `error`

    def check(self) -> None:
        """Raises CaptureFailed when the file takes no more; a reader of a pipe that has left is no failure."""
        if self._native.error and not self.reader_left:
            raise CaptureFailed(f"cannot write the capture {self._path}: {os.strerror(self._native.error)}")

    def close(self) -> None:
        os.close(self._native.fd)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_counters(self) -> dict[str, Any] | None:
        if self._counters is None:
            return None
        try:
            return metrics.read(self._counters)
        except metrics.CountersUnreadable:
            return None

    def _write(self, kind: int, body: bytes, options: list[tuple[int, bytes]]) -> None:
        for code, value in options:
            body += struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)
        body += struct.pack("<HH", _END, 0)
        length = len(body) + 12
        block = struct.pack("<II", kind, length) + body + struct.pack("<I", length)
        try:
            while block:
                block = block[os.write(self._native.fd, block) :]
        except OSError as error:
            self._native.error = error.errno
            self.check()


def _timestamp(nanoseconds: int) -> bytes:
    return struct.pack("<II", nanoseconds >> 32, nanoseconds & 0xFFFFFFFF)
